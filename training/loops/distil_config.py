"""What a distillation is asked to do: one frozen dataclass, whose names are those of the TOML file and the flags."""

import math
from dataclasses import dataclass, field, replace

from ..adapters.methods import LORA_FAMILY, AdapterConfig
from ..data.prompts import Prompts
from ..distillation import CONVENTIONS, PG_SB
from .config import PRECISIONS
from .optimizers import OPTIMIZERS, SCHEDULES, check_optimizer


@dataclass(frozen=True)
class Rates:
    """What a learner of the two is told."""

    steps: int
    learning_rate: float
    optimizer: str
    weight_decay: float
    scheduler: str
    warm_up: int
    ema_decay: float
    text_encoder_learning_rate: float = 0.0


@dataclass(frozen=True)
class DistilConfig:
    """Options of a distillation. Where the defaults are not PG-SB's (arXiv 2412.02687, section 4 and supplement) on
    SD1.5 and SD2.1, it is said; what the papers leave open is SwiftBrush's code.

    Times are shares of the model's own: 0 = data, 1 = noise; 0.4 is 399 of 1000.

    ValueError, here and before any work, for a value that means nothing.
    """

    steps: int = 40_000  # of the student
    batch_size: int = 16  # samples at once
    accumulation: int = 1  # batches to an update, of either network
    full: bool = False  # all weights of the student learn, on a second copy of the network, and no adapter
    learning_rate: float = 1e-4  # of a student that is an adapter; the papers' 1e-6 is for all of its weights
    fake_learning_rate: float = 1e-3
    fake_updates: int = 1  # of the fake network to one of the student; 5 and 10 in DMD2
    optimizer: str = "adamw"  # a key of OPTIMIZERS, of both
    weight_decay: float = 0.0
    scheduler: str = "constant"  # a key of SCHEDULES, of both
    warm_up: int = 0  # steps of linear growth of both learning rates
    clip_norm: float = 1.0  # largest norm of either gradient, 0 = no limit
    ema_decay: float = 0.999  # of a moving average of the student, which is then what is saved; 0 = none
    convention: str = PG_SB  # one of CONVENTIONS
    guidance_low: float = 0.5  # of the teachers' scale, uniform from here …
    guidance_high: float = 4.0  # … to here; 3 on PixArt. The same number twice is a fixed scale
    guidance_by_sample: bool = False  # draw a scale for each sample, instead of one for each iteration
    time: float = 1.0  # at which the student is called; DMD2 found 0.4 for SDXL
    lowest_time: float = 0.02  # of the noise that the student's pictures are judged in …
    highest_time: float = 0.98  # … uniform in between
    # The first steps, in which the student learns what the teacher draws in many from the same noise, by regression;
    # 0 = none. Of this many pairs over and over, to the next whole step (10 000 in DMD2); 0 = of new ones each time.
    pretraining_steps: int = 0
    pretraining_pairs: int = 0
    pretraining_teacher_steps: int = 20
    pretraining_guidance: float | None = None  # of the teacher there; None = pair_guidance
    null_share: float = 0.1  # of the fake network's samples that have the empty prompt
    # NASA-T: what the teacher is guided away from, and the student inside its attention, by a scale that is uniform
    # from low to high. Lines as of prompts; () = none.
    negative_prompts: tuple[str, ...] = ()
    nasa_low: float = 0.0
    nasa_high: float = 1.0
    # Of pictures that are unlike their prompts, a loss whose weight falls on a line to 0; 0.1 in PG-SB. 0 = none.
    clip_weight: float = 0.0
    clip_threshold: float = 0.37  # cosine of features from which on a picture is like its prompt; 0.35 in SwiftBrush v2
    clip_samples: int = 0  # of each batch, how many are decoded for it; 0 = all
    precision: str = "float32"  # "bfloat16" = autocast. Weights that are trained, and what x0 is made of, are float32
    gradient_checkpointing: bool = False  # of the student: less memory, about a third more time
    seed: int = 0
    save_every: int = 500  # steps between checkpoints; 0 = at the end only
    report_every: int = 10  # steps; a report also comes once half a second has passed
    sample_every: int = 0  # steps between sample pictures; 0 = none
    sample_prompts: tuple[str, ...] = ()
    adapter: AdapterConfig = field(default_factory=lambda: AdapterConfig(rank=64, targets="all"))
    fake_rank: int = 64  # of the fake network's adapter, whose layers are the student's …
    fake_alpha: float = 128.0  # … and which is scaled by alpha / rank

    def __post_init__(self) -> None:
        for name in COUNTS:
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("save_every", "sample_every", "weight_decay", "clip_norm", "clip_weight"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "0 or more")
        for name in ("learning_rate", "fake_learning_rate"):
            self._require(name, 0 < getattr(self, name) < math.inf, "a positive number, for example 1e-4")
        for name, table in _CHOICES.items():
            self._require(name, getattr(self, name) in table, f"one of {', '.join(table)}")
        self._require("warm_up", 0 <= self.warm_up < self.steps, f"0 or more, and less than steps={self.steps}")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "at least 0 and less than 1, for example 0.999")
        self._require("null_share", 0 <= self.null_share <= 1, "a share from 0 to 1")
        self._require("time", 0 < self.time <= 1, "a share above 0, up to 1")
        fits = -math.inf < self.guidance_low <= self.guidance_high < math.inf
        self._require_range("guidance_low", "guidance_high", fits, "low <= high")
        fits = 0 <= self.nasa_low <= self.nasa_high < math.inf
        self._require_range("nasa_low", "nasa_high", fits, "0 <= low <= high")
        fits = 0 <= self.lowest_time < self.highest_time <= 1
        self._require_range("lowest_time", "highest_time", fits, "0 <= lowest < highest <= 1")
        if self.negative_prompts:
            Prompts(self.negative_prompts)
        self._require("clip_threshold", -1 < self.clip_threshold <= 1, "a cosine above -1, up to 1")
        fits = 0 <= self.clip_samples <= self.batch_size
        self._require("clip_samples", fits, f"0 for all, and no more than batch_size={self.batch_size}")
        first, pairs = self.pretraining_steps, self.pretraining_pairs
        self._require("pretraining_steps", 0 <= first <= self.steps, f"0 or more, up to steps={self.steps}")
        self._require("pretraining_pairs", pairs >= 0 and (first > 0 or not pairs), "0, or with pretraining_steps some")
        scale = self.pretraining_guidance
        fits = scale is None or (0 <= scale < math.inf and first > 0)
        self._require("pretraining_guidance", fits, "0 or more with pretraining_steps, or nothing")
        for rate in (self.learning_rate, self.fake_learning_rate):
            check_optimizer(self.optimizer, rate, self.scheduler, self.ema_decay)
        self._require("fake_rank", self.fake_rank >= 1, "at least 1")
        self._require("fake_alpha", 0 < self.fake_alpha < math.inf, "a positive number")

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"Got {name}={getattr(self, name)!r}: expected {expected}.")

    def _require_range(self, low: str, high: str, holds: bool, expected: str) -> None:
        if not holds:
            got = ", ".join(f"{name}={getattr(self, name)!r}" for name in (low, high))
            raise ValueError(f"Got {got}: expected finite numbers with {expected}.")

    @property
    def samples_a_step(self) -> int:
        return self.batch_size * self.accumulation

    @property
    def pair_guidance(self) -> float:
        """The teacher's scale in pairs: as given, or 1 for pg-sb and the middle of the range for dmd."""
        if self.pretraining_guidance is not None:
            return self.pretraining_guidance
        return 1.0 if self.convention == PG_SB else (self.guidance_low + self.guidance_high) / 2

    @property
    def depends_on_steps(self) -> bool:
        """Whether the first steps would be others, had the run more of them."""
        return self.scheduler != "constant" or self.clip_weight > 0

    @property
    def fake(self) -> AdapterConfig:
        """The fake network's adapter: of the LoRA family plain LoRA, otherwise of the student's method."""
        if self.adapter.method not in LORA_FAMILY:
            alpha = None if self.adapter.alpha is None else self.fake_alpha
            return replace(self.adapter, rank=self.fake_rank, alpha=alpha)
        return replace(self.adapter, method="lora", rank=self.fake_rank, alpha=self.fake_alpha)

    @property
    def student_rates(self) -> Rates:
        return self._rates(self.learning_rate, self.ema_decay)

    @property
    def fake_rates(self) -> Rates:
        return self._rates(self.fake_learning_rate, 0.0)

    def _rates(self, learning_rate: float, ema_decay: float) -> Rates:
        return Rates(
            steps=self.steps,
            learning_rate=learning_rate,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            scheduler=self.scheduler,
            warm_up=self.warm_up,
            ema_decay=ema_decay,
        )


COUNTS = ("steps", "batch_size", "accumulation", "fake_updates", "report_every", "pretraining_teacher_steps")
_CHOICES = {
    "optimizer": OPTIMIZERS,
    "scheduler": SCHEDULES,
    "precision": PRECISIONS,
    "convention": CONVENTIONS,
}

"""What a run is asked to do: one frozen dataclass, whose names are those of the TOML file and of the command line."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..adapters.methods import UNMERGEABLE, AdapterConfig
from ..adapters.targets import TEXT_TARGETS
from ..density_presets import DensityConfig, preset_density
from ..losses import CHOICES as LOSS_CHOICES
from ..losses import DCO
from ..weightings import WEIGHTINGS
from .optimizers import OPTIMIZERS, SCHEDULES, check_optimizer, check_rates
from .tables import from_table, to_table

PRECISIONS = ("float32", "bfloat16")
AUTOMATIC_PRECISION = "automatic"  # what a person may state, and :func:`precision_on` answers
# Devices with matrix products in bfloat16. A CPU has them seldom, and then for large products only.
WITH_BFLOAT16 = ("cuda", "xpu")
MEMORY = ("automatic", "as set")


class RunConfig(Protocol):
    """The options that every kind of run has: when it reports, draws and saves."""

    @property
    def steps(self) -> int: ...
    @property
    def samples_a_step(self) -> int: ...
    @property
    def depends_on_steps(self) -> bool: ...
    @property
    def save_every(self) -> int: ...
    @property
    def report_every(self) -> int: ...
    @property
    def sample_every(self) -> int: ...
    @property
    def sample_prompts(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run. The defaults are the recipe of Style-Friendly SNR Sampler (arXiv 2411.14793,
    section 4 and Fig. S3): Adam at 1e-4, 300 steps of 4 accumulated samples, rank 32 with alpha 32, an unweighted
    mean square of the model's own prediction. What the paper leaves open is marked.

    ValueError, here and before any work, for a value that means nothing.
    """

    steps: int = 300  # optimizer steps; diffusers, which the paper uses, counts these
    batch_size: int = 1  # samples at once
    accumulation: int = 4  # batches to an optimizer step; the noise levels are stratified over all of them
    learning_rate: float = 1e-4  # for Prodigy 1
    optimizer: str = "adam"  # a key of OPTIMIZERS
    weight_decay: float = 0.0  # not in the paper
    scheduler: str = "constant"  # a key of SCHEDULES; not in the paper
    warm_up: int = 0  # steps of linear growth of the learning rate; not in the paper
    clip_norm: float = 1.0  # largest norm of the gradient, 0 = no limit; not in the paper, diffusers' default
    ema_decay: float = 0.0  # of a moving average of the adapter, which is then what is saved; 0 = none
    loss: str = "mse"  # one of losses.CHOICES
    weighting: str = "none"  # a key of WEIGHTINGS
    offset_noise: float = 0.0  # standard deviation; 0.01 is in use for FLUX
    precision: str = "float32"  # of the adapter's arithmetic: "bfloat16" = autocast. Its weights are always float32
    gradient_checkpointing: bool = False  # recompute activations: less memory, about a third more time
    memory: str = "automatic"  # a member of MEMORY: whether a plan decides how much is recomputed and moved about
    seed: int = 0
    style_phrase: str = ""  # the words of "{content} in {style phrase} style"
    resolution: int | None = None  # side in pixels of a square of the same area; None = the model's own
    caption_dropout: float = 0.0  # share of samples trained without their caption
    save_every: int = 100  # steps between checkpoints; 0 = at the end only
    report_every: int = 10  # steps; a report also comes once half a second has passed
    sample_every: int = 0  # steps between sample pictures; 0 = none
    sample_prompts: tuple[str, ...] = ()
    # Of the adapter's part on CLIP text encoders, which captions then go through in every step; 0 = they are left as
    # they are. diffusers' DreamBooth scripts for LoRA take 5e-6 by default. Not in the paper.
    text_encoder_learning_rate: float = 0.0
    text_encoder_targets: str = "attention"  # a key of TEXT_TARGETS
    dco_beta: float | None = None  # of the loss "dco", for means over a sample's elements; None = losses.dco_beta
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    density: DensityConfig = field(default_factory=DensityConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "report_every"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("save_every", "sample_every", "weight_decay", "clip_norm", "offset_noise"):
            _require(self, name, 0 <= getattr(self, name) < math.inf, "0 or more")
        rate = self.text_encoder_learning_rate
        _require(self, "text_encoder_learning_rate", 0 <= rate < math.inf, "0 for none, or a rate such as 5e-6")
        if rate and self.adapter.method in UNMERGEABLE:
            raise ValueError(
                f"Got text_encoder_learning_rate={rate} for {self.adapter.method}, which adapts the model alone: "
                "expected 0, or another method."
            )
        for name, table in _CHOICES.items():
            _require(self, name, getattr(self, name) in table, f"one of {', '.join(table)}")
        states_beta = self.dco_beta is None or 0 < self.dco_beta < math.inf
        _require(self, "dco_beta", states_beta, "a positive number, for example 1000, or nothing for the published one")
        acts = self.dco_beta is None or self.loss == DCO
        _require(self, "dco_beta", acts, f"0 or nothing with the loss {self.loss}, where it has no effect: see {DCO}")
        _require(self, "learning_rate", 0 < self.learning_rate < math.inf, "a positive number, for example 1e-4")
        _require(self, "warm_up", 0 <= self.warm_up < self.steps, f"0 or more, and less than steps={self.steps}")
        _require(self, "ema_decay", 0 <= self.ema_decay < 1, "at least 0 and less than 1, for example 0.99")
        _require(self, "caption_dropout", 0 <= self.caption_dropout <= 1, "a share from 0 to 1")
        _require(self, "resolution", self.resolution is None or self.resolution >= 1, "pixels, for example 1024")
        check_optimizer(self.optimizer, self.learning_rate, self.scheduler, self.ema_decay)
        check_rates(self.optimizer, self.learning_rate, rate)
        preset_density(self.density)

    @property
    def samples_a_step(self) -> int:
        return self.batch_size * self.accumulation

    @property
    def depends_on_steps(self) -> bool:
        """Whether the first steps would be others, had the run more of them."""
        return self.scheduler != "constant"


def _require(config: TrainConfig, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"Got {name}={getattr(config, name)!r}: expected {expected}.")


def config_to_table(config: TrainConfig) -> dict[str, Any]:
    """The configuration as a nested table for TOML or JSON."""
    return to_table(config)


def config_from_table(table: Mapping[str, Any]) -> TrainConfig:
    """The configuration that a table states; what it leaves out has its default. ValueError names a bad entry."""
    return from_table(TrainConfig, table)


_CHOICES = {
    "optimizer": OPTIMIZERS,
    "scheduler": SCHEDULES,
    "loss": LOSS_CHOICES,
    "weighting": WEIGHTINGS,
    "precision": PRECISIONS,
    "memory": MEMORY,
    "text_encoder_targets": TEXT_TARGETS,
}


def precision_on(device: str) -> str:
    """The precision for a device, "cuda:0" or another of torch's, that its person leaves open."""
    return "bfloat16" if device.partition(":")[0] in WITH_BFLOAT16 else "float32"

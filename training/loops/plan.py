"""Whether a run fits, what is done so that it does, and what would have to change where nothing helps.

What changes no number is done without asking, cheapest first: blocks are recomputed, as few as need be; their inputs
wait in CPU memory; weights are streamed, where the host can. What changes the result is only advised.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from ..errors import TrainingError
from ..formats.state import write_atomically
from ..memory import GIB
from .config import TrainConfig
from .saving import Saving, as_configured
from .survey import EVERYTHING, Rehearsal, Survey

MARGIN = 1.1  # on everything but the model, whose size is known
STREAMED = 0.9  # of a model's weights that may stay in CPU memory
EIGHT_BIT = "adamw-8bit"
BYTES_8BIT = 2.0  # of the optimiser's state for each weight
SMALLEST_SIDE = 256  # pixels that are still advised


class DoesNotFit(TrainingError):
    """A run that no setting makes fit the device's memory; the message says what would."""


@dataclass(frozen=True)
class Budget:
    """What there is for a run."""

    model: int  # bytes of its weights, as they are loaded
    available: float | None  # bytes for all of the run, the model included; None = not known
    may_stream: bool = False  # weights may stay in CPU memory
    may_offload: bool = False  # activations may


@dataclass(frozen=True)
class Plan:
    """What a run will take at most, before it begins. Bytes."""

    model: int
    adapter: int  # its weights and gradients, the optimiser's states, the moving average
    activations: int  # everything else
    available: int | None
    saving: Saving
    blocks: int
    streamed: int = 0  # of the model's weights, which stay in CPU memory
    step_seconds: float | None = None
    steps: int = 0
    advice: str = ""  # what would make it fit, where it does not

    @property
    def needed(self) -> int:
        """Of the device's memory."""
        return self.model - self.streamed + self.adapter + self.activations

    @property
    def beyond_the_model(self) -> int:
        return self.adapter + self.activations

    @property
    def fits(self) -> bool:
        return self.available is None or self.model - self.streamed + MARGIN * self.beyond_the_model <= self.available

    def sentence(self) -> str:
        """For the person who waits."""
        of = "" if self.available is None else f" of {size(self.available)}"
        streamed = f" ({size(self.streamed)} of it streamed)" if self.streamed else ""
        parts = (
            f"model {size(self.model)}{streamed}, adapter and optimizer {size(self.adapter)}, "
            f"activations {size(self.activations)}"
        )
        text = f"plan: {size(self.needed)}{of} ({parts}); {self.saving.describe(self.blocks)}"
        if self.step_seconds is not None:
            text += f"; {spoken(self.step_seconds)} a step, {clock(self.step_seconds * self.steps)} in all"
        return text if self.fits else f"{text}. It does not fit: {self.advice}"

    def to_file(self, path: Path) -> None:
        """Writes the plan as JSON, whole or not at all."""
        values = asdict(self) | {"needed": self.needed, "fits": self.fits, "sentence": self.sentence()}
        values["saving"] = {"recomputed": sorted(self.saving.recomputed), "offload": self.saving.offload}
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        write_atomically(path, lambda temporary: _write(temporary, text))


def size(count: float) -> str:
    """ "3.4 GiB", or MiB where that is less than one."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def spoken(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"


def clock(seconds: float) -> str:
    """ "2:05" for 125 seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def choose(survey: Survey, config: TrainConfig, budget: Budget) -> Plan:
    """The plan of the least costly setting that fits; of the last one, with advice, where none does."""
    area = survey.largest[0] * survey.largest[1]
    plans = [
        _planned(survey, config, budget, config.batch_size, area, saving, streaming)
        for saving, streaming in _settings(survey, config, budget)
    ]
    for plan in plans:
        if plan.fits:
            return plan
    return replace(plans[-1], advice=_advice(survey, config, budget))


def rehearsed(plan: Plan, survey: Survey, config: TrainConfig, rehearsal: Rehearsal) -> Plan:
    """The plan with what a whole batch took, and the time of a step of pictures of all sizes."""
    area = survey.largest[0] * survey.largest[1]
    flops = [survey.flops(config.batch_size, each, rehearsal.saving) for each in survey.areas]
    share = sum(flops) / len(flops) / max(survey.flops(config.batch_size, area, rehearsal.saving), 1.0)
    seconds = config.accumulation * rehearsal.seconds * share + survey.adapter.seconds
    most = max(rehearsal.bytes, _afterwards(survey, config))
    return replace(plan, saving=rehearsal.saving, activations=most, step_seconds=seconds, steps=config.steps)


def corrected(survey: Survey, config: TrainConfig, rehearsal: Rehearsal) -> Survey:
    """The survey that would have foretold what the rehearsal took."""
    area = survey.largest[0] * survey.largest[1]
    foretold = survey.activations(config.batch_size, area, rehearsal.saving)
    return replace(survey, correction=survey.correction * rehearsal.bytes / max(foretold, 1.0))


def _settings(survey: Survey, config: TrainConfig, budget: Budget) -> Iterator[tuple[Saving, bool]]:
    """(saving, whether weights are streamed), the cheapest first."""
    if config.memory != "automatic":
        yield as_configured(config), budget.may_stream
        return
    yield Saving(), False
    may_recompute = config.gradient_checkpointing and survey.blocks > 0
    if may_recompute:
        area = survey.largest[0] * survey.largest[1]
        order = survey.order(config.batch_size, area)
        yield from ((Saving(frozenset(order[:count])), False) for count in range(1, len(order) + 1))
        if budget.may_offload:
            yield Saving(EVERYTHING.recomputed, offload=True), False
    if budget.may_stream:
        yield (
            Saving(EVERYTHING.recomputed if may_recompute else frozenset(), may_recompute and budget.may_offload),
            True,
        )


def _planned(
    survey: Survey, config: TrainConfig, budget: Budget, batch: int, area: float, saving: Saving, streaming: bool
) -> Plan:
    most = max(survey.activations(batch, area, saving), _afterwards(survey, config))
    plan = Plan(
        budget.model, survey.adapter.resident(config), round(most), _whole(budget.available), saving, survey.blocks
    )
    if not streaming or plan.fits or budget.available is None:
        return plan
    missing = budget.model + MARGIN * plan.beyond_the_model - budget.available
    return replace(plan, streamed=round(min(missing, STREAMED * budget.model)))


def _afterwards(survey: Survey, config: TrainConfig) -> int:
    """Bytes when a step ends, on top of what lasts: of the update itself, or of copies that go into a checkpoint."""
    cost = survey.adapter
    gradients = 0 if config.accumulation > 1 else cost.weights
    return gradients + max(cost.update, 2 * cost.weights)


def _advice(survey: Survey, config: TrainConfig, budget: Budget) -> str:
    """The changes that would make it fit, each alone; where none does alone, all of them."""
    area = survey.largest[0] * survey.largest[1]
    best = Saving(EVERYTHING.recomputed if survey.blocks else frozenset(), bool(survey.blocks and budget.may_offload))

    def fits(batch: int = config.batch_size, share: float = 1.0, spared: float = 0.0) -> bool:
        plan = _planned(survey, config, budget, batch, area * share, best, budget.may_stream)
        return replace(plan, adapter=plan.adapter - round(spared)).fits

    helpful: dict[str, str] = {}
    for change in _changes(survey, config):
        if change.kind not in helpful and fits(change.batch or config.batch_size, change.share, change.spared):
            helpful[change.kind] = change.text
    if helpful:
        return "one of these would help: " + "; ".join(helpful.values())
    for change in _changes(survey, config):
        if change.kind == "resolution" and fits(1, change.share):
            return f"batch_size 1 together with {change.text} would"
    return "nothing that can be set here is enough: take a smaller or more strongly quantised model, or a lower rank"


@dataclass(frozen=True)
class _Change:
    """Of options: what a user would do, and what it does to the sums."""

    kind: str
    text: str
    batch: int | None = None
    share: float = 1.0  # of the pictures' area
    spared: float = 0.0  # bytes


def _changes(survey: Survey, config: TrainConfig) -> Iterator[_Change]:
    """What could be changed, the least first within each kind."""
    if not config.gradient_checkpointing and survey.blocks:
        yield _Change("checkpointing", "gradient_checkpointing on")
    elif config.memory != "automatic":
        yield _Change("memory", "memory on automatic")
    spared = survey.adapter.states - BYTES_8BIT / 4 * survey.adapter.weights
    if config.optimizer != EIGHT_BIT and spared > 0 and find_spec("bitsandbytes") is not None:
        yield _Change("optimizer", f"the optimizer {EIGHT_BIT}", spared=spared)
    for batch in range(config.batch_size - 1, 0, -1):
        if config.samples_a_step % batch == 0:
            more = config.samples_a_step // batch
            yield _Change("batch", f"batch_size {batch} with accumulation {more}, which trains the same", batch)
    if config.resolution is not None:
        for side in range(config.resolution - 64, SMALLEST_SIDE - 1, -64):
            yield _Change("resolution", f"a resolution of {side}", share=(side / config.resolution) ** 2)


def _whole(count: float | None) -> int | None:
    return None if count is None else round(count)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

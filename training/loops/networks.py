"""The networks of score distillation: one frozen network in three roles.

Student and fake are adapters on it, and the teacher is the network itself, or wears an adapter too: a style. Then the
other two begin as the teacher, with the style as theirs, so that a student is one file for the plain network. A student
may be all of the network's weights instead; then there are two networks, and teacher and fake are on a frozen copy.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..adapters.attach import Adapter, attached, attached_together, switched_to
from ..adapters.methods import AdapterConfig
from ..adapters.whole import Whole, merge_into, trained_whole
from ..attention_guidance import AttentionGuidance
from ..denoiser import Conditioning, Denoiser, TimedDenoiser
from ..formats.adapters import LoadedAdapter
from ..formats.starting import Start, WholeStart, start_of
from .distil_config import DistilConfig

logger = logging.getLogger(__name__)

STUDENT, FAKE, TEACHER = "student", "fake", "teacher"

# The denoiser with negative prompts, a row for each of the batch, inside its attention.
Against = Callable[[AttentionGuidance, Conditioning], Denoiser]


@dataclass(frozen=True)
class Worn:
    """An adapter that the teacher wears, with the names of the network's layers."""

    name: str  # of its file
    loaded: LoadedAdapter

    @property
    def config(self) -> AdapterConfig:
        """Of exactly its layers."""
        layers = tuple(rf"\A{re.escape(name)}" for name in self.loaded.names)
        return replace(self.loaded.config, targets=layers)

    @property
    def digest(self) -> str:
        """Tells one from another."""
        return Start(self.name, self.loaded.state, self.loaded.names, "").digest

    def start(self, config: AdapterConfig) -> Start:
        """The same as an adapter of this configuration begins with it. ValueError where that has no such form."""
        return start_of(self.loaded, config, self.name)


@dataclass(frozen=True)
class Networks:
    denoiser: Denoiser  # of the student
    judge: Denoiser  # of teacher and fake: the same one, or where all weights of the student learn, a frozen copy
    student: Adapter | Whole
    fake: Adapter
    teacher: Adapter | None = None  # None = the network without any
    precision: str = "float32"
    against: Against | None = None  # None = as diffusers' models are reached
    device: str = "cpu"  # type of the one that computes

    @contextmanager
    def acting_as(self, role: Adapter | Whole | None) -> Iterator[Denoiser]:
        """The network as the student, the fake or the teacher, of whose roles this is the adapter."""
        bfloat16 = torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16")
        every = [each for each in (self.student, self.fake, self.teacher) if isinstance(each, Adapter)]
        with switched_to(role if isinstance(role, Adapter) else None, every), bfloat16:
            yield self.denoiser if role is self.student else self.judge


@contextmanager
def in_three_roles(
    denoiser: TimedDenoiser,
    config: DistilConfig,
    *,
    worn: Worn | None,
    start: Start | WholeStart | None,  # of the student; None = it begins as the teacher
    against: Against | None,
    device: torch.device,
    frozen: nn.Module | None = None,  # a copy of the network, where all weights are trained and it is made already
) -> Iterator[Networks]:
    """The network with its adapters, which come off without a trace. Elsewhere than in a role it is the student.

    ValueError for a worn adapter that student and fake cannot begin with.
    """
    judge, whole, family = denoiser, None, denoiser.family
    configs = {STUDENT: config.adapter, FAKE: config.fake}
    starts: dict[str, Start | None] = {STUDENT: None if isinstance(start, WholeStart) else start}
    if worn is not None:
        starts = {role: starts.get(role) or worn.start(each) for role, each in configs.items()}
        configs[TEACHER] = worn.config
    with ExitStack() as stack:
        if config.full:
            whole, copied = stack.enter_context(trained_whole(denoiser.module, frozen))
            judge = copy.copy(denoiser)
            judge.module = copied
            _begin_whole(denoiser.module, whole, worn, start, config, family)
            del configs[STUDENT]
            starts.pop(STUDENT)
        adapters = stack.enter_context(
            attached_together(judge.module, configs, family=family, seed=config.seed, device=device)
        )
        if worn is not None:
            adapters[TEACHER].load_state_dict(worn.loaded.state)
        for role, given in starts.items():
            if given is not None:
                adapters[role].load_state_dict(given.joined(adapters[role].state_dict()))
                logger.info("the %s %s", role, given.said)
        yield Networks(
            denoiser=denoiser,
            judge=judge,
            student=whole or adapters[STUDENT],
            fake=adapters[FAKE],
            teacher=adapters.get(TEACHER),
            precision=config.precision,
            against=against,
            device=device.type,
        )


def _begin_whole(
    module: nn.Module,
    whole: Whole,
    worn: Worn | None,
    start: Start | WholeStart | None,
    config: DistilConfig,
    family: str,
) -> None:
    """Gives a student of its own weights what it begins with."""
    if isinstance(start, WholeStart):
        try:
            whole.load_state_dict({name: start.state[name] for name in whole.tensors if name in start.state})
        except ValueError as error:
            raise ValueError(f"{start.name} is no model of this one's architecture: {error}") from error
        logger.info("the student begins with the weights of %s", start.name)
    elif start is not None:
        with attached(module, config.adapter, family=family, seed=config.seed) as fresh:
            state = start.joined(fresh.state_dict())
        merge_into(module, state, config.adapter, family, start.name)
    elif worn is not None:
        merge_into(module, worn.loaded.state, worn.config, family, worn.name)

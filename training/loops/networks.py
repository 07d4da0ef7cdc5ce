"""The networks of score distillation: one frozen network in three roles.

Student and fake are adapters on it, and the teacher is the network itself, or wears an adapter too: a style. Then the
other two begin as the teacher, with the style as theirs, so that a student is one file for the plain network.
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ..adapters.attach import Adapter, attached_together, switched_to
from ..adapters.methods import AdapterConfig
from ..attention_guidance import AttentionGuidance
from ..denoiser import Conditioning, Denoiser
from ..formats.adapters import LoadedAdapter
from ..formats.starting import Start, start_of
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
    def digest(self) -> str:
        """Tells one from another."""
        return Start(self.name, self.loaded.state, self.loaded.names, "").digest

    def start(self, config: AdapterConfig) -> Start:
        """The same as an adapter of this configuration begins with it. ValueError where that has no such form."""
        return start_of(self.loaded, config, self.name)


@dataclass(frozen=True)
class Networks:
    denoiser: Denoiser
    student: Adapter
    fake: Adapter
    teacher: Adapter | None = None  # None = the network without any
    precision: str = "float32"
    against: Against | None = None  # None = as diffusers' models are reached
    device: str = "cpu"  # type of the one that computes

    @contextmanager
    def acting_as(self, adapter: Adapter | None) -> Iterator[Denoiser]:
        """Inside, the network is the student, the fake or the teacher."""
        bfloat16 = torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bfloat16")
        every = [each for each in (self.student, self.fake, self.teacher) if each is not None]
        with switched_to(adapter, every), bfloat16:
            yield self.denoiser


@contextmanager
def in_three_roles(
    denoiser: Denoiser,
    config: DistilConfig,
    *,
    worn: Worn | None,
    start: Start | None,  # of the student; None = it begins as the teacher
    against: Against | None,
    device: torch.device,
) -> Iterator[Networks]:
    """The network with its adapters, which come off without a trace. Elsewhere than in a role it is the student.

    ValueError for a worn adapter that student and fake cannot begin with.
    """
    configs, starts = {STUDENT: config.adapter, FAKE: config.fake}, {STUDENT: start}
    if worn is not None:
        starts = {role: starts.get(role) or worn.start(each) for role, each in configs.items()}
        layers = tuple(rf"\A{re.escape(name)}" for name in worn.loaded.names)
        configs[TEACHER] = replace(worn.loaded.config, targets=layers)
    with attached_together(
        denoiser.module, configs, family=denoiser.family, seed=config.seed, device=device
    ) as adapters:
        if worn is not None:
            adapters[TEACHER].load_state_dict(worn.loaded.state)
        for role, given in starts.items():
            if given is not None:
                adapters[role].load_state_dict(given.joined(adapters[role].state_dict()))
                logger.info("the %s %s", role, given.said)
        student, fake, teacher = adapters[STUDENT], adapters[FAKE], adapters.get(TEACHER)
        yield Networks(denoiser, student, fake, teacher, config.precision, against, device.type)

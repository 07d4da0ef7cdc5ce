"""An adapter, or what else learns, and everything that moves it: what has to survive an interruption."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..formats.keys import TEXT_ENCODER
from ..sharding import is_part, part_like, take_over, whole
from .optimizers import OPTIMIZERS, SWITCHED, WARMS_UP_ITSELF, Group, build_schedule


class Learning(Protocol):
    """What a learner is told, by the names of :class:`.config.TrainConfig`."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def text_encoder_learning_rate(self) -> float: ...
    @property
    def optimizer(self) -> str: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def scheduler(self) -> str: ...
    @property
    def warm_up(self) -> int: ...
    @property
    def ema_decay(self) -> float: ...


class Trained(Protocol):
    """What learns: an adapter, or all weights of a network."""

    routing: Any

    @property
    def tensors(self) -> Mapping[str, nn.Parameter]: ...
    def parameters(self) -> list[nn.Parameter]: ...
    def parameters_under(self, prefix: str) -> list[nn.Parameter]: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class Average:
    """Exponential moving average of the parameters; with a decay of 0 it is none.

    Short at first, min(decay, (1 + n) / (10 + n)) after n updates, so that the initial weights are soon forgotten.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.tensors = [parameter.detach().clone() for parameter in parameters] if decay else []
        self._parameters = parameters

    def update(self) -> None:
        if self.tensors:
            self.updates += 1
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            get_ema_multi_avg_fn(decay)(self.tensors, [p.detach() for p in self._parameters], self.updates)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "tensors": self.tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = state["updates"]
        for tensor, saved in zip(self.tensors, state["tensors"], strict=True):
            take_over(tensor, saved)


def _groups(adapter: Trained, text_rate: float) -> list[Group]:
    """The network's parameters at the learning rate of the run, and a text encoder's at their own."""
    text = adapter.parameters_under(TEXT_ENCODER)
    known = set(map(id, text))
    rest = [parameter for parameter in adapter.parameters() if id(parameter) not in known]
    return [{"params": rest}, {"params": text, "lr": text_rate}] if text else [{"params": rest}]


class Learner:
    """What learns, its optimiser and schedule, the average of its weights, and how far it has come.

    ``beside``: learners that are saved and continued with it, by name.
    """

    def __init__(
        self, adapter: Trained, config: Learning, beside: Mapping[str, "Learner"] = MappingProxyType({})
    ) -> None:
        self.adapter, self.beside = adapter, beside
        self.parameters: list[nn.Parameter] = list(adapter.parameters())
        self.optimizer: Any = OPTIMIZERS[config.optimizer](
            _groups(adapter, config.text_encoder_learning_rate),
            config.learning_rate,
            config.weight_decay,
            config.warm_up,
        )
        warm_up = 0 if config.optimizer in WARMS_UP_ITSELF else config.warm_up
        self.schedule = build_schedule(config.scheduler, self.optimizer, config.steps, warm_up)
        self.average = Average(self.parameters, config.ema_decay)
        self._switched = config.optimizer in SWITCHED
        self.step = 0  # optimizer steps done
        self.losses: list[float] = []  # mean loss of each
        self.whole = True  # False while an update is under way: what is in memory then belongs to no step
        self._seconds, self._since = 0.0, time.monotonic()

    @property
    def all_parameters(self) -> list[nn.Parameter]:
        """With those of the learners beside it."""
        return [*self.parameters, *(each for learner in self.beside.values() for each in learner.all_parameters)]

    @property
    def seconds(self) -> float:
        """Of training, over all sessions of the run."""
        return self._seconds + time.monotonic() - self._since

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Around everything that changes the state, so that a torn one is never saved. Counts the step."""
        self.whole = False
        yield
        if self.adapter.routing is not None:
            self.adapter.routing.complete()
        self.step += 1
        self.whole = True

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Inside, the adapter has the weights that are its result, and no gradients: averaged ones, where there are.

        The weights in training come back as copies: an optimiser's own way back would lose bits.
        """
        if not (self._switched or self.average.tensors):
            with torch.no_grad():
                yield
            return
        before = [parameter.detach().clone() for parameter in self.parameters]
        try:
            with torch.no_grad():
                if self._switched:
                    self.optimizer.eval()
                for parameter, averaged in zip(self.parameters, self.average.tensors, strict=False):
                    parameter.copy_(averaged)
                yield
        finally:
            with torch.no_grad():
                if self._switched:
                    self.optimizer.train()
                for parameter, value in zip(self.parameters, before, strict=True):
                    parameter.copy_(value)

    @property
    def in_parts(self) -> bool:
        """Whether other processes have the rest of what learns."""
        return any(map(is_part, self.parameters))

    def result(self, *, kept: bool = True) -> dict[str, Tensor]:
        """The adapter as it is saved and used, on the CPU. In parts, all processes ask, and those get it that keep it.

        A whole model beside the one in parts is at most in main memory.
        """
        found = {}
        with self.evaluated() if self._switched else nullcontext():  # which takes memory for a copy
            results = self.average.tensors or self.parameters
            for name, tensor in zip(self.adapter.tensors, results, strict=True):
                value = whole(tensor.detach())
                if kept:
                    found[name] = value.to("cpu", copy=True)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Of tensors that go on being trained: to be written, or copied."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "losses": torch.tensor(self.losses, dtype=torch.float32),
            "adapter": {name: tensor.detach() for name, tensor in self.adapter.tensors.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average.state_dict(),
            "routing": None if self.adapter.routing is None else self.adapter.routing.state_dict(),
            **({"beside": {name: each.state_dict() for name, each in self.beside.items()}} if self.beside else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where ``state`` was taken."""
        self.adapter.load_state_dict(state["adapter"])
        self.optimizer.load_state_dict(_in_parts_alike(state["optimizer"], self.parameters))
        self.schedule.load_state_dict(state["schedule"])
        self.average.load_state_dict(state["average"])
        if self.adapter.routing is not None:
            self.adapter.routing.load_state_dict(state["routing"])
        self.step, self.losses = state["step"], state["losses"].tolist()
        self._seconds, self._since = state["seconds"], time.monotonic()
        for name, learner in self.beside.items():
            learner.load_state_dict(state["beside"][name])


def _in_parts_alike(state: Mapping[str, Any], parameters: list[nn.Parameter]) -> Mapping[str, Any]:
    """An optimizer's state, of whose whole tensors this process takes its part where the parameters are in parts."""

    def placed(value: Any, like: nn.Parameter) -> Any:
        if not is_part(like) or is_part(value) or getattr(value, "shape", None) != like.shape:
            return value
        part = part_like(like, value.shape, value.dtype)
        take_over(part, value)
        return part

    found = {
        number: {name: placed(value, parameters[number]) for name, value in each.items()}
        for number, each in state["state"].items()
    }
    return {**state, "state": found}

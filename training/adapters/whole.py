"""All weights of a network as what is trained, with the handles that a learner has on an adapter."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..sharding import is_part, put_together, take_over
from .attach import Adapter, attached
from .methods import UNMERGEABLE, AdapterConfig
from .stand_in import StandIn

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer


class Whole:
    """A network's parameters by their names. Inside :func:`trained_whole`."""

    routing = None  # as of an adapter without routers

    def __init__(self, module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
        """``dtypes``: of the parameters before they were float32."""
        self._module, self._dtypes = module, dtypes
        self._tensors = dict(module.named_parameters())

    @property
    def tensors(self) -> Mapping[str, nn.Parameter]:
        """By their names, in the order of :meth:`parameters`."""
        return self._tensors

    def parameters(self) -> list[nn.Parameter]:
        return list(self._tensors.values())

    def parameters_under(self, prefix: str) -> list[nn.Parameter]:
        """Those whose names begin so."""
        return [tensor for name, tensor in self._tensors.items() if name.startswith(prefix)]

    def as_stored(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All of ``tensors``, whole, as the network's file has them: in its types, with what is no parameter.

        A weight that the network has by several names is there under each.
        """
        names = {id(tensor): name for name, tensor in self._tensors.items()}
        own = {key: (tensor, names.get(id(tensor))) for key, tensor in self._module.state_dict(keep_vars=True).items()}
        return {
            key: tensor.detach() if name is None else state[name].to(self._dtypes[name])
            for key, (tensor, name) in own.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over values for all of ``tensors``. ValueError, and nothing changed, if a name or a shape differs."""
        shapes = {name: tensor.shape for name, tensor in state.items()}
        if differing := {n for n, t in self._tensors.items() if shapes.pop(n, None) != t.shape} | shapes.keys():
            raise ValueError(f"these weights are missing, of another shape, or not known here: {sorted(differing)[:3]}")
        for name, tensor in self._tensors.items():
            take_over(tensor, state[name])


@contextmanager
def trained_whole(module: nn.Module, frozen: nn.Module | None = None) -> Iterator[tuple[Whole, nn.Module]]:
    """Inside, ``module`` is trained in float32; given with a frozen copy of what it was, and is again afterwards.

    ``frozen``: that copy, where it was made before, as of a module in parts (:class:`..sharding.Twofold`). Such a
    module has float32 already, and keeps it.
    """
    frozen = copy.deepcopy(module).requires_grad_(False) if frozen is None else frozen
    flags = [parameter.requires_grad for parameter in module.parameters()]
    dtypes = {name: parameter.dtype for name, parameter in frozen.named_parameters()}
    try:
        for parameter in module.parameters():
            if not is_part(parameter):
                # A copy of what is float32 already, for the frozen one has the numbers to go back to.
                parameter.data = parameter.data.to(torch.float32, copy=True)
            parameter.requires_grad_(True)
        with warnings.catch_warnings():
            # Of torch, that it has no fused norm where autocast meets weights of float32.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
            yield Whole(module, dtypes), frozen
    finally:
        for parameter, before, flag in zip(module.parameters(), frozen.parameters(), flags, strict=True):
            parameter.grad = None
            parameter.requires_grad_(flag)
            if is_part(parameter):
                take_over(parameter, before)
            else:
                parameter.data = before.data


def merge_into(module: nn.Module, state: Mapping[str, Tensor], config: AdapterConfig, family: str, name: str) -> None:
    """Adds an adapter's change to the weights of ``module``. ValueError for one that is no change of weights."""
    if config.method in UNMERGEABLE:
        raise ValueError(f"{name} is {config.method}, which is no change of weights that a student could begin with")
    flags = [parameter.requires_grad for parameter in module.parameters()]
    with attached(module, config, family=family, seed=0) as adapter:
        _load(adapter, state, name)
        for layer in map(adapter.layer, adapter.names):
            _merge(layer)
    for parameter, flag in zip(module.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)


def _merge(layer: "BaseTunerLayer") -> None:
    """A weight in parts is put together for it, and no stand-in is in its place."""
    shown = layer.get_base_layer()
    layer.base_layer = shown.layer if isinstance(shown, StandIn) else shown
    with put_together(layer.base_layer):
        layer.merge()
    layer.base_layer = shown


def _load(adapter: Adapter, state: Mapping[str, Tensor], name: str) -> None:
    try:
        adapter.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{name} does not fit this network: {error}") from error

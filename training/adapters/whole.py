"""All weights of a network as what is trained, with the handles that a learner has on an adapter."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .attach import Adapter, attached
from .methods import UNMERGEABLE, AdapterConfig


class Whole:
    """A network's parameters by their names. Inside :func:`trained_whole`."""

    routing = None  # as of an adapter without routers

    def __init__(self, module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
        """``dtypes``: of the parameters before they were float32."""
        self._module, self._dtypes = module, dtypes
        self._tensors = dict(module.named_parameters())

    def parameters(self) -> list[nn.Parameter]:
        return list(self._tensors.values())

    def parameters_under(self, prefix: str) -> list[nn.Parameter]:
        """Those whose names begin so."""
        return [tensor for name, tensor in self._tensors.items() if name.startswith(prefix)]

    def as_stored(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What :meth:`state_dict` gave as the network's own file has it: in its types, with what is no parameter."""
        own = self._module.state_dict()
        return {name: state[name].to(self._dtypes[name]) if name in state else tensor for name, tensor in own.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Copies."""
        return {name: tensor.detach().clone() for name, tensor in self._tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what :meth:`state_dict` gave. ValueError, and nothing changed, if a name or a shape differs."""
        shapes = {name: tensor.shape for name, tensor in state.items()}
        if differing := {n for n, t in self._tensors.items() if shapes.pop(n, None) != t.shape} | shapes.keys():
            raise ValueError(f"these weights are missing, of another shape, or not known here: {sorted(differing)[:3]}")
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name])


@contextmanager
def trained_whole(module: nn.Module) -> Iterator[tuple[Whole, nn.Module]]:
    """Inside, ``module`` is trained in float32; given with a frozen copy of what it was, and is again afterwards."""
    frozen = copy.deepcopy(module).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in module.parameters()]
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    try:
        for parameter in module.parameters():
            # A copy of what is float32 already, for the frozen one has the numbers to go back to.
            parameter.data = parameter.data.to(torch.float32, copy=True)
            parameter.requires_grad_(True)
        yield Whole(module, dtypes), frozen
    finally:
        for parameter, before, flag in zip(module.parameters(), frozen.parameters(), flags, strict=True):
            parameter.grad, parameter.data = None, before.data
            parameter.requires_grad_(flag)


def merge_into(module: nn.Module, state: Mapping[str, Tensor], config: AdapterConfig, family: str, name: str) -> None:
    """Adds an adapter's change to the weights of ``module``. ValueError for one that is no change of weights."""
    if config.method in UNMERGEABLE:
        raise ValueError(f"{name} is {config.method}, which is no change of weights that a student could begin with")
    flags = [parameter.requires_grad for parameter in module.parameters()]
    with attached(module, config, family=family, seed=0) as adapter:
        _load(adapter, state, name)
        for layer in map(adapter.layer, adapter.names):
            layer.merge()
    for parameter, flag in zip(module.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)


def _load(adapter: Adapter, state: Mapping[str, Tensor], name: str) -> None:
    try:
        adapter.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{name} does not fit this network: {error}") from error

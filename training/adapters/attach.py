"""An adapter on frozen module trees, for the time of a ``with`` block."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..frozen import frozen_products, is_readable
from ..randomness import generator
from .deltas import recomputed_deltas
from .global_draws import cuda_devices, global_draws
from .initial import initialise, measure_magnitudes
from .keys_values import Rows, keep_to_rows, stacked_rows
from .low_rank import ADAPTER, low_rank_products
from .methods import READS_WEIGHTS, STYLE_INJECT, AdapterConfig, check_kin, check_layers, peft_config
from .routing import RoutingMeter
from .stand_in import stand_ins
from .targets import resolve_targets, target_patterns
from .text_tokens import told_of_text

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer


@dataclass(frozen=True)
class Part:
    """One of the module trees under an adapter: a model's network, or a text encoder beside it."""

    module: nn.Module
    family: str  # of the target presets
    targets: str | tuple[str, ...]  # a preset, or patterns
    prefix: str = ""  # of its layers' names: "" for the network, "text_encoder.text_model." for SD1.5's CLIP
    device: torch.device | None = None  # where it computes; None = where its weights are

    def layers(self, config: AdapterConfig) -> list[str]:
        """Those that get the adapter, without the prefix. ValueError where it cannot be put on them."""
        return layers_to_adapt(self.module, replace(config, targets=self.targets), family=self.family)


def parts_named(trees: Mapping[str, nn.Module], names: Iterable[str], family: str) -> list[Part]:
    """Parts with exactly these layers, of trees by their prefix: "" for the network's."""
    inside: dict[str, list[str]] = {}
    for name in names:
        prefix = max((prefix for prefix in trees if name.startswith(prefix)), key=len)
        inside.setdefault(prefix, []).append(rf"\A{re.escape(name.removeprefix(prefix))}")
    return [Part(trees[prefix], family, tuple(patterns), prefix) for prefix, patterns in inside.items()]


class Adapter:
    """A handle on what :func:`attached` put into a model. Only these parameters require a gradient."""

    def __init__(
        self,
        config: AdapterConfig,
        layers: dict[str, "BaseTunerLayer"],
        tensors: dict[str, nn.Parameter],
        key: str = ADAPTER,  # under which peft keeps it
    ) -> None:
        self.config, self.key = config, key
        self.names = list(layers)  # of the adapted layers, in the model's order
        self._by_name = layers
        self._layers = list(layers.values())
        self._tensors = tensors
        self.routing = _watched(config, layers)  # of styleinject; None of the others

    @property
    def tensors(self) -> Mapping[str, nn.Parameter]:
        """By peft's names, in the order of :meth:`parameters`."""
        return self._tensors

    def parameters(self) -> list[nn.Parameter]:
        return list(self._tensors.values())

    def layer(self, name: str) -> "BaseTunerLayer":
        """peft's layer of this name, around the frozen one."""
        return self._by_name[name]

    def parameters_under(self, prefix: str) -> list[nn.Parameter]:
        """Those of the layers whose names begin so."""
        return [tensor for name, tensor in self._tensors.items() if name.startswith(prefix)]

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the adapter's tensors under peft's names, ``<layer>.lora_A.weight``."""
        return {name: tensor.detach().clone() for name, tensor in self._tensors.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what :meth:`state_dict` gave. ValueError, and nothing changed, if a name or a shape differs."""
        if differing := sorted(self._tensors.keys() ^ state.keys()):
            raise ValueError(f"these adapter tensors are missing or not known here: {', '.join(differing)}")
        for name, tensor in self._tensors.items():
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"the adapter tensor {name} has shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
                )
        for name, tensor in self._tensors.items():
            tensor.copy_(state[name])

    @contextmanager
    def enabled(self, active: bool) -> Iterator[None]:
        """``with adapter.enabled(False)`` the model answers as its base does."""
        before = [not layer.disable_adapters for layer in self._layers]
        try:
            for layer in self._layers:
                layer.enable_adapters(active)
            yield
        finally:
            for layer, was in zip(self._layers, before, strict=True):
                layer.enable_adapters(was)

    @contextmanager
    def dropout(self, source: torch.Generator) -> Iterator[None]:
        """Inside, dropout is on and drawn from ``source``; everywhere else it is off. Nothing happens at share 0.

        torch's dropout draws from the global generators, so they are seeded inside and put back after. A backward
        pass that recomputes belongs inside, too.
        """
        if not self.config.dropout:
            yield
            return
        with ExitStack() as stack:
            stack.enter_context(global_draws(self.parameters(), source))
            for layer in self._layers:
                stack.callback(layer.train, layer.training)
                layer.train()
                layer.get_base_layer().eval()
            yield


def _watched(config: AdapterConfig, layers: Mapping[str, Any]) -> RoutingMeter | None:
    """Counts how the layers' routers divide what passes, where they have routers."""
    if config.method != STYLE_INJECT:
        return None
    meter = RoutingMeter(list(layers), config.branches)
    for number, layer in enumerate(layers.values()):
        layer.watch = partial(meter.add, number)
    return meter


@contextmanager
def attached(
    module: nn.Module,
    config: AdapterConfig,
    *,
    family: str,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,  # where the layers compute; None = where their weights are
    prefix: str = "",  # of all names
) -> Iterator[Adapter]:
    """Puts an adapter on ``module``, and takes it off without a trace.

    Inside, the module gives the same output as before, bit for bit, until the adapter's parameters change (but for
    oft in bfloat16: it hands a layer a contiguous copy of a strided input, which torch may round differently). They
    are of type ``dtype`` whatever the model's, drawn from ``seed`` and each layer's name alone. ``family`` picks the
    target presets. ValueError, before anything is touched, for targets that match nothing, a rank larger than a
    layer, or a model that carries a peft adapter already.
    """
    configs = {ADAPTER: config}
    with attached_together(
        module, configs, family=family, seed=seed, dtype=dtype, device=device, prefix=prefix
    ) as adapters:
        yield adapters[ADAPTER]


@contextmanager
def attached_together(
    module: nn.Module,
    configs: Mapping[str, AdapterConfig],
    *,
    family: str,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    prefix: str = "",
) -> Iterator[dict[str, Adapter]]:
    """Several adapters by name on one ``module``, as :func:`attached` puts one on; the first of them is active.

    :func:`switched_to` makes another the active one. Of two that are drawn alike, the factors begin alike.
    """
    check_kin(configs)
    names = {key: layers_to_adapt(module, config, family=family) for key, config in configs.items()}
    plain = {name: module.get_submodule(name) for each in names.values() for name in each}
    for key, config in configs.items():
        _refuse_unreadable(module, config, names[key])
    told = any(config.method == STYLE_INJECT for config in configs.values())
    with frozen_products(module), _restored(module, list(plain)):
        adapters = {}
        for key, config in configs.items():
            stacked = stacked_rows(config.targets, {name: plain[name] for name in names[key]})
            layers = _inject(module, config, names[key], stacked, family, key)
            tensors = {prefix + name: tensor for name, tensor in _tensors(module, layers, key).items()}
            for name, tensor in tensors.items():
                initialise(name, tensor, config, generator(seed, "adapter", name), dtype, device)
            for layer in layers.values():
                measure_magnitudes(layer)
            for name, rows in stacked.items():
                keep_to_rows(tensors, prefix + name, rows, config.rank)
            adapters[key] = Adapter(config, {prefix + name: each for name, each in layers.items()}, tensors, key)
        wrapped = [module.get_submodule(name) for name in plain]
        first = switched_to(next(iter(adapters.values())), adapters.values())
        telling = told_of_text(module) if told else nullcontext()
        with low_rank_products(wrapped), recomputed_deltas(wrapped), telling, first:
            yield adapters


@contextmanager
def switched_to(chosen: Adapter | None, every: Iterable[Adapter]) -> Iterator[None]:
    """Inside, the model answers with ``chosen`` (None = as its base), and only its parameters require a gradient.

    ``every``: all that :func:`attached_together` put on the model. Afterwards it is as it was.
    """
    mine = set(map(id, chosen._layers)) if chosen else set()
    layers = {id(layer): layer for adapter in every for layer in adapter._layers}
    before = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in layers.values()]
    try:
        for layer in layers.values():
            if chosen and id(layer) in mine:
                layer.set_adapter([chosen.key])
            layer.enable_adapters(id(layer) in mine)
        yield
    finally:
        for layer, active, disabled in before:
            layer.set_adapter(active)
            layer.enable_adapters(not disabled)


@contextmanager
def attached_to_parts(parts: Sequence[Part], config: AdapterConfig, *, seed: int) -> Iterator[Adapter]:
    """:func:`attached` to several trees at once: one adapter, whose method, rank and scale are those of all."""
    with ExitStack() as stack:
        adapters = [
            stack.enter_context(
                attached(
                    part.module,
                    replace(config, targets=part.targets),
                    family=part.family,
                    seed=seed,
                    device=part.device,
                    prefix=part.prefix,
                )
            )
            for part in parts
        ]
        yield _joined(config, adapters)


def _joined(config: AdapterConfig, adapters: Sequence[Adapter]) -> Adapter:
    layers, tensors = {}, {}
    for adapter in adapters:
        layers |= adapter._by_name
        tensors |= adapter._tensors
    return Adapter(config, layers, tensors)


def layers_to_adapt(module: nn.Module, config: AdapterConfig, *, family: str) -> list[str]:
    """The layers that :func:`attached` would put the adapter on. ValueError where it would raise one."""
    _refuse_adapted(module)
    names = resolve_targets(module, target_patterns(family, config.targets))
    check_layers(config, {name: module.get_submodule(name) for name in names})
    return names


def _refuse_adapted(module: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, part in module.named_modules():
        if isinstance(part, BaseTunerLayer):
            raise ValueError(
                f"the model carries an adapter already, for example on the layer {name}: "
                "remove it, or merge it into the weights, before training"
            )


def _refuse_unreadable(module: nn.Module, config: AdapterConfig, names: list[str]) -> None:
    if config.method not in READS_WEIGHTS:
        return
    for name in names:
        layer = module.get_submodule(name)
        if not is_readable(layer):
            kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
            raise ValueError(
                f"{config.method} needs the numbers of the weights, and those of the layer {name}, a {kind}, cannot be "
                "read: choose lora, or load the model in another format"
            )


@contextmanager
def _restored(module: nn.Module, names: list[str]) -> Iterator[None]:
    """Puts back the layers of these names, and every flag that peft sets on a model."""
    layers = {name: module.get_submodule(name) for name in names}
    gradients = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    modes = [(part, part.training) for part in module.modules()]
    adapters = vars(module).pop("peft_config", None)
    try:
        yield
    finally:
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer)
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)
        for part, mode in modes:
            part.training = mode
        vars(module).pop("peft_config", None)
        if adapters is not None:
            module.peft_config = adapters


def _inject(
    module: nn.Module, config: AdapterConfig, names: list[str], stacked: Mapping[str, Rows], family: str, key: str
) -> dict[str, "BaseTunerLayer"]:
    """Lets peft wrap the layers. What it draws for them is thrown away, and the global generators put back."""
    from peft import inject_adapter_in_model

    shown = stand_ins(module, names)
    with torch.random.fork_rng(cuda_devices(module.parameters())), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # of one that we put beside it
        inject_adapter_in_model(peft_config(config, names, stacked, family), module, key)
    layers: dict[str, Any] = {name: module.get_submodule(name) for name in names}
    for layer in layers.values():
        layer.set_adapter([key])
        layer.eval()
    for one in shown:  # only now: peft looks at weights several times when it wraps
        one.shows_weights = config.method == "dora"
    return layers


def _tensors(module: nn.Module, layers: dict[str, "BaseTunerLayer"], key: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters under the names that peft gives them in files."""
    from peft import get_peft_model_state_dict

    inside = {
        f"{name}.{inner}": parameter
        for name, layer in layers.items()
        for inner, parameter in layer.named_parameters()
        if parameter.requires_grad
    }
    return get_peft_model_state_dict(module, state_dict=inside, adapter_name=key, save_embedding_layers=False)

"""The adapter methods: what a user says of one, and the peft configuration it means."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

from ..style_inject import FORMS
from . import keys_values
from .keys_values import Rows, stacked_rows

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained.

    ``rank``: inner dimension; for OFT the side of a rotated block, which divides a layer's inputs.
    ``alpha``: the adapter's output is scaled by alpha/rank (alpha/sqrt(rank) for rslora). None = rank. OFT has none.
    ``targets``: a preset of :mod:`.targets`, or patterns.
    ``dropout``: of the adapter's input (the LoRA family) or of whole layers (lokr, loha), in [0, 1). OFT has none.
    ``init``: "gaussian" (standard deviation 1/rank) or "uniform" (He) for the first factor of the LoRA family and of
    styleinject.
    ``branches``: down-projections of styleinject, each of the rank. ``injection``: how they act, one of its forms.
    ``shared_bottleneck``: the bottlenecks of layers with equally many outputs have their projections in common.
    """

    method: str = "lora"
    rank: int = 32
    alpha: float | None = None
    targets: str | tuple[str, ...] = "style"
    dropout: float = 0.0
    init: str = "gaussian"
    branches: int = 4
    injection: str = FORMS[0]
    shared_bottleneck: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown adapter method {self.method!r}: expected one of {', '.join(METHODS)}")
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}: expected at least 1")
        if self.method == "oft" and self.alpha is not None:
            raise ValueError("alpha has no effect on oft, which rotates and does not scale: leave it out")
        if self.method == "oft" and self.dropout:
            raise ValueError("dropout has no effect on oft: leave it out")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}: expected more than 0, or None for the rank")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: expected a share in [0, 1)")
        if self.init not in INITS:
            raise ValueError(f"unknown init {self.init!r}: expected one of {', '.join(INITS)}")
        if self.branches < 1:
            raise ValueError(f"branches is {self.branches}: expected at least 1, for example 4")
        if self.injection not in FORMS:
            raise ValueError(f"unknown injection {self.injection!r}: expected one of {', '.join(FORMS)}")
        usual = {each.name: each.default for each in fields(self)}
        refuse_idle(self.method, [name for name in OF_METHOD if getattr(self, name) != usual[name]])

    @property
    def options(self) -> dict[str, Any]:
        """What the method has besides rank and alpha, for the adapter's file."""
        if self.method == STYLE_INJECT:
            return {"branches": self.branches, "injection": self.injection}
        return {"shared_bottleneck": True} if self.shared_bottleneck else {}

    @property
    def scale_alpha(self) -> float:
        """Alpha with its default filled in."""
        return self.rank if self.alpha is None else self.alpha


STYLE_INJECT = "styleinject"
BOTTLENECK = "bottleneck"
UNMERGEABLE = (
    STYLE_INJECT,
    BOTTLENECK,
)  # acts by the input, and is no change of weights: a file that only our loader can load
# Options that only one method has.
OF_METHOD = {"branches": STYLE_INJECT, "injection": STYLE_INJECT, "shared_bottleneck": BOTTLENECK}
READS_WEIGHTS = ("dora", "oft")  # needs the numbers of the frozen weights: to train, or to write files
INITS = ("gaussian", "uniform")
LORA_FAMILY = ("lora", "rslora", "dora")  # to peft one kind of layer, which may have several of them


def refuse_idle(method: str, stated: Iterable[str]) -> None:
    """ValueError where an option that somebody stated belongs to another method, and would change nothing."""
    for name in stated:
        if OF_METHOD.get(name, method) != method:
            raise ValueError(
                f"{name} has no effect on {method}: leave it at its default, or choose the method {OF_METHOD[name]}"
            )


def check_kin(configs: Mapping[str, AdapterConfig]) -> None:
    """ValueError for adapters, by name, of methods that a layer cannot have together."""
    kinds = {"lora" if config.method in LORA_FAMILY else config.method for config in configs.values()}
    if len(kinds) > 1:
        methods = ", ".join(f"{config.method} for {name}" for name, config in configs.items())
        raise ValueError(f"Got {methods}: expected one method for all, or several of {', '.join(LORA_FAMILY)}.")


def check_layers(config: AdapterConfig, layers: Mapping[str, nn.Module]) -> None:
    """ValueError naming the first layer that is too small for the rank, or that the method cannot be on."""
    stacked = stacked_rows(config.targets, layers)
    if stacked and config.method not in keys_values.METHODS:
        raise ValueError(
            f"{config.targets} adapts keys and values alone, which the layer {next(iter(stacked))} has in one with "
            f"others, and {config.method} cannot be on some of a layer's rows: choose "
            f"{' or '.join(keys_values.METHODS)}, or other targets"
        )
    for name, layer in layers.items():
        outputs, inputs = _sizes(layer)
        outputs = min(map(len, stacked[name])) if name in stacked else outputs
        if config.rank > min(outputs, inputs):
            raise ValueError(
                f"rank {config.rank} is larger than the smaller side of the layer {name}, "
                f"which has {inputs} inputs and {outputs} outputs: choose at most {min(outputs, inputs)}"
            )
        if config.method == "oft" and inputs % config.rank:
            raise ValueError(
                f"oft rotates blocks of {config.rank} inputs, and the layer {name} has {inputs}: "
                "choose a rank that divides it"
            )
        if config.method == STYLE_INJECT and getattr(layer, "groups", 1) != 1:
            raise ValueError(
                f"styleinject adapts no convolution in groups, and the layer {name} is one: choose targets without it"
            )


def _sizes(layer: Any) -> tuple[int, int]:
    """Outputs and inputs of a layer, those of a convolution with its kernel. Weights do not tell: some are packed."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.out_channels, layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    return layer.out_features, layer.in_features


def peft_config(
    config: AdapterConfig,
    names: list[str],
    stacked: Mapping[str, Rows] = MappingProxyType({}),
    family: str = "other",  # of the model
) -> "PeftConfig":
    """The peft configuration that puts an adapter on exactly these layers, and two in one on those ``stacked``."""
    # A string is matched whole; peft matches the entries of a list against the ends of names.
    found = METHODS[config.method](config, "|".join(map(re.escape, names)))
    if config.method == STYLE_INJECT:
        found.family = family  # tells what is known of prompts
    if stacked and config.method == BOTTLENECK:
        found.parts = {name: [[part.start, part.stop] for part in rows] for name, rows in stacked.items()}
    elif stacked:
        # At twice the rank, the scale stays that of one: alpha/rank, for rslora alpha/sqrt(rank).
        factor = 2**0.5 if config.method == "rslora" else 2
        found.rank_pattern = {rf"\A{re.escape(name)}": 2 * config.rank for name in stacked}
        found.alpha_pattern = {rf"\A{re.escape(name)}": factor * config.scale_alpha for name in stacked}
    return found


def _lora(config: AdapterConfig, targets: str, use_rslora: bool = False, use_dora: bool = False) -> "PeftConfig":
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=config.scale_alpha,
        target_modules=targets,
        lora_dropout=config.dropout,
        init_lora_weights="gaussian" if config.init == "gaussian" else True,
        use_rslora=use_rslora,
        use_dora=use_dora,
    )


def _rslora(config: AdapterConfig, targets: str) -> "PeftConfig":
    return _lora(config, targets, use_rslora=True)


def _dora(config: AdapterConfig, targets: str) -> "PeftConfig":
    return _lora(config, targets, use_dora=True)


def _lokr(config: AdapterConfig, targets: str) -> "PeftConfig":
    from peft import LoKrConfig

    return LoKrConfig(r=config.rank, alpha=config.scale_alpha, target_modules=targets, module_dropout=config.dropout)


def _loha(config: AdapterConfig, targets: str) -> "PeftConfig":
    from peft import LoHaConfig

    return LoHaConfig(r=config.rank, alpha=config.scale_alpha, target_modules=targets, module_dropout=config.dropout)


def _oft(config: AdapterConfig, targets: str) -> "PeftConfig":
    from peft import OFTConfig

    # peft 0.21 takes a module_dropout here and never applies it.
    return OFTConfig(r=0, oft_block_size=config.rank, target_modules=targets)


def _style_inject(config: AdapterConfig, targets: str) -> "PeftConfig":
    from .style_inject_peft import StyleInjectConfig

    return StyleInjectConfig(
        r=config.rank,
        alpha=config.scale_alpha,
        branches=config.branches,
        injection=config.injection,
        dropout=config.dropout,
        target_modules=targets,
    )


def _bottleneck(config: AdapterConfig, targets: str) -> "PeftConfig":
    from .bottleneck_peft import BottleneckConfig

    return BottleneckConfig(
        r=config.rank,
        alpha=config.scale_alpha,
        shared=config.shared_bottleneck,
        dropout=config.dropout,
        target_modules=targets,
    )


METHODS: dict[str, Callable[[AdapterConfig, str], "PeftConfig"]] = {
    "lora": _lora,
    "rslora": _rslora,  # arXiv 2312.03732
    "dora": _dora,  # arXiv 2402.09353
    "lokr": _lokr,
    "loha": _loha,  # arXiv 2108.06098
    "oft": _oft,  # arXiv 2306.07280
    STYLE_INJECT: _style_inject,  # arXiv 2401.13942
    BOTTLENECK: _bottleneck,  # FineStyle, NeurIPS 2024
}

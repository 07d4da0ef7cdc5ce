"""An adapter's file, opened: the layers it adapts, whoever wrote it, and what in it is not understood."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..adapters.methods import UNMERGEABLE
from .keys import detect_family
from .layers import Layer
from .metadata import FULL, AdapterMetadata, read_metadata, stated_family, states_family
from .rotations import from_glora
from .sharing import OWN, SHARED, unshared
from .spelling import ALPHA, read_alpha, read_key
from .state import opened

# Tensors that make a method complete. Tucker cores, magnitudes and LoKr's two ways for each factor come on top.
_NEEDED: tuple[tuple[str, tuple[frozenset[str], ...], frozenset[str]], ...] = (
    ("lora", (frozenset({"A", "B"}),), frozenset({"magnitude"})),
    ("loha", (frozenset(f"hada_w{i}_{side}" for i in "12" for side in "ab"),), frozenset({"hada_t1", "hada_t2"})),
    (
        "lokr",
        tuple(
            frozenset(first + second)
            for first in (["lokr_w1"], ["lokr_w1_a", "lokr_w1_b"])
            for second in (["lokr_w2"], ["lokr_w2_a", "lokr_w2_b"])
        ),
        frozenset({"lokr_t2"}),
    ),
    ("oft", (frozenset({"oft_R"}),), frozenset()),
    ("glora", (frozenset({"a1", "a2", "b1", "b2"}),), frozenset()),
    ("bottleneck", (frozenset({"bottleneck_down", "bottleneck_up"}),), frozenset()),
    ("styleinject", (frozenset(f"styleinject_{part}" for part in "ABRr"),), frozenset()),
)

EXPECTED = "an adapter (LoRA, LoKr, LoHa, OFT, StyleInject or bottleneck)"
# As headers of safetensors files spell them.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32}


@dataclass(frozen=True)
class AdapterFile:
    """What a file holds. Names of layers have dots and no prefix, in whichever layout the file has them."""

    path: Path
    header: Mapping[str, str]
    about: AdapterMetadata | None  # None = another tool's file
    layers: Mapping[str, Layer]
    unknown: tuple[str, ...]  # keys that belong to no layer we understand
    tensors: Mapping[str, Tensor]

    @property
    def states_family(self) -> bool:
        """Whether the file says its family, so that names of layers, which families share, need not be asked."""
        return self.about is not None or states_family(self.header)

    @property
    def family(self) -> str | None:
        """As its metadata say, or else as its names tell; None for one that we do not know."""
        if self.about:
            return self.about.family
        return stated_family(self.header) if states_family(self.header) else detect_family(self.layers)

    @property
    def unmergeable(self) -> bool:
        """Whether it acts by the input of its layers, and is no change of weights."""
        return any(layer.method in UNMERGEABLE for layer in self.layers.values())


def read_adapter(path: Path) -> AdapterFile:
    """Opens an adapter's file of any style. ValueError names one that is truncated, foreign or of a newer version."""
    path = Path(path)
    with opened(path, EXPECTED) as file:
        header = dict(file.metadata() or {})
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    return _contents(path, header, tensors)


def read_outline(path: Path) -> AdapterFile:
    """The same from a file's header: its tensors have shapes and types, and no values but those of the alphas."""
    path = Path(path)
    with opened(path, EXPECTED) as file:
        header, tensors = dict(file.metadata() or {}), outlines(file)
        tensors |= {key: file.get_tensor(key) for key, each in tensors.items() if not each.dim() or _is_alpha(key)}
    return _contents(path, header, tensors)


def outlines(file: safe_open) -> dict[str, Tensor]:
    """The tensors of an open file by their shapes and types, without values."""
    found = {}
    for key in file.keys():  # noqa: SIM118 - no mapping
        entry = file.get_slice(key)
        dtype = _DTYPES.get(entry.get_dtype(), torch.uint8)
        found[key] = torch.empty(entry.get_shape(), dtype=dtype, device="meta")
    return found


def _is_alpha(key: str) -> bool:
    return key.endswith(f".{ALPHA}")


def _contents(path: Path, header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> AdapterFile:
    about = read_metadata(header, str(path))
    if about is not None and about.method == FULL:
        raise ValueError(
            f"{path} has all weights of a {about.family} network, as `stylewright distill --full` writes them, and is "
            "no adapter: ComfyUI's Load Diffusion Model and `stylewright generate --adapter` read it, and `distill "
            "--full --init-model` begins with it"
        )
    layers, unknown = read_layers(tensors, about)
    if not layers:
        shown = ", ".join(list(tensors)[:3]) or "none"
        raise ValueError(f"{path} is not {EXPECTED} that we know: its tensors are {shown}, …")
    return AdapterFile(path, header, about, layers, tuple(unknown), tensors)


def read_about(path: Path) -> AdapterMetadata | None:
    """What an adapter's file says of itself, of which only the header is read; None for another tool's."""
    with opened(path, EXPECTED) as file:
        return read_metadata(file.metadata() or {}, str(path))


def read_layers(
    tensors: Mapping[str, Tensor], about: AdapterMetadata | None = None
) -> tuple[dict[str, Layer], list[str]]:
    """The layers that these keys describe, and the keys that describe none."""
    found: dict[str, dict[str, str]] = {}  # layer -> our name of a tensor -> key
    unknown = []
    for key in tensors:
        match read_key(key):
            case None:
                unknown.append(key)
            case layer, name if name in found.get(layer, {}):
                unknown.append(key)
            case layer, name:
                found.setdefault(layer, {})[name] = key
    shared = {name: keys for name, keys in found.items() if keys.keys() & (OWN | SHARED)}
    layers = unshared({n: {each: tensors[key] for each, key in keys.items()} for n, keys in shared.items()})
    for name, keys in found.items():
        if name in layers:
            continue
        layer = _layer({each: tensors[key] for each, key in keys.items()}, about)
        if layer is None:
            unknown += keys.values()
        else:
            layers[name] = layer
    return layers, unknown


def _layer(tensors: dict[str, Tensor], about: AdapterMetadata | None) -> Layer | None:
    """A layer of these tensors; None where some are missing or too many."""
    alpha = tensors.pop(ALPHA, None)
    if "dora_scale" in tensors and "B" in tensors and tensors["dora_scale"].shape[0] == tensors["B"].shape[0]:
        tensors["magnitude"] = tensors.pop("dora_scale")  # else it scales inputs: LyCORIS can, peft's DoRA cannot
    fitting = [
        method
        for method, needed, optional in _NEEDED
        if any(each <= tensors.keys() <= each | optional for each in needed)
    ]
    if not fitting:
        return None
    method = fitting[0]
    if method == "glora":
        return from_glora(Layer(method, tensors), about.rank) if about and about.method == "oft" else None
    if "magnitude" in tensors:
        tensors["magnitude"] = tensors["magnitude"].flatten()
    return Layer(method, tensors, read_alpha(method, tensors, alpha))

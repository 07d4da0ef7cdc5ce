"""What an adapter's file says of itself: our own keys, and those that other tools read."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..adapters.methods import UNMERGEABLE
from ..clocks import LOG_SNR, SIGMA, TIME
from .keys import UNET_LAYERS

FORMAT_VERSION = 1
PREFIX = "stylewright."
VERSION_KEY = f"{PREFIX}format_version"
VERSIONS_KEY = f"{PREFIX}versions"
FULL = "full"  # in the place of an adapter's method, where a file has all weights of a network
MERGEABLE_KEY = f"{PREFIX}mergeable"  # "false" for what depends on the input of a layer; else not written
# Levels of a one-step student by their unit: above the first, up to the second. EDM's time is log(sigma) / 4.
LEVELS = {SIGMA: (0, 1), TIME: (-1000, 1000), LOG_SNR: (-100, 100)}
NEEDS_OUR_LOADER = "it cannot be merged into weights: ComfyUI loads it with Stylewright's Load Style LoRA alone"
# Written with the tensors: the style, the layout that was trained, the layers' names in it, which norm DoRA's scales
# are relative to ("merged" = of the adapted weight, as in the paper, "base" = of the model's, as ComfyUI computes).
STYLE_KEY, LAYOUT_KEY, LAYERS_KEY, NORM_KEY = (f"{PREFIX}{name}" for name in ("style", "layout", "layers", "dora_norm"))


@dataclass(frozen=True)
class AdapterMetadata:
    """How an adapter came to be. Only the first three are needed to use it."""

    family: str  # "flux", "sd3", "sdxl", "sd15", "pixart", or what the denoiser says
    method: str  # a key of the adapter methods, or FULL
    rank: int  # for OFT the side of a rotated block
    alpha: float | None = None  # None = rank
    targets: tuple[str, ...] = ()  # a preset's name, or patterns
    base_model: str = ""  # its name
    style_phrase: str = ""
    trigger: str = ""  # words that call the style up; "" = the style phrase
    process: str = ""
    prediction: str = ""
    density: Mapping[str, Any] = field(default_factory=dict)  # what a density says of itself
    seed: int | None = None
    steps: int | None = None  # optimizer steps done
    images: int | None = None
    resolution: int | None = None  # side in pixels
    learning_rate: float | None = None
    optimizer: str = ""
    title: str = ""  # "" = from the style phrase
    date: str = ""  # ISO 8601. "" = none, so that the same run gives the same file
    training: Mapping[str, Any] = field(default_factory=dict)  # the whole configuration
    unet_layers: int = UNET_LAYERS  # residual layers a level of a UNet
    started_from: str = ""  # the name of the adapter that training began with; "" = none
    options: Mapping[str, Any] = field(default_factory=dict)  # of the method, besides rank and alpha
    routing: Mapping[str, Any] = field(default_factory=dict)  # of styleinject: what its routers did at the end
    # Of a one-step student: ``level`` of its call in ``unit`` ("time" of the teacher's 1000, "sigma" of a flow, or
    # "log_snr"; clocks.py), its ``prediction``, and ``start``, what it is fed ("unit": noise of unit variance).
    one_step: Mapping[str, Any] = field(default_factory=dict)

    @property
    def call(self) -> str:
        """How a one-step student is called, in words; "" for what is none."""
        return f"at {self.one_step['unit']} {float(self.one_step['level']):g}" if self.one_step else ""

    @property
    def scale(self) -> float:
        """What the adapter's output is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        if self.method == "oft":
            return 1.0
        return alpha / self.rank**0.5 if self.method == "rslora" else alpha / self.rank


def build_metadata(about: AdapterMetadata) -> dict[str, str]:
    """The header of an adapter's file, without what depends on its tensors."""
    if about.rank < 1 or about.unet_layers < 1:
        raise ValueError(f"rank is {about.rank} and unet_layers {about.unet_layers}: expected at least 1")
    stated = {name: getattr(about, name) for name in _FIELDS}
    own = {f"{PREFIX}{name}": _write(value) for name, value in stated.items() if value not in (None, "", (), {})}
    if about.method in UNMERGEABLE:
        own[MERGEABLE_KEY] = "false"
    own |= {VERSION_KEY: str(FORMAT_VERSION), VERSIONS_KEY: json.dumps(_versions())}
    return {**own, **_modelspec(about), **_kohya(about)}


def read_metadata(header: Mapping[str, str], where: str) -> AdapterMetadata | None:
    """What :func:`build_metadata` wrote; None for a file of another tool.

    ``where`` names the file. ValueError for a format version that is newer than ours, or what cannot be read.
    """
    found = header.get(VERSION_KEY)
    if found is None:
        return None
    if not found.isdecimal() or not 1 <= int(found) <= FORMAT_VERSION:
        raise ValueError(
            f"{where} has the adapter format version {found}, and this Stylewright reads up to {FORMAT_VERSION}: "
            "update it to use the file"
        )
    try:
        stated = {name: _read(name, header[f"{PREFIX}{name}"]) for name in _FIELDS if f"{PREFIX}{name}" in header}
        about = AdapterMetadata(**stated)
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where} has damaged metadata under {PREFIX}…: {error}") from error
    if about.one_step:
        _check_call(about.one_step, where)
    return about


def _check_call(one_step: Mapping[str, Any], where: str) -> None:
    """ValueError where the call of a one-step student is at no level of noise."""
    try:
        level, unit = float(one_step["level"]), one_step["unit"]
        known = unit in LEVELS and {"prediction", "start"} <= one_step.keys()
    except (TypeError, ValueError, KeyError, AttributeError):
        known = False
    if not known:
        raise ValueError(
            f"{where} says that it is a one-step student, and not how it is called: expected a level, its unit "
            f"({', '.join(LEVELS)}), prediction and start under {PREFIX}one_step, and got {one_step!r}"
        )
    least, most = LEVELS[unit]
    if not least < level <= most:
        raise ValueError(
            f"{where} says that its student is called at {unit} {level:g}: expected more than {least}, up to "
            f"{most}. The file was changed or is damaged: take the one that its run wrote"
        )


def states_family(header: Mapping[str, str]) -> bool:
    """Whether another tool's metadata name the kind of model."""
    return any(header.get(key) for key in _BASE_KEYS)


def stated_family(header: Mapping[str, str]) -> str | None:
    """The family that another tool's metadata name; None where they do not, or for one that we do not know."""
    base, architecture = (header.get(key, "").lower().replace(".", "-") for key in _BASE_KEYS)
    for family, (_, _, bases, architectures) in _FAMILIES.items():
        if base.startswith(bases) or architecture.startswith(architectures):
            return family
    return None


_BASE_KEYS = ("ss_base_model_version", "modelspec.architecture")
_FIELDS = [each.name for each in dataclasses.fields(AdapterMetadata)]
_TEXT = {each.name for each in dataclasses.fields(AdapterMetadata) if each.type is str}


def _write(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _read(name: str, text: str) -> Any:
    value = text if name in _TEXT else json.loads(text)
    return tuple(value) if name == "targets" else value


def _versions() -> dict[str, str]:
    found = {}
    for name in ("stylewright", "torch", "peft", "diffusers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a folder in custom_nodes is no installed package
            continue
    return found


# family -> modelspec.architecture, ss_base_model_version, and how either begins in files of other tools
_FAMILIES: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "flux": ("Flux.1-dev", "flux1", ("flux1", "flux_1"), ("flux-1-",)),
    "sd3": ("stable-diffusion-3.5-large", "sd3", ("sd3", "stable-diffusion-3"), ("stable-diffusion-3",)),
    "sdxl": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", ("sdxl_",), ("stable-diffusion-xl",)),
    "sd15": ("stable-diffusion-v1", "sd_v1", ("sd_v1", "sd_1"), ("stable-diffusion-v1",)),
    "pixart": ("pixart-sigma", "pixart", ("pixart",), ("pixart",)),
}
_PREDICTIONS = {"eps": "epsilon", "v": "v"}  # modelspec knows no name for a flow


def _modelspec(about: AdapterMetadata) -> dict[str, str]:
    """https://github.com/Stability-AI/ModelSpec, version 1.0.1"""
    architecture = _FAMILIES[about.family][0] if about.family in _FAMILIES else about.family
    side = about.resolution
    stated = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{architecture}/{about.method if about.method in UNMERGEABLE else 'lora'}",
        "implementation": "diffusers",
        "title": about.title or about.style_phrase or "Stylewright adapter",
        "date": about.date,
        "resolution": f"{side}x{side}" if side else "",
        "prediction_type": _PREDICTIONS.get(about.prediction, ""),
        "trigger_phrase": about.trigger or about.style_phrase,
        "usage_hint": NEEDS_OUR_LOADER if about.method in UNMERGEABLE else "",
    }
    return {f"modelspec.{name}": value for name, value in stated.items() if value}


def _kohya(about: AdapterMetadata) -> dict[str, str]:
    """The keys of kohya's sd-scripts, all strings, which A1111, Forge and the sites that host adapters show."""
    lycoris = about.method in ("loha", "lokr", "oft")
    flux = "networks.lora_flux" if about.family == "flux" else "networks.lora"
    plain = f"stylewright.{about.method}" if about.method in UNMERGEABLE else flux
    words = about.trigger or about.style_phrase
    side = about.resolution
    stated = {
        "network_module": "lycoris.kohya" if lycoris else plain,
        "network_args": json.dumps({"algo": about.method}) if lycoris else "",
        "network_dim": str(about.rank),
        # What sd-scripts means by it: the scale is alpha / dim.
        "network_alpha": f"{about.scale * about.rank:g}",
        "base_model_version": _FAMILIES[about.family][1] if about.family in _FAMILIES else about.family,
        "sd_model_name": about.base_model,
        "resolution": f"({side}, {side})" if side else "",
        "num_train_images": "" if about.images is None else str(about.images),
        "steps": "" if about.steps is None else str(about.steps),
        "max_train_steps": "" if about.steps is None else str(about.steps),
        "learning_rate": "" if about.learning_rate is None else str(about.learning_rate),
        "optimizer": about.optimizer,
        "seed": "" if about.seed is None else str(about.seed),
        "tag_frequency": json.dumps({"style": {words: about.images or 1}}, ensure_ascii=False) if words else "",
    }
    return {f"ss_{name}": value for name, value in stated.items() if value}

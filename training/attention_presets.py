"""How strongly a negative prompt acts where nobody says: by family and method, with the source of each.

SNOOPI gives NASA's scale for three backbones (arXiv 2412.02687v3), NAG's paper its three numbers for its models (arXiv
2505.21179, Table 5). For the rest the nearest of these stands in, and says so. Nobody's scale fits every model: v1 of
SNOOPI tuned NASA from 0.04 to 0.8.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .attention_guidance import METHODS, AttentionGuidance


@dataclass(frozen=True)
class Preset:
    """One method for one family."""

    guidance: AttentionGuidance
    source: str


def _nasa(scale: float, source: str) -> Preset:
    return Preset(AttentionGuidance("nasa", scale), source)


def _nag(scale: float, blend: float, source: str) -> Preset:
    return Preset(AttentionGuidance("nag", scale, tau=2.5, blend=blend), source)


def _vsf(scale: float, source: str) -> Preset:
    return Preset(AttentionGuidance("vsf", scale), source)


_TABLE_5 = "arXiv 2505.21179, Table 5"
_SNOOPI = "arXiv 2412.02687v3, NASA-I"

NASA: Mapping[str, Preset] = {
    "sd15": _nasa(0.1, _SNOOPI),
    "sd21": _nasa(0.2, _SNOOPI),
    "pixart": _nasa(0.5, _SNOOPI),
    "sdxl": _nasa(0.2, "SD2.1's; up to 1 is shown for DMD2, arXiv 2412.02687v3"),
}
NAG: Mapping[str, Preset] = {
    "sd15": _nag(2.0, 0.375, _TABLE_5),
    "sd21": _nag(2.0, 0.375, "SD1.5's, " + _TABLE_5),
    "sdxl": _nag(2.0, 0.5, _TABLE_5),
    "pixart": _nag(4.0, 0.375, _TABLE_5 + ", PixArt-Σ"),
    "flux": _nag(4.0, 0.25, _TABLE_5),
    "sd3": _nag(4.0, 0.125, _TABLE_5 + ", SD3.5-Large"),
    "wan21": _nag(4.0, 0.25, _TABLE_5),
    "wan22": _nag(4.0, 0.25, "Wan2.1's, " + _TABLE_5),
}
VSF: Mapping[str, Preset] = {
    "sd3": _vsf(3.5, "arXiv 2508.10931, its SD3.5 example"),
}
OTHERS: Mapping[str, Preset] = {
    "nasa": _nasa(0.2, "SD2.1's, arXiv 2412.02687v3; none is published for this family"),
    "nag": _nag(4.0, 0.25, "FLUX's, " + _TABLE_5 + "; none is published for this family"),
    "vsf": _vsf(1.0, "a value as large as the prompt's own; none is published for this family"),
}
# Where SNOOPI gives NASA a scale that is its method; elsewhere NAG, which joint attention does not make unstable.
OF_SNOOPI = ("sd15", "sd21", "pixart")

_TABLES = dict(zip(METHODS, (NASA, NAG, VSF), strict=True))


def preset(family: str, method: str | None = None) -> Preset:
    """Of a family by our names; ``method`` None = the one for the family."""
    method = method or ("nasa" if family in OF_SNOOPI else "nag")
    return _TABLES[method].get(family, OTHERS[method])

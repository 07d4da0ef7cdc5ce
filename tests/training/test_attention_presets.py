"""Published scales, by family and method."""

from stylewright.training.attention_guidance import METHODS, AttentionGuidance
from stylewright.training.attention_presets import preset


def test_published_numbers():
    assert [preset(family).guidance for family in ("sd15", "sd21", "pixart")] == [
        AttentionGuidance("nasa", scale) for scale in (0.1, 0.2, 0.5)
    ]
    expected = {"sd15": (2, 0.375), "sdxl": (2, 0.5), "pixart": (4, 0.375), "flux": (4, 0.25), "sd3": (4, 0.125)}
    for family, (scale, blend) in expected.items():
        assert preset(family, "nag").guidance == AttentionGuidance("nag", scale, tau=2.5, blend=blend)


def test_every_family_has_all_methods_and_what_is_borrowed_says_so():
    for method in METHODS:
        found = preset("a family of tomorrow", method)
        assert found.guidance.method == method and "none is published" in found.source
    assert preset("a family of tomorrow").guidance.method == "nag"

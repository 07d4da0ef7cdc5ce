"""File names of adapters: placeholders, and what is refused."""

import re

import pytest

pytestmark = pytest.mark.comfy

WORDS = {"style": "ink / wash", "seed": "7", "empty": ""}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("mine", r"mine"),
        ("%style%/%seed%", r"ink _ wash/7"),
        ("%year%-%month%-%day%_%hour%%minute%%second%", r"\d{4}-\d\d-\d\d_\d{6}"),
        ("%date%", r"\d{4}-\d\d-\d\d"),
        ("%date:yy.MM.dd-hhmmss%/x", r"\d\d\.\d\d\.\d\d-\d{6}/x"),
        ("a%empty%", r"anone"),
        ("100%", r"100%"),
        ("50% of 70%", r"50% of 70%"),
    ],
)
def test_placeholders(pattern, expected):
    from stylewright.nodes.bridge.files import fill

    assert re.fullmatch(expected, fill(pattern, WORDS))


def test_an_unknown_placeholder_is_named():
    from stylewright.nodes.bridge.files import fill

    with pytest.raises(ValueError, match=r"holds %stile%, which is none of %style%, %seed%.*%date:yyyy-MM-dd%"):
        fill("a/%stile%", WORDS)


def test_words_bring_in_no_folders(tmp_path, monkeypatch):
    import folder_paths

    from stylewright.nodes.bridge.files import adapter_pattern

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    assert adapter_pattern("%style%", {"style": "../../etc/passwd"}) == "_.._etc_passwd"
    assert adapter_pattern("sub\\x.safetensors", {}) == "sub/x"
    with pytest.raises(ValueError, match="does not name a file inside models/loras"):
        adapter_pattern("../%style%", WORDS)

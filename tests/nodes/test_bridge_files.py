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


@pytest.mark.parametrize(
    "pattern", ["con", "NUL/mine", "a/COM1.ink", "lpt\u00b9", "styles./mine", "styles /mine", "%style%/mine", "mine."]
)
def test_names_that_windows_reserves_are_refused_everywhere(pattern, tmp_path, monkeypatch):
    import folder_paths

    from stylewright.nodes.bridge.files import adapter_pattern

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    with pytest.raises(ValueError, match="which Windows does not allow"):
        adapter_pattern(pattern, {"style": "Aux"})
    assert not any(tmp_path.iterdir())
    assert adapter_pattern("console/nullity.v2", {}) == "console/nullity.v2"


def test_a_file_in_the_place_of_a_run_is_left_alone(tmp_path, monkeypatch):
    import folder_paths

    from stylewright.nodes.bridge.runs import new_run

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path / "loras")], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    (tmp_path / "loras").mkdir()
    (tmp_path / "output" / "stylewright").mkdir(parents=True)
    (tmp_path / "output" / "stylewright" / "mine_00001").write_text("no run")
    assert new_run("mine", "mine").name == "mine_00002"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "stylewright").write_text("no folder")
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match=r"nothing can be written to .*stylewright: a file is in its place"):
        new_run("mine", "mine")

"""What the package says of itself, and what an installation carries."""

import os
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# The registry drops all classifiers if one of them is unknown to it or to PyPI.
COMFY_CLASSIFIERS = re.compile(r"Operating System :: |Environment :: (GPU|NPU) :: |Programming Language :: |Topic :: ")


def requirements(name: str) -> list[str]:
    return PROJECT["project"]["optional-dependencies"][name]


def test_requirements_txt_repeats_the_dependencies():
    assert (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")[:-1] == PROJECT["project"][
        "dependencies"
    ]


def test_dependencies_leave_torch_alone_and_pin_nothing():
    for requirement in PROJECT["project"]["dependencies"]:
        assert re.match(r"[a-z0-9-]+>=[\d.]+(; python_version < '3\.11')?$", requirement), requirement
        assert not requirement.startswith("torch")


@pytest.mark.parametrize("extra", ["standalone", "test"])
def test_extras_pin_torch_exactly(extra):
    assert "torch==2.13.0" in requirements(extra)


def test_every_folder_with_code_is_packaged():
    folders = {path.parent for top in ("nodes", "training") for path in (ROOT / top).rglob("*.py")} | {ROOT}
    missing = [folder for folder in folders if not (folder / "__init__.py").exists()]
    assert not missing, f"folders with code but no __init__.py: {missing}"
    names = {".".join(("stylewright", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == names


def test_data_patterns_carry_what_the_package_reads():
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for top in ("web", "locales", "workflows", "training/embedded/weights"):
        package = "stylewright.training.embedded" if top.startswith("training") else "stylewright"
        base = ROOT if package == "stylewright" else ROOT / "training" / "embedded"
        carried = {path for pattern in data[package] for path in base.glob(pattern)}
        files = {path for path in (ROOT / top).rglob("*") if path.is_file()}
        assert files, f"{top}/ is empty"
        assert files <= carried, f"not packaged: {files - carried}"


def test_the_registry_fields():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert project["name"] == "stylewright"
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["urls"]["Repository"].startswith("https://")
    assert comfy["DisplayName"] == "Stylewright"
    assert comfy["requires-comfyui"] == ">=0.14.0"
    assert comfy["PublisherId"]
    assert all(COMFY_CLASSIFIERS.match(classifier) for classifier in project["classifiers"])


def test_the_changelog_names_this_version():
    assert f"## {PROJECT['project']['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_root_file_is_an_entry_point_and_nothing_else():
    import stylewright

    assert stylewright.WEB_DIRECTORY == "./web"
    assert not hasattr(stylewright, "NODE_CLASS_MAPPINGS"), "it would silence comfy_entrypoint"


def test_the_root_is_not_on_the_path():
    """There nodes/ would hide ComfyUI's nodes.py."""
    assert str(ROOT) not in sys.path


def test_a_failing_entry_point_leaves_a_traceback(monkeypatch, caplog):
    import asyncio

    import stylewright

    monkeypatch.setitem(sys.modules, "stylewright.nodes", None)  # an import of None raises ImportError
    with pytest.raises(ImportError):
        asyncio.run(stylewright.comfy_entrypoint())
    assert caplog.records[-1].exc_info is not None


def test_one_licence():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["project"]["license"] == "Apache-2.0"


def test_ci_runs_the_test_command_of_the_readme():
    readme, ci = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", ".ci/run"))
    assert ".venv/bin/pip install -e '.[test]' && .venv/bin/pytest" in readme
    assert "\"$work/venv/bin/pip\" install -qq -e '.[test]'" in ci
    assert '"$work/venv/bin/pytest" --junitxml' in ci


def test_ci_can_be_started():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)

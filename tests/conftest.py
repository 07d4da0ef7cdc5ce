"""What every test stands on: the package under its own name, and ComfyUI where it can be imported.

The repository root is loaded as ``stylewright`` the way ComfyUI loads a pack, from its ``__init__.py``, so that
it is never on ``sys.path``: there ``nodes/`` would hide ComfyUI's ``nodes.py``.

A test module with ``pytestmark = pytest.mark.comfy`` may import ComfyUI at its top. Without ComfyUI the module
is not imported, and its tests are reported as skipped one by one.
"""

import ast
import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "stylewright"
NO_COMFY = "no ComfyUI in this interpreter (set COMFYUI_PATH and run with ComfyUI's Python)"


def load_package(root: Path, name: str) -> None:
    """Imports the folder ``root`` as the package ``name``, by the steps of ComfyUI's own loader."""
    spec = importlib.util.spec_from_file_location(name, root / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


load_package(ROOT, PACKAGE)


def comfyui_path() -> Path | None:
    """The checkout that COMFYUI_PATH names, or comfy-cli's default one. ValueError if it names something else."""
    named = os.environ.get("COMFYUI_PATH")
    path = Path(named) if named else Path.home() / "comfy" / "ComfyUI"
    if (path / "comfy" / "options.py").is_file():
        return path.resolve()
    if named:
        raise ValueError(f"COMFYUI_PATH={named} is not a ComfyUI checkout: it has no comfy/options.py")
    return None


def open_comfyui(base: Path) -> bool:
    """Makes ComfyUI importable, on the CPU and with ``base`` for its models, input and output.

    False where there is no checkout or this interpreter lacks ComfyUI's requirements.
    """
    path = comfyui_path()
    if path is None or importlib.util.find_spec("comfy_kitchen") is None:
        return False
    for folder in ("input", "output", "temp", "user", "models/loras"):
        (base / folder).mkdir(parents=True)
    sys.path.insert(0, str(path))
    arguments, sys.argv = sys.argv, ["x", "--cpu", "--disable-all-custom-nodes", "--base-directory", str(base)]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # parses sys.argv once, now
    finally:
        sys.argv = arguments
    return True


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes")


def pytest_configure(config):
    config.comfy_base = Path(tempfile.mkdtemp(prefix="stylewright-comfy-"))
    config.has_comfy = open_comfyui(config.comfy_base)


def pytest_unconfigure(config):
    shutil.rmtree(config.comfy_base, ignore_errors=True)


def _has_mark(tree: ast.Module, mark: str) -> bool:
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    return any("pytestmark" in map(ast.unparse, node.targets) and mark in ast.unparse(node.value) for node in assigned)


class UnimportedModule(pytest.File):
    """A test module whose tests are counted from its source, because it cannot be imported here."""

    def collect(self):
        tree = ast.parse(self.path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                yield SkippedTest.from_parent(self, name=node.name, line=node.lineno - 1)


class SkippedTest(pytest.Item):
    """Stands for one test function of an :class:`UnimportedModule`."""

    def __init__(self, *, line: int, **kwargs):
        super().__init__(**kwargs)
        self.line = line
        self.add_marker(pytest.mark.comfy)

    def runtest(self):
        raise AssertionError("the marker skips this before it runs")

    def reportinfo(self):
        return self.path, self.line, self.name


def pytest_ignore_collect(collection_path, config):
    """With ``-m comfy`` only modules are imported that have such tests: importing all takes long."""
    if config.option.markexpr == "comfy" and collection_path.match("test_*.py"):
        return "mark.comfy" not in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_pycollect_makemodule(module_path, parent):
    if parent.config.has_comfy or not _has_mark(ast.parse(module_path.read_text(encoding="utf-8")), "comfy"):
        return None
    return UnimportedModule.from_parent(parent, path=module_path)


def _missing(config, item) -> str | None:
    """Why this test cannot run here, if so."""
    if item.get_closest_marker("comfy") and not config.has_comfy:
        return NO_COMFY
    if item.get_closest_marker("slow") and not config.getoption("--slow"):
        return "takes minutes: run with --slow"
    if item.get_closest_marker("gpu"):
        import torch

        return None if torch.cuda.is_available() else "no CUDA device"
    return None


def pytest_collection_modifyitems(config, items):
    for item in items:
        if reason := _missing(config, item):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter, config):
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NO_COMFY in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} ComfyUI tests skipped: {NO_COMFY}")


@pytest.fixture(scope="session")
def comfy(pytestconfig) -> Path:
    """The ComfyUI checkout in use; its modules can be imported. Skips the test where there is none."""
    if not pytestconfig.has_comfy:
        pytest.skip(NO_COMFY)
    return comfyui_path()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return ROOT

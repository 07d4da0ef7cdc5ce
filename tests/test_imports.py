"""The import rules of the architecture, read from the source: who may import whom.

1. ``training/`` never imports ComfyUI and never climbs out of itself.
2. Only ``nodes/bridge/`` knows ComfyUI's internals; the other node files know ``comfy_api`` and the bridge.
3. Inside ``training/`` lower layers never import upper ones.

And what keeps ComfyUI's start fast: heavy libraries are imported where they are used.
"""

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]

# ComfyUI's top-level modules, and aiohttp, which its server is made of. Absolute "nodes" and "utils" are its own, too:
# ours are imported relatively.
COMFYUI = {
    "aiohttp", "alembic_db", "api_server", "app", "comfy", "comfy_aimdo", "comfy_api_nodes", "comfy_config",
    "comfy_execution", "comfy_extras", "comfy_kitchen", "comfyui_version", "cuda_malloc",
    "execution", "folder_paths", "latent_preview",
    "main", "middleware", "node_helpers", "nodes", "protocol", "server", "utils",
}  # fmt: skip
SCHEMA_API = {"comfy_api"}

# Lowest first. A name is a folder of training/, or folder/folder where a part of it belongs higher.
# Every single file of training/ is mathematics: functions of tensors, and the contracts they share.
LAYERS = [
    {"mathematics"},
    {"adapters", "concepts", "data", "embedded", "formats", "hosts"},
    {"loops", "embedded/pretrain"},
    {"demo"},
    {"cli"},
]

HEAVY = {
    "accelerate", "bitsandbytes", "diffusers", "matplotlib", "peft", "prodigyopt", "schedulefree", "scipy",
    "torchvision", "transformers",
}  # fmt: skip
UNSAFE = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve", "subprocess"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load"}
NOT_INSTALLED = {"bitsandbytes", "torch"}  # torch comes with ComfyUI or an extra; bitsandbytes is the user's choice
OWN_METHODS = "_peft.py"  # end of the files of training/adapters that derive from peft's classes
COMMAND_LINE = {"rich", "typer"}  # at the top of training/cli only, which nothing else imports


@dataclass(frozen=True)
class Import:
    """One import statement: ``target`` is a path from the root for relative imports, a dotted name otherwise."""

    file: str
    line: int
    target: str
    relative: bool
    at_import: bool  # runs when the file is imported

    @property
    def package(self) -> str:
        return self.target.split(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"


def python_files(folder: str, root: Path = ROOT) -> list[Path]:
    files = sorted((root / folder).rglob("*.py"))
    assert files, f"no Python files in {folder}/"
    return files


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _deferred(tree: ast.Module) -> set[ast.AST]:
    """Nodes that do not run at import: bodies of functions, and of ``if TYPE_CHECKING``."""
    late = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    )
    return {child for node in late for child in ast.walk(node)}


def _resolve(file: Path, node: ast.ImportFrom, root: Path) -> list[str]:
    """Paths from the root, "training/formats/state.py" or "training/formats", of a relative import."""
    base = file.parent
    for _ in range(node.level - 1):
        base = base.parent
    base = base.joinpath(*(node.module or "").split("."))
    if not base.is_relative_to(root):
        return [str(base)]
    found = []
    for alias in node.names:
        inner = base / alias.name
        target = next((path for path in (inner.with_suffix(".py"), inner) if path.exists()), None)
        if target is None:
            target = base.with_suffix(".py") if base.with_suffix(".py").exists() else base
        found.append(target.relative_to(root).as_posix())
    return found


def imports_of(file: Path, root: Path = ROOT) -> list[Import]:
    tree = _tree(file)
    deferred = _deferred(tree)
    name = file.relative_to(root).as_posix()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets, relative = [alias.name for alias in node.names], False
        elif isinstance(node, ast.ImportFrom):
            relative = node.level > 0
            targets = _resolve(file, node, root) if relative else [node.module]
        else:
            continue
        found += [Import(name, node.lineno, target, relative, node not in deferred) for target in targets]
    return found


def imports_in(folder: str, root: Path = ROOT) -> list[Import]:
    return [found for file in python_files(folder, root) for found in imports_of(file, root)]


def layer_of(path: str) -> int:
    """Index into LAYERS of a file or folder "training/…"."""
    parts = path.split("/")[1:]
    names = ["/".join(parts[:2]), parts[0]] if parts[0:1] and not parts[0].endswith(".py") else ["mathematics"]
    for name in names:
        for index, layer in enumerate(LAYERS):
            if name in layer:
                return index
    raise AssertionError(f"{path} has no layer: add its folder to LAYERS in tests/test_imports.py")


def climbing_out(found: Import) -> bool:
    return found.relative and not found.target.startswith("training/") and found.target != "training"


def forbidden_in_nodes(found: Import) -> bool:
    """ComfyUI's internals outside the bridge; node files inside it."""
    in_bridge = found.file.startswith("nodes/bridge/")
    if found.relative:
        leaves = not found.target.startswith(("nodes", "training"))
        upwards = in_bridge and found.target.startswith("nodes") and not found.target.startswith("nodes/bridge")
        return leaves or upwards
    return not in_bridge and found.package in COMFYUI


def above(found: Import) -> bool:
    return found.relative and found.target.startswith("training/") and layer_of(found.target) > layer_of(found.file)


def heavy_at_import(found: Import) -> bool:
    allowed = COMMAND_LINE if found.file.startswith("training/cli/") else set()
    if found.relative:  # methods of our own have peft's classes for a base
        return found.at_import and found.target.endswith(OWN_METHODS) and not found.file.endswith(OWN_METHODS)
    if found.file.startswith("training/adapters/") and found.file.endswith(OWN_METHODS):
        allowed = {"peft"}
    return found.at_import and found.package in (HEAVY | COMMAND_LINE) - allowed


def listed(found: list[Import]) -> str:
    return "\n".join(map(str, found))


def test_training_never_imports_comfyui():
    wrong = [i for i in imports_in("training") if not i.relative and i.package in COMFYUI | SCHEMA_API]
    assert not wrong, listed(wrong)


def test_training_never_climbs_out():
    wrong = [i for i in imports_in("training") if climbing_out(i)]
    assert not wrong, listed(wrong)


def test_only_the_bridge_knows_comfyui():
    wrong = [i for i in imports_in("nodes") if forbidden_in_nodes(i)]
    assert not wrong, listed(wrong)


def test_lower_layers_never_import_upper_ones():
    wrong = [i for i in imports_in("training") if above(i)]
    assert not wrong, listed(wrong)


def test_our_own_imports_are_relative():
    wrong = [i for folder in ("training", "nodes") for i in imports_in(folder) if i.package == "stylewright"]
    assert not wrong, listed(wrong)


def test_heavy_libraries_are_imported_where_they_are_used():
    wrong = [i for folder in ("training", "nodes") for i in imports_in(folder) if heavy_at_import(i)]
    assert not wrong, listed(wrong)


def test_nothing_is_unpickled_or_executed():
    """Also what the registry's scanner looks for: a flagged version is invisible until somebody has looked at it."""
    wrong = [i for folder in ("training", "nodes") for i in imports_in(folder) if i.package in UNSAFE]
    assert not wrong, listed(wrong)
    for file in python_files("training") + python_files("nodes"):
        called = {ast.unparse(node.func) for node in ast.walk(_tree(file)) if isinstance(node, ast.Call)}
        assert not called & UNSAFE_CALLS, f"{file} calls {called & UNSAFE_CALLS}"


def test_no_module_imports_itself_through_others():
    graph: dict[str, set[str]] = {}
    for i in imports_in("training") + imports_in("nodes"):
        if i.relative and i.at_import and i.target.endswith(".py") and i.target != i.file:
            graph.setdefault(i.file, set()).add(i.target)
    done: set[str] = set()

    def visit(file: str, trail: tuple[str, ...]) -> None:
        assert file not in trail, f"import cycle: {' -> '.join((*trail, file))}"
        if file not in done:
            for target in sorted(graph.get(file, ())):
                visit(target, (*trail, file))
            done.add(file)

    for file in sorted(graph):
        visit(file, ())


@pytest.mark.parametrize(
    ("file", "line", "rule"),
    [
        ("training/noise.py", "from .loops import train", above),
        ("training/formats/adapters.py", "from ..cli import main", above),
        ("training/embedded/text.py", "from .pretrain import stage", above),
        ("training/noise.py", "from ..nodes import bridge", climbing_out),
        ("training/data/images.py", "from ... import nodes", climbing_out),
        ("nodes/density.py", "import comfy.utils", forbidden_in_nodes),
        ("nodes/density.py", "def f():\n    from folder_paths import get_output_directory", forbidden_in_nodes),
        ("nodes/bridge/model.py", "from .. import density", forbidden_in_nodes),
        ("nodes/density.py", "import peft.tuners", heavy_at_import),
        ("training/noise.py", "import typer", heavy_at_import),
        ("training/cli/main.py", "from matplotlib import pyplot", heavy_at_import),
        ("training/adapters/own_peft.py", "import transformers", heavy_at_import),
        ("training/adapters/attach.py", "from .own_peft import Layer", heavy_at_import),
    ],
)
def test_the_rules_catch_an_offender(tmp_path, file, line, rule):
    for other in ("loops/train.py", "cli/main.py", "embedded/pretrain/stage.py", "noise.py", "adapters/own_peft.py"):
        _write(tmp_path / "training" / other, "")
    _write(tmp_path / "nodes" / "density.py", "")
    _write(tmp_path / file, line)
    assert any(rule(found) for found in imports_of(tmp_path / file, tmp_path))


@pytest.mark.parametrize(
    ("file", "line", "rule"),
    [
        ("training/loops/train.py", "from ..noise import add_noise", above),
        ("training/loops/train.py", "from .config import TrainConfig", above),
        ("nodes/bridge/model.py", "import comfy.utils", forbidden_in_nodes),
        ("nodes/density.py", "from comfy_api.latest import io\nfrom .bridge import model", forbidden_in_nodes),
        ("nodes/bridge/model.py", "from ...training import noise", forbidden_in_nodes),
        ("nodes/density.py", "def f():\n    import peft", heavy_at_import),
        ("training/adapters/own_peft.py", "from peft.config import PeftConfig", heavy_at_import),
        ("training/adapters/attach.py", "def f():\n    from .own_peft import Layer", heavy_at_import),
        ("training/cli/main.py", "import typer", heavy_at_import),
    ],
)
def test_the_rules_let_pass_what_is_allowed(tmp_path, file, line, rule):
    for other in ("noise.py", "loops/config.py", "adapters/own_peft.py"):
        _write(tmp_path / "training" / other, "")
    _write(tmp_path / file, line)
    assert not any(rule(found) for found in imports_of(tmp_path / file, tmp_path))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def run_python(code: str) -> str:
    """Output of ``code`` in a fresh interpreter, with the root loaded as ``stylewright`` before it."""
    load = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('stylewright', {str(ROOT / '__init__.py')!r})\n"
        "sys.modules['stylewright'] = package = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(package)\n"
    )
    result = subprocess.run([sys.executable, "-c", load + code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_imports_almost_nothing():
    loaded = set(run_python("print(*{name.split('.')[0] for name in sys.modules})").split())
    assert "stylewright" in loaded
    assert not loaded & (HEAVY | COMMAND_LINE | COMFYUI | {"torch", "numpy", "safetensors"})


def test_the_command_line_starts_without_heavy_libraries():
    code = "from stylewright.training.cli.app import run\nassert run(['--help']) == 0\nprint('modules', *sys.modules)"
    loaded = {name.split(".")[0] for name in run_python(code).partition("modules")[2].split()}
    assert "typer" in loaded
    assert not loaded & HEAVY


def test_every_library_that_is_imported_is_declared():
    with (ROOT / "pyproject.toml").open("rb") as file:
        dependencies = tomllib.load(file)["project"]["dependencies"]
    declared = {re.match(r"[a-z0-9-]+", requirement).group() for requirement in dependencies}
    provided = packages_distributions()
    used = {i.package for folder in ("training", "nodes") for i in imports_in(folder) if not i.relative}
    used -= {*sys.stdlib_module_names, *COMFYUI, *SCHEMA_API, *NOT_INSTALLED}
    undeclared = {name for name in used if not declared.intersection(map(str.lower, provided.get(name, [name])))}
    assert not undeclared

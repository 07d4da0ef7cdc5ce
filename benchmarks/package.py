"""The repository as the package ``stylewright``, whether it is installed or not."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def load_package(name: str = "stylewright") -> None:
    """Imports the tree that this file belongs to, by the steps of ComfyUI's own loader.

    Its root never comes onto ``sys.path``: there ``nodes/`` would hide ComfyUI's ``nodes.py``.
    """
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{ROOT} is no package: it has no __init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)

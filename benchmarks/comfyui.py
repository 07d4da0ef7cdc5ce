"""ComfyUI for the benchmarks: where its checkout is, and how it becomes importable without its server."""

import importlib.util
import os
import sys
from pathlib import Path


def comfyui_path() -> Path | None:
    """The checkout that COMFYUI_PATH names, else comfy-cli's default one. ValueError if it names something else."""
    named = os.environ.get("COMFYUI_PATH")
    path = Path(named) if named else Path.home() / "comfy" / "ComfyUI"
    if (path / "comfy" / "options.py").is_file():
        return path.resolve()
    if named:
        raise ValueError(f"COMFYUI_PATH={named} is not a ComfyUI checkout: it has no comfy/options.py")
    return None


def why_absent() -> str | None:
    """Why this interpreter cannot run ComfyUI; None if it can."""
    if comfyui_path() is None:
        return "there is no ComfyUI: set COMFYUI_PATH to a checkout"
    if importlib.util.find_spec("comfy_kitchen") is None:
        return f"{sys.executable} lacks ComfyUI's requirements: run with ComfyUI's own Python"
    return None


def open_comfyui(base: Path, device: str, *more: str) -> None:
    """Makes ComfyUI importable in this process, with ``base`` for its models, input and output, and ``more`` flags."""
    for folder in ("input", "output", "temp", "user", "models/loras"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(comfyui_path()))
    flags = [*(["--cpu"] if device == "cpu" else []), *more]
    arguments, sys.argv = sys.argv, ["x", *flags, "--disable-all-custom-nodes", "--base-directory", str(base)]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # parses sys.argv once, now
    finally:
        sys.argv = arguments

"""The sample pictures in a run's folder: one PNG a prompt and step, which says what it shows."""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..formats.state import write_atomically

NAME = re.compile(r"step-(\d+)-(\d+)\.png")
PROMPT = "prompt"  # key of the PNG's text


def save_samples(folder: Path, step: int, images: Tensor, prompts: Sequence[str] = ()) -> None:
    """Writes pictures (b, 3, h, w) in [0, 1], each with its prompt where there are as many of them."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    for index, image in enumerate(images.detach().float().cpu().clamp(0, 1)):
        pixels = (image * 255).round().byte().movedim(0, -1).contiguous().numpy()
        text = PngInfo()
        if len(prompts) == len(images):
            text.add_itxt(PROMPT, prompts[index])
        picture = Image.fromarray(pixels)
        path = folder / f"step-{step:06d}-{index}.png"
        write_atomically(path, lambda temporary, p=picture, t=text: p.save(temporary, format="png", pnginfo=t))


def find_samples(folder: Path, prompts: Sequence[str], *, until: int) -> dict[int, list[Path]]:
    """The pictures of these prompts by step, up to the step ``until``, in order.

    A step counts where it has a picture of each prompt: a continued run may have been asked for other ones before.
    """
    found: dict[int, dict[int, Path]] = {}
    for path in folder.glob("step-*.png"):
        if (match := NAME.fullmatch(path.name)) and int(match[1]) <= until:
            found.setdefault(int(match[1]), {})[int(match[2])] = path
    whole = {step: _of_prompts(found[step], prompts) for step in sorted(found)}
    return {step: paths for step, paths in whole.items() if paths}


def _of_prompts(paths: dict[int, Path], prompts: Sequence[str]) -> list[Path]:
    """One path a prompt, or none."""
    ordered = [paths[index] for index in range(len(prompts)) if index in paths]
    same = len(ordered) == len(prompts) and all(map(_shows, ordered, prompts))
    return ordered if same else []


def _shows(path: Path, prompt: str) -> bool:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return picture.info.get(PROMPT) == prompt
    except (OSError, UnidentifiedImageError):
        return False

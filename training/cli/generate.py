"""``stylewright generate``: pictures from prompts, with an adapter or without."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from .output import Json, show
from .progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapters.attach import Adapter
    from ..denoiser import TimedDenoiser
    from ..formats.contents import AdapterFile
    from ..hosts.host import Host

Prompts = Annotated[list[str], typer.Option("--prompt", help="What to draw; may be repeated.")]
Model = Annotated[str, typer.Option(help='"embedded", a diffusers folder, or a .safetensors checkpoint.')]
Components = Annotated[str | None, typer.Option(help="For a checkpoint: the diffusers folder with what it lacks.")]
AdapterOption = Annotated[
    Path | None,
    typer.Option("--adapter", help="A style to draw in, or a one-step student, which is drawn with in one."),
]
Plain = Annotated[
    bool, typer.Option("--plain", help="Take the prompts as they are, without the adapter's style phrase.")
]
Negative = Annotated[str, typer.Option(help="What to keep away from: by guidance, in attention with a student.")]
Steps = Annotated[int | None, typer.Option(help="Of a model that is no student. (default: 20)")]
Guidance = Annotated[float | None, typer.Option(help="Of classifier-free guidance. (default: the model's own)")]
StyleGuidance = Annotated[
    float, typer.Option(help="FineStyle's first scale: more of what the adapter changes, beside --guidance.")
]
Size = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels. (default: the model's own)")]
Out = Annotated[Path, typer.Option(help="Folder for the pictures.")]
Precision = Annotated[str, typer.Option(help="float32 or bfloat16, of the model's weights.")]


def generate(
    prompts: Prompts,
    model: Model = "embedded",
    components: Components = None,
    adapter: AdapterOption = None,
    plain: Plain = False,
    negative: Negative = "",
    seed: int = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    style_guidance: StyleGuidance = 0.0,
    size: Size = None,
    precision: Precision = "float32",
    device: str = "auto",
    out: Out = Path("pictures"),
    as_json: Json = False,
) -> None:
    """Draw pictures, each in the adapter's style: "a cat" becomes "a cat in {style phrase} style"."""
    import torch

    from ..guidance import finestyle
    from ..hosts.generate import generate as draw
    from ..hosts.loading import load_host
    from ..loops.config import PRECISIONS
    from .train import device_of

    if precision not in PRECISIONS:
        raise ValueError(f"Got --precision {precision}: expected one of {', '.join(PRECISIONS)}.")
    if style_guidance and adapter is None:
        raise ValueError("--style-guidance strengthens what an adapter changes: give its file with --adapter.")
    pixels = size_of(size)
    host = load_host(model, device_of(device), getattr(torch, precision), components=components)
    level = level_of(adapter, host)
    if level is not None and (guidance is not None or style_guidance):
        raise ValueError(
            f"{adapter} is a one-step student, which is never guided: leave --guidance and --style-guidance out"
        )
    if level is not None and steps not in (None, 1):
        raise ValueError(f"{adapter} is a one-step student, which draws in one: leave --steps {steps} out")
    unguided = (host.guidance_scale if guidance is None else guidance) == 1 and not style_guidance
    if negative and level is None and unguided:
        raise ValueError(
            f"--negative has no effect on {host.name} without guidance: give --guidance above 1, or leave it"
        )
    with wearing(host, adapter) as (host, phrase, attachment), progress_bar() as update:
        scale = host.guidance_scale if guidance is None else guidance
        asked = prompts if plain else in_style(prompts, phrase)
        pictures = draw(
            host,
            asked,
            seed=seed,
            steps=20 if steps is None else steps,
            guidance_scale=scale,
            guidance=finestyle(style_guidance, scale - 1) if style_guidance else None,
            adapter=attachment,
            size=pixels,
            negative=negative,
            one_step=level,
            callback=lambda step, total, _: update("drawing", step, total),
        )
    files = save(pictures, out, seed)
    drawn = [{"file": file, "prompt": prompt} for file, prompt in zip(files, asked, strict=True)]
    show({"pictures": drawn, "seed": seed}, [f"{each['file']}  {each['prompt']}" for each in drawn], as_json)


@contextmanager
def wearing(host: "Host", adapter: Path | None) -> Iterator[tuple["Host", str, "Adapter | None"]]:
    """Inside, the host's model has the adapter of this file. Gives the host to draw with, whose text encoders have
    their part of it, the adapter's style phrase, "" if it has none, and the adapter.

    ValueError for an adapter of another family, or one whose layers the model does not have.
    """
    if adapter is None:
        yield host, "", None
        return
    from ..adapters.attach import attached_to_parts, parts_named
    from ..formats.adapters import loaded_from
    from ..formats.contents import read_about, read_adapter
    from ..formats.keys import TEXT_ENCODER
    from ..formats.metadata import FULL
    from ..hosts.text import with_text_encoders
    from ..hosts.whole import with_weights

    about = read_about(adapter)
    if about is not None and about.method == FULL:
        with with_weights(host.denoiser, adapter, about):
            yield host, about.style_phrase, None
        return
    file = read_adapter(adapter)
    require_family(file, host)
    if any(name.startswith(TEXT_ENCODER) for name in file.layers):
        host = with_text_encoders(host)
    loaded = loaded_from(file, "diffusers", weights=weights_of(host), text_encoders=True)
    trees = {"": host.denoiser.module, **host.text_encoders}
    with attached_to_parts(parts_named(trees, loaded.names, host.denoiser.family), loaded.config, seed=0) as attachment:
        attachment.load_state_dict(loaded.state)
        yield host, loaded.about.style_phrase if loaded.about else "", attachment


def require_family(file: "AdapterFile", host: "Host") -> None:
    """ValueError for an adapter of another family than the host's."""
    if file.family != (family := host.denoiser.family):
        is_for = "is an adapter for" if file.states_family else "is, by the names of its layers, an adapter for"
        raise ValueError(
            f"{file.path} {is_for} {file.family or 'a family that we do not know'}, and the model {host.name} is of "
            f"the family {family}"
        )


def level_of(adapter: Path | None, host: "Host") -> "Tensor | None":
    """The log_snr (1,) at which the student in this file is called; None where it is none."""
    from ..formats.contents import read_about
    from ..one_step_presets import log_snr_of_call

    about = read_about(adapter) if adapter else None
    if about is None or not about.one_step:
        return None
    return log_snr_of_call(about.one_step, cast("TimedDenoiser", host.denoiser).clock)


def weights_of(host: "Host") -> Callable[[str], "Tensor"]:
    """Gives the weight of a layer of the host's model, or of a text encoder in it, by its name; or a ValueError."""
    trees = {"": host.denoiser.module, **host.text_encoders}
    parameters = {prefix + name: value for prefix, tree in trees.items() for name, value in tree.named_parameters()}

    def weight(name: str) -> "Tensor":
        if (found := parameters.get(f"{name}.weight")) is None:
            raise ValueError(f"{host.name} has no layer {name}, which the adapter is on: it is for another model")
        return found

    return weight


def in_style(prompts: list[str], phrase: str) -> list[str]:
    """The prompts with the style phrase, as in training."""
    from ..data.captions import styled

    return [styled(prompt, phrase) for prompt in prompts] if phrase else prompts


def size_of(size: str | None) -> tuple[int, int] | None:
    """Height and width of "WIDTHxHEIGHT"."""
    if size is None:
        return None
    found = re.fullmatch(r"(\d+)x(\d+)", size)
    if not found:
        raise ValueError(f"Got --size {size}: expected WIDTHxHEIGHT in pixels, for example 1024x768.")
    return int(found[2]), int(found[1])


def save(pictures: "Tensor", folder: Path, seed: int) -> list[Path]:
    """Writes pictures (b, 3, h, w) in [0, 1] as PNG, beside those that are there."""
    from PIL import Image

    from ..formats.state import write_atomically

    files: list[Path] = []
    for picture in (pictures.clamp(0, 1) * 255).round().byte().movedim(1, -1).contiguous().numpy():
        names = (folder / f"{seed}-{number:04d}.png" for number in range(10_000))
        file = next(name for name in names if not name.exists())
        image = Image.fromarray(picture)
        write_atomically(file, lambda temporary, image=image: image.save(temporary, format="png"))
        files.append(file)
    return files

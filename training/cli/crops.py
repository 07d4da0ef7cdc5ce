"""``stylewright crops``: one picture taken apart, as a folder to train on."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import Json, show

if TYPE_CHECKING:
    from torch import Tensor

    from ..concepts.phrases import Phrases
    from ..concepts.reference import Locate


def crops(
    picture: Annotated[Path, typer.Argument(help="The reference, one picture.")],
    out: Annotated[Path, typer.Argument(help="A folder to make, with the whole picture, its crops and captions.")],
    prompt: Annotated[str, typer.Option(help="What the whole picture shows and how it is drawn.")],
    content: Annotated[list[str], typer.Option(help="A phrase of the prompt for something shown. Once for each.")],
    style: Annotated[list[str], typer.Option(help="A phrase of the prompt for the style. Once for each.")],
    mask: Annotated[list[str] | None, typer.Option(help="PHRASE=FILE: white where it is, instead of a search.")] = None,
    model: Annotated[str, typer.Option(help="Finds phrases without a mask: embedded, or a model's path.")] = "embedded",
    components: Annotated[
        Path | None, typer.Option(help="For a single file: a diffusers folder of its family.")
    ] = None,
    device: Annotated[str, typer.Option(help="A torch device, or auto.")] = "auto",
    locate_by: Annotated[
        str, typer.Option(help="attention, or prediction error, which works on every model.")
    ] = "attention",
    resolution: Annotated[int | None, typer.Option(help="At which the picture is looked at. Else the model's.")] = None,
    whole_share: Annotated[float, typer.Option(help="Share of the samples that are the whole picture.")] = 0.4,
    variants: Annotated[int, typer.Option(help="Crops of each box.")] = 4,
    seed: Annotated[int, typer.Option(help="Draws noises and moves crops.")] = 0,
    as_json: Json = False,
) -> None:
    """Cut out what a picture's prompt names (FineStyle); then train --images OUT --caption-mode full."""
    from ..concepts.boxes import BoxOptions
    from ..concepts.crops import CropOptions
    from ..concepts.drawing import draw_found
    from ..concepts.phrases import read_phrases, repeated
    from ..concepts.reference import find, items_found
    from ..data.images import open_image, open_mask

    if resolution is not None and resolution < 1:
        raise ValueError(f"the resolution is {resolution}: expected pixels, such as 512")
    pixels, phrases = open_image(picture), read_phrases(prompt, "\n".join(content), "\n".join(style))
    files = [_pair(text) for text in mask or []]
    if twice := repeated([phrase for phrase, _ in files]):
        raise ValueError(f"--mask names {', '.join(map(repr, twice))} twice: each phrase has one mask")
    masks = {phrase: open_mask(Path(file))[0] for phrase, file in files}
    locate = None
    if any(phrase not in masks for phrase in phrases.content):
        locate = _locator(model, components, device, pixels, phrases, resolution, seed, locate_by)
    found = find(pixels, phrases, masks, locate, BoxOptions())
    items = items_found(pixels, phrases, found, CropOptions(whole_share or None, variants), seed=seed)
    if out.exists():
        raise ValueError(f"{out} is there already: name a folder to make")
    out.mkdir(parents=True)
    lines = []
    for number, item in enumerate(items):
        file = f"{number:03d}.png"
        _save(item.image, out / file)  # ty: ignore[invalid-argument-type]
        line = {"caption": item.caption, "repeats": item.repeats, "style_phrase": item.concept.style_phrase}
        lines.append(json.dumps({"file": file, **line}))
    (out / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shown = out.with_name(f"{out.name}-found.png")
    _save(draw_found(pixels, found), shown)
    show(
        {"folder": out, "picture": shown, "found": {each.phrase: str(each.crop) for each in found}},
        [*map(str, found), f"wrote {out}; look at {shown}, then: stylewright train --images {out} --caption-mode full"],
        as_json,
    )


def _pair(text: str) -> tuple[str, str]:
    phrase, equals, file = text.rpartition("=")
    if not (phrase and equals and file):
        raise ValueError(f"the mask {text!r} is none: expected PHRASE=FILE, such as 'a woman=woman.png'")
    return phrase, file


def _locator(
    model: str,
    components: Path | None,
    device: str,
    picture: "Tensor",
    phrases: "Phrases",
    resolution: int | None,
    seed: int,
    by: str,
) -> "Locate":
    from ..concepts.errors import error_maps
    from ..concepts.locate import Search, attention_maps
    from ..concepts.reference import LOCATE_BY, competing, resized, size_to_look_at
    from ..hosts.attention_maps import watch_of
    from ..hosts.loading import load_host
    from .train import device_of

    if by not in LOCATE_BY:
        raise ValueError(f"phrases cannot be located by {by!r}: expected one of {', '.join(LOCATE_BY)}")
    host = load_host(model, device_of(device), components=components)
    size = size_to_look_at(*picture.shape[1:], resolution or host.resolution, host.pixels_per_token)
    seen = resized(picture, *size)
    asked = (seen, phrases.prompt, competing(phrases, by), Search(seed=seed))
    if by == "prediction error":
        return lambda _: error_maps(host, *asked)
    return lambda _: attention_maps(host, watch_of(host), *asked)


def _save(picture: "Tensor", path: Path) -> None:
    """(3, h, w) in [0, 1]."""
    from PIL import Image

    Image.fromarray((picture.movedim(0, -1) * 255).round().byte().numpy()).save(path)

"""What a dataset is made of: pictures with their captions, from a folder or from memory."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from .captions import Row, contains, listed, one_line, read_rows, read_text
from .concepts import BASE, STYLE, Concept
from .images import IMAGE_SUFFIXES, load_picture

log = logging.getLogger(__name__)

MASK_ENDING = "_mask"  # cat_mask.png is the mask of cat.jpg
PLAIN = Concept()  # all as the run has it


@dataclass(frozen=True, eq=False)
class Encoded:
    """A picture that somebody else's autoencoder has encoded, at the one size that it has."""

    latent: Tensor  # (c, h, w) as the denoiser takes it


@dataclass(frozen=True)
class Item:
    """One picture with its caption. Files are opened when they are encoded.

    ``mask`` is 1 where the picture is learned from; the picture's own path means its transparency.
    """

    image: Tensor | Path | Encoded  # (3, h, w) in [0, 1]
    caption: str
    mask: Tensor | Path | None = None  # (h, w) or (1, h, w); None = the whole picture
    repeats: int = 1  # how often it is seen while others are seen once
    concept: Concept = PLAIN  # what it shares with others: style phrase, sizes, weight, …
    name: str = "the picture"  # for messages

    def __post_init__(self) -> None:
        if not isinstance(self.repeats, int) or self.repeats < 1:
            raise ValueError(f"repeats of {self.name} is {self.repeats!r}, expected a whole number from 1")


def items_from_memory(
    images: Sequence[Tensor] | Tensor,
    captions: Sequence[str] | str,
    masks: Sequence[Tensor | None] | Tensor | None = None,
    *,
    repeats: int = 1,
    concept: Concept = PLAIN,
) -> list[Item]:
    """Items of tensors (3, h, w) in [0, 1]. One text as ``captions`` is the caption of every picture."""
    count = len(images)
    if count == 0:
        raise ValueError("There are no pictures: give at least one")
    captions = [captions] * count if isinstance(captions, str) else captions
    masks = [None] * count if masks is None else masks
    if len(captions) != count:
        raise ValueError(f"Got {count} pictures and {len(captions)} captions: expected as many captions as pictures")
    if len(masks) != count:
        raise ValueError(f"Got {count} pictures and {len(masks)} masks: expected as many masks as pictures")
    return [
        Item(image, one_line(caption), mask, repeats, concept, name=f"picture {number}")
        for number, (image, caption, mask) in enumerate(zip(images, captions, masks, strict=True), start=1)
    ]


def read_folder(
    path: Path | str,
    *,
    repeats: int = 1,
    concept: Concept = PLAIN,
    alpha_masks: bool = False,
    within: Path | None = None,  # a JSONL file may list what is below this folder only; None = anything
) -> list[Item]:
    """The pictures of a folder, in order of their names, without its subfolders; or those that a JSONL file lists.

    Captions are in ``cat.txt`` beside ``cat.png``, or in one JSONL file of the folder; masks in ``cat_mask.png``, or
    with ``alpha_masks`` in the transparency of pictures that have no such file. A style phrase in a line of that file
    counts instead of the concept's.
    ValueError for whatever does not fit together, all of it at once, with the files named.
    """
    path = Path(path)
    if path.is_file() and path.suffix.lower() == ".jsonl":
        files = _Files(rows=read_rows(path))
    elif path.is_dir():
        files = _sort(path)
    elif path.exists():
        raise ValueError(f"{path} is a file: expected a folder with pictures and captions, or a .jsonl file")
    else:
        raise ValueError(f"There is no folder {path}")
    rows, unusable = _rows_beside(files)
    if problems := _problems(files) + unusable + _outside(files, within):
        # A person mends all of it at once: pictures are opened later, but told of here if there is anything to tell.
        problems += _unreadable(files, within)
        raise ValueError(f"{path} cannot be trained on:\n" + "\n".join(f"- {problem}" for problem in problems))
    rows = [*files.rows, *rows]
    _tell_of_own_phrases(path, rows, concept.style_phrase)
    masks = _masks_beside(rows)
    return [
        Item(
            image=row.image,
            caption=row.caption,
            mask=row.mask or masks.get(row.image) or (row.image if alpha_masks else None),
            repeats=repeats * row.repeats,
            concept=concept if row.style_phrase is None else replace(concept, style_phrase=row.style_phrase),
            name=str(row.image),
        )
        for row in rows
    ]


def _tell_of_own_phrases(path: Path, rows: Sequence[Row], stated: str | None) -> None:
    own = dict.fromkeys(row.style_phrase for row in rows if row.style_phrase is not None)
    if stated and own and stated not in own:
        log.warning(
            "Pictures of %s name a style phrase of their own, %s, and keep it: %r is not theirs",
            path, ", ".join(map(repr, own)), stated,
        )  # fmt: skip


def phrase_among(items: Sequence[Item]) -> str:
    """The style phrase of the first of the style's pictures that has one; "" = none has."""
    return next((item.concept.style_phrase for item in items if item.concept.style_phrase), "")


def preserving(items: Sequence[Item], role: str, weight: float) -> list[Item]:
    """The same items for prior preservation: as regularisation pictures, with "pictures" or "base" as ``role``."""
    return [replace(item, concept=replace(item.concept, role=role, weight=weight)) for item in items]


def without_style(items: Sequence[Item], weight: float) -> list[Item]:
    """The style's pictures once more, under their contents alone: there the model is to stay what it is.

    ValueError for captions that hold the style phrase, or for which it is not known where it is.
    """
    items = [item for item in items if item.concept.role == STYLE]
    marked = [
        item.name
        for item in items
        if item.concept.caption_mode != "content" or contains(item.caption, item.concept.style_phrase or "")
    ]
    if marked:
        raise ValueError(
            "For prior preservation on the style's own pictures their captions are taken without the style phrase, "
            f"which is known for the caption mode 'content' and contents alone. Not so: {listed(marked)}. Write "
            "contents, or give regularisation pictures"
        )
    concepts = [replace(item.concept, role=BASE, weight=weight, caption_mode="plain") for item in items]
    return [replace(item, concept=concept) for item, concept in zip(items, concepts, strict=True)]


def check_pictures(items: Sequence[Item]) -> None:
    """Opens every picture and mask. ValueError with everything that cannot be used."""
    problems = []
    for item in items:
        if isinstance(item.image, Encoded):
            continue
        try:
            load_picture(item.image, item.mask, item.name)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))


@dataclass(frozen=True)
class _Files:
    """The content of a folder by its part in a dataset."""

    images: tuple[Path, ...] = ()
    texts: tuple[Path, ...] = ()
    masks: tuple[Path, ...] = ()
    rows: Sequence[Row] = ()


def _visible(folder: Path) -> list[Path]:
    """Files in order of their names, without hidden ones, such as the ``._cat.png`` that macOS leaves behind."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _masks_among(files: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and f.stem.endswith(MASK_ENDING))


def _sort(folder: Path) -> _Files:
    """Files of a folder. ValueError where there is no picture, or more than one JSONL file."""
    files = _visible(folder)
    masks = _masks_among(files)
    images = tuple(f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and f not in masks)
    lists = [file for file in files if file.suffix.lower() == ".jsonl"]
    if len(lists) > 1:
        names = listed([file.name for file in lists])
        raise ValueError(f"{folder} holds several .jsonl files ({names}): name the one to use")
    if not images and not lists:
        raise ValueError(_no_images(folder, files, masks))
    texts = tuple(f for f in files if f.suffix.lower() == ".txt")
    return _Files(images, texts, masks, read_rows(lists[0]) if lists else [])


def _no_images(folder: Path, files: list[Path], masks: tuple[Path, ...]) -> str:
    kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
    if masks:
        found = f"only masks ({listed([file.name for file in masks])}); a picture's name cannot end in {MASK_ENDING}"
    else:
        found = f"{listed([file.name for file in files])}" if files else "no files"
    below = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    hint = f". Its subfolders ({listed(below)}) are not searched: name them one by one" if below else ""
    return f"No pictures in {folder}: expected {kinds}, found {found}{hint}"


def _problems(files: _Files) -> list[str]:
    """What does not fit together, one line each; empty = nothing."""
    by_list = {row.image for row in files.rows}
    stems = {image.stem for image in files.images} | {image.stem for image in by_list}
    texts = {text.stem: text for text in files.texts}
    found = [
        (
            [image.name for image in files.images if image not in by_list and image.stem not in texts],
            "Pictures without captions: {}. Write what each shows into a .txt file of its name",
        ),
        (
            [image.name for image in files.images if image in by_list and image.stem in texts],
            "Pictures with a caption in the .jsonl file and in a .txt file: {}. Remove one of them",
        ),
        (
            [text.name for text in files.texts if text.stem not in stems],
            "Captions without pictures: {}. Add the pictures, or remove the files",
        ),
        (
            [f"{row.image} ({row.place})" for row in files.rows if not row.image.is_file()],
            "Pictures that are listed but missing: {}",
        ),
        (
            [f"{row.mask} ({row.place})" for row in files.rows if row.mask and not row.mask.is_file()],
            "Masks that are listed but missing: {}",
        ),
        (
            [m.name for m in files.masks if _of_mask(m) not in stems and files.images and m not in by_list],
            f"Masks without pictures: {{}}. A name that ends in {MASK_ENDING} means the mask of another picture",
        ),
    ]
    return [message.format(listed(names)) for names, message in found if names]


def _outside(files: _Files, folder: Path | None) -> list[str]:
    """What is listed and not below the folder, in one line."""
    named = [(path, row.place) for row in files.rows for path in (row.image, row.mask) if path is not None]
    strays = [f"{path} ({place})" for path, place in named if not _is_below(path, folder)]
    return [f"Files that are listed and not below {folder}: {listed(strays)}"] if strays else []


def _is_below(path: Path, folder: Path | None) -> bool:
    return folder is None or path.resolve().is_relative_to(folder.resolve())


def _unreadable(files: _Files, within: Path | None) -> list[str]:
    """What is wrong with pictures and masks themselves, of those that are there and may be opened."""
    pictures = dict.fromkeys([*files.images, *(row.image for row in files.rows)])
    masks = dict.fromkeys([*files.masks, *(row.mask for row in files.rows if row.mask)])
    found = []
    for path in [*pictures, *masks]:
        try:
            if path.is_file() and _is_below(path, within):
                load_picture(path, None, str(path))
        except ValueError as error:
            found.append(str(error))
    return found


def _of_mask(mask: Path) -> str:
    return mask.stem.removesuffix(MASK_ENDING)


def _rows_beside(files: _Files) -> tuple[list[Row], list[str]]:
    """The pictures with a text file of their own, and what is wrong with those files."""
    texts = {text.stem: text for text in files.texts}
    by_list = {row.image for row in files.rows}
    rows, problems = [], []
    for image in files.images:
        if image not in by_list and image.stem in texts:
            try:
                rows.append(Row(image, one_line(read_text(texts[image.stem])), None, 1, texts[image.stem].name))
            except ValueError as error:
                problems.append(str(error))
    if empty := [row.place for row in rows if not row.caption]:
        problems.append(f"Empty captions: {listed(empty)}. Write what the picture shows, such as 'a cat'")
    return rows, problems


def _masks_beside(rows: Sequence[Row]) -> dict[Path, Path]:
    """Masks by their pictures' paths, from the folders that the pictures are in."""
    folders = dict.fromkeys(row.image.parent for row in rows)
    masks = {(mask.parent, _of_mask(mask)): mask for folder in folders for mask in _masks_among(_visible(folder))}
    return {row.image: masks[place] for row in rows if (place := (row.image.parent, row.image.stem)) in masks}

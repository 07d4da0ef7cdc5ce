"""Pictures and captions in, a dataset out."""

from comfy_api.latest import io
from torch import Tensor

from ..training.data.captions import CAPTION_MODES, Caption, complete
from ..training.data.items import Item, check_pictures, items_from_memory, read_folder
from .bridge.files import input_folder, picture_folder, picture_folders
from .sockets import DATASET, StyleDataset

NO_FOLDER = "[from the images input]"


class StyleDatasetNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StyleDataset",
            display_name="Style Dataset",
            category="stylewright/data",
            description=(
                "Pictures of one style with their captions. Pictures come from a link, a batch or a list of batches of "
                "any sizes, or from a folder with a .txt file beside each picture."
            ),
            search_aliases=["training images", "captions", "image folder", "dataset", "style reference"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", optional=True, tooltip="The pictures, where no folder is chosen."),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="One mask a picture, of its size: white is learned from, black is not.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    placeholder="a cat sitting on a chair\na house by a lake",
                    tooltip="What each picture shows: one line a picture, or one line for all. Leave the style out.",
                ),
                io.String.Input(
                    "style_phrase",
                    default="watercolor painting",
                    tooltip=(
                        "The words that name the style in every caption and later in your prompts: "
                        "'(content) in (style phrase) style'."
                    ),
                ),
                io.Int.Input(
                    "resolution",
                    default=1024,
                    min=64,
                    max=4096,
                    step=16,
                    tooltip=(
                        "Pictures are trained at about resolution x resolution pixels, each in the aspect ratio "
                        "nearest its own. 1024 for FLUX, SD3.5 and SDXL, 512 for SD1.5, 128 for the embedded model."
                    ),
                ),
                io.Combo.Input(
                    "folder",
                    options=[NO_FOLDER, *picture_folders()],
                    default=NO_FOLDER,
                    tooltip=(
                        "A folder below ComfyUI's input folder, with cat.txt beside cat.png, or with a .jsonl file of "
                        "file and caption. Masks are cat_mask.png."
                    ),
                ),
                io.Combo.Input(
                    "caption_mode",
                    options=list(CAPTION_MODES),
                    default="content",
                    advanced=True,
                    tooltip="content: captions say what is shown, and the style phrase is added. full: they have it.",
                ),
            ],
            outputs=[
                DATASET.Output("dataset", tooltip="For the trainer."),
                io.String.Output("captions", tooltip="The complete captions that are trained on, one line a picture."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: list[str] | None = None, **unused: object) -> object:
        """A folder is read again when a file of it changes."""
        if not folder or folder[0] == NO_FOLDER:
            return None
        files = sorted(path for path in picture_folder(folder[0]).iterdir() if path.is_file())
        return [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files]

    @classmethod
    def execute(
        cls,
        captions: list[str],
        style_phrase: list[str],
        resolution: list[int],
        folder: list[str],
        caption_mode: list[str],
        images: list[Tensor] | None = None,
        masks: list[Tensor] | None = None,
    ) -> io.NodeOutput:
        phrase = style_phrase[0].strip()
        if folder[0] == NO_FOLDER:
            items = linked_items(images, masks, captions)
        else:
            refuse_both(images, masks, captions, folder[0])
            items = read_folder(picture_folder(folder[0]), within=input_folder())
        check_pictures(items)
        texts = complete([Caption(item.name, item.caption, phrase) for item in items], caption_mode[0])
        dataset = StyleDataset(tuple(items), phrase, caption_mode[0], resolution[0])
        return io.NodeOutput(dataset, "\n".join(texts))


def linked_items(images: list[Tensor] | None, masks: list[Tensor] | None, captions: list[str]) -> list[Item]:
    """Items of linked batches (b, h, w, c) with masks (b, h, w). ValueError where their numbers differ."""
    pictures = [picture[..., :3].movedim(-1, 0) for batch in images or [] for picture in batch]
    if not pictures:
        raise ValueError("there are no pictures: link some to 'images', or choose a folder")
    white = None if masks is None else [mask for batch in masks for mask in _batched(batch)]
    return items_from_memory(pictures, lines(captions), white)


def _batched(mask: Tensor) -> Tensor:
    return mask if mask.ndim == 3 else mask[None]


def lines(captions: list[str]) -> list[str] | str:
    """One caption a picture: a list as it came, or the lines of one text. A single line is the caption of all."""
    if len(captions) > 1:
        return captions
    texts = [line for line in captions[0].splitlines() if line.strip()]
    if not texts:
        raise ValueError("there are no captions: write what each picture shows, one line a picture")
    return texts[0] if len(texts) == 1 else texts


def refuse_both(images: object, masks: object, captions: list[str], folder: str) -> None:
    """ValueError where a folder and links or captions are both given: one of them would be ignored."""
    given = [name for name, value in (("images", images), ("masks", masks)) if value is not None]
    given += ["captions"] if any(text.strip() for text in captions) else []
    if given:
        raise ValueError(
            f"the pictures and captions come from the folder {folder!r}, so {' and '.join(given)} would be ignored: "
            f"unlink and empty them, or set the folder to {NO_FOLDER!r}"
        )

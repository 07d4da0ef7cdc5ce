"""Pictures and captions in, a dataset out."""

from collections.abc import Sequence
from dataclasses import replace

from comfy_api.latest import io
from torch import Tensor

from ..training.data.captions import CAPTION_MODES
from ..training.data.concepts import Concept
from ..training.data.encoding import spellings
from ..training.data.items import check_pictures, phrase_among, read_folder
from .bridge.conditioning import encoded_captions
from .bridge.files import files_of, input_folder, picture_folder, picture_folders
from .pictures import lines, linked_items, one_for_all, sizes
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
                    tooltip=(
                        "One mask a picture: white is learned from, black is not. What you paint in the mask editor is "
                        "white; for pictures with a transparent background switch invert_masks on."
                    ),
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
                    tooltip=(
                        "content: captions say what is shown, and the style phrase is added. full: they have it. "
                        "plain: they are taken as they are, as for regularisation pictures in no style."
                    ),
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip=(
                        "Captions as you encoded them, instead of texts: one for all pictures, or one a picture, as a "
                        "list or joined by Conditioning (Combine)."
                    ),
                ),
                io.Int.Input(
                    "repeats",
                    default=1,
                    min=1,
                    max=10_000,
                    optional=True,
                    advanced=True,
                    tooltip="How often these pictures are seen while those of other datasets with 1 are seen once.",
                ),
                io.String.Input(
                    "more_resolutions",
                    default="",
                    placeholder="512, 768",
                    optional=True,
                    advanced=True,
                    tooltip="Further sizes at which the same pictures are trained, beside resolution. Empty: none.",
                ),
                io.Int.Input(
                    "caption_orders",
                    default=1,
                    min=1,
                    max=100,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "In how many orders the tags between a caption's commas are trained, the written one among "
                        "them. 1: as written."
                    ),
                ),
                io.Int.Input(
                    "keep_tags",
                    default=0,
                    min=0,
                    max=100,
                    optional=True,
                    advanced=True,
                    tooltip="How many tags stay in front whatever the order.",
                ),
                io.Boolean.Input(
                    "invert_masks",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Learn from the black parts of linked masks: Load Image gives what is opaque as black.",
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
        files = files_of(picture_folder(folder[0]))
        return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files]

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
        conditioning: list[list] | None = None,
        repeats: Sequence[int] = (1,),
        more_resolutions: Sequence[str] = ("",),
        caption_orders: Sequence[int] = (1,),
        keep_tags: Sequence[int] = (0,),
        invert_masks: Sequence[bool] = (False,),
    ) -> io.NodeOutput:
        answers = {}
        concept = Concept(
            style_phrase=style_phrase[0].strip(),
            caption_mode=caption_mode[0],
            resolutions=sizes(resolution[0], more_resolutions[0]),
            orders=caption_orders[0],
            keep=keep_tags[0],
        )
        if folder[0] != NO_FOLDER:
            refuse_both(images, masks, conditioning, captions, folder[0])
            items = read_folder(picture_folder(folder[0]), repeats=repeats[0], concept=concept, within=input_folder())
        else:
            if conditioning is not None:
                refuse_texts(captions, caption_orders[0])
                encoded = encoded_captions(conditioning)
                answers, concept = encoded.answers, replace(concept, caption_mode="plain")
                texts = one_for_all(encoded.captions)
            else:
                texts = lines(captions)
            items = linked_items(images, masks, texts, inverted=invert_masks[0], repeats=repeats[0], concept=concept)
        check_pictures(items)
        texts = spellings(items, concept.style_phrase or "", caption_mode[0], seed=0)
        phrase = concept.style_phrase or phrase_among(items)
        dataset = StyleDataset(tuple(items), phrase, caption_mode[0], resolution[0], answers=answers)
        return io.NodeOutput(dataset, "\n".join(written for written, *_ in texts))


def refuse_texts(captions: Sequence[str], orders: int) -> None:
    """ValueError where captions come from conditioning, and something is asked of texts."""
    if any(text.strip() for text in captions):
        raise ValueError("the captions come from 'conditioning', so 'captions' would be ignored: empty them")
    if orders > 1:
        raise ValueError("the captions come from 'conditioning', which has no tags to shuffle: set caption_orders to 1")


def refuse_both(images: object, masks: object, conditioning: object, captions: Sequence[str], folder: str) -> None:
    """ValueError where a folder and links or captions are both given: one of them would be ignored."""
    links = (("images", images), ("masks", masks), ("conditioning", conditioning))
    given = [name for name, value in links if value is not None]
    given += ["captions"] if any(text.strip() for text in captions) else []
    if given:
        raise ValueError(
            f"the pictures and captions come from the folder {folder!r}, so {' and '.join(given)} would be ignored: "
            f"unlink and empty them, or set the folder to {NO_FOLDER!r}"
        )

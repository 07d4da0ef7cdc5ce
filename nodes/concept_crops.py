"""FineStyle's concept-oriented data scaling: of one picture and its prompt, crops of what the prompt names."""

import logging
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..training.concepts.boxes import BoxOptions, cut
from ..training.concepts.crops import CropOptions, enlarged
from ..training.concepts.drawing import draw_found
from ..training.concepts.locate import Search
from ..training.concepts.phrases import lines_of, read_phrases, repeated
from ..training.concepts.reference import Locate, competing, find, items_found
from ..training.data.images import check_pixels
from ..training.data.items import Item
from .concept_crops_inputs import boxes, cutting, looking
from .pictures import one_picture
from .sockets import DATASET, StyleDataset

logger = logging.getLogger(__name__)


class ConceptCrops(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptCrops",
            display_name="Concept Crops (FineStyle)",
            category="stylewright/data",
            description=(
                "Which part of a picture belongs to which words of its prompt: crops around each content phrase, with "
                "prompts of their own, beside the whole picture. A frozen model finds the places, or your masks do."
            ),
            search_aliases=["finestyle", "concepts", "leakage", "attention map", "daam", "crop", "bounding box"],
            inputs=[
                io.Image.Input("image", tooltip="The reference: one picture."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    placeholder="a woman with a laptop and a potted plant in flat cartoon style",
                    tooltip="What the whole picture shows and how it is drawn. The phrases below are parts of it.",
                ),
                io.String.Input(
                    "content_phrases",
                    default="",
                    multiline=True,
                    placeholder="a woman\na laptop\na potted plant",
                    tooltip="What is shown, one phrase a line, the words of the prompt, in any case. Each gets crops.",
                ),
                io.String.Input(
                    "style_phrases",
                    default="",
                    multiline=True,
                    placeholder="flat cartoon",
                    tooltip=(
                        "The words that name the style, one phrase a line: prompts of crops are '(content) in (style) "
                        "style'. The first is the dataset's style phrase."
                    ),
                ),
                io.Int.Input(
                    "resolution",
                    default=1024,
                    min=64,
                    max=4096,
                    step=16,
                    tooltip=(
                        "Picture and crops are trained at about resolution x resolution pixels, and the model looks at "
                        "the picture so. 1024 for FLUX, SD3.5 and SDXL, 512 for SD1.5, 128 for the embedded model."
                    ),
                ),
                io.Model.Input("model", optional=True, tooltip="Finds the phrases: the model that will be trained."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder of the model."),
                io.Vae.Input("vae", optional=True, tooltip="The VAE of the model."),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="Where phrases are, in white, instead of what the model finds: a batch, one mask a phrase.",
                ),
                io.String.Input(
                    "masked_phrases",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Which content phrases the masks are of, one a line. Empty: all, in their order.",
                ),
                *boxes(),
                *cutting(),
                *looking(),
            ],
            outputs=[
                DATASET.Output("dataset", tooltip="The whole picture and the crops, for the trainer."),
                io.Image.Output(
                    "preview", tooltip="What each phrase took: its map, its own box (thin), its crop (thick)."
                ),
                io.Image.Output("crops", is_output_list=True, tooltip="The crop of each phrase, as it is cut out."),
                io.String.Output("prompts", tooltip="The prompts that are trained, with their shares, one a line."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        prompt: str,
        content_phrases: str,
        style_phrases: str,
        resolution: int,
        model: object = None,
        clip: object = None,
        vae: object = None,
        masks: Tensor | None = None,
        masked_phrases: str = "",
        threshold: str = "share",
        share: float = 0.45,
        padding: float = 0.15,
        shape: str = "square",
        least_side: float = 0.3,
        whole_share: float = 0.4,
        variants: int = 4,
        jitter: float = 0.1,
        outside_weight: float = 1.0,
        noises: int = 4,
        seed: int = 0,
        locate_by: str = "attention",
    ) -> io.NodeOutput:
        picture = check_pixels(one_picture(image), "the reference")
        phrases = read_phrases(prompt, content_phrases, style_phrases)
        how = BoxOptions(threshold, share, padding, shape, least_side)
        parts = CropOptions(whole_share or None, variants, jitter, outside_weight)
        given = _masks(masks, lines_of(masked_phrases), phrases.content)
        search = Search(noises=noises, seed=seed)
        asked = {"picture": picture, "prompt": phrases.prompt, "search": search, "resolution": resolution}
        locate = _locator(model, clip, vae, by=locate_by, **asked)
        found = find(picture, phrases, given, locate, how)
        items = items_found(picture, phrases, found, parts, seed=seed, resolutions=(resolution,))
        note = enlarged({each.phrase: each.crop for each in found}, resolution)
        if note:
            logger.warning("Concept Crops: %s", note)
        dataset = StyleDataset(tuple(items), phrases.style[0], "full", resolution, notes=(note,) if note else ())
        logger.info("Concept Crops: %s", "; ".join(map(str, found)))
        preview = draw_found(picture, found).movedim(0, -1)[None]
        crops = [cut(picture, each.crop).movedim(0, -1)[None].contiguous() for each in found]
        return io.NodeOutput(dataset, preview, crops, _summary(items))


def _masks(masks: Tensor | None, named: tuple[str, ...], content: tuple[str, ...]) -> dict[str, Tensor]:
    """Masks by phrase: of those that are named, or of all. ValueError where they are not as many."""
    if masks is None:
        if named:
            raise ValueError(
                f"masked_phrases names {', '.join(named)}, and no masks are linked: link them, or empty it"
            )
        return {}
    if twice := repeated(named):
        raise ValueError(f"masked_phrases names {', '.join(map(repr, twice))} twice: each phrase has one mask")
    phrases = named or content
    batch = masks[None] if masks.ndim == 2 else masks
    if len(batch) != len(phrases):
        raise ValueError(
            f"there are {len(batch)} masks for {len(phrases)} phrases ({', '.join(phrases)}): give one for each, or "
            "name in masked_phrases which they are of"
        )
    return dict(zip(phrases, batch, strict=True))


def _locator(model: Any, clip: Any, vae: Any, **asked: Any) -> Locate | None:
    """By the model where one is linked. ValueError where a part of it is missing."""
    linked = {"model": model, "clip": clip, "vae": vae}
    if all(part is None for part in linked.values()):
        return None
    if missing := [name for name, part in linked.items() if part is None]:
        raise ValueError(f"to find phrases a model needs its text encoder and VAE: link {' and '.join(missing)}, too")
    from .bridge.attention_maps import phrase_maps  # not at start-up

    return lambda known: phrase_maps(model, clip, vae, phrases=competing(known, asked["by"]), **asked)


def _summary(items: Sequence[Item]) -> str:
    """The prompts with their shares of the samples, one a line."""
    sights: dict[str, int] = {}
    for item in items:
        sights[item.caption] = sights.get(item.caption, 0) + item.repeats
    return "\n".join(f"{100 * seen / sum(sights.values()):.3g} %  {caption}" for caption, seen in sights.items())

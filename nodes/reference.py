"""Pictures of the embedded model's world in styles that it has never seen: something to learn from."""

import torch
from comfy_api.latest import io
from torch import Tensor

from ..training.data.captions import styled
from ..training.embedded.renderer import HELD_OUT_STYLES, SUBJECTS, extents, render, scene_of
from ..training.embedded.several import MOST, several
from ..training.embedded.vocabulary import FREE_WORDS
from ..training.randomness import generator


class ReferenceNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StylewrightReference",
            display_name="Reference Picture (embedded model)",
            category="stylewright/data",
            description=(
                "Draws pictures in a style that the embedded model was never shown, with the captions and the style "
                "phrase to learn them by."
            ),
            search_aliases=["example picture", "style reference", "demo image", "stylewright"],
            inputs=[
                io.Combo.Input(
                    "style",
                    options=list(HELD_OUT_STYLES),
                    default="glacier",
                    tooltip="A style outside the model's training: a new combination, a new palette or a new ground.",
                ),
                io.Combo.Input(
                    "subject",
                    options=list(SUBJECTS),
                    default="star",
                    tooltip="What the first picture shows; further pictures show the subjects after it in this list.",
                ),
                io.Int.Input(
                    "count",
                    default=1,
                    min=1,
                    max=len(SUBJECTS),
                    tooltip="How many pictures. One is enough for a style. With together: how many subjects, 2 to 4.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,  # another picture is another training
                    tooltip="Places, turns and scales the subjects. The same seed draws the same pictures.",
                ),
                io.Boolean.Input(
                    "together",
                    default=False,
                    optional=True,
                    tooltip="All subjects in one picture, 2 to 4 of them, each in a quarter of its own.",
                ),
            ],
            outputs=[
                io.Image.Output("images", tooltip="The pictures, 128x128."),
                io.String.Output("captions", tooltip="What each picture shows, one line a picture, without the style."),
                io.String.Output(
                    "style_phrase", tooltip="A free word of the model's vocabulary, to name the style by."
                ),
                io.Mask.Output("masks", tooltip="Where each subject is, in white: its box. A mask a subject."),
                io.String.Output("prompts", tooltip="The captions with the style, one line a picture."),
                io.String.Output("subjects", tooltip="All subjects that are shown, one a line."),
            ],
        )

    @classmethod
    def execute(cls, style: str, subject: str, count: int, seed: int, together: bool = False) -> io.NodeOutput:
        first = SUBJECTS.index(subject)
        subjects = [(first + i) % len(SUBJECTS) for i in range(count)]
        names, draw = [SUBJECTS[i] for i in subjects], generator(seed, "reference", style)
        if together and not 2 <= count <= MOST:
            raise ValueError(
                f"count is {count}, and together shows 2 to {MOST} different subjects in one picture: set count to 2 "
                f"to {MOST}, or switch together off"
            )
        if together:
            found = several(subjects, HELD_OUT_STYLES[style], draw)
            pictures, boxes, captions = found.picture[None], found.boxes, [found.content]
        else:
            scenes = scene_of(torch.tensor(subjects), HELD_OUT_STYLES[style], draw)
            pictures, boxes, captions = render(scenes), extents(scenes), names
        prompts = [styled(caption, FREE_WORDS[0]) for caption in captions]
        return io.NodeOutput(
            pictures.movedim(1, -1).contiguous(),
            "\n".join(captions),
            FREE_WORDS[0],
            _masks(boxes, pictures.shape[-1]),
            "\n".join(prompts),
            "\n".join(names),
        )


def _masks(boxes: Tensor, size: int) -> Tensor:
    """(b, size, size), 1 inside of each box (b, 4)."""
    masks = torch.zeros(len(boxes), size, size)
    for mask, (left, top, right, bottom) in zip(masks, boxes.tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return masks

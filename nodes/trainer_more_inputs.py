"""Inputs of the trainer that came later: runs that go on, memory, other beginnings, text encoders, DCO,
StyleInject, a teacher.

Each is optional, with its default in ``execute`` too, so that prompts from before it run as they did. Add at the end.
"""

from comfy_api.latest import io

from ..training.adapters.targets import TEXT_TARGETS
from ..training.loops.config import MEMORY
from ..training.style_inject import FORMS
from .bridge.resuming import AUTOMATIC, RESUME
from .sockets import LORA


def keeping() -> list[io.Input]:
    """The widgets of how a run goes on, and of what it leaves behind."""
    return [
        io.Combo.Input(
            "resume",
            options=list(RESUME),
            default=AUTOMATIC,
            optional=True,
            tooltip=(
                "automatic: goes on with the run of this file name and these options, also with more steps, or begins "
                "one. continue: an error that names what differs where there is none to go on with. begin anew: always "
                "a new run. use as it is: trains nothing, and gives what the run has learned so far."
            ),
        ),
        io.Boolean.Input(
            "save_intermediate",
            default=False,
            optional=True,
            advanced=True,
            tooltip="Puts the adapter of every checkpoint into models/loras too, with its step in the name.",
        ),
        io.Int.Input(
            "keep_checkpoints",
            default=3,
            min=0,
            max=1000,
            optional=True,
            advanced=True,
            tooltip=(
                "How many finished runs of this file name can be trained further. Each checkpoint takes three to five "
                "times the space of its adapter; of older ones it is deleted. Interrupted runs keep theirs."
            ),
        ),
    ]


def fitting() -> list[io.Input]:
    """The widget of what is done to fit into the device's memory."""
    return [
        io.Combo.Input(
            "memory",
            options=list(MEMORY),
            default=MEMORY[0],
            optional=True,
            advanced=True,
            tooltip=(
                "automatic: a plan is made before training and shown. With gradient_checkpointing on, it recomputes "
                "as few blocks as fit, then moves activations to CPU memory; then, either way, weights are streamed; "
                "what does not fit is refused with what would. as set: gradient_checkpointing alone decides, for all "
                "blocks. The adapter is the same bit for bit."
            ),
        ),
    ]


def starting() -> list[io.Input]:
    """Where a run begins."""
    return [
        LORA.Input(
            "init_lora",
            optional=True,
            tooltip="An adapter to begin with, of the same method: from Resize Style LoRA, or another trainer. At "
            "another rank than this node's it is padded, or cut to the nearest of this rank.",
        )
    ]


def given() -> list[io.Input]:
    """The sockets for what somebody has encoded already."""
    return [
        io.Latent.Input(
            "latents",
            optional=True,
            tooltip=(
                "Instead of a dataset: encoded pictures, one batch or a list of batches of any sizes. A noise mask is "
                "where it is learned."
            ),
        ),
        io.Conditioning.Input(
            "conditioning",
            optional=True,
            tooltip=(
                "The captions of these latents as you encoded them: one for all, or one a latent, as a list or joined "
                "by Conditioning (Combine)."
            ),
        ),
    ]


def text_encoder() -> list[io.Input]:
    """The widgets of what is trained besides the model."""
    return [
        io.Float.Input(
            "text_encoder_learning_rate",
            default=0.0,
            min=0.0,
            max=10.0,
            step=1e-6,
            round=1e-9,
            optional=True,
            advanced=True,
            tooltip=(
                "Trains the CLIP text encoders too, at this rate: of SD1.5, SD2, SDXL, SD3, FLUX.1. 5e-6 is what "
                "diffusers' DreamBooth scripts take. 0 = they stay as they are, as in the paper."
            ),
        ),
        io.Combo.Input(
            "text_encoder_targets",
            options=list(TEXT_TARGETS),
            default="attention",
            optional=True,
            advanced=True,
            tooltip="Layers of the text encoders: attention, as in diffusers, or all, with the MLPs, as in kohya's.",
        ),
    ]


def consistency() -> list[io.Input]:
    """The widget of the loss that the base model takes part in."""
    return [
        io.Float.Input(
            "dco_beta",
            default=0.0,
            min=0.0,
            max=1e6,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="Of the loss dco: how soon doing better than the base model is enough. 0 = what is published: 1000 "
            "for SD and SDXL, 1 for SD3, FLUX and other flows.",
        ),
    ]


def style_inject() -> list[io.Input]:
    """The widgets of the method of that name."""
    return [
        io.Int.Input(
            "branches",
            default=4,
            min=1,
            max=64,
            optional=True,
            advanced=True,
            tooltip=(
                "Of the method styleinject: down-projections, each of the rank, which a router weighs for each "
                "picture. Of about the size of a LoRA of rank 16: 4 branches of rank 4."
            ),
        ),
        io.Combo.Input(
            "injection",
            options=list(FORMS),
            default=FORMS[0],
            optional=True,
            advanced=True,
            tooltip=(
                "Of the method styleinject. f2c: spreads of features change with the input, and their means stay. f1: "
                "one new spread for each channel. f2: as f2c, and means may move. lora: branches alone, to compare."
            ),
        ),
    ]


def teaching() -> list[io.Input]:
    """The socket for a model to learn from."""
    return [
        io.Model.Input(
            "teacher",
            optional=True,
            tooltip=(
                "Another MODEL of the family, a fine-tune or a base with LoRAs: what it answers is learned instead of "
                "pictures. No images are needed: link latents that it has drawn, and their conditioning. With a "
                "dataset it is asked at those pictures."
            ),
        ),
    ]


def bottleneck() -> list[io.Input]:
    """The widget of the method of that name."""
    return [
        io.Boolean.Input(
            "shared_bottleneck",
            default=False,
            optional=True,
            advanced=True,
            tooltip=(
                "Of the method bottleneck: layers of equal width share their projections, and each has two vectors of "
                "its own. A small part of the size."
            ),
        ),
    ]

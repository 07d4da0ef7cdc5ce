"""The inputs of the trainer. Their ids and their order are part of every shared workflow: add at the end only.

What is added is optional, with its default in ``execute`` too, so that prompts from before it run as they did.
"""

from comfy_api.latest import io

from ..training.adapters.methods import METHODS
from ..training.adapters.targets import TARGETS
from ..training.loops.optimizers import OPTIMIZERS
from ..training.losses import CHOICES as LOSS_CHOICES
from ..training.weightings import WEIGHTINGS
from . import training_widgets as widgets
from .sockets import DATASET, DENSITY

PRESETS = list(dict.fromkeys(preset for presets in TARGETS.values() for preset in presets))


def links() -> list[io.Input]:
    """The sockets."""
    return [
        io.Model.Input(
            "model",
            tooltip="What is trained. LoRAs and patches of nodes before count as part of it, and it stays as is.",
        ),
        io.Clip.Input(
            "clip",
            optional=True,
            tooltip=(
                "The model's text encoder: captions are encoded once, before training. Only where all captions are "
                "conditioning and no sample pictures are drawn there need be none."
            ),
        ),
        io.Vae.Input(
            "vae",
            optional=True,
            tooltip=(
                "The model's VAE: pictures are encoded once, before training. Only where latents are linked and no "
                "sample pictures are drawn there need be none."
            ),
        ),
        DATASET.Input(
            "dataset",
            optional=True,
            tooltip="The pictures and captions, from Style Dataset or Combine Style Datasets.",
        ),
        DENSITY.Input(
            "density",
            optional=True,
            tooltip="Which noise levels are drawn, from Noise Level Density. None: N(-6, 2²), the paper's law.",
        ),
    ]


def plain() -> list[io.Input]:
    """The widgets that are always shown, in order."""
    return [
        io.Int.Input(
            "steps",
            default=300,
            min=1,
            max=1_000_000,
            tooltip="Optimizer steps. The paper: 300 for a style of one picture.",
        ),
        io.Float.Input(
            "learning_rate",
            default=1e-4,
            min=0.0,
            max=10.0,
            step=1e-6,
            round=1e-9,
            tooltip="1e-4 is the paper's. About 1 for the optimizer prodigy, which finds its own.",
        ),
        io.Int.Input(
            "rank",
            default=32,
            min=1,
            max=1024,
            tooltip="Size of the adapter: how much it can learn, and its file's size. Of oft it is large anyhow.",
        ),
        io.Float.Input(
            "alpha",
            default=0.0,
            min=0.0,
            max=4096.0,
            step=0.5,
            tooltip="The adapter is scaled by alpha / rank. 0 = equal to the rank, a scale of 1, as in the paper.",
        ),
        io.Int.Input("batch_size", default=1, min=1, max=256, tooltip="Samples at once. More needs more memory."),
        io.Int.Input(
            "accumulation",
            default=4,
            min=1,
            max=1024,
            tooltip="Batches to an optimizer step. Noise levels are spread evenly over all samples of a step.",
        ),
        io.Combo.Input(
            "method",
            options=list(METHODS),
            default="lora",
            tooltip=(
                "Kind of adapter. lora loads everywhere; the others load in ComfyUI, and styleinject and bottleneck, "
                "which are no changes of weights, with Load Style LoRA alone."
            ),
        ),
        io.Combo.Input("optimizer", options=list(OPTIMIZERS), default="adam", tooltip="adam is the paper's."),
        io.Combo.Input(
            "targets",
            options=PRESETS,
            default="style",
            tooltip=(
                "Which layers are adapted. style: the paper's list for FLUX, its kin and SD3.5, attention layers for "
                "SD1.5, SDXL and PixArt, the layers of the blocks elsewhere. kv_text: keys and values of the text, "
                "FineStyle's. kv_both: keys and values of text and picture."
            ),
        ),
        widgets.seed("The same seed and settings give the same adapter."),
        widgets.precision(
            "Of the arithmetic: automatic is bfloat16 on a GPU, and float32 on a CPU, where bfloat16 is slow. The "
            "adapter's weights are kept in float32 either way."
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=True,
            tooltip=(
                "Computes activations twice instead of keeping them: far less memory, a third more time. With the "
                "memory input on automatic it is done for as many blocks as the device needs, which may be none."
            ),
        ),
        io.String.Input(
            "file_name",
            default="stylewright/style",
            tooltip="Where the adapter goes, below models/loras. A number is added, and nothing is ever overwritten.",
        ),
        widgets.sample_prompt(
            "What to draw while training, one line a picture; the style phrase is added. Empty: nothing."
        ),
        widgets.sample_every(50),
    ]


def advanced() -> list[io.Input]:
    """The widgets that a user has to ask for."""
    return [
        widgets.sample_steps("Sampling steps of a picture."),
        widgets.sample_cfg("these"),
        widgets.scheduler("How the learning rate goes over the run."),
        widgets.warm_up("Steps over which the learning rate grows first."),
        widgets.weight_decay("Pulls the adapter to zero."),
        widgets.clip_norm("a step's gradient"),
        widgets.ema_decay(0.0, "Saves a moving average of the adapter with this decay, for example 0.99. 0 = none."),
        io.Float.Input(
            "caption_dropout",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="Share of samples that are trained with an empty prompt.",
        ),
        io.Float.Input(
            "dropout", default=0.0, min=0.0, max=0.95, step=0.01, advanced=True, tooltip="Dropout within the adapter."
        ),
        io.Combo.Input(
            "loss",
            options=list(LOSS_CHOICES),
            default="mse",
            advanced=True,
            tooltip="How a prediction's error is measured. dco: how much smaller it is than the base model's, which "
            "keeps the adapter near it; takes a third longer. See dco_beta.",
        ),
        io.Combo.Input(
            "weighting",
            options=list(WEIGHTINGS),
            default="none",
            advanced=True,
            tooltip="A factor on the loss by noise level. The paper takes none: the density does that work.",
        ),
        io.Float.Input(
            "offset_noise",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="Noise that is constant over a picture, for very dark or bright styles. 0.01 is in use for FLUX.",
        ),
        widgets.save_every(100),
        widgets.target_patterns(),
    ]

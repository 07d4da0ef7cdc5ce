"""The inputs of the distiller. Their ids and their order are part of every shared workflow: add at the end only."""

from comfy_api.latest import io

from ..training.adapters.methods import METHODS, UNMERGEABLE
from ..training.distillation import CONVENTIONS, DMD
from ..training.loops.optimizers import OPTIMIZERS
from . import training_widgets as widgets
from .trainer_inputs import PRESETS

AS_THE_CONVENTION = -1.0  # a guidance scale that is none


def links() -> list[io.Input]:
    """The sockets."""
    return [
        io.Model.Input(
            "teacher",
            tooltip="What draws in many steps. LoRAs and patches of nodes before count as part of it: with a style's "
            "LoRA the student draws the style, and its file has that LoRA inside. The model stays as it is.",
        ),
        io.Clip.Input("clip", tooltip="The model's text encoder, which tells it the prompts."),
        io.Vae.Input("vae", optional=True, tooltip="The model's VAE. Needed for sample pictures only."),
        io.Model.Input(
            "student",
            optional=True,
            tooltip="The same model with a student's LoRA on it, to begin with: yours, or a published one of one step "
            "or a few. None: the student begins as the teacher.",
        ),
    ]


def plain() -> list[io.Input]:
    """The widgets that are always shown, in order."""
    return [
        io.String.Input(
            "prompts",
            default="",
            multiline=True,
            placeholder="{circle|star} in {jazz|opera} style",
            tooltip="What to learn from, one prompt a line, with alternatives in braces, which cannot be within each "
            "other. Each line is as likely as any other. A line that begins with # is left out.",
        ),
        io.String.Input(
            "negatives",
            default="",
            multiline=True,
            placeholder="blurry, low quality",
            tooltip="NASA-T: negative prompts, one a line, which the teacher is guided away from, and the student "
            "inside its attention. Braces stand for alternatives here, too. Empty: none.",
        ),
        io.Int.Input(
            "steps", default=2000, min=1, max=1_000_000, tooltip="Updates of the student. The paper: 40,000 on SD2.1."
        ),
        io.Float.Input(
            "learning_rate",
            default=1e-4,
            min=1e-9,
            max=10.0,
            step=1e-6,
            round=1e-9,
            tooltip="Of the student's LoRA. The paper's 1e-6 is for all weights of a student.",
        ),
        io.Int.Input("rank", default=64, min=1, max=1024, tooltip="Size of the student's LoRA."),
        io.Float.Input(
            "alpha",
            default=0.0,
            min=0.0,
            max=4096.0,
            step=0.5,
            tooltip="The student's LoRA is scaled by alpha / rank. 0 = equal to the rank, a scale of 1.",
        ),
        io.Int.Input(
            "batch_size", default=4, min=1, max=256, tooltip="Pictures at once. The paper has 64 on four GPUs."
        ),
        io.Int.Input("accumulation", default=1, min=1, max=1024, tooltip="Batches to an update, of either network."),
        io.Combo.Input(
            "convention",
            options=list(CONVENTIONS),
            default=DMD,
            tooltip="Who is guided. dmd: the teacher alone, and the student draws what the teacher draws with CFG. "
            "pg-sb: teacher and fake network by one scale, the paper's, and the student goes to what the teacher draws "
            "without CFG, more evenly.",
        ),
        io.Float.Input(
            "guidance_low",
            default=2.0,
            min=-100.0,
            max=100.0,
            step=0.1,
            tooltip="The guidance scale is drawn anew for each step, from here to guidance_high. The paper: 0.5.",
        ),
        io.Float.Input(
            "guidance_high",
            default=4.0,
            min=-100.0,
            max=100.0,
            step=0.1,
            tooltip="The largest guidance scale. The same number twice is a fixed one. The paper: 4 on SD1.5 and "
            "SD2.1, 3 on PixArt.",
        ),
        io.Int.Input(
            "resolution",
            default=512,
            min=16,
            max=8192,
            step=16,
            tooltip="Side in pixels of the pictures that are learned: 512 for SD1.5, 1024 for SDXL, SD3 and FLUX, 128 "
            "for the embedded model.",
        ),
        widgets.seed("The same seed and settings give the same student."),
        widgets.precision(
            "Of the arithmetic: automatic is bfloat16 on a GPU, and float32 on a CPU. Weights that are "
            "trained are kept in float32 either way."
        ),
        io.Boolean.Input(
            "gradient_checkpointing",
            default=True,
            tooltip="Computes activations twice instead of keeping them, in as many blocks as the device needs.",
        ),
        io.String.Input(
            "file_name",
            default="stylewright/student",
            tooltip="Where the student goes, below models/loras. A number is added, and nothing is ever overwritten.",
        ),
        widgets.sample_prompt(
            "What to draw meanwhile, one line a picture: by the teacher at first, then by the student in "
            "one step. Empty: nothing."
        ),
        widgets.sample_every(100),
    ]


def advanced() -> list[io.Input]:
    """What a user has to ask for of the distillation."""
    return [
        io.String.Input(
            "prompt_file",
            default="",
            advanced=True,
            tooltip="A text file of further prompts below ComfyUI's input folder, one a line, of any size.",
        ),
        io.String.Input(
            "style_phrase",
            default="",
            advanced=True,
            tooltip='Of a style\'s LoRA in the teacher: "in … style" with these words is added to every prompt.',
        ),
        io.Float.Input(
            "time",
            default=1.0,
            min=0.001,
            max=1.0,
            step=0.001,
            round=0.0001,
            advanced=True,
            tooltip="At which the student is called: 1 = the teacher's last, pure noise. DMD2 found 0.4 for SDXL.",
        ),
        io.Float.Input(
            "lowest_time",
            default=0.02,
            min=0.0,
            max=0.99,
            step=0.01,
            advanced=True,
            tooltip="The least noise in which the student's pictures are judged, as a share of the teacher's time.",
        ),
        io.Float.Input(
            "highest_time",
            default=0.98,
            min=0.01,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="The most of that noise, above lowest_time.",
        ),
        io.Boolean.Input(
            "guidance_by_sample",
            default=False,
            advanced=True,
            tooltip="Draw a guidance scale for each picture, instead of one for all of a step.",
        ),
        io.Float.Input(
            "distilled_guidance",
            default=3.5,
            min=0.0,
            max=100.0,
            step=0.1,
            advanced=True,
            tooltip="Of FLUX.1-dev and its kin alone: the guidance that they are told, teacher and student alike. At "
            "3.5, ComfyUI's own default, the student needs no FluxGuidance.",
        ),
        io.Float.Input(
            "nasa_low",
            default=0.0,
            min=0.0,
            max=10.0,
            step=0.05,
            advanced=True,
            tooltip="With negatives: the scale in the student's attention is drawn anew for each step, from here …",
        ),
        io.Float.Input(
            "nasa_high",
            default=1.0,
            min=0.0,
            max=10.0,
            step=0.05,
            advanced=True,
            tooltip="… to here. The paper: 0 to 1.",
        ),
        io.Float.Input(
            "fake_learning_rate",
            default=1e-3,
            min=1e-9,
            max=10.0,
            step=1e-5,
            round=1e-9,
            advanced=True,
            tooltip="Of the fake network, a second LoRA, which learns what the student draws.",
        ),
        io.Int.Input(
            "fake_updates",
            default=1,
            min=1,
            max=100,
            advanced=True,
            tooltip="Of the fake network to one of the student. 5 in DMD2.",
        ),
        io.Int.Input(
            "fake_rank", default=64, min=1, max=1024, advanced=True, tooltip="Size of the fake network's LoRA."
        ),
        io.Float.Input(
            "fake_alpha",
            default=128.0,
            min=0.01,
            max=4096.0,
            step=0.5,
            advanced=True,
            tooltip="The fake network's LoRA is scaled by fake_alpha / fake_rank.",
        ),
        io.Float.Input(
            "null_share",
            default=0.1,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="Of pg-sb: the share of the fake network's samples that have the empty prompt.",
        ),
    ]


def training() -> list[io.Input]:
    """What a user has to ask for of the training, and of its sample pictures."""
    return [
        io.Combo.Input(
            "method",
            options=[method for method in METHODS if method not in UNMERGEABLE],
            default="lora",
            advanced=True,
            tooltip="Kind of the student's adapter. lora loads everywhere.",
        ),
        io.Combo.Input(
            "targets",
            options=PRESETS,
            default="all",
            advanced=True,
            tooltip="Which layers the student and the fake network adapt: a student has to change all that it can.",
        ),
        widgets.target_patterns(),
        io.Combo.Input(
            "optimizer", options=list(OPTIMIZERS), default="adamw", advanced=True, tooltip="Of both networks."
        ),
        widgets.scheduler("How both learning rates go over the run."),
        widgets.warm_up("Steps over which both learning rates grow first."),
        widgets.weight_decay("Pulls the adapters to zero."),
        widgets.clip_norm("either gradient"),
        widgets.ema_decay(0.99, "Saves a moving average of the student with this decay. 0 = none."),
        widgets.save_every(250),
        widgets.sample_steps("Sampling steps of the teacher's pictures. The student's have one."),
        widgets.sample_cfg("the teacher's"),
    ]


def lessons() -> list[io.Input]:
    """What a student is taught before the scores: the teacher's pictures from its own noise."""
    return [
        io.Int.Input(
            "pretraining_steps",
            default=0,
            min=0,
            max=1_000_000,
            optional=True,
            advanced=True,
            tooltip="The first steps, in which the student learns by regression what the teacher draws in many from "
            "the student's own noise. DMD2 found it necessary for SDXL in one step. 0 = none.",
        ),
        io.Int.Input(
            "pretraining_pairs",
            default=0,
            min=0,
            max=10_000_000,
            optional=True,
            advanced=True,
            tooltip="Of so many pictures of the teacher, over and over, which are kept in main memory; 10,000 in DMD2. "
            "0 = of new ones in each step, which takes longest.",
        ),
        io.Int.Input(
            "pretraining_teacher_steps",
            default=20,
            min=1,
            max=1000,
            optional=True,
            advanced=True,
            tooltip="Sampling steps of these pictures.",
        ),
        io.Float.Input(
            "pretraining_guidance",
            default=AS_THE_CONVENTION,
            min=AS_THE_CONVENTION,
            max=100.0,
            step=0.1,
            optional=True,
            advanced=True,
            tooltip="CFG of these pictures. Below 0: what the convention leads to, which is 1 with pg-sb, and with dmd "
            "the middle of the guidance range.",
        ),
    ]

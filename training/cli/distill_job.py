"""What a distillation is asked for on top of its options, and what its flags say of themselves."""

from dataclasses import dataclass

from .job import HELP as JOB_HELP
from .train import HELP as TRAIN_HELP


@dataclass(frozen=True)
class DistilJob:
    """Where a distillation takes its model and prompts from, and where it leaves its results."""

    model: str = "embedded"
    components: str | None = None
    prompt: tuple[str, ...] = ()
    prompts: str | None = None
    encodings: str | None = None
    style_phrase: str = ""
    teacher_adapter: str | None = None
    init_adapter: str | None = None
    init_model: str | None = None
    clip: str | None = None
    decoder: str | None = None
    resolution: int | None = None
    device: str = "auto"
    out: str = "runs/student"


JOB = {
    **{name: JOB_HELP[name] for name in ("model", "components", "device")},
    "prompt": "What to learn from, alternatives as {a|b}; may be repeated. (default: what the model says of itself)",
    "prompts": "A text file of such prompts, one a line; each line is as likely as any other.",
    "encodings": "A folder to keep encoded prompts in, for this run and others. (default: the run's, if they are few)",
    "style_phrase": 'Prompts become "{prompt} in {style phrase} style". (default: the teacher adapter\'s)',
    "teacher_adapter": "An adapter of the teacher's, such as a style, which the student's own file then has, too.",
    "init_adapter": "A student to begin with. (default: the teacher)",
    "init_model": "With --full: a model of the same kind to begin with, such as SD-Turbo for SD2.1, or a full student.",
    "clip": "For --clip-weight: the folder of a CLIP as transformers saves it. (default: the embedded model's own)",
    "decoder": "For the same: the folder of an AutoencoderTiny of diffusers. (default: the model's autoencoder)",
    "resolution": "Side in pixels of the student's square pictures. (default: the model's own)",
    "out": "Folder of the run; a run that is there is continued.",
}
SHARED = ("optimizer", "weight_decay", "scheduler", "warm_up", "precision", "seed")
SHARED += ("save_every", "report_every", "sample_every", "sample_prompts", "gradient_checkpointing")
HELP = {
    **{name: TRAIN_HELP[name] for name in SHARED},
    **{name: text for name, text in TRAIN_HELP.items() if name.startswith("adapter.")},
    "steps": "Updates of the student.",
    "batch_size": "Pictures at once, of all processes together.",
    "accumulation": "Batches to an update, of either network.",
    "full": "Train all weights of the student, on a second copy of the model, and write them all.",
    "learning_rate": "Of the student; 1e-6 in the papers, for all of its weights (--full).",
    "fake_learning_rate": "Of the fake network, which learns what the student draws.",
    "fake_updates": "Of the fake network to one of the student.",
    "clip_norm": "Largest norm of either gradient; 0 = no limit.",
    "ema_decay": "Save a moving average of the student; 0 = none.",
    "convention": '"pg-sb": both networks are guided by one scale; "dmd": the teacher alone is.',
    "guidance_low": "The scale is drawn from here …",
    "guidance_high": "… to here; the same number twice is a fixed one.",
    "guidance_by_sample": "Draw a scale for each picture, instead of one for all.",
    "time": "At which the student is called: 1 = the teacher's last, 0.4 = 399 of 1000.",
    "lowest_time": "Of the noise in which the student's pictures are judged.",
    "highest_time": "The same.",
    "negative_prompts": "NASA-T: what the teacher is guided away from, and the student; may be repeated.",
    "nasa_low": "Of the scale in the student's attention, which is drawn from here …",
    "nasa_high": "… to here.",
    "clip_weight": "Of a loss on pictures that are unlike their prompts, falling to 0 over the run; 0.1 in PG-SB.",
    "clip_threshold": "Cosine of features, of pictures and of prompts, from which on they are alike enough.",
    "clip_samples": "Of each batch, how many are decoded for that; 0 = all.",
    "pretraining_steps": "Of the steps, the first, in which the student learns what the teacher draws in many.",
    "pretraining_pairs": "How many of its pictures these are, over and over, kept in memory; 0 = always new ones.",
    "pretraining_teacher_steps": "In how many steps the teacher draws them.",
    "pretraining_guidance": "Of the teacher there. (default: 1 for pg-sb, for dmd the middle of its scales)",
    "null_share": "Share of the fake's samples that have the empty prompt.",
    "fake_rank": "Of the fake network's adapter.",
    "fake_alpha": "It is scaled by alpha / rank.",
}

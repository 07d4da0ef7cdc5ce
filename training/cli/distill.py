"""``stylewright distill``: a one-step student of a model, from prompts."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..loops.config import AUTOMATIC_PRECISION, precision_on
from ..loops.distil_config import DistilConfig
from ..loops.share import require_alike
from ..loops.tables import from_table
from .flags import flags_of, merge, with_flags
from .job import HELP as JOB_HELP
from .job import read_toml, sorted_out
from .launch import Launch, as_launched, launched
from .output import Json, show
from .progress import Update, patient_interrupt, progress_bar
from .train import CHECKPOINT, nothing_left_of_a_false_start
from .train import HELP as TRAIN_HELP

if TYPE_CHECKING:
    from ..data.prompts import Encode, Prompts
    from ..denoiser import TimedDenoiser
    from ..hosts.host import Host
    from ..loops.distil import DistilResult
    from ..loops.events import Event


@dataclasses.dataclass(frozen=True)
class DistilJob:
    """Where a distillation takes its model and prompts from, and where it leaves its results."""

    model: str = "embedded"
    components: str | None = None
    prompt: tuple[str, ...] = ()
    prompts: str | None = None
    encodings: str | None = None
    style_phrase: str = ""
    resolution: int | None = None
    device: str = "auto"
    out: str = "runs/student"


JOB = {
    **{name: JOB_HELP[name] for name in ("model", "components", "device")},
    "prompt": "What to learn from, alternatives as {a|b}; may be repeated. (default: what the model says of itself)",
    "prompts": "A text file of such prompts, one a line; each line is as likely as any other.",
    "encodings": "A folder to keep encoded prompts in, for this run and others. (default: the run's, if they are few)",
    "style_phrase": 'Prompts become "{prompt} in {style phrase} style".',
    "resolution": "Side in pixels of the student's square pictures. (default: the model's own)",
    "out": "Folder of the run; a run that is there is continued.",
}
FEW = 10_000  # lines of prompts, whose encodings are kept unasked: those of millions would fill the disk
SHARED = ("optimizer", "weight_decay", "scheduler", "warm_up", "precision", "seed")
SHARED += ("save_every", "report_every", "sample_every", "sample_prompts", "gradient_checkpointing")
HELP = {
    **{name: TRAIN_HELP[name] for name in SHARED},
    **{name: text for name, text in TRAIN_HELP.items() if name.startswith("adapter.")},
    "steps": "Updates of the student.",
    "batch_size": "Pictures at once, of all processes together.",
    "accumulation": "Batches to an update, of either network.",
    "learning_rate": "Of the student.",
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
    "null_share": "Share of the fake's samples that have the empty prompt.",
    "fake_rank": "Of the fake network's adapter.",
    "fake_alpha": "It is scaled by alpha / rank.",
}
FLAGS = (*flags_of(DistilJob, JOB, "Model and prompts"), *flags_of(DistilConfig, HELP, "Distillation"))


@with_flags(*FLAGS)
def distill(
    given: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="A TOML file with the names of the flags, which override it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Teach a model to draw in one step, from prompts alone. Prints where the student is."""
    with launched() as launch:
        table = as_launched(merge(read_toml(config) if config else {}, given))
        require_alike(table, launch.processes)
        if table.get("precision") == AUTOMATIC_PRECISION:
            table["precision"] = precision_on(launch.device_of(table.get("device", DistilJob.device)))
        ours, rest = sorted_out(table, DistilJob, DistilConfig)
        run(from_table(DistilJob, ours), from_table(DistilConfig, rest), as_json, launch)


def run(job: DistilJob, options: DistilConfig, as_json: bool, launch: Launch) -> None:
    """Distils, and says where the results are. Ctrl-C saves first and leaves with code 130."""
    folder, writes = Path(job.out), launch.processes.writes
    try:
        with nothing_left_of_a_false_start(folder), progress_bar(shown=writes) as update:
            result = _distil(job, options, folder, update, launch)
    except KeyboardInterrupt:
        if not writes:
            raise
        saved = (folder / CHECKPOINT).exists()
        advice = "everything is saved, continue with the same command" if saved else "nothing was trained yet"
        typer.echo(f"stylewright: interrupted; {advice}", err=True)
        raise typer.Exit(130) from None
    if not writes:
        return
    last = result.history[-1] if result.history else None
    figures = {"steps": result.steps_done, "seconds": last and last.seconds, **(last.others if last else {})}
    lines = [
        f"student      {result.path}",
        f"run          {folder}  (options, events, checkpoint, samples)",
        f"draw with it stylewright generate --model {job.model} --adapter {result.path} --prompt …",
    ]
    show({"student": result.path, "run": folder, **figures}, lines, as_json)


def _distil(job: DistilJob, options: DistilConfig, folder: Path, update: Update, launch: Launch) -> "DistilResult":
    import torch

    from ..hosts.loading import load_host
    from ..loops.distil import distil

    processes = launch.processes
    dtype, device = getattr(torch, options.precision), launch.device_of(job.device)
    with processes.in_turn() if processes.sharded else processes.together():  # a model in parts is whole before
        host = load_host(job.model, device, dtype, components=job.components, place=launch.place)
    with processes.together():
        prompts = prompts_of(job, host, folder)
    side = job.resolution or host.resolution
    if side % host.pixels_per_token:
        raise ValueError(f"Got resolution={side}: {host.name} draws multiples of {host.pixels_per_token}")
    with processes.together():
        encode = _encoder(job, host, prompts, folder, processes.rank)

    def report(event: "Event") -> None:
        apart = event.others.get("apart", float("nan"))
        update("distilling", event.step, event.steps, f"apart {apart:.4f}")

    with patient_interrupt(speaks=processes.writes) as check:
        return distil(
            cast("TimedDenoiser", host.denoiser),
            prompts,
            encode,
            options,
            latent_size=(host.latent_channels, side // host.pixels_per_latent, side // host.pixels_per_latent),
            run_dir=folder,
            report=report,
            check=check,
            sample=_sampler(host, options, side),
            device=host.device,
            conditioning=host.training_conditioning,
            base_model=host.name,
            unet_layers=host.unet_layers,
            resolution=side,
            processes=processes,
        )


def prompts_of(job: DistilJob, host: "Host", folder: Path) -> "Prompts":
    """The job's prompts, or the model's own. ``folder`` is the run's. ValueError where there are none."""
    from ..data.captions import styled
    from ..data.prompts import Prompts, read_prompts

    file = read_prompts(Path(job.prompts), folder / "cache") if job.prompts else None
    if not (job.prompt or file or host.prompts):
        raise ValueError(f"{host.name} has no prompts of its own: give some by --prompt or --prompts")
    lines = job.prompt if job.prompt or file else host.prompts
    lines = tuple(styled(line, job.style_phrase) if job.style_phrase else line for line in lines)
    return Prompts(lines, file, job.style_phrase)


def _encoder(job: DistilJob, host: "Host", prompts: "Prompts", folder: Path, process: int) -> "Encode":
    """The host's text encoder; of a few prompts, or where a folder is named for it, what it says is kept on disk."""
    from ..data.prompts import remembered
    from ..data.store import Store

    if not (job.encodings or prompts.count <= FEW):
        return host.encode_prompts
    store = Store(Path(job.encodings) if job.encodings else folder / "cache", process)
    return remembered(host.encode_prompts, store, f"{host.name}, {host.denoiser.family}")


def _sampler(host: "Host", options: DistilConfig, side: int) -> Any:
    """What draws the sample pictures of a run, from the same noise each time. None where none are wanted."""
    if not (options.sample_every and options.sample_prompts):
        return None
    import torch

    from ..clocks import log_snr_at
    from ..hosts.generate import generate

    level = log_snr_at(cast("TimedDenoiser", host.denoiser).clock, torch.tensor([options.time]))
    prompts = list(options.sample_prompts)
    return lambda step: generate(host, prompts, seed=options.seed, size=(side, side), one_step=level)

"""``stylewright distill``: a one-step student of a model, from prompts."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..loops.config import AUTOMATIC_PRECISION, precision_on
from ..loops.distil_config import DistilConfig
from ..loops.share import require_alike
from ..loops.tables import from_table
from .distill_job import HELP, JOB, DistilJob
from .flags import flags_of, merge, with_flags
from .job import read_toml, refuse_idle_options, sorted_out
from .launch import Launch, as_launched, launched
from .output import Json, show
from .progress import Update, patient_interrupt, progress_bar
from .train import CHECKPOINT, loaded_for, nothing_left_of_a_false_start, start_at

if TYPE_CHECKING:
    from ..data.lines import Lines
    from ..data.prompts import Encode, Prompts
    from ..denoiser import TimedDenoiser
    from ..formats.starting import Start, WholeStart
    from ..hosts.host import Host
    from ..loops.distil import DistilResult
    from ..loops.events import Event
    from ..loops.likeness import Likeness
    from ..loops.networks import Worn


FEW = 10_000  # lines of prompts, whose encodings are kept unasked: those of millions would fill the disk
FLAGS = (*flags_of(DistilJob, JOB, "Model and prompts"), *flags_of(DistilConfig, HELP, "Distillation"))


@with_flags(*FLAGS)
def distill(
    given: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="A TOML file with the names of the flags, which override it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Teach a model to draw in one step, from prompts alone; the same command again continues a run that stopped."""
    with launched() as launch:
        table = as_launched(merge(read_toml(config) if config else {}, given))
        require_alike(table, launch.processes)
        if table.get("precision") == AUTOMATIC_PRECISION:
            table["precision"] = precision_on(launch.device_of(table.get("device", DistilJob.device)))
        refuse_idle_options(table)
        if table.get("full") and table.get("adapter"):
            stated = ", ".join(map(str, table["adapter"]))
            raise ValueError(
                f"Got {stated} of an adapter, and full, which trains all weights without one: leave one of both out"
            )
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
    from ..loops.pupil import require_called_alike
    from ..sharding import Twofold

    processes = launch.processes
    _require_one_beginning(job, options)
    with processes.together():
        lines = stated_prompts(job, folder)
    dtype, device = getattr(torch, options.precision), launch.device_of(job.device)
    twofold = Twofold(launch.place) if options.full and launch.place else None
    with processes.in_turn() if processes.sharded else processes.together():  # a model in parts is whole before
        host = load_host(job.model, device, dtype, components=job.components, place=twofold or launch.place)
    with processes.together():
        worn = worn_of(job.teacher_adapter, host)
        start = _start_of(job, host, options)
        require_called_alike(start, cast("TimedDenoiser", host.denoiser), options)
        job = replace(job, style_phrase=job.style_phrase or phrase_of(worn))
        prompts = prompts_of(job, host, lines)
    side = host.resolution if job.resolution is None else job.resolution
    if side < 1 or side % host.pixels_per_token:
        raise ValueError(f"Got resolution={side}: {host.name} draws multiples of {host.pixels_per_token}")
    with processes.together():
        encode = _encoder(job, host, prompts, folder, processes.rank)
        if options.sample_every and options.sample_prompts:
            host.encode_prompts(list(options.sample_prompts))  # refuses what the model does not know

    def report(event: "Event") -> None:
        by_pairs = "apart" not in event.others
        said = f"loss {event.loss:.4f}" if by_pairs else f"apart {event.others['apart']:.4f}"
        update("learning pairs" if by_pairs else "distilling", event.step, event.steps, said)

    with processes.together():
        likeness = likeness_of(job, options, host)
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
            identity={"base_model": Path(job.model).absolute().name},
            unet_layers=host.unet_layers,
            resolution=side,
            schedule=lambda steps: host.schedule(steps, (side // host.pixels_per_token) ** 2),
            worn=worn,
            start=start,
            likeness=likeness,
            processes=processes,
            frozen=twofold.frozen if twofold else None,
        )


def _start_of(job: DistilJob, host: "Host", options: DistilConfig) -> "Start | WholeStart | None":
    """What the student begins with, where it is not the teacher."""
    if job.init_model is None:
        return start_at(job.init_adapter, host, options.adapter)
    from ..hosts.whole import whole_start

    return whole_start(job.init_model, job.components, host.denoiser)


def _require_one_beginning(job: DistilJob, options: DistilConfig) -> None:
    """ValueError for two, and for one that a student without weights of its own cannot have."""
    if job.init_model is None:
        return
    if job.init_adapter is not None:
        raise ValueError("Got --init-adapter and --init-model: a student begins with one of them")
    if not options.full:
        raise ValueError(
            "Got --init-model, all weights of a student, which is an adapter on its teacher without --full: state "
            "--full, too, or begin with an adapter by --init-adapter"
        )


def stated_prompts(job: DistilJob, folder: Path) -> "Lines | None":
    """The lines of the job's file of prompts, if it names one. ``folder`` is the run's.

    ValueError for these and for the prompts beside them where they cannot be used: before a large model is loaded.
    """
    from ..data.prompts import Prompts, read_prompts

    if job.prompt:
        Prompts(job.prompt)
    return read_prompts(Path(job.prompts), folder / "cache") if job.prompts else None


def prompts_of(job: DistilJob, host: "Host", file: "Lines | None") -> "Prompts":
    """The job's prompts, further ones in ``file``, or the model's own. ValueError where there are none."""
    from ..data.captions import styled
    from ..data.prompts import Prompts

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


def worn_of(path: str | None, host: "Host") -> "Worn | None":
    """The adapter in a file as the teacher wears it. ValueError for one that is not of its network alone."""
    if path is None:
        return None
    from ..formats.contents import read_outline
    from ..formats.keys import TEXT_ENCODER
    from ..loops.networks import Worn

    outline = read_outline(Path(path))
    if any(name.startswith(TEXT_ENCODER) for name in outline.layers):
        raise ValueError(f"{path} adapts text encoders, too, which a student's file cannot: choose one without them")
    if outline.about is not None and outline.about.one_step:
        raise ValueError(f"{path} is a one-step student, and no teacher: --init-adapter begins with it")
    return Worn(Path(path).name, loaded_for(host, Path(path)))


def phrase_of(worn: "Worn | None") -> str:
    """The style phrase that an adapter was trained with; "" where there is none."""
    about = None if worn is None else worn.loaded.about
    return "" if about is None else about.style_phrase


def likeness_of(job: DistilJob, options: DistilConfig, host: "Host") -> "Likeness | None":
    """What tells how alike pictures and prompts are, where the options count it. ValueError where nothing does."""
    if not options.clip_weight:
        if job.clip or job.decoder:
            raise ValueError("Got --clip or --decoder, which do nothing without --clip-weight: 0.1 is PG-SB's")
        return None
    from ..hosts.likeness import open_clip, open_tiny_decoder
    from ..loops.likeness import Likeness

    open_features = partial(open_clip, Path(job.clip), host.device) if job.clip else host.open_features
    if open_features is None:
        raise ValueError(
            f"Got clip_weight={options.clip_weight} and nothing that compares {host.name}'s pictures with prompts: "
            "--clip names the folder of a CLIP as transformers saves it (config.json, model.safetensors, tokenizer)"
        )
    features = open_features()
    if job.decoder:
        return Likeness(open_tiny_decoder(Path(job.decoder), host.latent_channels, host.device), features)
    return Likeness(host.open_decoder(), features)


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

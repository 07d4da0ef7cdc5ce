"""``stylewright train`` and ``stylewright resume``."""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..loops.config import AUTOMATIC_PRECISION, TrainConfig, precision_on
from ..loops.share import require_alike
from .flags import flags_of, merge, with_flags
from .job import HELP as JOB_HELP
from .job import Job, folder_of, keep, located, read_toml, recall, split
from .launch import Launch, as_launched, launched
from .output import Json, show
from .planning import train_within_memory
from .progress import Update, patient_interrupt, progress_bar

if TYPE_CHECKING:
    from ..adapters.methods import AdapterConfig
    from ..data.dataset import Dataset
    from ..formats.adapters import LoadedAdapter
    from ..formats.starting import Start
    from ..hosts.host import Host
    from ..loops.events import Event
    from ..loops.saving import Saving
    from ..loops.train import TrainResult

HELP = {
    "steps": "Optimizer steps.",
    "batch_size": "Pictures at once, of all processes together.",
    "accumulation": "Batches to an optimizer step.",
    "learning_rate": "For Prodigy 1.",
    "optimizer": "adam, adamw, adamw-8bit, prodigy, schedule-free.",
    "weight_decay": "Of the adapter's weights.",
    "scheduler": "Of the learning rate: constant, linear, cosine.",
    "warm_up": "Steps in which the learning rate grows.",
    "clip_norm": "Largest norm of the gradient; 0 = no limit.",
    "ema_decay": "Save a moving average of the adapter, for example 0.99; 0 = none.",
    "loss": "mse, huber, …; dco: better than the base, which needs a second pass, without gradients.",
    "weighting": "Of the loss by noise level: none, min-snr-5, …",
    "offset_noise": "Standard deviation of a noise that is constant over the picture.",
    "precision": "float32, bfloat16, or automatic: bfloat16 on a GPU. The adapter's weights are float32 in all.",
    "gradient_checkpointing": "Less memory, about a third more time.",
    "memory": '"automatic": recompute only what does not fit, where recomputing is allowed; "as set": all or nothing.',
    "seed": "The same seed gives the same adapter.",
    "style_phrase": 'The words that name the style: captions become "{content} in {style phrase} style".',
    "resolution": "Pixels: pictures are trained at about this squared. (default: the model's own)",
    "caption_dropout": "Share of samples trained without their caption.",
    "save_every": "Steps between checkpoints; 0 = at the end only.",
    "report_every": "Steps between reports, at most.",
    "sample_every": "Steps between sample pictures, the last of which come at the end; 0 = none.",
    "sample_prompts": "What the sample pictures show; may be repeated.",
    "text_encoder_learning_rate": "Trains the CLIP text encoders too, at this rate, for example 5e-6; 0 = not.",
    "dco_beta": "Of dco, for means over a sample: how soon better is enough. (default: 1 for flows, else 1000)",
    "text_encoder_targets": "Which of their layers: attention, or all (with the MLPs).",
    "adapter.method": "lora, rslora, dora, lokr, loha, oft, styleinject, bottleneck.",
    "adapter.rank": "Inner dimension of the adapter.",
    "adapter.alpha": "The adapter is scaled by alpha / rank. (default: the rank)",
    "adapter.targets": "A preset of layers, for example style.",
    "adapter.dropout": "Share, while training.",
    "adapter.init": "gaussian or uniform.",
    "adapter.branches": "Of styleinject: down-projections of this rank, which a router weighs.",
    "adapter.injection": "Of styleinject: f2c, f1, f2, or lora for comparison.",
    "adapter.shared_bottleneck": "Of bottleneck: projections in common to layers of a width, and vectors for each.",
    "density.preset": "The law of the noise level; `stylewright density` shows what it draws.",
    "density.mu": "Mean of log_snr, instead of the preset's.",
    "density.sigma": "Standard deviation of log_snr, instead of the preset's.",
    "density.shift": "A further timestep shift; 1 = none.",
    "density.reference_tokens": "Image tokens that the law is stated for; it is carried to those of the run.",
}

CHECKPOINT = "checkpoint.safetensors"
FLAGS = (*flags_of(Job, JOB_HELP, "Model and pictures"), *flags_of(TrainConfig, HELP, "Training"))


@with_flags(*FLAGS)
def train(
    given: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="A TOML file with the names of the flags, which override it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Learn the style of some pictures. Prints where the adapter is."""
    with launched() as launch:
        table = as_launched(merge(read_toml(config) if config else {}, given))
        require_alike(table, launch.processes)
        if table.get("precision") == AUTOMATIC_PRECISION:
            table["precision"] = precision_on(launch.device_of(table.get("device", Job.device)))
        job, options = split(table)
        job = located(job)
        run(job, options, launch.processes.from_first(lambda: folder_of(job)), as_json, launch)


def resume(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run of train.")],
    steps: Annotated[int | None, typer.Option(help="Train until this step instead.")] = None,
    device: Annotated[str | None, typer.Option(help="Another device than before.")] = None,
    as_json: Json = False,
) -> None:
    """Continue a run exactly where it stopped, or train it for longer."""
    from ..loops.checkpoint import read_config

    with launched() as launch:
        job, options = launch.processes.from_first(lambda: (recall(folder), read_config(folder)))
        options = options if steps is None else dataclasses.replace(options, steps=steps)
        job = job if device is None else dataclasses.replace(job, device=device)
        run(job, options, folder, as_json, launch)


def run(job: Job, options: TrainConfig, folder: Path, as_json: bool, launch: Launch) -> None:
    """Trains in ``folder`` and says where the results are. Ctrl-C saves first and leaves with code 130."""
    from ..loops.checkpoint import require_writable

    processes = launch.processes
    try:
        with nothing_left_of_a_false_start(folder), progress_bar(shown=processes.writes) as update:
            processes.from_first(lambda: require_writable(folder))
            result = _train(job, options, folder, update, launch)
    except KeyboardInterrupt:
        if not processes.writes:
            raise
        saved = (folder / CHECKPOINT).exists()
        advice = (
            f"everything is saved, continue with: stylewright resume {folder}" if saved else "nothing was trained yet"
        )
        typer.echo(f"stylewright: interrupted; {advice}", err=True)
        raise typer.Exit(130) from None
    if not processes.writes:
        return
    last = result.history[-1] if result.history else None
    figures = {"steps": result.steps_done, "loss": last and last.loss, "seconds": last and last.seconds}
    lines = [
        f"adapter      {result.path}",
        f"run          {folder}  (options, events, checkpoint, samples)",
        f"draw with it stylewright generate --model {job.model} --adapter {result.path} --prompt …",
    ]
    show({"adapter": result.path, "run": folder, **figures}, lines, as_json)


@contextmanager
def nothing_left_of_a_false_start(folder: Path) -> Iterator[None]:
    """Removes a folder that was made inside, if what is raised comes before the first checkpoint."""
    is_new = not folder.exists()
    try:
        yield
    except BaseException:
        if is_new and not (folder / CHECKPOINT).exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _train(job: Job, options: TrainConfig, folder: Path, update: Update, launch: Launch) -> "TrainResult":
    import torch

    from ..data.dataset import shared_dataset
    from ..data.encoding import encode
    from ..data.items import phrase_among
    from ..hosts.loading import load_host
    from ..hosts.text import with_text_encoders
    from ..loops.subject import parts_of
    from ..loops.train import train as train_adapter
    from .pictures import at_sizes, items_of, phrase_of

    processes = launch.processes
    options = dataclasses.replace(options, style_phrase=phrase_of(job, options))
    with processes.together():
        items = items_of(job, options) if processes.writes else []
    phrase = options.style_phrase or processes.from_first(lambda: phrase_among(items))
    options = dataclasses.replace(options, style_phrase=phrase)
    dtype, device = getattr(torch, options.precision), launch.device_of(job.device)
    with processes.in_turn() if processes.sharded else processes.together():  # a model in parts is whole before
        host = load_host(job.model, device, dtype, components=job.components, place=launch.place)
    with processes.together():
        if options.text_encoder_learning_rate:
            host = with_text_encoders(host)
        options = dataclasses.replace(options, density=options.density.stated_for(host.reference_tokens))
        for part in parts_of(host.denoiser, options, host.text_encoders):  # before pictures are encoded
            part.layers(options.adapter)
        start = start_at(job.init_adapter, host, options.adapter)
    resolution = options.resolution or host.resolution

    def encoded() -> "Dataset":
        return encode(
            at_sizes(items, resolution, job.more_resolutions),
            host,
            resolution=resolution,
            style_phrase=options.style_phrase,
            caption_mode=job.caption_mode,
            caption_dropout=options.caption_dropout,
            prior_share=job.prior_share,
            seed=options.seed,
            cache_dir=folder / "cache",
            progress=lambda done, total: update("reading", done, total),
        )

    dataset = shared_dataset(encoded, processes)
    processes.from_first(lambda: keep(job, folder))

    def report(event: "Event") -> None:
        update("training", event.step, event.steps, f"loss {event.loss:.4f}")

    def trains(saving: "Saving") -> "TrainResult":
        with patient_interrupt(speaks=processes.writes) as check:
            return train_adapter(
                host.denoiser,
                dataset,
                options,
                run_dir=folder,
                report=report,
                check=check,
                sample=sampler(host, options),
                device=host.device,
                latents_per_token=(host.pixels_per_token // host.pixels_per_latent) ** 2,
                conditioning=host.training_conditioning,
                base_model=host.name,
                unet_layers=host.unet_layers,
                start=start,
                saving=saving,
                text_encoders=host.text_encoders,
                processes=processes,
            )

    return train_within_memory(host, dataset, options, folder, trains, processes)


def start_at(path: str | None, host: "Host", config: "AdapterConfig") -> "Start | None":
    """The adapter of a file as a run begins with it. ValueError for one of another family or method."""
    if path is None:
        return None
    from ..formats.starting import start_of

    loaded = loaded_for(host, Path(path))
    return start_of(loaded, config, Path(path).name)


def loaded_for(host: "Host", path: Path) -> "LoadedAdapter":
    """The adapter of a file, with the names of the host's layers. ValueError for one of another family."""
    from ..formats.adapters import loaded_from
    from ..formats.contents import read_adapter
    from .generate import require_family, weights_of

    file = read_adapter(path)
    require_family(file, host)
    return loaded_from(file, "diffusers", weights=weights_of(host))


def sampler(host: "Host", options: TrainConfig) -> Any:
    """What draws the sample pictures of a run, from the same noise each time. None where none are wanted."""
    if not (options.sample_every and options.sample_prompts):
        return None
    from ..data.captions import styled
    from ..hosts.generate import generate

    phrase = options.style_phrase
    prompts = [styled(prompt, phrase) if phrase else prompt for prompt in options.sample_prompts]
    return lambda step: generate(host, prompts, seed=options.seed)


def device_of(name: str) -> str:
    """A torch device; "auto" is CUDA where there is one. ValueError for a device that is not there."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"The device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name

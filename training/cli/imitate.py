"""``stylewright imitate``: what a fine-tune or an adapter does, as an adapter of any method, with no images."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..loops.config import TrainConfig, config_from_table, config_to_table
from .flags import flags_of, merge, with_flags
from .generate import Components, Guidance, Model, Prompts, wearing
from .job import read_toml, refuse_idle_options
from .output import Json, show
from .planning import train_within_memory
from .progress import patient_interrupt, progress_bar
from .train import HELP

if TYPE_CHECKING:
    from ..data.dataset import Dataset
    from ..hosts.host import Host
    from ..loops.train import TrainResult

ANSWERS = "answers"  # folder in a run's


@with_flags(*flags_of(TrainConfig, HELP, "Training"))
def imitate(
    given: dict[str, Any],
    teacher: Annotated[
        str, typer.Argument(help="An adapter's file, which is put on the model, or a fine-tune of the model.")
    ],
    prompts: Prompts,
    out: Annotated[Path, typer.Option(help="Folder of the run; a run that is there is continued.")],
    model: Model = "embedded",
    components: Components = None,
    pictures: Annotated[int, typer.Option(help="How many the teacher draws of each prompt.")] = 1,
    drawing_steps: Annotated[int, typer.Option(help="Sampling steps of these pictures.")] = 20,
    guidance: Guidance = None,
    device: str = "auto",
    config: Annotated[Path | None, typer.Option(help="A TOML file with the names of the training flags.")] = None,
    as_json: Json = False,
) -> None:
    """Learn what another model answers, at noised pictures that it draws of these prompts. No images are needed."""
    import torch

    from ..data.cache import digest
    from ..hosts.loading import load_host
    from ..loops.checkpoint import RunDirectory
    from ..loops.teaching import Answers, ask
    from .train import device_of

    if teacher == model or Path(teacher).resolve() == Path(model).resolve():
        raise ValueError(
            f"Got {teacher} as the teacher and the model: there is nothing to learn. Give a fine-tune, or an adapter's "
            "file, as the teacher."
        )
    options = _configured(merge(read_toml(config) if config else {}, given))
    dtype = getattr(torch, options.precision)
    host = load_host(model, device_of(device), dtype, components=components)
    options = replace(options, density=options.density.stated_for(host.reference_tokens))
    stored = RunDirectory(out).stored()
    shape: dict[str, Any] = {
        "latents_per_token": (host.pixels_per_token // host.pixels_per_latent) ** 2,
        "device": host.device,
    }
    with progress_bar() as update:
        with _teaching(teacher, host, components, dtype) as master:
            dataset = _drawn(master, host, prompts, pictures, drawing_steps, guidance, options, out)
            asked = (teacher, dataset.fingerprint(), str(config_to_table(options)))
            answers = Answers(out / ANSWERS, f"{digest(*asked)[:12]}-")
            ask(
                master.denoiser,
                host.denoiser,
                dataset,
                options,
                answers,
                first=stored.step if stored else 0,
                conditioning=host.training_conditioning,
                progress=lambda done, steps: update("asking the teacher", done, steps),
                **shape,
            )
        result = _learn(host, dataset, options, out, answers, update, shape)
    answers.forget()
    last = result.history[-1] if result.history else None
    figures = {"steps": result.steps_done, "loss": last and last.loss}
    show(
        {"adapter": result.path, "run": out, **figures}, [f"adapter      {result.path}", f"run          {out}"], as_json
    )


def _configured(table: Mapping[str, Any]) -> TrainConfig:
    """ValueError where a text encoder is to be trained: what it says is part of the question."""
    refuse_idle_options(table)
    options = config_from_table(table)
    if options.text_encoder_learning_rate:
        raise ValueError(
            "Got text_encoder_learning_rate: expected 0, for the teacher and the model get the same prompts."
        )
    return options


@contextmanager
def _teaching(teacher: str, host: "Host", components: str | None, dtype: Any) -> Iterator["Host"]:
    """The teacher as a host: the host itself with an adapter on it, or another model."""
    from ..formats.contents import read_outline
    from ..hosts.loading import load_host

    try:
        is_adapter = Path(teacher).is_file() and bool(read_outline(Path(teacher)).layers)
    except ValueError:  # a checkpoint
        is_adapter = False
    if is_adapter:
        with wearing(host, Path(teacher)) as (worn, _, _):
            yield worn
    else:
        yield load_host(teacher, host.device, dtype, components=components)


def _drawn(
    master: "Host",
    host: "Host",
    prompts: list[str],
    each: int,
    steps: int,
    guidance: float | None,
    options: TrainConfig,
    folder: Path,
) -> "Dataset":
    """Pictures that the teacher draws, encoded with their prompts."""
    from ..data.encoding import encode
    from ..data.items import items_from_memory
    from ..hosts.generate import generate

    asked = [prompt for prompt in prompts for _ in range(each)]
    side = options.resolution or host.resolution
    drawn = generate(master, asked, seed=options.seed, steps=steps, guidance_scale=guidance, size=(side, side))
    return encode(
        items_from_memory(list(drawn), asked),
        host,
        resolution=side,
        style_phrase="",
        caption_mode="plain",
        caption_dropout=options.caption_dropout,
        seed=options.seed,
        cache_dir=folder / "cache",
    )


def _learn(
    host: "Host", dataset: "Dataset", options: TrainConfig, folder: Path, answers: Any, update: Any, shape: dict
) -> "TrainResult":
    from ..loops.train import train
    from ..processes import ALONE

    def trains(saving: Any) -> "TrainResult":
        with patient_interrupt() as check:
            return train(
                host.denoiser,
                dataset,
                options,
                run_dir=folder,
                report=lambda event: update("training", event.step, event.steps, f"loss {event.loss:.4f}"),
                check=check,
                conditioning=host.training_conditioning,
                base_model=host.name,
                unet_layers=host.unet_layers,
                saving=saving,
                answers=answers,
                **shape,
            )

    return train_within_memory(host, dataset, options, folder, trains, ALONE)

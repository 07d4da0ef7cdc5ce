"""The trainer: a style from pictures, by the law of the noise level."""

from typing import Any

from comfy_api.latest import io

from ..training.adapters.methods import AdapterConfig
from ..training.density_presets import DensityConfig
from ..training.loops.config import MEMORY, TrainConfig
from .bridge.precision import precision_for
from .bridge.resuming import AS_IT_IS, AUTOMATIC
from .bridge.sampling import Brush
from .lists import one_value_each
from .sockets import LORA, LOSS_MAP, StyleDataset, StyleDensity
from .trainer_inputs import advanced, links, plain
from .trainer_more_inputs import (
    bottleneck,
    consistency,
    fitting,
    given,
    keeping,
    starting,
    style_inject,
    teaching,
    text_encoder,
)
from .trainer_samples import sampling


class StyleFriendlySNRTrainer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="StyleFriendlySNRTrainer",
            display_name="Train Style LoRA (Style-Friendly SNR)",
            category="stylewright/training",
            description=(
                "Learns the style of a few pictures as an adapter for the model it is given, of any family and "
                "precision, without a second copy of its weights. The adapter is saved in models/loras under a free "
                "name; an interrupted run keeps what it has learned, and queued again it continues."
            ),
            search_aliases=["train lora", "style training", "fine-tune", "dreambooth", "style friendly snr", "dora"],
            is_output_node=True,
            is_input_list=True,  # latents and conditioning of several sizes come as lists
            inputs=[
                *links(),
                *plain(),
                *advanced(),
                *keeping(),
                *sampling(),
                *fitting(),
                *starting(),
                *given(),
                *text_encoder(),
                *consistency(),
                *style_inject(),
                *teaching(),
                *bottleneck(),
            ],
            outputs=[
                LORA.Output("lora", tooltip="The adapter, for Load Style LoRA or ComfyUI's own LoraModelLoader."),
                LOSS_MAP.Output("losses", tooltip="The loss of every step, for ComfyUI's Plot Loss Graph."),
                io.String.Output("path", tooltip="The adapter's file."),
                io.Image.Output(
                    "samples",
                    tooltip="A labelled strip of sample pictures for each prompt: before, on the way, after. Without "
                    "sample pictures, what is linked here is not run.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    @one_value_each("latents", "conditioning")
    def fingerprint_inputs(cls, resume: str = AUTOMATIC, file_name: str = "", **unused: object) -> object:
        """A run that is used as it is may have learned more since; otherwise the inputs say everything, but for files
        that are gone: what the cache remembers of them is published again."""
        from .bridge.runs import last_written, lost_adapters, runs_of

        if resume != AS_IT_IS:
            return lost_adapters(file_name)
        return [(run.name, last_written(run)) for run, _ in runs_of(file_name)]

    @classmethod
    @one_value_each("latents", "conditioning")
    def execute(
        cls,
        model: object,
        clip: object = None,
        vae: object = None,
        dataset: StyleDataset | None = None,
        *,
        steps: int,
        learning_rate: float,
        rank: int,
        alpha: float,
        batch_size: int,
        accumulation: int,
        method: str,
        optimizer: str,
        targets: str,
        seed: int,
        precision: str,
        gradient_checkpointing: bool,
        file_name: str,
        sample_prompt: str,
        sample_every: int,
        sample_steps: int,
        sample_cfg: float,
        scheduler: str,
        warm_up: int,
        weight_decay: float,
        clip_norm: float,
        ema_decay: float,
        caption_dropout: float,
        dropout: float,
        loss: str,
        weighting: str,
        offset_noise: float,
        save_every: int,
        target_patterns: str,
        resume: str = AUTOMATIC,
        save_intermediate: bool = False,
        keep_checkpoints: int = 3,
        sample_sampler: str = "euler",
        sample_scheduler: str = "simple",
        sample_seed: int = 0,
        sample_negative: str = "",
        sample_width: int = 0,
        sample_height: int = 0,
        memory: str = MEMORY[0],
        text_encoder_learning_rate: float = 0.0,
        text_encoder_targets: str = "attention",
        dco_beta: float = 0.0,
        branches: int = 4,
        injection: str = "f2c",
        density: StyleDensity | None = None,
        init_lora: dict | None = None,
        latents: list[dict] | None = None,
        conditioning: list[list] | None = None,
        teacher: Any = None,
        shared_bottleneck: bool = False,
    ) -> io.NodeOutput:
        from .bridge.board import address_of  # half of the core, which nobody waits for at start-up
        from .bridge.previews import nothing_to_show
        from .bridge.training import Job, Sockets, train_adapter
        from .sample_strip import draw_strips

        dataset = dataset_of(model, dataset, latents, conditioning)
        patterns = tuple(line.strip() for line in target_patterns.splitlines() if line.strip())
        config = TrainConfig(
            steps=steps,
            batch_size=batch_size,
            accumulation=accumulation,
            learning_rate=learning_rate,
            optimizer=optimizer,
            weight_decay=weight_decay,
            scheduler=scheduler,
            warm_up=warm_up,
            clip_norm=clip_norm,
            ema_decay=ema_decay,
            loss=loss,
            weighting=weighting,
            offset_noise=offset_noise,
            precision=precision_for(model, precision),
            gradient_checkpointing=gradient_checkpointing,
            memory=memory,
            seed=seed,
            style_phrase=dataset.style_phrase,
            resolution=dataset.resolution,
            caption_dropout=caption_dropout,
            save_every=save_every,
            sample_every=sample_every,
            sample_prompts=tuple(line.strip() for line in sample_prompt.splitlines() if line.strip()),
            adapter=AdapterConfig(
                method=method,
                rank=rank,
                alpha=alpha or None,
                targets=patterns or targets,
                dropout=dropout,
                branches=branches,
                injection=injection,
                shared_bottleneck=shared_bottleneck,
            ),
            text_encoder_learning_rate=text_encoder_learning_rate,
            text_encoder_targets=text_encoder_targets,
            dco_beta=dco_beta or None,
            density=DensityConfig() if density is None else density.config,
        )
        job = Job(
            dataset.items,
            dataset.caption_mode,
            config,
            file_name,
            Brush(sample_sampler, sample_scheduler, sample_steps, sample_cfg, sample_seed, sample_width, sample_height),
            sample_negative,
            resume,
            save_intermediate,
            keep_checkpoints,
            init_lora,
            answers=dataset.answers,
            prior_share=dataset.prior_share,
            notes=dataset.notes,
            teacher=teacher,
        )
        trained = train_adapter(Sockets(model, clip, vae), job, address_of(cls.hidden))
        strips = draw_strips(trained.samples, config.sample_prompts, steps) if trained.samples else nothing_to_show()
        return io.NodeOutput(trained.tensors, {"loss": trained.losses}, str(trained.path), strips, ui=trained.ui)


def dataset_of(
    model: Any, dataset: StyleDataset | None, latents: list[dict] | None, conditioning: list[list] | None
) -> StyleDataset:
    """What is trained on: the dataset, or latents with their conditioning. ValueError where it is neither or both."""
    if dataset is not None:
        given = [name for name, value in (("latents", latents), ("conditioning", conditioning)) if value is not None]
        if given:
            raise ValueError(
                f"there is a dataset, so {' and '.join(given)} would be ignored: unlink one of them. For pictures with "
                "captions that you encoded link the conditioning to Style Dataset"
            )
        return dataset
    if latents is None or conditioning is None:
        missing = "conditioning" if latents is not None else "latents" if conditioning is not None else "a dataset"
        raise ValueError(f"{missing} is missing: link a dataset, or latents together with their conditioning")
    from .bridge.given import given_items, side_of

    items, answers = given_items(latents, conditioning)
    return StyleDataset(tuple(items), "", "plain", side_of(items, model), answers=answers)

"""The distiller: a model that draws in one step, from prompts alone."""

from comfy_api.latest import io

from ..training.adapters.methods import AdapterConfig
from ..training.loops.config import MEMORY
from ..training.loops.distil_config import DistilConfig
from .bridge.precision import precision_for
from .bridge.resuming import AS_IT_IS, AUTOMATIC
from .bridge.sampling import Brush
from .distiller_inputs import AS_THE_CONVENTION, advanced, lessons, links, plain, training
from .sockets import LORA, LOSS_MAP
from .trainer_more_inputs import fitting, keeping
from .trainer_samples import sampling


class PGSBDistiller(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PGSBDistiller",
            display_name="Distill One-Step Student (PG-SB)",
            category="stylewright/training",
            description=(
                "Teaches a LoRA to draw in one step what the model draws in many, from prompts alone: score "
                "distillation with random guidance, and with negative prompts, if you like. The file says how it is "
                "called, so that One-Step Sampler sets itself up."
            ),
            search_aliases=[
                "distillation",
                "one step",
                "turbo",
                "swiftbrush",
                "snoopi",
                "dmd",
                "few step",
                "lightning",
            ],
            is_output_node=True,
            inputs=[
                *links(),
                *plain(),
                *advanced(),
                *training(),
                *sampling("the resolution above"),
                *keeping(),
                *fitting(),
                *lessons(),
            ],
            outputs=[
                LORA.Output("lora", tooltip="The student, for Load Style LoRA, and then One-Step Sampler."),
                LOSS_MAP.Output("losses", tooltip="The loss of every step, for ComfyUI's Plot Loss Graph."),
                io.String.Output("path", tooltip="The student's file."),
                io.Image.Output(
                    "samples",
                    tooltip="A labelled strip of sample pictures for each prompt: the teacher's, and the student's on "
                    "the way and after. Without sample pictures, what is linked here is not run.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def fingerprint_inputs(cls, resume: str = AUTOMATIC, file_name: str = "", **unused: object) -> object:
        """A run that is used as it is may have learned more since; and files that are gone are published again."""
        from .bridge.runs import last_written, lost_adapters, runs_of

        if resume != AS_IT_IS:
            return lost_adapters(file_name, DistilConfig)
        return [(run.name, last_written(run)) for run, _ in runs_of(file_name, DistilConfig)]

    @classmethod
    def execute(
        cls,
        teacher: object,
        clip: object,
        vae: object = None,
        student: object = None,
        *,
        prompts: str,
        negatives: str,
        steps: int,
        learning_rate: float,
        rank: int,
        alpha: float,
        batch_size: int,
        accumulation: int,
        convention: str,
        guidance_low: float,
        guidance_high: float,
        resolution: int,
        seed: int,
        precision: str,
        gradient_checkpointing: bool,
        file_name: str,
        sample_prompt: str,
        sample_every: int,
        prompt_file: str,
        style_phrase: str,
        time: float,
        lowest_time: float,
        highest_time: float,
        guidance_by_sample: bool,
        distilled_guidance: float,
        nasa_low: float,
        nasa_high: float,
        fake_learning_rate: float,
        fake_updates: int,
        fake_rank: int,
        fake_alpha: float,
        null_share: float,
        method: str,
        targets: str,
        target_patterns: str,
        optimizer: str,
        scheduler: str,
        warm_up: int,
        weight_decay: float,
        clip_norm: float,
        ema_decay: float,
        save_every: int,
        sample_steps: int,
        sample_cfg: float,
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
        pretraining_steps: int = 0,
        pretraining_pairs: int = 0,
        pretraining_teacher_steps: int = 20,
        pretraining_guidance: float = AS_THE_CONVENTION,
    ) -> io.NodeOutput:
        from .bridge.board import address_of  # half of the core, which nobody waits for at start-up
        from .bridge.distil_prompts import lines_of, prompts_of, styled_lines
        from .bridge.distilling import TEACHER, DistilJob, DistilSockets, distil_student
        from .bridge.previews import nothing_to_show
        from .sample_strip import draw_strips

        config = DistilConfig(
            steps=steps,
            batch_size=batch_size,
            accumulation=accumulation,
            learning_rate=learning_rate,
            fake_learning_rate=fake_learning_rate,
            fake_updates=fake_updates,
            optimizer=optimizer,
            weight_decay=weight_decay,
            scheduler=scheduler,
            warm_up=warm_up,
            clip_norm=clip_norm,
            ema_decay=ema_decay,
            convention=convention,
            guidance_low=guidance_low,
            guidance_high=guidance_high,
            guidance_by_sample=guidance_by_sample,
            time=time,
            lowest_time=lowest_time,
            highest_time=highest_time,
            null_share=null_share,
            negative_prompts=lines_of(negatives),
            nasa_low=nasa_low,
            nasa_high=nasa_high,
            precision=precision_for(teacher, precision),
            gradient_checkpointing=gradient_checkpointing,
            seed=seed,
            save_every=save_every,
            sample_every=sample_every,
            sample_prompts=styled_lines(sample_prompt, style_phrase),
            adapter=AdapterConfig(
                method=method, rank=rank, alpha=alpha or None, targets=lines_of(target_patterns) or targets
            ),
            fake_rank=fake_rank,
            fake_alpha=fake_alpha,
            pretraining_steps=pretraining_steps,
            pretraining_pairs=pretraining_pairs,
            pretraining_teacher_steps=pretraining_teacher_steps,
            pretraining_guidance=None if pretraining_guidance < 0 else pretraining_guidance,
        )
        job = DistilJob(
            prompts_of(prompts, prompt_file, style_phrase),
            config,
            resolution,
            file_name,
            Brush(sample_sampler, sample_scheduler, sample_steps, sample_cfg, sample_seed, sample_width, sample_height),
            sample_negative,
            style_phrase,
            distilled_guidance,
            memory,
            resume,
            save_intermediate,
            keep_checkpoints,
        )
        made = distil_student(DistilSockets(teacher, clip, vae, student), job, address_of(cls.hidden))
        strips = nothing_to_show()
        if made.samples:
            strips = draw_strips(made.samples, config.sample_prompts, steps, first=TEACHER)
        return io.NodeOutput(made.tensors, {"loss": made.losses}, str(made.path), strips, ui=made.ui)

"""Pictures while training, by ComfyUI's own sampling: what a KSampler will draw with the saved file.

The adapter is in place on the loaded model while it is trained, so nothing is loaded, patched or copied to draw.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.sd
import latent_preview
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ...training.data.cache import settle
from .one_step import OneStep
from .previews import TrainingProgress

logger = logging.getLogger(__name__)

SAMPLERS = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS = comfy.samplers.KSampler.SCHEDULERS
KEY = "stylewright.samples"


@dataclass(frozen=True)
class Brush:
    """A KSampler's widgets, and the size of its empty latent."""

    sampler: str = "euler"  # one of SAMPLERS
    scheduler: str = "simple"  # one of SCHEDULERS
    steps: int = 20
    cfg: float = 1.0
    seed: int = 0
    width: int = 0  # pixels; 0 = the side that training has
    height: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.cfg):
            raise ValueError(f"sample_cfg is {self.cfg}: expected a number, such as your KSampler's cfg")

    def sized(self, side: int, multiple: int, model: str) -> "Brush":
        """With a size in place of 0. ValueError for one that the model does not draw."""
        side -= side % multiple
        brush = replace(self, width=self.width or side, height=self.height or side)
        if brush.width % multiple or brush.height % multiple:
            raise ValueError(
                f"sample pictures of {brush.width}x{brush.height}: {model} draws multiples of {multiple} pixels, for "
                f"example {brush.width - brush.width % multiple}x{brush.height - brush.height % multiple}"
            )
        return brush


@dataclass(frozen=True)
class Subject:
    """What is drawn, as ComfyUI's CONDITIONING."""

    positives: Sequence[list]  # one a picture
    negative: list


class Painter:
    """Draws at a step, and lets training go on where that fails.

    A failure while sampling ends the pictures of this run, one of the VAE leaves ComfyUI's rough approximation of
    them; the progress says either. An interrupt is an interrupt.
    """

    def __init__(
        self,
        model: comfy.model_patcher.ModelPatcher,
        vae: comfy.sd.VAE,
        subject: Callable[[], Subject],
        brush: Brush,
        progress: TrainingProgress,
        sigma: float | None = None,  # at which a one-step student is called; None = the brush's sampler and steps
    ) -> None:
        """``model`` is in a training session whenever something is drawn."""
        self._model, self._vae, self._subject, self._brush, self._sigma = model, vae, subject, brush, sigma
        self._progress = progress
        self._works, self._decodes = True, True

    def __call__(self, step: int) -> Tensor | None:
        """One picture a prompt, (b, 3, h, w) in [0, 1] on the CPU; None once drawing has failed."""
        if not self._works:
            return None
        self._progress.drawing(step)
        try:
            subject = self._subject()
            pictures = [self._picture(positive, subject.negative) for positive in subject.positives]
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:  # whatever it is, the training is worth more than the picture
            self._give_up(step, error)
            return None
        return torch.cat(pictures)

    def _picture(self, positive: list, negative: list) -> Tensor:
        if self._sigma is None:
            latent = draw_latent(self._model, self._vae, positive, negative, self._brush)
        else:
            latent = draw_once(self._model, self._vae, positive, self._brush, self._sigma)
        if self._decodes and has_room(self._vae, latent):
            try:
                return decode(self._vae, latent)
            except comfy.model_management.InterruptProcessingException:
                raise
            except Exception as error:
                logger.warning("the VAE cannot decode a sample picture", exc_info=True)
                self._decodes = False
                self._progress.noted(
                    f"The VAE cannot decode sample pictures ({_brief(error)}): they are approximations from here."
                )
        return resized(approximation(self._model, self._vae, latent), self._brush)

    def _give_up(self, step: int, error: Exception) -> None:
        logger.warning("no more sample pictures in this run: drawing failed at step %d", step, exc_info=True)
        self._works = False
        comfy.model_management.soft_empty_cache()
        if isinstance(error, torch.OutOfMemoryError):
            size = f"{self._brush.width}x{self._brush.height}"
            self._progress.noted(
                f"Too little memory to draw a sample of {size}: no more of them in this run. Training goes on."
            )
        else:
            self._progress.noted(f"No more sample pictures in this run ({_brief(error)}). Training goes on.")


def draw_latent(
    model: comfy.model_patcher.ModelPatcher, vae: comfy.sd.VAE, positive: list, negative: list, brush: Brush
) -> Tensor:
    """The LATENT (1, c, …) that a KSampler gives on an empty latent of the brush's size, with the weights as they are.

    The random numbers that samplers draw come from the brush's seed, and the global generators are put back.
    """
    return draw_from(model, _empty(model, vae, brush), positive, negative, brush)


def _empty(model: comfy.model_patcher.ModelPatcher, vae: comfy.sd.VAE, brush: Brush) -> Tensor:
    side = vae.spacial_compression_encode()
    return torch.zeros(1, model.model.latent_format.latent_channels, brush.height // side, brush.width // side)


def draw_once(
    model: comfy.model_patcher.ModelPatcher, vae: comfy.sd.VAE, positive: list, brush: Brush, sigma: float
) -> Tensor:
    """The LATENT (1, c, …) that a One-Step Sampler gives of the brush's size and seed, called at ``sigma``."""
    with _sampling(model) as ready:
        empty = comfy.sample.fix_empty_latent_channels(ready, _empty(model, vae, brush))
        return comfy.sample.sample_custom(
            ready,
            comfy.sample.prepare_noise(empty, brush.seed),
            1.0,
            OneStep(),
            torch.tensor([sigma, 0.0]),
            positive,
            [],
            empty,
            disable_pbar=True,
            seed=brush.seed,
        )


def draw_from(
    model: comfy.model_patcher.ModelPatcher, empty: Tensor, positive: list, negative: list, brush: Brush
) -> Tensor:
    """The same on an empty LATENT (b, c, …) that is given."""
    with _sampling(model) as ready:
        empty = comfy.sample.fix_empty_latent_channels(ready, empty)
        return comfy.sample.sample(
            ready,
            comfy.sample.prepare_noise(empty, brush.seed),
            brush.steps,
            brush.cfg,
            brush.sampler,
            brush.scheduler,
            positive,
            negative,
            empty,
            disable_pbar=True,
            seed=brush.seed,
        )


@contextmanager
def _sampling(model: comfy.model_patcher.ModelPatcher) -> Iterator[comfy.model_patcher.ModelPatcher]:
    """A clone for ComfyUI's samplers, which loads nothing: the model is loaded, and has an adapter that must stay.

    Inside, ComfyUI takes the kernels that it takes for a KSampler, not those of training.
    """
    ready = model.clone()
    ready.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING, KEY, _as_it_is)
    devices = [model.load_device] if model.load_device.type == "cuda" else []
    training = comfy.model_management.in_training
    comfy.model_management.in_training = False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield ready
    finally:
        comfy.model_management.in_training = training
        model.pre_run()  # a guider's clean-up ends the session's


def _as_it_is(
    prepare: Callable,
    model: comfy.model_patcher.ModelPatcher,
    noise_shape: Sequence[int],
    conds: dict,
    model_options: dict | None = None,
    force_full_load: bool = False,
    force_offload: bool = False,
) -> tuple:
    """In place of comfy.sampler_helpers.prepare_sampling: its answer, without what it does to the device's memory."""
    return model.model, conds, []


def decode(vae: comfy.sd.VAE, latent: Tensor) -> Tensor:
    """What VAEDecode makes of a LATENT, as (b, 3, h, w) in [0, 1] on the CPU."""
    with torch.inference_mode():
        pictures = vae.decode(latent)
        return settle(pictures.flatten(0, -4).movedim(-1, 1).float().clamp(0, 1))


def has_room(vae: comfy.sd.VAE, latent: Tensor) -> bool:
    """Whether ComfyUI can decode without pushing out the model that is being trained, by the sums it does itself."""
    device = vae.patcher.load_device
    if comfy.model_management.is_device_cpu(device):
        return True
    working = vae.memory_used_decode(latent.shape, vae.vae_dtype) + comfy.model_management.extra_reserved_memory()
    weights = vae.patcher.model_size() - vae.patcher.loaded_size()
    needed = 1.1 * weights + max(working, comfy.model_management.minimum_inference_memory())
    return comfy.model_management.get_free_memory(device) > needed


def approximation(model: comfy.model_patcher.ModelPatcher, vae: comfy.sd.VAE, latent: Tensor) -> Tensor:
    """A rough picture (1, 3, h, w) in [0, 1] of a LATENT, at the size of the latent.

    By ComfyUI's linear map where the family has one, else by the VAE, whatever it pushes out of the device's memory.
    """
    form = model.model.latent_format
    if form.latent_rgb_factors is None:
        return decode(vae, latent)
    previewer = latent_preview.Latent2RGBPreviewer(
        form.latent_rgb_factors, form.latent_rgb_factors_bias, form.latent_rgb_factors_reshape
    )
    image = previewer.decode_latent_to_preview(model.model.process_latent_in(latent.float()))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, image.height, image.width, 3)
    return pixels.movedim(-1, 1).float() / 255


def resized(picture: Tensor, brush: Brush) -> Tensor:
    """A picture (1, 3, h, w) at the brush's size."""
    return interpolate(picture, (brush.height, brush.width), mode="bilinear")


def _brief(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__

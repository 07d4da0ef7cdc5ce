"""What a node shows while it works: a progress bar with pictures, and a line of text on itself."""

from collections.abc import Callable

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import latent_preview
import torch
from PIL import Image
from torch import Tensor

from ...training.hosts.host import Host
from ...training.loops.events import Event
from .session import raise_if_interrupted

LARGEST = 512  # side of a preview in pixels


class TrainingProgress:
    """Tells ComfyUI of a run, and the run of ComfyUI's interrupt."""

    def __init__(self, steps: int, node_id: str | None) -> None:
        self._bar = comfy.utils.ProgressBar(steps, node_id=node_id)
        self._node_id = node_id

    def encoded(self, done: int, total: int) -> None:
        """A picture or caption of the dataset was encoded."""
        show_text(self._node_id, f"encoding {done} of {total}")
        raise_if_interrupted()

    def report(self, event: Event) -> None:
        left = (event.steps - event.step) * event.seconds / max(1, event.step)
        show_text(self._node_id, f"step {event.step} of {event.steps}, loss {event.loss:.4f}, {duration(left)} left")
        self._bar.update_absolute(event.step, event.steps, None if event.images is None else preview(event.images))
        raise_if_interrupted()

    def finished(self, text: str) -> None:
        show_text(self._node_id, text)


def duration(seconds: float) -> str:
    """ "2:05" for 125 seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def preview(pictures: Tensor) -> tuple[str, Image.Image, int]:
    """Pictures (b, 3, h, w) in [0, 1] side by side, in the form that ComfyUI's progress bar takes."""
    row = torch.cat(list(pictures.clamp(0, 1)), 2)
    return "JPEG", Image.fromarray((row * 255).round().byte().movedim(0, -1).cpu().numpy()), LARGEST * len(pictures)


def show_text(node_id: str | None, text: str) -> None:
    """Writes a line below a node's widgets. Nothing happens outside a server."""
    if node_id is None:
        return
    from server import PromptServer  # ComfyUI's own, which only a running server has loaded

    PromptServer.instance.send_progress_text(text, node_id)


def decoder_for_previews(
    model: comfy.model_patcher.ModelPatcher, vae: comfy.sd.VAE, host: Host
) -> Callable[[Tensor], Tensor]:
    """Latents to pictures without pushing the model that is being trained out of the device's memory.

    By the VAE where there is room for it beside the model, else by ComfyUI's linear approximation.
    """

    def decode(latents: Tensor) -> Tensor:
        if _fits(vae, latents) or model.model.latent_format.latent_rgb_factors is None:
            return host.decode_latents(latents)
        return torch.cat([_approximate(model, latent[None]) for latent in latents])

    return decode


def _fits(vae: comfy.sd.VAE, latents: Tensor) -> bool:
    """Whether ComfyUI can decode without unloading anything, by the sums that it does itself."""
    device = vae.patcher.load_device
    if comfy.model_management.is_device_cpu(device):
        return True
    working = vae.memory_used_decode(latents[:1].shape, vae.vae_dtype) + comfy.model_management.extra_reserved_memory()
    weights = vae.patcher.model_size() - vae.patcher.loaded_size()
    needed = 1.1 * weights + max(working, comfy.model_management.minimum_inference_memory())
    return comfy.model_management.get_free_memory(device) > needed


def _approximate(model: comfy.model_patcher.ModelPatcher, latent: Tensor) -> Tensor:
    """A small picture (1, 3, h, w) in [0, 1] of a latent (1, c, h, w)."""
    form = model.model.latent_format
    previewer = latent_preview.Latent2RGBPreviewer(form.latent_rgb_factors, form.latent_rgb_factors_bias)
    image = previewer.decode_latent_to_preview(latent.float())
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, image.height, image.width, 3)
    return pixels.movedim(-1, 1).float() / 255

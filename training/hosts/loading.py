"""Any model by name: the embedded one, a folder in diffusers' layout, or a single-file checkpoint."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..formats.whole import is_whole
from .embedded import load_embedded
from .flux import open_flux
from .host import Host
from .parts import DENOISER_PREFIX, Parts, Placing, checkpoint_keys, read_json
from .pixart import open_pixart
from .sd3 import open_sd3
from .unet import open_unet

FAMILIES = {"flux": open_flux, "sd3": open_sd3, "sdxl": open_unet, "sd15": open_unet, "pixart": open_pixart}
PIPELINES = {
    "FluxPipeline": "flux",
    "StableDiffusion3Pipeline": "sd3",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusionPipeline": "sd15",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
}
# A key that a family's single files have and the families after it have not.
MARKERS = {
    "flux": "double_blocks.0.img_mod.lin.weight",
    "sd3": "joint_blocks.0.x_block.adaLN_modulation.1.weight",
    "sdxl": "label_emb.0.0.weight",
    "pixart": "y_embedder.y_proj.fc1.weight",
    "sd15": "input_blocks.0.0.weight",
}


def load_host(
    model: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    components: str | Path | None = None,  # for a single file: a diffusers folder with what the file lacks
    place: Placing | None = None,  # brings the denoiser to where it computes; None = whole onto the device
) -> Host:
    """Opens "embedded", a diffusers folder, or a single file. Nothing is ever downloaded.

    Raises ValueError where the model is of no supported family or a part of it is not on disk.
    """
    if str(model) == "embedded":
        return load_embedded(device=device, dtype=dtype, place=place)
    folder = Path(components).expanduser() if components else None
    parts = replace(find_parts(Path(model).expanduser(), folder, device, dtype), place=place)
    if missing := parts.missing():
        advice = "--components names the folder" if parts.checkpoint else "nothing is downloaded"
        raise ValueError(f"{parts.name} lacks {'; '.join(missing)}. Put the files there ({advice}) and try again")
    return FAMILIES[parts.family](parts)


def find_parts(model: Path, components: Path | None, device: str, dtype: torch.dtype) -> Parts:
    """Where the parts of the model are. ValueError for what is no model."""
    if model.is_dir():
        if components is not None:
            raise ValueError(f"{model} is a folder, which has its components inside: leave --components out")
        return Parts(family_of_folder(model), model, None, device, dtype)
    if not model.is_file():
        raise ValueError(f'no model at {model}: expected "embedded", a diffusers folder, or a .safetensors file')
    if model.suffix != ".safetensors":
        raise ValueError(f"{model.name} is not a .safetensors file; other formats can run code when they are opened")
    keys = checkpoint_keys(model)
    if is_whole(model):
        raise ValueError(
            f"{model} has all weights of a network, as `stylewright distill --full` writes them, and no model around "
            f"it: `stylewright generate --model MODEL --adapter {model}` draws with it, where MODEL is its teacher"
        )
    family = family_of_keys(keys, model)
    if components is None:
        raise ValueError(
            f"{model.name} is a {family} checkpoint. Its configuration and tokenizers, and the text encoders and "
            f"autoencoder if it lacks them, come from a diffusers folder of the same family: --components FOLDER "
            f"(the one with model_index.json; nothing is downloaded)"
        )
    if (other := family_of_folder(components)) != family:
        raise ValueError(f"{model.name} is a {family} checkpoint, but --components {components} is a {other} model")
    return Parts(family, components, model, device, dtype)


def family_of_folder(folder: Path) -> str:
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is not a diffusers folder: it has no model_index.json")
    pipeline = read_json(folder / "model_index.json").get("_class_name")
    if pipeline not in PIPELINES:
        raise ValueError(f"{folder} holds a {pipeline}, expected one of {', '.join(PIPELINES)}")
    return PIPELINES[pipeline]


def family_of_keys(keys: Sequence[str], file: Path) -> str:
    """The family of a single-file checkpoint, by its key names."""
    plain = {key.removeprefix(DENOISER_PREFIX) for key in keys}
    for family, marker in MARKERS.items():
        if marker in plain:
            return family
    raise ValueError(
        f"{file} is not a checkpoint of a supported family ({', '.join(MARKERS)}); "
        f"its first keys are {', '.join(sorted(keys)[:3]) or 'none'}"
    )

"""CONDITIONING that a sampler and a model can take, told apart from what would only give noise or a raw error later."""

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_patcher
from torch import Tensor, nn

# Layers that a text's tokens come to first, and its pooled vector, by their paths in the networks of families.
TEXT_LAYERS = (
    "txt_in", "txt_in.input_embedder", "context_embedder", "text_embedding.0", "y_embedder.y_proj.fc1",
    "caption_projection.linear_1", "cap_embedder.1", "cond_seq_linear",
)  # fmt: skip
POOLED_LAYERS = ("vector_in.in_layer", "y_embedder.mlp.0")
SIZES = {"SDXL": 6 * 256, "SDXLRefiner": 5 * 256}  # numbers for sizes, which UNets are told behind the pooled vector
TRANSLATE = ("LTXAVModel",)  # take texts of several widths


def check_sound(named: Mapping[str, Sequence[Sequence[Any]]]) -> None:
    """ValueError names a conditioning that is empty, has no tokens or another form, or contains NaN or infinity."""
    for name, conditioning in named.items():
        if not conditioning:
            raise ValueError(f"{name} is empty: expected a conditioning, as of CLIP Text Encode")
        for text, values in conditioning:
            if text is not None and (text.ndim < 2 or 0 in text.shape):
                raise ValueError(
                    f"{name} has an encoding of the shape {tuple(text.shape)}: expected (batch, tokens, width), none "
                    "of them 0. Encode the prompt with CLIP Text Encode"
                )
            for what, value in (("text", text), ("pooled_output", values.get("pooled_output"))):
                if isinstance(value, Tensor) and not bool(value.isfinite().all()):
                    raise ValueError(f"{name} contains NaN or infinity ({what}): run the text encoder in float32")


def check_fits(model: comfy.model_patcher.ModelPatcher, named: Mapping[str, Sequence[Sequence[Any]]]) -> None:
    """ValueError names a conditioning that another model's text encoder has made.

    Silent for models that other nodes work on, for there are some that translate the encodings of other encoders.
    """
    if is_adapted(model):
        return
    for name, conditioning in named.items():
        if reason := misfit(model, conditioning):
            raise ValueError(f"{name} {reason}")


def is_adapted(model: comfy.model_patcher.ModelPatcher) -> bool:
    """Whether something between a sampler and ComfyUI's own network may change what it is told."""
    return (
        not type(model.model.diffusion_model).__module__.startswith("comfy.")
        or not type(model.model).__module__.startswith("comfy.")
        or "model_function_wrapper" in model.model_options
        or any(path.startswith("diffusion_model") for path in model.object_patches)
        or any(
            key is None or not str(key).startswith("stylewright") for each in model.wrappers.values() for key in each
        )
    )


def misfit(model: comfy.model_patcher.ModelPatcher, conditioning: Sequence[Sequence[Any]]) -> str | None:
    """Which width came, which the model takes, and what to do; None where they agree, or nothing is known."""
    text, pooled = widths_taken(model)
    for encoding, values in conditioning:
        vector = values.get("pooled_output")
        for what, found, wanted in (("", encoding, text), (" its pooled output", vector, pooled)):
            if isinstance(found, Tensor) and wanted and found.shape[-1] != wanted:
                return (
                    f"is encoded {found.shape[-1]} wide{' in' * bool(what)}{what}, this model takes {wanted}: encode "
                    "the prompt with the CLIP that belongs to the model"
                )
    return None


def widths_taken(model: comfy.model_patcher.ModelPatcher) -> tuple[int | None, int | None]:
    """Of the text's tokens and of the pooled vector, as far as they are known."""
    base, network = model.model, model.model.diffusion_model
    if type(network).__name__ in TRANSLATE:
        return None, None
    config, sizes = base.model_config.unet_config, SIZES.get(type(base).__name__)
    text = config.get("context_dim") or config.get("crossattn_emb_channels") or _inputs(network, TEXT_LAYERS)
    if sizes is not None:
        return text, config["adm_in_channels"] - sizes
    return text, _inputs(network, POOLED_LAYERS)


def _inputs(network: nn.Module, paths: Sequence[str]) -> int | None:
    """How many numbers the first of these layers takes that a network has."""
    layers = dict(network.named_modules())
    found = (getattr(layers.get(path), "in_features", None) for path in paths)
    return next(filter(None, found), None)

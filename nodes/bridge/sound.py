"""CONDITIONING that a sampler can take, told apart from what would only give noise or a raw error later."""

from collections.abc import Mapping

from torch import Tensor


def check_sound(named: Mapping[str, list]) -> None:
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

"""What a loaded MODEL attends to, seen by ComfyUI's own ``optimized_attention_override``, and its text's tokens."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_patcher
import comfy.sd
import comfy.utils
from torch import Tensor

from ...training.concepts.locate import Search, Watch, attention_maps
from ...training.concepts.maps import Recorder
from ...training.concepts.reference import resized, size_to_look_at
from .denoiser import ComfyDenoiser
from .host import comfy_host
from .kernels import OVERRIDE
from .prompts import PROMPT, PromptTable
from .session import training_session

ARGUMENTS = ("heads", "mask", "attn_precision", "skip_reshape")  # after q, k, v in ComfyUI
# Classes of diffusion models in which every attention tells the override of itself, and where a joint one has its text
# in front of the picture. A class counts for what derives from it.
SEEN = ("UNetModel", "Flux", "Chroma", "OpenAISignatureMMDITWrapper", "QwenImageTransformer2DModel")


def phrase_maps(
    model: comfy.model_patcher.ModelPatcher,
    clip: comfy.sd.CLIP,
    vae: comfy.sd.VAE,
    picture: Tensor,  # (3, h, w) in [0, 1]
    prompt: str,
    phrases: Sequence[str],
    search: Search,
    resolution: int,  # pixels: the picture is looked at with about resolution² of them
) -> Tensor:
    """Maps (phrases, h', w') in [0, 1] of the whole picture. ValueError for a model that cannot be seen into."""
    kinds = [kind.__name__ for kind in type(model.model.diffusion_model).__mro__]
    if not any(kind in SEEN for kind in kinds):
        raise ValueError(
            f"{kinds[0]}: no hook of ComfyUI shows what this model attends to. It works on {', '.join(SEEN)}; give a "
            "mask of each phrase instead, or locate with another model"
        )
    clone, sight = model.clone(), _Sight(model.model_options["transformer_options"].get(OVERRIDE))
    clone.model_options["transformer_options"][OVERRIDE] = sight
    host = comfy_host(clone, clip, vae, resolution=resolution)
    assert isinstance(host.denoiser, ComfyDenoiser), "comfy_host makes one"
    host = replace(host, token_ids=_Tokens(clip, host.denoiser.prompts, prompt))

    @contextmanager
    def watched(recorder: Recorder) -> Iterator[None]:
        with training_session(clone):
            sight.recorder = recorder
            try:
                yield
            finally:
                sight.recorder = None

    size = size_to_look_at(*picture.shape[1:], resolution, host.pixels_per_token)
    bar = comfy.utils.ProgressBar(1)
    return attention_maps(
        host,
        Watch(watched),
        resized(picture, *size),
        prompt,
        phrases,
        search,
        lambda done, total: bar.update_absolute(done, total),
    )


@dataclass
class _Sight:
    """Another override's attention, or ComfyUI's, while the recorder looks on."""

    before: Callable[..., Tensor] | None
    recorder: Recorder | None = None

    def __call__(self, attention: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if self.recorder is not None:
            given = {**dict(zip(("q", "k", "v", *ARGUMENTS), args, strict=False)), **kwargs}
            q, k = (
                each
                if given.get("skip_reshape")
                else each.flatten(2).unflatten(2, (given["heads"], -1)).transpose(1, 2)
                for each in (given["q"], given["k"])
            )
            self.recorder.see(q, k, given.get("mask"))
        if self.before is None:
            return attention(*args, **kwargs)
        return self.before(attention, *args, **kwargs)


class _Tokens:
    """The tokens of texts, by each encoder whose answers the model attends to, in the order of its context.

    Which these are is told by the length of what they answer to the whole prompt. ValueError where nothing fits.
    """

    def __init__(self, clip: comfy.sd.CLIP, prompts: PromptTable, prompt: str) -> None:
        self._clip = clip
        context = prompts.answer(int(prompts.encode([prompt])[PROMPT][0]))["cross_attn"].shape[1]
        lengths = {name: len(ids) for name, ids in self._all(prompt).items()}
        self._names = _names(lengths, context)

    def __call__(self, text: str) -> list[list[int]]:
        found = self._all(text)
        return [found[name] for name in self._names]

    def _all(self, text: str) -> dict[str, list[int]]:
        """Embeddings from files count as one more token."""
        return {
            name: [token if isinstance(token, int) else -1 for chunk in chunks for token, *_ in chunk]
            for name, chunks in self._clip.tokenize(text).items()
        }


def _names(lengths: dict[str, int], context: int) -> list[str]:
    single = [name for name, length in lengths.items() if length == context]
    if single:
        return single[:1]  # SDXL's two have the same tokens
    pairs = [
        [one, other]
        for one, first in lengths.items()
        for other, second in lengths.items()
        if "t5" in other and "t5" not in one and first + second == context
    ]
    if pairs:
        return pairs[0]  # SD3: its CLIPs, which have the same tokens, and T5 behind them
    raise ValueError(
        f"which of the {context} tokens that this model attends to are of which words is not known: give a mask of "
        "each phrase instead, or locate with another model"
    )

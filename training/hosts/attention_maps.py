"""What a diffusers model attends to, seen where it calls torch's own attention."""

from collections.abc import Callable
from typing import Any

from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..concepts.locate import Watch
from ..concepts.maps import Recorder, picture_first, text_first
from .host import Host

PICTURE_FIRST = ("sd3",)  # families of joint attention in which diffusers puts the text behind the picture


class _Seen(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}
            self._recorder.see(given["query"], given["key"], given.get("attn_mask"))
        return func(*args, **kwargs)


def watch_of(host: Host) -> Watch:
    """For models of diffusers, whose attention goes through torch's ``scaled_dot_product_attention``."""
    return Watch(_Seen, picture_first if host.denoiser.family in PICTURE_FIRST else text_first)

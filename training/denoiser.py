"""The one model contract: every host gives its models this shape, and nothing above asks what is inside."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from .clocks import Clock

# Named batch-first tensors, for example ``context`` (b, n, d) and ``pooled`` (b, d). The names belong to the host.
Conditioning = Mapping[str, Tensor]

# The one entry that all hosts share, of models that are told of it: what became of the picture on its way here, (b, 6)
# in pixels: the original's height and width, top and left of the cut in the resized picture, and the height and width
# that were kept (SDXL's micro-conditioning, arXiv 2307.01952, section 2.2). Without it a picture counts as uncut and of
# its own size, which is how pictures are drawn.
SIZES = "sizes"


class Denoiser(Protocol):
    """A frozen network that predicts from a noisy latent.

    ``module`` is the tree that adapters attach to. ``process`` and ``prediction`` are names from
    :mod:`.noise` and :mod:`.predictions`; ``log_snr_range`` is what the model was trained on, lowest first.
    """

    family: str  # "flux", "sd3", "sdxl", "sd15", "pixart", …: a key of the target presets
    module: nn.Module
    process: str
    prediction: str
    log_snr_range: tuple[float, float]

    def __call__(self, x_t: Tensor, log_snr: Tensor, conditioning: Conditioning) -> Tensor:
        """Prediction (b, c, h, w) in float32 for x_t (b, c, h, w) at log_snr (b,)."""
        ...


class TimedDenoiser(Denoiser, Protocol):
    """A denoiser whose own time is known, which distillation draws from and names the student's call by."""

    @property
    def clock(self) -> Clock: ...

"""FineStyle's adapter on kernels (NeurIPS 2024, pp. 52937-52961): a bottleneck behind a layer, y + W_up GELU(W_down y).

The form is that of StyleDrop's adapters in its public port, which FineStyle's appendix counts in the same terms (a
width and its parameters); on which side of the kernel it is, no source that we know says. It is no change of weights.
"""

import torch.nn.functional as F
from torch import Tensor

DOWN_STD = 0.02  # of W_down at the start, cut off at 2; W_up is zero


def bottleneck(y: Tensor, down: Tensor, up: Tensor, channels: int = -1) -> Tensor:
    """What is added to a layer's output ``y``, of its shape and type. ``channels``: the dimension of its features.

    down: (r, features), up: (features, r), in whose type it is computed.
    """
    inner = F.gelu(F.linear(y.movedim(channels, -1).to(down.dtype), down))
    return F.linear(inner, up).movedim(-1, channels).to(y.dtype)

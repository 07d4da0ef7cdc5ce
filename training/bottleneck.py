"""FineStyle's adapter on kernels (NeurIPS 2024, pp. 52937-52961): a bottleneck behind a layer, y + W_up GELU(W_down y).

The form is that of StyleDrop's adapters in its public port, which FineStyle's appendix counts in the same terms (a
width and its parameters); on which side of the kernel it is, no source that we know says. It is no change of weights.

Parameters may be shared, as the port's may: one W_down and W_up for all layers, and for each layer l two vectors, d_l
and u_l, that are added to them. Which way a vector is spread over its matrix is our reading: along the matrix's
inputs, so that it is the same for all of its outputs. Layers of other widths than the first have a pair of their own.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DOWN_STD = 0.02  # of W_down and d_l at the start, cut off at 2; W_up and u_l are zero


def bottleneck(y: Tensor, down: Tensor, up: Tensor, channels: int = -1) -> Tensor:
    """What is added to a layer's output ``y``, of its shape and type. ``channels``: the dimension of its features.

    down: (r, features), up: (features, r), in whose type it is computed.
    """
    inner = F.gelu(F.linear(y.movedim(channels, -1).to(down.dtype), down))
    return F.linear(inner, up).movedim(-1, channels).to(y.dtype)


def own_factors(down: Tensor, up: Tensor, d: Tensor, u: Tensor, parts: Sequence[range]) -> tuple[Tensor, Tensor]:
    """A layer's own (n r, features) and (features, n r), of what layers share and its vectors.

    down: (r, m) and up: (m, r), shared; d: (features,) and u: (n r,), the layer's. Of its features each of the n
    ``parts``, of m each, has a bottleneck to itself; there are several where a layer stacks keys and values.
    """
    rank, features = len(down), len(d)
    downs, ups = [], []
    for number, part in enumerate(parts):
        around = (part.start, features - part.stop)
        downs.append(F.pad(down + d[part.start : part.stop], around))
        ups.append(F.pad(up + u[number * rank : (number + 1) * rank], (0, 0, *around)))
    return torch.cat(downs), torch.cat(ups, dim=1)

"""LoHa and LoKr, which multiply with a matrix of the weight's size: made again in the backward pass, not kept.

peft makes W' = W1 o W2, or their Kronecker product, in every call, and autograd keeps it for the gradient by the
input: over all layers a second copy of the model, in the adapter's float32.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_later


@contextmanager
def recomputed_deltas(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, those of ``layers`` that are peft's LoHa or LoKr keep their factors only. The results are the same."""
    from peft.tuners.lycoris_utils import LycorisLayer

    with ExitStack() as stack:
        for layer in layers:
            if isinstance(layer, LycorisLayer):
                layer._get_delta_activations = _recomputing(layer._get_delta_activations)
                stack.callback(vars(layer).pop, "_get_delta_activations")
        yield


def _recomputing(activations: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def recomputing(*args: Any, **kwargs: Any) -> Tensor:
        return recompute_later(activations, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return recomputing

"""Activations that wait in CPU memory between the forward and the backward pass.

On CUDA they travel on a stream of their own, from and into pinned memory: out while the next block computes, and
back while the block after it is differentiated, so that the device waits for neither as long as a block computes
longer than its input travels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_BYTES = 2**20  # a smaller tensor is not worth its trip


@dataclass
class Parked:
    """A tensor on its way: the tensor itself until it is first taken, afterwards its copy in CPU memory."""

    tensor: Tensor | None
    host: Tensor
    device: torch.device
    needs_gradient: bool
    before: "Parked | None"  # the one that went before, which comes back after
    returning: Tensor | None = None
    arrival: torch.cuda.Event | None = None


class Garage:
    """Parks tensors in the order of the forward pass and gives them back in the reverse order, bit for bit."""

    def __init__(self, device: torch.device, least_bytes: int | None = None) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._least_bytes = LEAST_BYTES if least_bytes is None else least_bytes
        self._last: Parked | None = None

    def begin(self) -> None:
        """A forward pass begins."""
        self._last = None

    def park(self, value: object) -> object:
        """The value, or a claim to it where it is an activation of some size."""
        if not isinstance(value, Tensor) or not value.requires_grad or value.nbytes < self._least_bytes:
            return value
        self._last = Parked(value, self._sent(value), value.device, value.requires_grad, self._last)
        return self._last

    def take(self, value: object) -> object:
        """What was parked: the very tensor at first, so that gradients flow, then one of the same numbers."""
        if not isinstance(value, Parked):
            return value
        if value.tensor is not None:
            tensor, value.tensor = value.tensor, None
            return tensor
        tensor = self._received(value)
        if value.before is not None:
            self._fetch(value.before)  # while the one just taken is in use
        return tensor.requires_grad_(value.needs_gradient)

    def _sent(self, tensor: Tensor) -> Tensor:
        source = tensor.detach()
        host = torch.empty_like(source, device="cpu", pin_memory=self._stream is not None)
        if self._stream is None:
            return host.copy_(source)
        self._stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(self._stream):
            host.copy_(source, non_blocking=True)
        source.record_stream(self._stream)  # the memory is free again when the copy is done
        return host

    def _fetch(self, parked: Parked) -> None:
        """Starts the way back, once."""
        if parked.tensor is not None or parked.returning is not None:
            return
        if self._stream is None:
            parked.returning = parked.host.to(parked.device, copy=True)
            return
        with torch.cuda.stream(self._stream):
            parked.returning = parked.host.to(parked.device, non_blocking=True)
            parked.arrival = self._stream.record_event()

    def _received(self, parked: Parked) -> Tensor:
        self._fetch(parked)
        tensor, arrival = parked.returning, parked.arrival
        assert tensor is not None
        parked.returning = parked.arrival = None
        if arrival is not None:
            stream = torch.cuda.current_stream(parked.device)
            stream.wait_event(arrival)
            tensor.record_stream(stream)
        return tensor

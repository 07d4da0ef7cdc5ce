"""Bytes and products that are counted, against what the sizes say."""

import pytest
import torch

from stylewright.training.memory import Footprint, is_out_of_memory, nbytes

ROW = 1000 * 4  # bytes


def test_bytes_are_counted_from_a_tensors_making_to_its_end():
    before = torch.zeros(1000)
    with Footprint() as cost:
        first = before + 1
        view = first[3:]
        assert cost.live == ROW
        first = view = None  # noqa: F841
        assert cost.live == 0
        second = before * 2
        before.add_(second)  # in place: nothing new
        third = torch.cat([second, second])
        assert cost.live == cost.peak == 3 * ROW
        del third
        assert cost.live == ROW
    assert cost.peak == 3 * ROW


def test_laps_have_peaks_of_their_own():
    with Footprint() as cost:
        kept = torch.zeros(1000)
        (torch.zeros(3000) + 0).sum()
        first = cost.lap()
        kept = kept + 1
        second = cost.lap()
        third = cost.lap()
    assert (first.live, second.live, third.live) == (ROW, ROW, ROW)
    assert first.peak == 7 * ROW and second.peak == 2 * ROW and third.peak == ROW


def test_only_memory_of_the_device_counts():
    with Footprint(torch.device("meta")) as cost:
        kept = torch.zeros(1000)
    assert cost.peak == 0 and kept.numel()


def test_products_are_counted_forwards_and_backwards():
    """2 n i o for y = x W^T, and as many for the gradient of x: W is frozen."""
    n, i, o = 5, 7, 11
    x, w = torch.randn(n, i, requires_grad=True), torch.randn(o, i)
    with Footprint() as cost:
        y = torch.nn.functional.linear(x, w)
        assert cost.lap().flops == 2 * n * i * o
        y.sum().backward()
        assert cost.lap().flops == 2 * n * i * o
    assert cost.flops == 4 * n * i * o


class Packed(torch.Tensor):
    """A class of weights that cannot be made without its own argument, as ComfyUI-GGUF's."""

    def __new__(cls, *args, kind):
        return super().__new__(cls, *args)

    def __init__(self, *args, kind):
        super().__init__()


def test_tensors_of_other_classes_are_what_they_are_without_counting():
    x, weight = torch.ones(1, 2), Packed(torch.eye(2), kind="Q8")
    assert type(torch.Tensor(x @ weight)) is torch.Tensor
    with Footprint() as cost:
        assert type(torch.Tensor(x @ weight)) is torch.Tensor
    assert cost.flops == 2 * 2 * 2


@pytest.mark.parametrize("tokens", [16, 32])
def test_attention_is_counted_on_the_cpu_too(tokens):
    q = torch.randn(1, 2, tokens, 8, requires_grad=True)
    with Footprint() as cost:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    product = 2 * 2 * tokens * tokens * 8
    assert cost.flops == (2 + 5) * product  # the kernel computes the scores once more on the way back


def test_each_memory_counts_once():
    tensor = torch.zeros(10)
    assert nbytes([tensor, tensor[2:], torch.zeros(3, dtype=torch.float64)]) == 40 + 24


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8000000000000 bytes."),
        RuntimeError("MPS backend out of memory"),
        MemoryError(),
    ],
)
def test_errors_of_memory_are_known(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), ValueError("out of memory"), KeyboardInterrupt()])
def test_other_errors_are_not_mistaken_for_them(error):
    assert not is_out_of_memory(error)


def test_torchs_own_error_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)

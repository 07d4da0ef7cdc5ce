"""Tensors that wait in CPU memory come back as they went."""

import pytest
import torch

from stylewright.training.offload import Garage


def travel(device):
    garage = Garage(device, least_bytes=1)
    tensors = [torch.randn(3, 5, device=device).requires_grad_() * 2 for _ in range(4)]
    garage.begin()
    claims = [garage.park(tensor) for tensor in tensors]
    assert all(garage.take(claim) is tensor for claim, tensor in zip(claims, tensors, strict=True))
    for claim, tensor in reversed(list(zip(claims, tensors, strict=True))):
        back = garage.take(claim)
        assert back is not tensor and torch.equal(back, tensor)
        assert back.requires_grad and back.device == tensor.device and back.stride() == tensor.stride()
        assert claim.tensor is None and claim.returning is None  # nothing is held
    assert claims[0].before is None and claims[3].before is claims[2]


def test_tensors_come_back():
    travel(torch.device("cpu"))


@pytest.mark.gpu
def test_tensors_come_back_over_a_stream_of_their_own():
    travel(torch.device("cuda", torch.cuda.current_device()))


def test_the_one_before_is_fetched_while_one_is_in_use():
    garage = Garage(torch.device("cpu"), least_bytes=1)
    claims = [garage.park(torch.ones(2, requires_grad=True)) for _ in range(3)]
    for claim in claims:
        garage.take(claim)
    garage.take(claims[2])
    assert claims[1].returning is not None and claims[0].returning is None


@pytest.mark.parametrize(
    "value", [None, "text", [1], torch.ones(2**20), torch.ones(2, requires_grad=True)], ids=lambda value: type(value)
)
def test_what_is_small_or_no_activation_stays(value):
    garage = Garage(torch.device("cpu"))
    assert garage.park(value) is value and garage.take(value) is value

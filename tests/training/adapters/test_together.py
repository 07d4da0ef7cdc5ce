"""Several adapters on one network, one of them active."""

import pytest
import torch
from torch import nn

from stylewright.training.adapters.attach import attached_together, switched_to
from stylewright.training.adapters.methods import AdapterConfig

CONFIGS = {
    "one": AdapterConfig(rank=2, targets=("first", "second")),
    "two": AdapterConfig(method="dora", rank=3, alpha=6, targets=("second", "third")),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().requires_grad_(False).eval()


X = torch.linspace(-1, 1, 24).reshape(4, 6)


def moved(adapter, by):
    for name, tensor in adapter._tensors.items():
        if "lora_B" in name:
            tensor.data += by


def test_each_answers_alone_and_the_base_beneath_them(net):
    plain = net(X)
    with attached_together(net, CONFIGS, family="toy", seed=0) as adapters:
        one, two = adapters.values()
        assert torch.equal(net(X), plain)
        moved(one, 0.1)
        changed = net(X)
        assert not torch.allclose(changed, plain)  # the first is the active one
        with switched_to(two, adapters.values()):
            torch.testing.assert_close(net(X), plain)
            moved(two, 0.2)
            other = net(X)
            assert not torch.allclose(other, plain) and not torch.allclose(other, changed)
            with switched_to(None, adapters.values()):
                assert torch.equal(net(X), plain)
            assert torch.equal(net(X), other)
        assert torch.equal(net(X), changed)
    assert torch.equal(net(X), plain) and type(net.second) is nn.Linear and not hasattr(net, "peft_config")


def test_gradients_reach_the_active_one_alone(net):
    with attached_together(net, CONFIGS, family="toy", seed=0) as adapters:
        for chosen in adapters.values():
            with switched_to(chosen, adapters.values()):
                net(X).square().sum().backward()
            for adapter in adapters.values():
                reached = any(p.grad is not None and p.grad.any() for p in adapter.parameters())
                assert reached == (adapter is chosen)
                for parameter in adapter.parameters():
                    parameter.grad = None


def test_each_has_its_own_tensors_under_the_names_of_files(net):
    with attached_together(net, CONFIGS, family="toy", seed=0) as adapters:
        states = {name: adapter.state_dict() for name, adapter in adapters.items()}
    assert set(states["one"]) == {f"{layer}.lora_{part}.weight" for layer in ("first", "second") for part in "AB"}
    assert states["one"]["second.lora_A.weight"].shape == (2, 6)
    assert states["two"]["second.lora_A.weight"].shape == (3, 6)


def test_methods_that_no_layer_can_have_together_are_refused_before_anything_is_touched(net):
    configs = {**CONFIGS, "two": AdapterConfig(method="oft", rank=2, targets=("second",))}
    with pytest.raises(ValueError, match="oft for two"), attached_together(net, configs, family="toy", seed=0):
        pass
    assert type(net.second) is nn.Linear

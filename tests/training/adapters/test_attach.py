"""Attaching: nothing changes at the start, nothing but the adapter learns, nothing is left behind."""

import copy

import pytest
import torch
from torch import nn

from stylewright.training.adapters.attach import attached
from stylewright.training.adapters.methods import METHODS, AdapterConfig
from stylewright.training.randomness import generator

ALL = ("to_q", "to_k", "conv")
LINEAR = ("to_q", "to_k")
DROPPING = sorted(METHODS.keys() - {"oft"})
BATCH, TOKENS, WIDTH = 2, 5, 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.to_q = nn.Linear(WIDTH, 2 * WIDTH)
        self.drop = nn.Dropout(0.5)
        self.to_k = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.conv = nn.Conv2d(WIDTH, 4, (3, 1), padding=(1, 0))

    def forward(self, x):
        x = x + self.to_k(torch.tanh(self.to_q(self.norm(x))))
        return x + self.conv(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2).repeat(1, 1, 2)


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.blocks = nn.ModuleList(Block() for _ in range(2)).to(dtype)
        self.eval().requires_grad_(False)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def inputs(dtype=torch.float32):
    return torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def fill(adapter, scale=0.3):
    source = torch.Generator().manual_seed(9)
    adapter.load_state_dict(
        {
            name: tensor + scale * torch.randn(tensor.shape, generator=source)
            for name, tensor in adapter.state_dict().items()
        }
    )


def config(method="lora", targets=None, **settings):
    return AdapterConfig(method, rank=4, targets=targets or (LINEAR if method == "oft" else ALL), **settings)


def snapshot(module):
    """Everything that attaching could have changed, by identity."""
    return {
        "modules": [(name, id(part), part.training, set(vars(part))) for name, part in module.named_modules()],
        "tensors": [(name, id(p), p.requires_grad, p.dtype, p.clone()) for name, p in module.named_parameters()],
        "hooks": [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in module.modules()],
    }


def assert_same(before, after):
    assert before["modules"] == after["modules"]
    assert before["hooks"] == after["hooks"]
    for (*one, value), (*other, now) in zip(before["tensors"], after["tensors"], strict=True):
        assert one == other
        assert torch.equal(value, now)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_adapter_changes_no_bit(method, dtype):
    net, x = Net(dtype), inputs(dtype)
    base = net(x)
    wide = torch.promote_types(dtype, torch.float32)
    with attached(net, config(method), family="other", seed=0, dtype=wide) as adapter:
        assert len(adapter.names) == (4 if method == "oft" else 6)
        assert torch.equal(net(x), base)
        fill(adapter)
        assert not torch.equal(net(x), base)
    assert torch.equal(net(x), base)


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_adapter_learns(method):
    """The first step's gradient is not zero everywhere, or nothing would ever happen."""
    net = Net()
    with attached(net, config(method), family="other", seed=0) as adapter:
        net(inputs()).square().mean().backward()
        by_layer = dict.fromkeys(adapter.names, 0.0)
        for (tensor_name, _), parameter in zip(adapter.state_dict().items(), adapter.parameters(), strict=True):
            layer = next(name for name in adapter.names if tensor_name.startswith(f"{name}."))
            by_layer[layer] += float(parameter.grad.abs().sum())
        assert all(total > 0 for total in by_layer.values())


@pytest.mark.parametrize("method", METHODS)
def test_only_the_adapter_gets_gradients(method):
    net = Net().requires_grad_(True)
    with attached(net, config(method), family="other", seed=0) as adapter:
        net(inputs()).square().mean().backward()
        ours = {id(parameter) for parameter in adapter.parameters()}
        assert len(ours) == len(adapter.parameters()) > 0
        for parameter in net.parameters():
            assert parameter.requires_grad == (parameter.grad is not None) == (id(parameter) in ours)


@pytest.mark.parametrize("method", METHODS)
def test_removal_leaves_no_trace(method):
    net = Net()
    net.blocks[0].to_q.weight.requires_grad_(True)  # flags need not be uniform
    net.blocks[1].train()
    before = snapshot(net)
    with attached(net, config(method), family="other", seed=0) as adapter:
        fill(adapter)
        net(inputs())
    assert_same(before, snapshot(net))


def test_an_error_inside_leaves_no_trace():
    net = Net()
    before = snapshot(net)
    with pytest.raises(KeyboardInterrupt), attached(net, config(), family="other", seed=0):
        raise KeyboardInterrupt
    assert_same(before, snapshot(net))


def test_an_error_half_way_through_leaves_no_trace():
    """peft has no OFT for one-dimensional convolutions, and says so after it has wrapped the layer before."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1)).train()
    before = snapshot(net)
    with (
        pytest.raises(TypeError, match="Conv1d"),
        attached(net, AdapterConfig("oft", rank=2, targets=("0", "1")), family="other", seed=0),
    ):
        pass
    assert_same(before, snapshot(net))


def test_an_earlier_peft_attribute_comes_back():
    net = Net()
    net.peft_config = {"theirs": object()}
    before = dict(net.peft_config)
    with attached(net, config(), family="other", seed=0):
        assert net.peft_config.keys() == {"default"}
    assert net.peft_config == before


def test_an_adapted_model_is_refused():
    net = Net()
    with attached(net, config(), family="other", seed=0):
        before = snapshot(net)
        with (
            pytest.raises(ValueError, match=r"carries an adapter already.*blocks\.0\.to_q"),
            attached(net, config(), family="other", seed=0),
        ):
            pass
        assert_same(before, snapshot(net))


def test_bad_targets_and_ranks_are_refused_before_anything_is_touched():
    net = Net()
    before = snapshot(net)
    for settings, message in [
        ({"targets": ("to_v",)}, "'to_v' matches no layer"),
        ({"rank": 9, "targets": ("to_q",)}, r"rank 9 .* layer blocks\.0\.to_q"),
        ({"targets": "everything"}, "no preset of the family"),
    ]:
        with pytest.raises(ValueError, match=message), attached(net, AdapterConfig(**settings), family="x", seed=0):
            pass
    assert_same(before, snapshot(net))


@pytest.mark.parametrize("method", METHODS)
def test_the_base_answers_while_the_adapter_is_disabled(method):
    net, x = Net(), inputs()
    base = net(x)
    with attached(net, config(method), family="other", seed=0) as adapter:
        fill(adapter)
        changed = net(x).detach()
        with adapter.enabled(False):
            assert torch.equal(net(x), base)
            with adapter.enabled(True):
                assert torch.equal(net(x), changed)
            assert torch.equal(net(x), base)
        assert torch.equal(net(x), changed)
        assert all(parameter.requires_grad for parameter in adapter.parameters())


def test_the_base_can_be_asked_between_forward_and_backward():
    """A loss that compares with the base: the graph made before is not disturbed."""
    net, x = Net(), inputs()
    gradients = []
    with attached(net, config(), family="other", seed=0) as adapter:
        fill(adapter)
        for ask in (False, True):
            output = net(x)
            if ask:
                with adapter.enabled(False), torch.no_grad():
                    net(x)
            output.square().mean().backward()
            gradients.append([parameter.grad.clone() for parameter in adapter.parameters()])
            for parameter in adapter.parameters():
                parameter.grad = None
    assert all(map(torch.equal, *gradients))


def initial(net, seed=0, **settings):
    with attached(net, config(**settings), family="other", seed=seed) as adapter:
        return adapter.state_dict()


@pytest.mark.parametrize("method", METHODS)
def test_initial_weights_depend_on_the_seed_alone(method):
    one, again = initial(Net(), method=method), initial(Net(), method=method)
    assert all(torch.equal(one[name], again[name]) for name in one | again)
    other = initial(Net(), seed=1, method=method)
    assert any(not torch.equal(one[name], other[name]) for name in one) == (method != "oft")


def test_initial_weights_depend_on_neither_the_models_type_nor_the_other_targets():
    full = initial(Net())
    half = initial(Net(torch.bfloat16))
    assert all(torch.equal(full[name], half[name]) for name in full)
    fewer = initial(Net(), targets=("to_k",))
    assert len(fewer) == 4
    assert all(torch.equal(full[name], fewer[name]) for name in fewer)


def test_layers_start_differently():
    state = initial(Net())
    assert not torch.equal(state["blocks.0.to_q.lora_A.weight"], state["blocks.1.to_q.lora_A.weight"])


@pytest.mark.parametrize("init, deviation", [("gaussian", 1 / 4), ("uniform", 1 / 40 / 3**0.5)])
def test_initial_laws(init, deviation):
    net = nn.Sequential(nn.Linear(1600, 8))
    with attached(net, AdapterConfig(rank=4, targets=("0",), init=init), family="other", seed=0) as adapter:
        first = adapter.state_dict()["0.lora_A.weight"]
        assert not adapter.state_dict()["0.lora_B.weight"].any()
    assert first.std().item() == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_global_generators_are_left_alone(method):
    before = torch.get_rng_state()
    net = Net()
    dropout = 0.5 if method in DROPPING else 0.0
    with attached(net, config(method, dropout=dropout), family="other", seed=0) as adapter:
        net(inputs())
        with adapter.dropout(generator(0, "dropout", 1)):
            net(inputs())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_has_its_own_type(method, dtype):
    net = Net(torch.bfloat16)
    with attached(net, config(method), family="other", seed=0, dtype=dtype) as adapter:
        assert {parameter.dtype for parameter in adapter.parameters()} == {dtype}
        assert net(inputs(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS)
def test_a_state_carries_over(method):
    x = inputs()
    one, other = Net(), Net()
    with attached(one, config(method), family="other", seed=0) as adapter:
        fill(adapter)
        state, expected = adapter.state_dict(), one(x).detach()
        with torch.no_grad():
            adapter.parameters()[0].zero_()  # the state is a copy
    with attached(other, config(method), family="other", seed=1) as adapter:
        adapter.load_state_dict(state)
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize("method", METHODS)
def test_states_have_pefts_names(method):
    from peft import get_peft_model_state_dict

    net = Net()
    with attached(net, config(method), family="other", seed=0) as adapter:
        theirs = get_peft_model_state_dict(net, save_embedding_layers=False)
        ours = adapter.state_dict()
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_foreign_state_is_refused_and_changes_nothing():
    with attached(Net(), config(), family="other", seed=0) as adapter:
        before = adapter.state_dict()
        name = "blocks.0.to_q.lora_B.weight"
        for broken, message in [
            ({key: value for key, value in before.items() if key != name}, name),
            ({**before, "blocks.7.to_q.lora_A.weight": before[name]}, r"blocks\.7\.to_q"),
            ({**{key: value + 1 for key, value in before.items()}, name: torch.zeros(3, 4)}, r"shape \(3, 4\)"),
        ]:
            with pytest.raises(ValueError, match=message):
                adapter.load_state_dict(broken)
            assert all(torch.equal(before[key], value) for key, value in adapter.state_dict().items())


@pytest.mark.parametrize("method", DROPPING)
def test_dropout_is_on_where_asked_and_repeats(method):
    net, x = Net(), inputs()
    with attached(net, config(method, dropout=0.5), family="other", seed=0) as adapter:
        fill(adapter, scale=1.0)
        plain = net(x).detach()
        outputs = []
        for place in (1, 2, 3, 1):
            with adapter.dropout(generator(0, "dropout", place)):
                assert not net.blocks[0].drop.training  # the model's own stays off
                outputs.append(net(x).detach())
        assert torch.equal(outputs[0], outputs[3])
        assert not all(torch.equal(outputs[0], output) for output in (*outputs[1:3], plain))
        assert torch.equal(net(x), plain)


def test_without_dropout_nothing_is_drawn():
    net = Net()
    source = generator(0)
    with attached(net, config(), family="other", seed=0) as adapter, adapter.dropout(source):
        assert not any(part.training for part in net.modules())
    assert torch.equal(source.get_state(), generator(0).get_state())


def test_the_model_can_be_copied_and_trained_again_after():
    net = Net()
    base = net(inputs())
    for _ in range(2):
        with attached(net, config("dora"), family="other", seed=0) as adapter:
            fill(adapter)
    assert torch.equal(copy.deepcopy(net)(inputs()), base)


def test_a_state_made_in_inference_mode_is_taken():
    with attached(Net(), config(), family="other", seed=0) as adapter:
        with torch.inference_mode():
            state = adapter.state_dict()
        adapter.load_state_dict(state)
        assert not any(parameter.is_inference() for parameter in adapter.parameters())

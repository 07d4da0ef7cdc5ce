"""StyleInject as peft's method: sizes, files of peft's own, what it is told of prompts, what is counted."""

import json

import pytest
import torch
from torch import nn

from stylewright.training.adapters.attach import attached
from stylewright.training.adapters.methods import AdapterConfig, peft_config
from stylewright.training.gradients import differentiable


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Cross(nn.Module):
    """A block with self-attention's and cross-attention's key layers."""

    def __init__(self, width=8, text=6):
        super().__init__()
        self.attn1, self.attn2 = nn.Module(), nn.Module()
        self.attn1.to_k, self.attn2.to_k = nn.Linear(width, width), nn.Linear(text, width)

    def forward(self, x, context):
        return x + self.attn1.to_k(x) + self.attn2.to_k(context).sum(1, keepdim=True)


class Net(nn.Module):
    def __init__(self, width=8, text=6, blocks=2):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.blocks = nn.ModuleList(Cross(width, text) for _ in range(blocks))
        self.eval().requires_grad_(False)

    def forward(self, x, context=None, attention_mask=None):
        for block in self.blocks:
            x = block(x, context)
        return x


CONFIG = AdapterConfig("styleinject", rank=2, branches=3, targets=(r"to_k",))


def fill(adapter, scale=0.5):
    state = adapter.state_dict()
    adapter.load_state_dict({n: t + scale * random(*t.shape, seed=i) for i, (n, t) in enumerate(state.items())})


@pytest.mark.parametrize(
    ("side", "branches", "rank", "expected"),
    [
        (320, 4, 4, 7_684), (320, 4, 3, 6_084), (320, 3, 4, 6_083),
        (1280, 4, 4, 30_724), (1280, 4, 3, 24_324), (1280, 3, 4, 24_323),
        (3072, 4, 4, 73_732), (3072, 4, 3, 58_372), (3072, 3, 4, 58_371),
    ],
)  # fmt: skip
def test_sizes_are_those_of_the_formula(side, branches, rank, expected):
    net = nn.Module()
    with torch.device("meta"):
        net.to_k = nn.Linear(side, side)
    net.to_k = nn.utils.skip_init(nn.Linear, side, side)
    config = AdapterConfig("styleinject", rank=rank, branches=branches, targets=("to_k",))
    with attached(net, config, family="other", seed=0) as adapter:
        count = sum(parameter.numel() for parameter in adapter.parameters())
    assert count == expected == branches * rank * side + rank * side + branches * side + branches


def test_branches_begin_apart_and_routing_even():
    with attached(Net(), CONFIG, family="other", seed=0) as adapter:
        for name, tensor in adapter.state_dict().items():
            if name.endswith("styleinject_A"):
                assert not torch.allclose(tensor[0], tensor[1])
                assert 0.3 < tensor.std() * CONFIG.rank < 1.7
            elif name.endswith("styleinject_R"):
                assert 0 < tensor.std() < 0.03
            else:
                assert not tensor.any()


def test_peft_saves_and_loads_it_with_its_configuration(tmp_path):
    from peft import PeftConfig, PeftModel, get_peft_model

    config = peft_config(
        AdapterConfig("styleinject", rank=2, alpha=6.0, branches=3, injection="f1"), ["blocks.0.attn1.to_k"]
    )
    x, context = random(2, 5, 8), random(2, 4, 6, seed=1)
    model = get_peft_model(Net(), config)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "styleinject" in name:
                parameter.copy_(random(*parameter.shape, seed=number))
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "STYLEINJECT" and stored["branches"] == 3 and stored["injection"] == "f1"
    assert type(PeftConfig.from_pretrained(str(tmp_path))).__name__ == "StyleInjectConfig"
    again = PeftModel.from_pretrained(Net(), str(tmp_path))
    assert torch.equal(again(x, context), model(x, context))
    assert not torch.allclose(again(x, context), Net()(x, context))


def test_two_of_pefts_adapters_act_side_by_side():
    from peft import get_peft_model

    config = peft_config(AdapterConfig("styleinject", rank=2, branches=3), ["blocks.0.attn1.to_k"])
    model = get_peft_model(Net(), config, "one")
    model.add_adapter("two", config)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "styleinject" in name:
                parameter.copy_(random(*parameter.shape, seed=number))
    layer, x = model.base_model.model.blocks[0].attn1.to_k, random(2, 5, 8)
    changes = []
    for active in (["one"], ["two"], ["one", "two"]):
        layer.set_adapter(active)
        changes.append(layer(x) - layer.base_layer(x))
    torch.testing.assert_close(changes[2], changes[0] + changes[1], rtol=1e-4, atol=1e-5)


def test_tokens_that_a_mask_leaves_out_change_nothing():
    net = Net()
    x, context = random(2, 5, 8), random(2, 4, 6, seed=1)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with attached(net, CONFIG, family="other", seed=0) as adapter:
        fill(adapter)
        layer = adapter.layer("blocks.0.attn2.to_k")
        seen = []
        handle = layer.register_forward_hook(lambda m, args, out: seen.append(out - layer.base_layer(args[0])))
        net(x, context=context, attention_mask=mask)
        net(x, context=torch.cat([context[:1], context[1:, [0, 1, 3, 2]]]), attention_mask=mask)
        net(x, context=context)
        handle.remove()
    masked, swapped, unmasked = seen
    assert (masked[1, 2:] == 0).all() and (masked[1, :2] != 0).all()
    torch.testing.assert_close(masked[1], swapped[1])
    torch.testing.assert_close(masked[0], unmasked[0])
    assert not torch.allclose(masked[1, :2], unmasked[1, :2])


def test_a_recomputed_block_sees_the_mask_of_its_own_call():
    """The network runs twice, with another mask, before the backward pass."""
    x, context = random(1, 5, 8), random(1, 4, 6, seed=1)
    masks = torch.tensor([[1, 1, 0, 0]]), torch.tensor([[1, 1, 1, 1]])
    gradients = []
    for checkpoint in (False, True):
        net = Net()
        with attached(net, CONFIG, family="other", seed=0) as adapter, differentiable(net, checkpoint=checkpoint):
            fill(adapter)
            sum(net(x, context=context, attention_mask=mask).square().mean() for mask in masks).backward()
            gradients.append([parameter.grad.clone() for parameter in adapter.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_clips_first_tokens_are_known_by_their_place():
    from stylewright.training.adapters.text_tokens import counted_tokens, reads_text

    x = random(2, 154, 6)
    counted = counted_tokens(x, "sdxl")
    assert counted.shape == (2, 154, 1)
    assert (~counted[0, :, 0]).nonzero().flatten().tolist() == [0, 77]
    assert counted_tokens(x[:, :100], "sdxl") is None and counted_tokens(x, "flux") is None
    names = {
        "middle_block.1.transformer_blocks.0.attn2.to_k": True,
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v": True,
        "blocks.0.cross_attn.kv_linear": True,
        "double_blocks.3.txt_attn.qkv": True,
        "transformer_blocks.3.attn.add_k_proj": True,
        "middle_block.1.transformer_blocks.0.attn2.to_q": False,
        "middle_block.1.transformer_blocks.0.attn1.to_k": False,
        "single_blocks.0.linear1": False,
        "double_blocks.3.img_attn.qkv": False,
    }
    assert {name: reads_text(name) for name in names} == names


def test_what_is_counted_of_routings():
    from stylewright.training.adapters.routing import RoutingMeter
    from stylewright.training.formats.routing import routing_in_words, routing_table

    meter = RoutingMeter(["even", "chosen", "divided", "silent"], 4)
    meter.add(0, torch.full((3, 4), 0.25))
    meter.add(1, torch.tensor([[1.0, 0, 0, 0]]))
    meter.add(2, torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
    assert not meter.read()  # belongs to no step yet
    meter.complete()
    found = meter.read()
    assert list(found) == ["even", "chosen", "divided"]
    assert found["even"].shares == (0.25,) * 4
    assert found["even"].entropy == pytest.approx(1) and found["even"].spread == pytest.approx(0, abs=1e-6)
    assert found["chosen"].entropy == pytest.approx(0) and found["chosen"].spread == pytest.approx(0)
    assert found["divided"].entropy == pytest.approx(0) and found["divided"].spread == pytest.approx(0.5)
    table = routing_table(found)
    assert table["one_sided"] == 1 and table["layers"]["divided"] == [0.5, 0.5, 0, 0]
    assert "in 1 of 3 layers one branch has over 90%" in routing_in_words(table)
    alone = RoutingMeter(["only"], 1)
    alone.add(0, torch.ones(3, 1))
    alone.complete()
    table = routing_table(alone.read())
    assert table["one_sided"] == 0 and routing_in_words(table) == "one branch, and so no routing"
    state = meter.state_dict()
    meter.add(0, torch.eye(4))
    other = RoutingMeter(meter.layers, 4)
    other.load_state_dict(state)
    assert other.read() == found


def test_routing_is_counted_where_something_is_learned_only():
    net, x, context = Net(), random(2, 5, 8), random(2, 4, 6, seed=1)
    with attached(net, CONFIG, family="other", seed=0) as adapter:
        with torch.no_grad():
            net(x, context=context)
        adapter.routing.complete()
        assert not adapter.routing.read()
        net(x, context=context).sum().backward()
        adapter.routing.complete()
        read = adapter.routing.read()
        assert list(read) == adapter.names and all(abs(sum(each.shares) - 1) < 1e-6 for each in read.values())


def test_what_it_cannot_be_on_is_refused():
    net = nn.Module()
    net.conv = nn.Conv2d(8, 8, 3, groups=2)
    config = AdapterConfig("styleinject", rank=2, targets=("conv",))
    with pytest.raises(ValueError, match="no convolution in groups"), attached(net, config, family="other", seed=0):
        pass
    with pytest.raises(ValueError, match="unknown injection 'f3': expected one of f2c, f1, f2, lora"):
        AdapterConfig("styleinject", injection="f3")
    with pytest.raises(ValueError, match="branches is 0: expected at least 1"):
        AdapterConfig("styleinject", branches=0)

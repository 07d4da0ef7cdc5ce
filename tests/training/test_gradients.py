"""Gradients of networks that add in place, against the same networks written without it, in float64."""

from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from stylewright.training.adapters.attach import attached
from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.gradients import differentiable, repeated_blocks
from stylewright.training.randomness import generator

BATCH, IMAGE, TEXT, WIDTH = 2, 7, 3, 8
LAYERS = ("inside", "outside")
MODES = [pytest.param(False, id="stored"), pytest.param(True, id="checkpointed")]


class Block(nn.Module):
    """Two streams that see each other and are added to in place, as FLUX's double blocks in ComfyUI are."""

    def __init__(self):
        super().__init__()
        self.image_norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.text_norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.late_norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.inside = nn.Linear(WIDTH, WIDTH)
        self.outside = nn.Linear(WIDTH, WIDTH)

    def mixed(self, img, txt):
        both = torch.cat([self.text_norm(txt), self.image_norm(img)], 1)
        both = torch.tanh(self.inside(both)) + both.mean(1, keepdim=True)
        return both[:, txt.shape[1] :], both[:, : txt.shape[1]]

    def forward(self, img, txt, *, gate):
        more_img, more_txt = self.mixed(img, txt)
        img += more_img * gate
        img += torch.tanh(self.outside(self.late_norm(img)))
        txt += more_txt
        return img, txt


class OutOfPlaceBlock(Block):
    def forward(self, img, txt, *, gate):
        more_img, more_txt = self.mixed(img, txt)
        img = img + more_img * gate
        img = img + torch.tanh(self.outside(self.late_norm(img)))
        return img, txt + more_txt


class Net(nn.Module):
    def __init__(self, block=Block, depth=3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.enter = nn.Linear(WIDTH, WIDTH)
            self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.double().eval().requires_grad_(False)

    def forward(self, img, txt, gate):
        img, txt = self.enter(img), self.enter(txt)
        for block in self.blocks:
            img, txt = block(img, txt, gate=gate)
        return img


def inputs():
    source = torch.Generator().manual_seed(4)
    shapes = ((BATCH, IMAGE, WIDTH), (BATCH, TEXT, WIDTH), (BATCH, 1, WIDTH))
    return [torch.randn(shape, generator=source, dtype=torch.float64) for shape in shapes]


def fill(adapter):
    source = torch.Generator().manual_seed(6)
    state = adapter.state_dict()
    adapter.load_state_dict({name: torch.randn(value.shape, generator=source) * 0.3 for name, value in state.items()})


def gradients(module, run, around, **settings):
    """(output, gradients of a filled adapter's parameters) of ``run`` inside the contexts ``around``."""
    settings = {"rank": 4, "targets": LAYERS, **settings}
    with (
        attached(module, AdapterConfig(**settings), family="flux", seed=0, dtype=torch.float64) as adapter,
        around(module),
        adapter.dropout(generator(0, "dropout")),
    ):
        fill(adapter)
        output = run()
        answer = output.detach().clone()  # recomputing without protection writes into the output, too
        output.square().mean().backward()
        assert not any(p.grad is not None for p in module.parameters() if not p.requires_grad)
        return answer, {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in zip(adapter.state_dict(), adapter.parameters(), strict=True)
        }


def error(ours, truth):
    """Relative distance of all gradients together."""
    assert ours.keys() == truth.keys()
    distance = sum(float((ours[name] - truth[name]).square().sum()) for name in truth)
    return (distance / sum(float(gradient.square().sum()) for gradient in truth.values())) ** 0.5


def of_net(block, around, **settings):
    net = Net(block)
    return gradients(net, lambda: net(*inputs()), around, **settings)


def untouched(module):
    return nullcontext()


@contextmanager
def naively_checkpointed(module):
    """The usual idiom, with the norms protected, so that torch has nothing to object to."""

    def naive(forward):
        return lambda *args, **kwargs: checkpoint(lambda: forward(*args, **kwargs), use_reentrant=False)

    with differentiable(module):
        for block in repeated_blocks(module):
            block.forward = naive(block.forward)
        try:
            yield
        finally:
            for block in repeated_blocks(module):
                del block.forward


@pytest.mark.parametrize("recompute", MODES)
def test_gradients_equal_those_of_the_network_without_in_place_additions(recompute):
    expected, truth = of_net(OutOfPlaceBlock, untouched)
    output, ours = of_net(Block, lambda module: differentiable(module, checkpoint=recompute))
    assert torch.equal(output, expected)
    assert error(ours, truth) < 1e-14


@pytest.mark.parametrize("recompute", MODES)
def test_gradients_equal_differences_of_the_loss(recompute):
    net, step = Net(), 1e-5
    config = AdapterConfig(rank=4, targets=LAYERS)
    with (
        attached(net, config, family="other", seed=0, dtype=torch.float64) as adapter,
        differentiable(net, checkpoint=recompute),
    ):
        fill(adapter)
        net(*inputs()).square().mean().backward()
        source = torch.Generator().manual_seed(8)
        directions = [torch.randn(p.shape, generator=source, dtype=p.dtype) for p in adapter.parameters()]
        along = sum((p.grad * d).sum() for p, d in zip(adapter.parameters(), directions, strict=True))
        losses = []
        with torch.no_grad():
            for move in (step, -2 * step):
                torch._foreach_add_(adapter.parameters(), directions, alpha=move)
                losses.append(net(*inputs()).square().mean())
    torch.testing.assert_close(along, (losses[0] - losses[1]) / (2 * step), rtol=1e-7, atol=1e-9)


def test_without_protection_torch_objects():
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        of_net(Block, untouched)


def test_naive_checkpoints_are_silently_wrong():
    """The trap itself: no error, the right output, and gradients that are off by a third."""
    learning = (*LAYERS, "enter")  # were the first block's input without gradient, torch would notice here, too
    expected, truth = of_net(OutOfPlaceBlock, untouched, targets=learning)
    output, wrong = of_net(Block, naively_checkpointed, targets=learning)
    assert torch.equal(output, expected)
    assert error(wrong, truth) > 0.05


@pytest.mark.parametrize("method", ["lora", "loha"])
def test_dropout_is_the_same_when_recomputed(method):
    settings = {"method": method, "dropout": 0.5}
    stored, checkpointed = (
        of_net(Block, lambda module, recompute=recompute: differentiable(module, checkpoint=recompute), **settings)
        for recompute in (False, True)
    )
    assert torch.equal(stored[0], checkpointed[0])
    assert not torch.equal(stored[0], of_net(Block, differentiable, method=method)[0])
    assert error(checkpointed[1], stored[1]) < 1e-14


def stored_bytes(depth, recompute):
    """Bytes of distinct memory that autograd keeps between the passes, without the network's own weights."""
    net, kept = Net(depth=depth), {}
    own = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other tensor gets its address
        return tensor

    config = AdapterConfig(rank=1, targets=LAYERS)
    with (
        attached(net, config, family="other", seed=0, dtype=torch.float64) as adapter,
        differentiable(net, checkpoint=recompute),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        own |= {parameter.untyped_storage().data_ptr() for parameter in adapter.parameters()}
        output = net(*inputs())
        size = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
        output.mean().backward()
    return size


def test_checkpoints_store_the_inputs_of_blocks_and_no_more():
    stream = BATCH * (IMAGE + TEXT) * WIDTH * 8
    a_block = stored_bytes(4, True) - stored_bytes(3, True)
    assert a_block == stream
    assert stored_bytes(4, False) - stored_bytes(3, False) > 4 * stream


@pytest.mark.parametrize("offload", [False, True], ids=["", "offloaded"])
@pytest.mark.parametrize("places", [(), (0,), (1, 2), (0, 2), (0, 1, 2)])
def test_which_blocks_are_recomputed_changes_no_bit(places, offload, monkeypatch):
    monkeypatch.setattr("stylewright.training.offload.LEAST_BYTES", 1)
    settings = {"targets": (*LAYERS, "enter"), "dropout": 0.5}
    expected, stored = of_net(Block, differentiable, **settings)
    device = torch.device("cpu") if offload else None
    output, ours = of_net(Block, lambda module: differentiable(module, checkpoint=places, offload=device), **settings)
    assert torch.equal(output, expected)
    assert all(torch.equal(ours[name], gradient) for name, gradient in stored.items())


def test_blocks_that_are_recomputed_keep_their_input_and_the_others_everything():
    stream = BATCH * (IMAGE + TEXT) * WIDTH * 8
    sizes = [stored_bytes(4, range(count)) for count in range(5)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[4] == stored_bytes(4, False) - stored_bytes(4, True) > 12 * stream


class ToldBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, options):
        return torch.tanh(self.inside(x) * (1 + options["block"]))


class Told(nn.Module):
    """Its blocks are told by one dictionary which of them is computed."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(ToldBlock() for _ in range(3))

    def forward(self, x):
        options = {}
        for options["block"], block in enumerate(self.blocks):
            x = block(x, options)
        return x


def test_a_block_is_told_the_same_when_it_is_recomputed():
    found, network, x = [], Told().double(), torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)
    for recompute in (False, True):
        with differentiable(network, checkpoint=recompute):
            found += torch.autograd.grad(network(x).square().sum(), x)
    assert torch.equal(*found)


def test_outputs_do_not_change_while_nothing_is_differentiated():
    net = Net()
    with torch.no_grad():
        expected = net(*inputs())
        for recompute in (False, True):
            with differentiable(net, checkpoint=recompute):
                assert torch.equal(net(*inputs()), expected)


@pytest.mark.parametrize("recompute", MODES)
def test_nothing_is_left_behind(recompute):
    net = Net()
    net.blocks[1].forward = their_forward = net.blocks[1].forward  # another tool's wrapper

    def state():
        return [
            (name, {key: value for key, value in vars(part).items() if not key.startswith("_")},
             len(part._forward_pre_hooks), len(part._forward_hooks))
            for name, part in net.named_modules()
        ]  # fmt: skip

    before = state()
    with differentiable(net, checkpoint=recompute):
        assert state() != before
    assert state() == before
    with pytest.raises(KeyboardInterrupt), differentiable(net, checkpoint=recompute):
        raise KeyboardInterrupt
    assert state() == before
    assert net.blocks[1].forward is their_forward


def test_a_network_without_blocks_cannot_be_checkpointed():
    with (
        pytest.raises(ValueError, match=r"Sequential has no repeated blocks"),
        differentiable(nn.Sequential(nn.Linear(2, 2)), checkpoint=True),
    ):
        pass
    with differentiable(nn.Sequential(nn.Linear(2, 2))):
        pass


class Part(nn.Module):
    def __init__(self, *lists):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.lists = lists[0] if lists else nn.Identity()


def test_repeated_blocks_are_the_innermost_elements_of_lists_of_like_modules():
    net = nn.Module()
    net.transformer_blocks = nn.ModuleList([Part(), Part()])
    net.stages = nn.ModuleList([Part(nn.ModuleList([Part(), Part()])), Part()])
    net.unet = nn.ModuleList([nn.Sequential(Part(), nn.Linear(2, 2)), nn.Sequential(Part())])
    net.feed_forward = nn.ModuleList([Part(), nn.Dropout(), nn.Linear(2, 2)])
    net.single_layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    expected = [
        *net.transformer_blocks, net.stages[1], net.unet[0][0], net.unet[1][0], *net.stages[0].lists,
    ]  # fmt: skip
    assert set(map(id, repeated_blocks(net))) == set(map(id, expected))
    assert len(repeated_blocks(net)) == len(expected)


class OutOfPlace(TorchFunctionMode):
    """Reads ``a += b`` (which is ``a = a.add_(b)``) as ``a = a + b``, whatever code it stands in."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == torch.Tensor.add_:
            function = torch.Tensor.add
        return function(*args, **kwargs or {})


def randomised(module):
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.1)
    return module.double().eval().requires_grad_(False)


def diffusers_flux():
    """(transformer, a run of it)."""
    from diffusers import FluxTransformer2DModel

    model = randomised(
        FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, pooled_projection_dim=12, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
        )
    )  # fmt: skip
    source = torch.Generator().manual_seed(4)
    tokens, text, pooled = (
        torch.randn(shape, generator=source, dtype=torch.float64) for shape in ((2, 15, 16), (2, 5, 24), (2, 12))
    )
    return model, lambda: model(
        hidden_states=tokens, encoder_hidden_states=text, pooled_projections=pooled,
        timestep=torch.tensor([0.3, 0.9], dtype=torch.float64), img_ids=torch.zeros(15, 3), txt_ids=torch.zeros(5, 3),
        return_dict=False,
    )[0]  # fmt: skip


def comfyui_flux():
    """(ComfyUI's own FLUX, a run of it). What the model does in place is ComfyUI's."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    model = randomised(
        Flux(
            image_model="flux", in_channels=4, out_channels=4, vec_in_dim=12, context_in_dim=24, hidden_size=32,
            mlp_ratio=4.0, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[4, 6, 6], theta=10000,
            patch_size=2, qkv_bias=True, guidance_embed=False, txt_ids_dims=[], dtype=torch.float64, device="cpu",
            operations=comfy.ops.disable_weight_init,
        )
    )  # fmt: skip
    source = torch.Generator().manual_seed(4)
    latent, text, pooled = (
        torch.randn(shape, generator=source, dtype=torch.float64) for shape in ((2, 4, 6, 10), (2, 5, 24), (2, 12))
    )
    return model, lambda: model(latent, torch.tensor([0.3, 0.9], dtype=torch.float64), text, pooled)


@contextmanager
def training_in_comfyui():
    import comfy.model_management

    before = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        yield
    finally:
        comfy.model_management.in_training = before


def compare(make, targets, recompute, host=nullcontext):
    with ExitStack() as stack:
        stack.enter_context(host())
        model, run = make()
        with OutOfPlace():
            expected, truth = gradients(model, run, untouched, targets=targets)
        output, ours = gradients(model, run, lambda m: differentiable(m, checkpoint=recompute), targets=targets)
    assert torch.equal(output, expected)
    assert len(truth) >= 20 and all(gradient.any() for gradient in truth.values())
    assert error(ours, truth) < 1e-12


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("targets", ["style", "all"])
def test_gradients_through_diffusers_flux(targets, recompute):
    compare(diffusers_flux, targets, recompute)


@pytest.mark.comfy
@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("targets", ["style", "all"])
def test_gradients_through_comfyuis_flux(targets, recompute, comfy):
    compare(comfyui_flux, targets, recompute, training_in_comfyui)


@pytest.mark.comfy
def test_comfyuis_flux_still_adds_in_place(comfy):
    """If this fails, the protection is no longer needed."""
    with training_in_comfyui():
        model, run = comfyui_flux()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(model, run, untouched, targets="style")
        learning = ("img_in", "txt_in", r"(?:img|txt)_attn\.(?:qkv|proj)", "linear[12]")
        with OutOfPlace():
            expected, truth = gradients(model, run, untouched, targets=learning)
        output, wrong = gradients(model, run, naively_checkpointed, targets=learning)
    assert torch.equal(output, expected)
    assert error(wrong, truth) > 0.05

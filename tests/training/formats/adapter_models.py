"""Module trees with a family's names, adapters on them, and what peft says those do to the weights."""

import torch
from torch import nn

from stylewright.training.adapters.attach import attached
from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.formats.keys import diffusers_names
from stylewright.training.formats.keys_flux import split_rows, swap_halves
from stylewright.training.formats.metadata import AdapterMetadata, build_metadata

H = 24  # hidden size; inputs and outputs of most layers below differ


def linears(shapes):
    return {name: nn.Linear(*shape) for name, shape in shapes.items()}


def native_flux():
    """One block of each kind and the layers around them, in native names."""
    shapes = {
        "img_in": (64, H),
        "final_layer.adaLN_modulation.1": (H, 2 * H),
        "final_layer.linear": (H, 64),
        "double_blocks.0.img_mod.lin": (H, 6 * H),
        "double_blocks.0.img_attn.qkv": (H, 3 * H),
        "double_blocks.0.txt_attn.qkv": (H, 3 * H),
        "double_blocks.0.img_attn.proj": (H, H),
        "double_blocks.0.txt_mlp.0": (H, 4 * H),
        "double_blocks.0.txt_mlp.2": (4 * H, H),
        "single_blocks.0.linear1": (H, 7 * H),
        "single_blocks.0.linear2": (5 * H, H),
    }
    return linears(shapes)


def native_sd3():
    shapes = {
        "context_embedder": (32, H),
        "joint_blocks.0.x_block.attn.qkv": (H, 3 * H),
        "joint_blocks.0.x_block.attn2.qkv": (H, 3 * H),
        "joint_blocks.0.context_block.attn.proj": (H, H),
        "joint_blocks.0.context_block.adaLN_modulation.1": (H, 6 * H),
        "joint_blocks.1.context_block.adaLN_modulation.1": (H, 2 * H),
        "joint_blocks.1.context_block.attn.qkv": (H, 3 * H),
        "joint_blocks.1.x_block.mlp.fc1": (H, 4 * H),
    }
    return linears(shapes)


def native_pixart():
    shapes = {
        "blocks.0.attn.qkv": (H, 3 * H),
        "blocks.0.cross_attn.q_linear": (H, H),
        "blocks.0.cross_attn.kv_linear": (H, 2 * H),
        "blocks.1.mlp.fc2": (4 * H, H),
        "y_embedder.y_proj.fc1": (32, H),
    }
    return linears(shapes)


def native_unet():
    layers = linears(
        {
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q": (H, H),
            "input_blocks.4.1.transformer_blocks.0.attn2.to_k": (16, H),
            "middle_block.1.transformer_blocks.0.ff.net.0.proj": (H, 8 * H),
            "output_blocks.3.1.transformer_blocks.0.attn1.to_out.0": (H, H),
            "output_blocks.4.0.emb_layers.1": (32, H),
            "time_embed.0": (16, 32),
        }
    )
    return layers | {
        "input_blocks.0.0": nn.Conv2d(4, 12, 3, padding=1),
        "input_blocks.3.0.op": nn.Conv2d(12, 16, 3, stride=2),
        "input_blocks.5.0.skip_connection": nn.Conv2d(8, 12, 1),
        "output_blocks.2.1.conv": nn.Conv2d(12, 16, 3),
        "middle_block.2.out_layers.3": nn.Conv2d(8, 12, 3),
    }


def native_sdxl():
    layers = native_unet()
    layers["output_blocks.2.2.conv"] = layers.pop("output_blocks.2.1.conv")
    return layers


NATIVE = {"flux": native_flux, "sd3": native_sd3, "pixart": native_pixart, "sd15": native_unet, "sdxl": native_sdxl}


class Tree(nn.Module):
    """Layers under dotted names, with seeded weights."""

    def __init__(self, layers):
        super().__init__()
        for name, layer in layers.items():
            *parents, last = name.split(".")
            at = self
            for parent in parents:
                if parent not in at._modules:
                    at.add_module(parent, nn.Module())
                at = at._modules[parent]
            at.add_module(last, layer)
        self.names = list(layers)

    def weights(self):
        return {name: self.weight(name) for name in self.names}

    def weight(self, name):
        return self.get_submodule(name).weight.detach().clone()


def as_diffusers(family, native, unet_layers=2):
    """The same weights (name -> tensor) under diffusers names; fused ones cut by the sizes that a transformer has."""
    parts = {}
    for name, weight in native.items():
        names = diffusers_names(family, name, unet_layers)
        halves = name.endswith("adaLN_modulation.1") and weight.shape[0] == 2 * weight.shape[1]
        weight = swap_halves(weight) if halves else weight
        parts |= dict(zip(names, split_rows(weight, len(names), weight.shape[1]), strict=True))
    return parts


def as_layer(weight, like):
    out, inputs = weight.shape[:2]
    layer = (
        nn.Linear(inputs, out)
        if weight.dim() == 2
        else nn.Conv2d(inputs, out, like.kernel_size, stride=like.stride, padding=like.padding)
    )
    layer.weight.data = weight.clone()
    return layer


def make_tree(family, layout):
    torch.manual_seed(0)
    native = Tree(NATIVE[family]())
    if layout == "native":
        return native
    layers = {}
    for name, layer in native.named_modules():
        if name in native.names:
            layers |= {n: as_layer(w, layer) for n, w in as_diffusers(family, {name: layer.weight.detach()}).items()}
    return Tree(layers)


def randomise(adapter, seed=1, size=0.1):
    """Every tensor of the adapter random, so that none of them can be lost unseen."""
    generator = torch.Generator().manual_seed(seed)
    state = adapter.state_dict()
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        state[name] = tensor * (1 + 0.3 * noise) if "magnitude" in name else size * noise
    adapter.load_state_dict(state)


def adapted_weights(tree, config, family, state):
    """The weights that peft itself makes of an adapter's state."""
    before = tree.weights()
    with attached(tree, config, family=family, seed=3) as adapter:
        adapter.load_state_dict(state)
        layers = [tree.get_submodule(name) for name in adapter.names]
        for layer in layers:
            layer.merge()
        after = {
            name: layer.get_base_layer().weight.detach().clone()
            for name, layer in zip(adapter.names, layers, strict=True)
        }
        for layer, name in zip(layers, adapter.names, strict=True):
            layer.get_base_layer().weight.data = before[name]
            layer.merged_adapters.clear()
    return {**before, **after}


METHODS = ("lora", "rslora", "dora", "lokr", "loha", "oft")


def config_for(method, targets, rank=3):
    alpha = None if method == "oft" else 5.0
    return AdapterConfig(method=method, rank=4 if method == "oft" else rank, alpha=alpha, targets=tuple(targets))


def metadata_for(family, config, **more):
    about = AdapterMetadata(family=family, method=config.method, rank=config.rank, alpha=config.alpha, **more)
    return build_metadata(about)


def train(family, layout, method, keep=lambda name, layer: True):
    """(tree, configuration, the adapter's random state, the weights that peft makes with it)."""
    tree = make_tree(family, layout)
    names = [name for name in tree.names if keep(name, tree.get_submodule(name))]
    config = config_for(method, [name.replace(".", r"\.") for name in names])
    with attached(tree, config, family=family, seed=3) as adapter:
        randomise(adapter)
        state = adapter.state_dict()
    return tree, config, state, adapted_weights(tree, config, family, state)

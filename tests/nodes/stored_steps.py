"""One training step by hand, its float64 reference, and what autograd keeps of weights."""

from contextlib import contextmanager, nullcontext

import torch
from stored_models import cast_model, is_linear
from torch.autograd.graph import saved_tensors_hooks

# A time and a guidance whose thousandfold bfloat16 has: ComfyUI embeds them in the model's type.
LEVELS, GUIDANCE = torch.tensor([0.0]), torch.tensor([1.0])


def noisy(seed=4):
    """40 tokens, which is the size of no weight."""
    return torch.randn(1, 16, 8, 20, generator=torch.Generator().manual_seed(seed))


@contextmanager
def session(model, clip, *, checkpoint=False, method="lora", fill=0.3):
    """A model with an adapter of random weights in training: (its denoiser, the adapter, the conditioning)."""
    from stylewright.nodes.bridge.denoiser import ComfyDenoiser
    from stylewright.nodes.bridge.prompts import PromptTable
    from stylewright.nodes.bridge.session import training_session
    from stylewright.training.adapters.attach import attached
    from stylewright.training.adapters.methods import AdapterConfig
    from stylewright.training.gradients import differentiable

    with torch.inference_mode(), training_session(model):
        prompts = PromptTable(clip)
        denoiser = ComfyDenoiser(model, prompts)
        config = AdapterConfig(method, rank=4)
        with attached(denoiser.module, config, family=denoiser.family, seed=0) as adapter:
            draw = torch.Generator().manual_seed(6)
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=draw) * fill)
            with differentiable(denoiser.module, checkpoint=checkpoint):
                yield denoiser, adapter, {**prompts.encode(["a star"]), "guidance": GUIDANCE}


def gradients(model, clip, *, autocast=False, **options):
    """Of a loss by the adapter's tensors, and the prediction."""
    with session(model, clip, **options) as (denoiser, adapter, rows):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            prediction = denoiser(noisy(), LEVELS, rows)
        (prediction - noisy(5)).square().mean().backward()
        found = [p.grad.double() for p in adapter.parameters()]
        return found, prediction.detach().double()


def reference(model, dense, clip, *, at_values=False, **options):
    """The same in float64, by torch's own backward pass over a dense model with the numbers of this one.

    ``at_values``: with the outputs that this model's layers give for the same inputs, roundings of theirs included.
    """
    from stylewright.nodes.bridge.frozen_layers import ComfyWeights

    cpu = torch.device("cpu")
    wide = cast_model(dense, torch.float64, torch.float64)
    state = wide.model.diffusion_model.state_dict()
    for name, part in model.model.diffusion_model.named_modules():
        if is_linear(model, name) if name else False:
            with torch.no_grad(), ComfyWeights(cpu).dense(part, torch.float32, cpu) as numbers:
                state[f"{name}.weight"].copy_(numbers.weight)
                if numbers.bias is not None:
                    state[f"{name}.bias"].copy_(numbers.bias)
            if at_values:
                wide.model.diffusion_model.get_submodule(name).register_forward_hook(_with_values_of(part))
        else:
            for key, tensor in part.named_parameters(recurse=False):
                state[f"{name}.{key}" if name else key].copy_(tensor.float())
    return gradients(wide, clip, **options)


def _with_values_of(layer):
    """A hook on a linear layer: its output has the values of another's, and its own way back."""

    def hook(module, inputs, output):
        with torch.no_grad():
            values = layer(inputs[0].float()).double()
        return output + (values - output).detach()

    return hook


def distance(found, wanted):
    """Of two lists of tensors, relative."""
    found, wanted = torch.cat([t.flatten() for t in found]), torch.cat([t.flatten() for t in wanted])
    return float((found - wanted).norm() / wanted.norm())


def copies(model, clip, **options):
    """Bytes of weights other than the model's own that autograd keeps for the backward pass."""
    shapes, own, kept = set(), set(), {}
    for part in model.model.diffusion_model.modules():
        if {"in_features", "out_features"} <= vars(part).keys():
            shapes |= {(part.out_features, part.in_features), (part.in_features, part.out_features)}
        own |= {parameter.data_ptr() for parameter in part.parameters(recurse=False)}

    def keep(tensor):
        if tuple(tensor.shape) in shapes and tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        gradients(model, clip, **options)
    return sum(kept.values())


def without_the_mechanism(monkeypatch):
    from stylewright.nodes.bridge import session
    from stylewright.training.adapters import attach

    for module in (session, attach):
        monkeypatch.setattr(module, "frozen_products", lambda *args: nullcontext())

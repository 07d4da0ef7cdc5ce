"""All weights of a model with an adapter's change: what it answers then is what it answers with the adapter."""

import pytest
import torch

from stylewright.training.adapters.attach import attached
from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.cli.merge import changed_weights
from stylewright.training.cli.train import loaded_for
from stylewright.training.formats.adapters import save_adapter
from stylewright.training.formats.merging import merge_students
from stylewright.training.formats.metadata import FULL, AdapterMetadata, build_metadata
from stylewright.training.formats.whole import load_whole, save_whole
from stylewright.training.hosts.loading import load_host
from stylewright.training.hosts.whole import merged_weights

METHODS = ("lora", "rslora", "dora", "lokr", "loha", "oft")
ONE_STEP = {"level": 0.4, "unit": "sigma", "prediction": "flow", "start": "unit"}


def about(host, method="lora", **more):
    options = {"process": host.denoiser.process, "prediction": host.denoiser.prediction, "one_step": ONE_STEP}
    return AdapterMetadata(host.denoiser.family, method, unet_layers=host.unet_layers, **options, **more)


def answer(host):
    x_t = torch.randn(2, host.latent_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    told = {name: value.expand(2, *value.shape[1:]) for name, value in host.encode_prompts(["a cat"]).items()}
    told |= {name: value.expand(2, *value.shape[1:]) for name, value in host.sampling_conditioning.items()}
    with torch.no_grad():
        return host.denoiser(x_t, torch.tensor([-1.0, 0.5]), told)


def student(host, path, method="lora", targets="all"):
    """Writes an adapter of random numbers. What the model answers with it, and its tensors."""
    config = AdapterConfig(method, 4 if method == "oft" else 2, targets=targets)
    denoiser, source = host.denoiser, torch.Generator().manual_seed(2)
    with attached(denoiser.module, config, family=denoiser.family, seed=0) as adapter:
        state = {n: t + 0.1 * torch.randn(t.shape, generator=source) for n, t in adapter.state_dict().items()}
        adapter.load_state_dict(state)
        answered = answer(host)
        frozen = {name: adapter.layer(name).get_base_layer().weight for name in adapter.names}
    alpha = None if method == "oft" else float(config.scale_alpha)
    header = build_metadata(about(host, method, rank=config.rank, alpha=alpha))
    save_adapter(path, state, header, weights=frozen.__getitem__)
    return answered, state


@pytest.mark.parametrize("family", ["flux", "sd3", "sdxl", "sd15", "pixart"])
def test_every_weight_is_the_bases_with_the_change(family, tiny_folder, tmp_path):
    host = load_host(tiny_folder(family))
    answered, state = student(host, tmp_path / "b.safetensors")
    base = {name: tensor.clone() for name, tensor in host.denoiser.module.state_dict().items()}
    found = merged_weights(host.denoiser, loaded_for(host, tmp_path / "b.safetensors"), "b")
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        a, b = (state.get(f"{name.removesuffix('.weight')}.lora_{side}.weight") for side in "AB")
        change = 0 if a is None else torch.einsum("or,ri->oi", b.flatten(1), a.flatten(1)).view_as(tensor)
        torch.testing.assert_close(tensor, base[name] + change)
    torch.testing.assert_close(answer(host), answered, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_that_changes_weights_is_in_them(method, tiny_folder, tmp_path):
    host = load_host(tiny_folder("sd3"))
    plain = answer(host)
    answered, _ = student(host, tmp_path / "b.safetensors", method)
    merged_weights(host.denoiser, loaded_for(host, tmp_path / "b.safetensors"), "b")
    torch.testing.assert_close(answer(host), answered, rtol=1e-4, atol=1e-4)
    assert (answered - plain).abs().max() > 0.01


def full(host, path, dtype=torch.float32, **changes):
    source = torch.Generator().manual_seed(3)
    state = host.denoiser.module.state_dict()
    state = {
        name: (value + 0.1 * torch.randn(value.shape, generator=source)).to(dtype) for name, value in state.items()
    }
    save_whole(path, {**state, **changes}, about(host, FULL, rank=1))
    return state


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_between_all_weights_and_an_adapter_are_all_weights(dtype, turned, tiny_folder, tmp_path):
    """The paper's own merge: 0.3 of the one and 0.7 of the base with the other's change, in the types of the one."""
    host, files = load_host(tiny_folder("sd3")), [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    whole = full(host, files[0], dtype)
    student(host, files[1])
    changed = merged_weights(host.denoiser, loaded_for(host, files[1]), "b")

    def merged(share):
        target = tmp_path / f"{share}.safetensors"
        given, weight = (files[::-1], 1 - share) if turned else (files, share)
        merge_students(*given, target, weight, changed=lambda path: changed_weights(tiny_folder("sd3"), None, path))
        return load_whole(target)

    for name, tensor in merged(0.3).items():
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor, (0.3 * whole[name].float() + 0.7 * changed[name]).to(dtype))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in merged(1.0).items())
    assert all(torch.equal(tensor, changed[name].to(dtype)) for name, tensor in merged(0.0).items())


def test_what_does_not_fit_the_model_is_named(tiny_folder, tmp_path):
    host, target = load_host(tiny_folder("flux")), tmp_path / "m.safetensors"
    whole, deep, adapter = (tmp_path / f"{name}.safetensors" for name in ("whole", "deep", "adapter"))
    name, value = next(iter(full(host, whole).items()))
    full(host, deep, **{name: value[..., :-1]})
    student(host, adapter)

    def merge(one, model, words):
        with pytest.raises(ValueError, match=words):
            merge_students(one, adapter, target, 0.5, changed=lambda path: changed_weights(model, None, path))

    merge(
        whole,
        tiny_folder("sd3"),
        r"adapter\.safetensors is an adapter for flux, and the model .*sd3 is of the family sd3",
    )
    merge(deep, tiny_folder("flux"), "is not of one size in deep.safetensors and adapter.safetensors")
    module = host.denoiser.module
    module.single_transformer_blocks = module.single_transformer_blocks[:1]
    with pytest.raises(ValueError, match=r"adapts the layer single_transformer_blocks\.1\..* does not have"):
        merged_weights(host.denoiser, loaded_for(host, adapter), "b")
    assert not target.exists()

"""The transformer's file: FLUX's original names, as ComfyUI wants them."""

import pytest
import torch
from safetensors.torch import load_file

from stylewright.training.embedded.autoencoder import LATENT_CHANNELS
from stylewright.training.embedded.text import WIDTH
from stylewright.training.embedded.transformer import load_transformer, new_transformer, save_transformer
from stylewright.training.formats.keys_flux import flux_to_diffusers, flux_to_original

HIDDEN = 256
STREAM = {
    "attn.qkv.weight": (3 * HIDDEN, HIDDEN),
    "attn.norm.query_norm.scale": (128,),
    "attn.norm.key_norm.scale": (128,),
    "attn.proj.weight": (HIDDEN, HIDDEN),
    "mlp.0.weight": (4 * HIDDEN, HIDDEN),
    "mlp.2.weight": (HIDDEN, 4 * HIDDEN),
    "mod.lin.weight": (6 * HIDDEN, HIDDEN),
}
SINGLE = {
    "linear1.weight": (7 * HIDDEN, HIDDEN),
    "linear2.weight": (HIDDEN, 5 * HIDDEN),
    "norm.query_norm.scale": (128,),
    "norm.key_norm.scale": (128,),
    "modulation.lin.weight": (3 * HIDDEN, HIDDEN),
}
ENDS = {
    "img_in.weight": (HIDDEN, 4 * LATENT_CHANNELS),
    "txt_in.weight": (HIDDEN, WIDTH),
    "time_in.in_layer.weight": (HIDDEN, 256),
    "time_in.out_layer.weight": (HIDDEN, HIDDEN),
    "vector_in.in_layer.weight": (HIDDEN, WIDTH),
    "vector_in.out_layer.weight": (HIDDEN, HIDDEN),
    "final_layer.adaLN_modulation.1.weight": (2 * HIDDEN, HIDDEN),
    "final_layer.linear.weight": (4 * LATENT_CHANNELS, HIDDEN),
}


def original_shapes():
    """Names and shapes of github.com/black-forest-labs/flux at this size, from its layers.py."""
    shapes = dict(ENDS)
    for i in range(2):
        shapes |= {f"double_blocks.{i}.{s}_{name}": shape for s in ("img", "txt") for name, shape in STREAM.items()}
    for i in range(4):
        shapes |= {f"single_blocks.{i}.{name}": shape for name, shape in SINGLE.items()}
    biases = {name.replace(".weight", ".bias"): shape[:1] for name, shape in shapes.items() if len(shape) == 2}
    return shapes | biases


@pytest.fixture(scope="module")
def transformer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return new_transformer().requires_grad_(False).eval()


def inputs(rows=2):
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(rows, 6, 64, generator=draw),
        "encoder_hidden_states": torch.randn(rows, 8, WIDTH, generator=draw),
        "pooled_projections": torch.randn(rows, WIDTH, generator=draw),
        "timestep": torch.tensor([0.1, 0.9]),
        "img_ids": torch.tensor([[0.0, i // 3, i % 3] for i in range(6)]),
        "txt_ids": torch.zeros(8, 3),
    }


def test_the_file_has_the_original_names_and_shapes(transformer, tmp_path):
    path = tmp_path / "transformer.safetensors"
    save_transformer(path, transformer)
    state = load_file(path)
    assert {key: tuple(value.shape) for key, value in state.items()} == original_shapes()
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert path.stat().st_size < 18.5e6  # with the autoencoder and the rest the weights stay under 25 MB


def test_names_there_and_back_change_nothing(transformer):
    state = transformer.state_dict()
    back = flux_to_diffusers(flux_to_original(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_a_loaded_model_gives_the_same_output(transformer, tmp_path):
    path = tmp_path / "transformer.safetensors"
    save_transformer(path, transformer, torch.float32)
    loaded = load_transformer(path)
    stated = {key: value for key, value in transformer.config.items() if value is not None and key[0] != "_"}
    assert stated == {key: loaded.config[key] for key in stated}
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(**inputs())[0], transformer(**inputs())[0])


def test_the_order_of_words_does_not_matter_to_it(transformer):
    """Text has no positions, so a prompt is a set of words."""
    batch = inputs()
    expected = transformer(**batch)[0]
    batch["encoder_hidden_states"] = batch["encoder_hidden_states"].flip(1)
    torch.testing.assert_close(transformer(**batch)[0], expected, atol=1e-5, rtol=1e-4)
    batch["hidden_states"] = batch["hidden_states"].flip(1)
    assert (transformer(**batch)[0] - expected).abs().max() > 0.01

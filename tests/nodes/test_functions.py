"""Functions that other nodes put on a model: told apart by what they were made with, and by nothing that changes."""

from functools import partial

import pytest
import torch

pytestmark = pytest.mark.comfy


def traits(value):
    from stylewright.nodes.bridge.functions import traits

    return repr(traits(value))


def digest(model):
    from stylewright.nodes.bridge.functions import traits
    from stylewright.nodes.bridge.identity import _hash, _pieces, functions_on

    return _hash(*_pieces(traits(functions_on(model))))


def closure(strength):
    return lambda x: x * strength


def with_default(value):
    def patch(x, strength=value):
        return x * strength

    return patch


def counting(strength):
    """Whose variables change with every call."""
    calls, seen = 0, {}

    def patch(x):
        nonlocal calls
        calls += 1
        seen[calls] = x
        return x * strength

    return patch


class Patch:
    """As nodes write them: a constructor's arguments, and what comes to pass."""

    def __init__(self, strength, blocks=(1, 2), model=None):
        self.strength, self._blocks, self.model = strength, blocks, model
        self.calls, self.cache = 0, None

    def __call__(self, x):
        self.calls, self.cache = self.calls + 1, x
        return x * self.strength

    def method(self, x):
        return self(x)


def of_tensor(value):
    tensor = torch.full((8,), value)
    return lambda x: x * tensor


KINDS = {
    "lambda": closure,
    "default": with_default,
    "counting": counting,
    "object": Patch,
    "method": lambda strength: Patch(strength).method,
    "partial": lambda strength: partial(torch.mul, other=strength),
    "function in a function": lambda strength: closure(closure(strength)),
    "object in a function": lambda strength: closure(Patch(strength)),
    "tensor": of_tensor,
    "blocks": lambda block: Patch(1.0, blocks={"double": [block]}),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_a_strength_counts_and_an_address_does_not(make):
    assert traits(make(0.5)) == traits(make(0.5))
    assert traits(make(0.5)) != traits(make(0.6))
    assert "0x" not in traits(make(0.5))


@pytest.mark.parametrize("kind", ["counting", "object", "method"])
def test_what_a_function_counts_and_keeps_while_it_is_used_does_not(kind):
    patch = KINDS[kind](0.5)
    before = traits(patch)
    patch(torch.ones(2))
    assert traits(patch) == before == traits(KINDS[kind](0.5))


def test_a_variable_that_a_function_assigns_is_no_part_of_it_however_often_it_ran_before():
    def made(strength):
        calls = 0

        def patch(x):
            nonlocal calls
            calls += 1
            return x * strength

        return patch

    used = made(0.5)
    used(1)
    assert traits(used) == traits(made(0.5)) != traits(made(0.6))


def test_names_tell_functions_apart():
    assert traits(closure(0.5)) != traits(with_default(0.5))
    assert traits(torch.nn.functional.silu) != traits(torch.nn.functional.gelu)


def test_a_function_around_a_model_or_itself_ends(tiny):
    model = tiny("flux")

    def patch(x):
        return patch(model.model(x))

    assert traits(patch) == traits(patch) and "0x" not in traits(patch)
    assert "ModelPatcher" in traits(Patch(1.0, model=model))


@pytest.mark.parametrize("name", ["FreeU", "FreeU_V2"])
def test_comfyui_s_own_nodes_are_told_apart_by_their_strengths_before_and_after_use(name, tiny):
    from comfy_extras import nodes_freelunch

    plain = tiny("sd15")

    def patched(b1=1.1):
        return getattr(nodes_freelunch, name).execute(plain, b1, 1.2, 0.9, 0.2).args[0]

    model = patched()
    before = digest(model)
    for patch in model.model_options["transformer_options"]["patches"]["output_block_patch"]:
        patch(
            torch.rand(1, 4 * plain.model.model_config.unet_config["model_channels"], 4, 4), torch.rand(1, 4, 4, 4), {}
        )
    assert before == digest(model) == digest(patched())
    assert before not in (digest(patched(1.3)), digest(plain))


def test_wrappers_count_where_training_goes_through_them(tiny):
    import comfy.patcher_extension

    from stylewright.nodes.bridge.identity import functions_on

    kinds, plain = comfy.patcher_extension.WrappersMP, tiny("flux")
    assert functions_on(plain) == {}
    around, sampling = plain.clone(), plain.clone()
    around.add_wrapper(kinds.DIFFUSION_MODEL, closure(0.5))
    sampling.add_wrapper(kinds.OUTER_SAMPLE, closure(0.5))
    sampling.set_model_sampler_cfg_function(closure(0.5))
    assert functions_on(around) and functions_on(sampling) == {}

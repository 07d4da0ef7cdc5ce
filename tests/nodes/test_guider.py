"""The guider against separate calls of two models, and against ComfyUI's own guider."""

import importlib.util
import sys
from pathlib import Path

import comfy.samplers
import pytest
import torch
from tiny_models import tiny_model

from stylewright.training.guidance import RULES

pytestmark = pytest.mark.comfy

spec = importlib.util.spec_from_file_location("guider_proof", Path(__file__).with_name("guider_proof.py"))
proof = sys.modules["guider_proof"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(proof)
LAYERS, LEVELS, apply, lora_of = proof.LAYERS, proof.LEVELS, proof.apply, proof.lora_of
by_hand, draw, node, stock = proof.by_hand, proof.draw, proof.node, proof.stock

RULE = {
    "FineStyle": ("FineStyle", 0.7, 2.5),
    "StyleDrop": ("StyleDrop", 1.2, 2.5),
    "DCO consistency": ("DCO consistency", 3.5, 2.2),
    "CFG": ("CFG", 3.5),
}


@pytest.fixture
def sampler(latent_channels, tiny_prompt):
    return lambda family: proof.Sampler(family, tiny_prompt, latent_channels)


def weights_of(rule):
    name, *scales = rule
    return RULES[name](*scales).weights


def guided(rule, model, base, sampler, levels=LEVELS, name="euler", **widgets):
    return draw(node(rule, model, base, sampler.positive, sampler.negative, **widgets)[0], sampler, levels, name)


def near(found, expected, unlike):
    """Equal to within float32's rounding; ``unlike`` is what it would be without what is proved."""
    assert (expected - unlike).norm() > 1e-3 * expected.norm(), "it has to be seen"
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


CASES = [*((family, "FineStyle", stock) for family in LAYERS), *((family, "FineStyle", apply) for family in LAYERS)]
CASES += [(family, rule, stock) for family in ("flux", "sdxl") for rule in RULE if rule != "FineStyle"]


@pytest.mark.parametrize(("family", "rule", "loader"), CASES)
def test_it_is_the_weighted_sum_of_separate_calls(family, rule, loader, tiny, sampler):
    at, model = sampler(family), tiny(family)
    lora = lora_of(model, LAYERS[family])
    other = tiny_model(family)  # the same weights in other memory
    expected = by_hand(loader(other, lora), model, weights_of(RULE[rule]), at)
    found = guided(RULE[rule], loader(model, lora), model, at)
    near(found, expected, by_hand(other, model, weights_of(RULE[rule]), at))


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_finestyle_without_its_first_scale_is_comfyui_s_guider_bit_for_bit(family, tiny, sampler):
    at, model = sampler(family), tiny(family)
    adapted = stock(model, lora_of(model, LAYERS[family]))
    own = comfy.samplers.CFGGuider(adapted)
    own.set_conds(at.positive, at.negative)
    own.set_cfg(3.5)
    expected = draw(own, at)
    assert torch.equal(guided(("FineStyle", 0.0, 2.5), adapted, model, at), expected)
    assert torch.equal(guided(("CFG", 3.5), adapted, model, at), expected)
    own = comfy.samplers.CFGGuider(model)
    own.set_conds(at.positive, at.negative)
    own.set_cfg(3.5)
    assert torch.equal(guided(("DCO consistency", 3.5, 0.0), adapted, model, at), draw(own, at))


def test_where_the_adapter_does_nothing_it_is_plain_cfg(tiny, sampler, caplog):
    at, model = sampler("flux"), tiny("flux")
    expected = guided(("CFG", 3.5), model, model, at)
    found = guided(("FineStyle", 1.0, 2.5), stock(model, lora_of(model, LAYERS["flux"]), 0.0), model, at)
    assert "the same: there is no adapter" in caplog.text
    torch.testing.assert_close(found, expected)


# --------------------------------------------------------------------------------------------------------------------
# What is called


@pytest.fixture
def calls(monkeypatch):
    """(adapted, index of the prompt) of every row that a model computes: 0 = positive, 1 = negative."""
    from comfy.model_base import BaseModel

    seen, apply_model = [], BaseModel._apply_model

    def count(self, x, t, *args, **kwargs):
        hooked = any(module._forward_hooks for module in self.diffusion_model.modules())
        rows = (kwargs.get("transformer_options") or args[3])["cond_or_uncond"]
        seen.append([(hooked, row) for row in rows])
        return apply_model(self, x, t, *args, **kwargs)

    monkeypatch.setattr(BaseModel, "_apply_model", count)
    return seen


@pytest.mark.parametrize(
    ("rule", "batches"),
    [
        (("FineStyle", 1.0, 2.5), [{(True, 0), (True, 1)}, {(False, 0)}]),
        (("FineStyle", 1.0, 0.0), [{(True, 0)}, {(False, 0)}]),
        (("StyleDrop", 1.0, 2.5), [{(True, 0)}, {(False, 0), (False, 1)}]),
        (("StyleDrop", 1.0, 0.0), [{(True, 0)}, {(False, 0)}]),
        (("StyleDrop", 2.0, 2.0), [{(True, 0)}, {(False, 1)}]),
        (("DCO consistency", 7.5, 3.0), [{(True, 0)}, {(False, 0), (False, 1)}]),
    ],
)
@pytest.mark.parametrize("family", ["flux", "sd15"])
def test_only_predictions_with_a_weight_are_made_and_those_of_a_model_together(
    family, rule, batches, calls, tiny, sampler
):
    at, model = sampler(family), tiny(family)
    guided(rule, stock(model, lora_of(model, LAYERS[family])), model, at, levels=(-3.0,))
    assert sorted(map(sorted, calls)) == sorted(map(sorted, batches))
    assert sum(map(len, calls)) == sum(bool(weight) for weight in weights_of(rule))
    calls.clear()
    expected = by_hand(stock(tiny_model(family), lora_of(model, LAYERS[family])), model, weights_of(rule), at)
    near(guided(rule, stock(model, lora_of(model, LAYERS[family])), model, at), expected, 0 * expected)


def test_no_weight_is_patched_while_it_samples(monkeypatch, tiny, sampler):
    import comfy.model_patcher

    at, model = sampler("flux"), tiny("flux")
    adapted = stock(model, lora_of(model, LAYERS["flux"]))
    patched, patch = [], comfy.model_patcher.ModelPatcher.patch_weight_to_device

    def note(self, key, *args, **kwargs):
        patched.extend([key] if key in self.patches else [])
        return patch(self, key, *args, **kwargs)

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "patch_weight_to_device", note)
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    memory = [tensor.data_ptr() for tensor in model.model.state_dict().values()]
    guided(RULE["FineStyle"], adapted, model, at)
    assert not patched
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    assert [tensor.data_ptr() for tensor in model.model.state_dict().values()] == memory


# --------------------------------------------------------------------------------------------------------------------
# Noise levels


@pytest.mark.parametrize("family", ["flux", "sdxl"])
@pytest.mark.parametrize("rule", [RULE["FineStyle"], RULE["StyleDrop"]], ids=["FineStyle", "StyleDrop"])
def test_each_scale_acts_in_its_window(family, rule, calls, tiny, sampler):
    at, model = sampler(family), tiny(family)
    lora, (name, style, text) = lora_of(model, LAYERS[family]), rule
    widgets = {
        "style_window": "from window_low to window_high", "style_window_low": -4.0, "style_window_high": 0.0,
        "text_window": "from window_low to window_high", "text_window_low": -2.0, "text_window_high": 20.0,
    }  # fmt: skip
    found = guided(rule, stock(model, lora), model, at, **widgets)
    assert [len(rows) for rows in calls] == {"FineStyle": [1, 1, 1, 1, 2, 2], "StyleDrop": [1, 1, 1, 1, 2, 1, 2]}[name]
    levels = {at.sigma(level): level for level in LEVELS}

    def weights(sigma):
        level = min(levels.items(), key=lambda item: abs(item[0] - sigma))[1]
        return RULES[name](style * (-4 <= level < 0), text * (level >= -2)).weights

    expected = by_hand(stock(tiny_model(family), lora), model, weights, at)
    near(found, expected, by_hand(stock(tiny_model(family), lora), model, weights_of(rule), at))


def test_a_window_that_no_step_is_in_is_said(tiny, sampler, caplog):
    at, model = sampler("flux"), tiny("flux")
    ends = {"style_window": "from window_low to window_high", "style_window_low": 19.0, "style_window_high": 20.0}
    adapted = stock(model, lora_of(model, LAYERS["flux"]))
    guided(("FineStyle", 1.0, 2.5), adapted, model, at, **ends)
    said = [line for line in caplog.messages if "no step of the sampler is in the window of the style" in line]
    assert len(said) == 1
    caplog.clear()
    guided(("FineStyle", 1.0, 2.5), adapted, model, at, **{**ends, "style_window_low": -20.0})
    assert "no step" not in caplog.text


def test_a_scale_by_noise_level_is_the_text_s(tiny, sampler):
    """CFG by Noise Level in front of it."""
    from stylewright.nodes.prompt_switch import CFGByLogSNR

    at, model = sampler("flux"), tiny("flux")
    lora = lora_of(model, LAYERS["flux"])

    class Node(CFGByLogSNR):
        """With the hidden inputs that an executor would set."""

    Node.hidden = type("Hidden", (), {"unique_id": None})
    scaled = Node.execute(stock(model, lora), "1, 3.5", "-2", "log_snr", 0.0).args[0]

    def weights(sigma):
        return RULES["FineStyle"](0.7, 2.5 * (sigma < at.sigma(-2.0))).weights

    expected = by_hand(stock(tiny_model("flux"), lora), model, weights, at)
    near(guided(("FineStyle", 0.7, 9.0), scaled, model, at), expected, 0 * expected)


def test_what_it_says(tiny, tiny_prompt):
    model = tiny("flux")
    adapted = stock(model, lora_of(model, LAYERS["flux"]))
    prompts = tiny_prompt("flux", 5, 1), tiny_prompt("flux", 5, 2)
    _, info = node(("FineStyle", 1.0, 5.5), adapted, model, *prompts, style_window="where style is made")
    assert info == (
        "FineStyle: 7.5 adapted(positive) -5.5 adapted(negative) -1 base(positive); 3 predictions a call\n"
        "the scale of the style acts at log_snr below -6.52"
    )
    _, info = node(("DCO consistency", 7.5, 3.0), adapted, model, *prompts)
    assert info.endswith("3 adapted(positive) +4.5 base(positive) -6.5 base(negative); 3 predictions a call")


def test_it_says_where_the_style_s_scale_has_nothing_to_strengthen(tiny, tiny_prompt):
    model = tiny("flux")
    adapted = stock(model, lora_of(model, LAYERS["flux"]))
    prompts = tiny_prompt("flux", 5, 1), tiny_prompt("flux", 5, 2)
    rule, same = ("FineStyle", 1.0, 5.5), "\nmodel and base are the same: there is no adapter"
    for one, other in ((model, model), (adapted, adapted), (adapted, adapted.clone())):
        assert same in node(rule, one, other, *prompts)[1]
    assert same not in node(("CFG", 3.5), model, model, *prompts)[1]
    assert "link them the other way round" in node(rule, model, adapted, *prompts)[1]


def test_a_rule_that_is_none_lists_those_that_there_are(tiny, tiny_prompt):
    """ComfyUI leaves an option away that a saved graph states and no list has."""
    from stylewright.nodes.guider import StyleGuider

    model, prompt = tiny("flux"), tiny_prompt("flux", 5, 1)
    with pytest.raises(ValueError, match="the rule is not one of FineStyle, CFG, StyleDrop, DCO consistency"):
        StyleGuider.execute(model, model, prompt, prompt)

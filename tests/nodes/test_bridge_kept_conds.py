"""Conds are kept on the device while they are few, and made again where they are not."""

import pytest
import torch

pytestmark = pytest.mark.comfy


def conds(numbers):
    from comfy.conds import CONDConstant, CONDRegular

    return {"c_crossattn": CONDRegular(torch.zeros(numbers)), "length": CONDConstant(3)}


def test_the_least_lately_used_go_and_what_is_wanted_stays():
    from stylewright.nodes.bridge.kept_conds import KeptConds

    kept = KeptConds(largest=4 * 25)
    for key in "abc":
        kept[key] = conds(10)
    kept["a"]  # used
    kept.shrink("c")
    assert "b" not in kept and "a" in kept and "c" in kept
    kept["d"] = conds(100)
    kept.shrink("d")
    assert len(kept) == 1 and "d" in kept, "one that is too large by itself is used all the same"


def test_a_denoiser_answers_the_same_whatever_it_forgets(tiny, tiny_clip):
    from stylewright.nodes.bridge.denoiser import ComfyDenoiser
    from stylewright.nodes.bridge.kept_conds import KeptConds
    from stylewright.nodes.bridge.prompts import PromptTable
    from stylewright.nodes.bridge.session import training_session

    model, prompts = tiny("sdxl"), PromptTable(tiny_clip("sdxl"))
    x_t, log_snr = torch.randn(2, 4, 8, 8), torch.zeros(2)
    with torch.inference_mode(), training_session(model), torch.no_grad():
        keeping, forgetting = ComfyDenoiser(model, prompts), ComfyDenoiser(model, prompts)
        forgetting._conds = KeptConds(largest=0)
        for pair in (["a cat", "a dog"], ["a bird", "a cat"], ["a dog", "a bird"]):
            rows = prompts.encode(pair)
            assert torch.equal(keeping(x_t, log_snr, rows), forgetting(x_t, log_snr, rows))
        assert len(keeping._conds) == 3 and len(forgetting._conds) == 2

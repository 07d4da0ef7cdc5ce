"""Distillation of every kind of model: flows and tables of noise levels, with negative prompts in the student."""

import importlib.util
import math
import sys
from pathlib import Path

import comfy.sd
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from one_step_runs import noise_of, one_step
from tiny_models import is_known

from stylewright.nodes.bridge.adapters import Strengths, apply_adapter
from stylewright.nodes.bridge.against import negatives_inside
from stylewright.nodes.bridge.denoiser import ComfyDenoiser
from stylewright.nodes.bridge.families import family_of
from stylewright.nodes.bridge.noise_levels import noise_levels
from stylewright.nodes.bridge.prompts import PromptTable
from stylewright.nodes.bridge.session import training_session
from stylewright.nodes.bridge.student_start import undressed
from stylewright.training.adapters.attach import attached
from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.attention_guidance import AttentionGuidance
from stylewright.training.clocks import log_snr_at
from stylewright.training.formats.adapters import loaded_from
from stylewright.training.formats.keys import FAMILIES
from stylewright.training.gradients import differentiable
from stylewright.training.one_step import answer_of

pytestmark = pytest.mark.comfy

spec = importlib.util.spec_from_file_location("family_proof", Path(__file__).with_name("family_proof.py"))
proof = sys.modules["family_proof"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(proof)

# What OneStepSampler is told: the level of a student that is called at the model's last time, or elsewhere.
LEVELS = {
    "flux": (1.0, "sigma"), "sd3": (1.0, "sigma"), "qwen": (1.0, "sigma"), "sd15": (999.0, "time"),
    "sdxl": (999.0, "time"), "pixart": (999.0, "time"), "cosmos": (-2 * math.log(80 / 0.5), "log_snr"),
    "cosmos-predict2": (-2 * math.log(80), "log_snr"), "hidream-o1": (2 * math.log(0.6 / (8 * 0.4)), "log_snr"),
}  # fmt: skip
EARLY = {"hidream-o1": 0.4}  # shares of the way to noise
UNREACHED = {"hidream-o1": ""}  # by negative prompts
NEGATIVES = "tree\nred chalk"
OF_STUDENT = "as the student's file says"
RESUMED = ("flux", "pixart")  # one attention for text and picture, and one for text that is reached by object patches


def distil(parts, base, **widgets):
    from stylewright.nodes.distiller import PGSBDistiller

    class Node(PGSBDistiller):
        """With the hidden inputs that an executor would set."""

    Node.hidden = type("Hidden", (), {"unique_id": None})
    tiny = proof.TINY[parts.family]
    short = {
        "prompts": "{star|house} by a lake", "negatives": NEGATIVES, "steps": 2, "learning_rate": 1e-2,
        "rank": 2, "fake_rank": 2, "batch_size": 2, "resolution": tiny.size[0] * tiny.pixels, "ema_decay": 0.0,
        "file_name": "test", "save_every": 1,
    }  # fmt: skip
    with proof.folders(base), torch.inference_mode():
        options = proof.defaults(PGSBDistiller) | short | widgets
        return Node.execute(parts.model, parts.clip, parts.vae, **options).args


def drawn_as_its_file_says(parts, lora):
    """The noise, and the latents in our scale that the nodes draw of it."""
    with torch.inference_mode():
        model = apply_adapter(parts.model, None, lora, Strengths(), warn=print).model
    drawn = one_step(model, parts.clip.encode_from_tokens_scheduled(proof.PROMPT), preset=OF_STUDENT)["samples"]
    x0 = parts.model.model.process_latent_in(drawn) / noise_levels(parts.model).data_scale
    return [each.reshape(1, *each.shape[1:2], *each.shape[-2:]) for each in (noise_of(drawn), x0)]


def drawn_in_distillation(parts, path, noise, share):
    """The same by the student as it is called in training, at this share of the way to noise."""

    def draw(denoiser, told):
        level = log_snr_at(denoiser.clock, torch.tensor([share]))
        return answer_of(denoiser, told)(noise, level)

    return proof.as_trained(parts, path, draw)


@pytest.mark.parametrize("family", LEVELS)
def test_a_student_of_every_kind_of_model(family, tmp_path):
    if not is_known(family):
        pytest.skip("a family that this ComfyUI does not know")
    parts, share = proof.load(family), EARLY.get(family, 1.0)
    before = proof.answer(parts.model, parts)
    with proof.counted(parts.model) as passes:
        lora, _, path, _ = distil(parts, tmp_path / "straight", time=share, negatives=UNREACHED.get(family, NEGATIVES))
    about = lora.file.about
    level, unit = LEVELS[family]
    assert about.one_step["level"] == pytest.approx(level, rel=1e-6) and about.one_step["unit"] == unit
    assert about.family == family_of(parts.model)
    noise, drawn = drawn_as_its_file_says(parts, lora)
    assert proof.relative(drawn, drawn_in_distillation(parts, Path(path), noise, share)) < 1e-4
    assert all(bool(tensor.isfinite().all()) for tensor in lora.values())
    stock = proof.answer_of_stock_loader(parts, Path(path))
    assert not stock.unmatched and stock.layers and proof.relative(stock.answer, before) > 1e-3
    if family in RESUMED:
        with proof.counted(parts.model, cancel_in=len(passes) - 2), pytest.raises(InterruptProcessingException):
            distil(parts, tmp_path / "cancelled")
        again, *_ = distil(parts, tmp_path / "cancelled")
        assert all(torch.equal(again[name], tensor) for name, tensor in lora.items())
        plain, *_ = distil(parts, tmp_path / "plain", nasa_high=0.0)
        assert any(not torch.equal(plain[name], tensor) for name, tensor in lora.items())
    with torch.inference_mode():
        wearing, _ = comfy.sd.load_lora_for_models(parts.model, None, dict(lora), 0.5, 0.0)
    base, worn, note = undressed(wearing, AdapterConfig(rank=2, targets="all"))
    assert not base.patches, note
    mine, found = loaded_from(lora.file, "native" if about.family in FAMILIES else None), worn.loaded
    assert set(found.names) == set(mine.names)
    for name in mine.names:
        factors = [[each.state[f"{name}.lora_{end}.weight"].flatten(1) for end in "BA"] for each in (mine, found)]
        change = 0.5 * mine.alpha / mine.rank * torch.mm(*factors[0])
        same = found.alpha / found.rank * torch.mm(*factors[1])
        assert torch.allclose(same, change, atol=1e-7 + 1e-5 * float(change.abs().max()))
    assert torch.equal(proof.answer(parts.model, parts), before)


@pytest.mark.parametrize("family", ["flux", "sd15", "pixart"])
def test_each_row_of_a_batch_is_kept_away_from_its_own_negative_prompt(family):
    """As the negative node does it, and with blocks that are computed again in the backward pass."""
    parts, guidance = proof.load(family), AttentionGuidance("nasa", 0.7)
    prompts = PromptTable(parts.clip)
    told, negative = prompts.encode(["star", "house", "star"]), prompts.encode(["tree", "blue", "tree"])
    x_t, levels = proof.latents(parts, 3), torch.tensor([-3.0, 0.5, 1.0])

    def gradient(denoiser, against, config):
        module = parts.model.model.diffusion_model
        with attached(module, AdapterConfig(rank=2, targets="all"), family=denoiser.family, seed=0) as adapter:
            proof.fill(adapter.parameters())
            with differentiable(module, checkpoint=config):
                answer = against(guidance, negative)(x_t, levels, told)
                denoiser(x_t, levels, told)  # another call, which must not hear of it, before the backward pass
                answer.square().mean().backward()
            return answer.detach(), [parameter.grad.clone() for parameter in adapter.parameters()]

    with torch.inference_mode(), training_session(parts.model):
        denoiser = ComfyDenoiser(parts.model, prompts)
        with torch.no_grad():
            plain = denoiser(x_t, levels, told)
            with negatives_inside(denoiser) as against:
                together = against(guidance, negative)(x_t, levels, told)
                one_by_one = []
                for row in range(3):
                    single = {name: value[row : row + 1] for name, value in negative.items()}
                    own = {name: value[row : row + 1] for name, value in told.items()}
                    denoise = against(guidance, single)
                    one_by_one.append(denoise(x_t[row : row + 1], levels[row : row + 1], own))
            assert torch.equal(denoiser(x_t, levels, told), plain)
        assert proof.relative(together, plain) > 1e-3
        assert proof.relative(together, torch.cat(one_by_one)) < 1e-5
        with negatives_inside(denoiser) as against:
            kept, recomputed = (gradient(denoiser, against, checkpoint) for checkpoint in (False, True))
    assert torch.equal(kept[0], recomputed[0])
    assert max(proof.relative(one, other) for one, other in zip(recomputed[1], kept[1], strict=True)) < 1e-5

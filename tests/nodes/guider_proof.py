"""Guided sampling by the node's guider, and by hand: two models with weights of their own, called in turn."""

import importlib.util
import sys
from pathlib import Path

import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import torch

spec = importlib.util.spec_from_file_location("windows_proof", Path(__file__).with_name("test_windows.py"))
windows_proof = sys.modules["windows_proof"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(windows_proof)
LAYERS, apply, lora_of, random, Sampler = (
    getattr(windows_proof, name) for name in ("LAYERS", "apply", "lora_of", "random", "Sampler")
)
LEVELS = (-5.0, -3.0, -1.0, 2.0)


def stock(model, lora, strength=1.0):
    """With a LoRA by ComfyUI's own loader."""
    with torch.inference_mode():
        return comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]


def node(rule, model, base, positive, negative, **widgets):
    """The guider and the info of the node; ``rule``: ("FineStyle", 1.0, 2.5)."""
    from stylewright.nodes.guider import StyleGuider
    from stylewright.nodes.guider_inputs import SCALES

    class Node(StyleGuider):
        """With the hidden inputs that an executor would set."""

    Node.hidden = type("Hidden", (), {"unique_id": None})
    name, *scales = rule
    stated = {"rule": name, **{id: scale for (id, *_), scale in zip(SCALES[name], scales, strict=True)}}
    with torch.inference_mode():
        return Node.execute(model, base, positive, negative, stated, **widgets).args


class ByHand(comfy.samplers.CFGGuider):
    """Separate calls of two models; what is drawn is ``weights(sigma)`` of their predictions."""

    def __init__(self, adapted, base, weights):
        super().__init__(adapted)
        self._base, self._weights = base, weights

    def sample(self, noise, latent_image, sampler, sigmas, *args, **kwargs):
        conds = {name: [each.copy() for each in found] for name, found in self.original_conds.items()}
        comfy.samplers.preprocess_conds_hooks(conds)
        self._options = comfy.model_patcher.create_model_options_clone(self._base.model_options)
        self._options["transformer_options"]["sample_sigmas"] = sigmas
        comfy.sampler_helpers.prepare_model_patcher(self._base, conds, self._options)
        self._model, conds, loaded = comfy.sampler_helpers.prepare_sampling(
            self._base, noise.shape, conds, self._options
        )
        self._base.pre_run()
        self._base_conds = comfy.samplers.process_conds(self._model, noise, conds, noise.device, latent_image)
        try:
            return super().sample(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            self._base.cleanup()
            comfy.sampler_helpers.cleanup_models(conds, loaded)

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006 (ComfyUI's signature)
        models = (self.inner_model, self.conds, model_options), (self._model, self._base_conds, self._options)
        predictions = []
        for model, conds, options in models:
            both = [conds["positive"], conds["negative"]]
            predictions += comfy.samplers.calc_cond_batch(model, both, x, timestep, options)
        weights = self._weights(float(timestep[0]))
        return sum(weight * each for weight, each in zip(weights, predictions, strict=True))


def draw(guider, sampler, levels=LEVELS, name="euler"):
    """What a guider draws, from the noise and at the levels of a :class:`Sampler` of test_windows."""
    sigmas = torch.tensor([*map(sampler.sigma, levels), 0.0])
    with torch.inference_mode():
        return guider.sample(
            random(*sampler.shape), torch.zeros(sampler.shape), comfy.samplers.sampler_object(name), sigmas,
            disable_pbar=True, seed=0,
        )  # fmt: skip


def by_hand(adapted, base, weights, sampler, **options):
    """``weights``: four numbers, or a function of sigma; the models must not share their weights."""
    guider = ByHand(adapted, base, weights if callable(weights) else lambda sigma: weights)
    guider.set_conds(sampler.positive, sampler.negative)
    return draw(guider, sampler, **options)

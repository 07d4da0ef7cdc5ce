# ruff: noqa: F811
"""Plans inside ComfyUI, what leaves the device, and runs that run out of memory."""

import json
from dataclasses import replace

import pytest
import torch

from .test_trainer_runs import folders, train  # noqa: F401

pytestmark = pytest.mark.comfy


class Exhausted:
    """Lets the model run out of memory in its calls of these numbers."""

    def __init__(self, module, *calls):
        self.calls, self.count = calls, 0
        self._handle = module.register_forward_pre_hook(self._called)

    def _called(self, module, args):
        if torch.is_grad_enabled():
            self.count += 1
            if self.count in self.calls:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._handle.remove()


@pytest.fixture
def notes(monkeypatch):
    """What the node says."""
    from stylewright.nodes.bridge.previews import TrainingProgress

    said = []
    monkeypatch.setattr(TrainingProgress, "noted", lambda self, text: said.append(text))
    monkeypatch.setattr(TrainingProgress, "planned", lambda self, text: said.append(text))
    return said


@pytest.fixture
def available(monkeypatch):
    """Sets what is free, in bytes beyond the model."""
    from stylewright.nodes.bridge import memory
    from stylewright.training.loops.plan import Budget

    def set_to(count):
        def budget_of(model):
            return Budget(model.model_size(), model.model_size() + count)

        monkeypatch.setattr(memory, "budget_of", budget_of)

    return set_to


PASSES = 8  # of a run of ``train``: four steps of two batches


@pytest.fixture
def starved(train):
    """``starved(5, …)`` trains on a model that runs out of memory in its fifth batch; the numbers of several."""

    def run(*batches, **changes):
        sockets = train.sockets()
        module = sockets.model.model.diffusion_model
        with Exhausted(module) as counter:
            train(on=sockets, name="counted", **changes)
        probes = counter.count - PASSES
        with Exhausted(module, *(probes + batch for batch in batches)):
            return train(on=sockets, name="starved", **changes)

    return run


def plan_of(trained):
    return json.loads((trained.run / "plan.json").read_text())


def test_the_plan_is_shown_and_kept(train, notes):
    sockets = train.sockets()
    plan = plan_of(train(on=sockets))
    assert plan["fits"] and plan["model"] == sockets.model.model_size()
    assert plan["sentence"] == notes[-1] and "nothing recomputed" in notes[-1]


@pytest.mark.parametrize("batch", [2, 5])
def test_a_run_that_runs_out_of_memory_goes_on_with_less(batch, train, starved, notes):
    """The adapter is that of a run which had enough, bit for bit."""
    expected = train()
    trained = starved(batch)
    assert trained.losses == expected.losses
    assert all(torch.equal(trained.tensors[name], tensor) for name, tensor in expected.tensors.items())
    told = next(note for note in notes if "memory ran out" in note)
    assert "with nothing recomputed; continues with 4 of 4 blocks recomputed" in told


def test_memory_that_runs_out_twice_is_an_error_that_keeps_what_was_learned(starved, folders):
    from stylewright.training.errors import TrainingError

    with pytest.raises(TrainingError, match="then with 4 of 4 blocks recomputed"):
        starved(5, 7)
    assert [path.name for path in folders[0].glob("starved*")] == ["starved_00001_step000002.safetensors"]


def test_nothing_cheaper_is_left_on_a_cpu_once_every_block_is_recomputed(starved):
    from stylewright.training.errors import TrainingError

    with pytest.raises(TrainingError, match="nothing is left to save"):
        starved(3, gradient_checkpointing=True, memory="as set")


def test_as_much_is_recomputed_as_the_device_needs(train, notes, available):
    from stylewright.training.loops.plan import DoesNotFit

    whole = plan_of(train(name="roomy", gradient_checkpointing=True))
    available(whole["adapter"] + whole["activations"])
    plan = plan_of(train(name="tight", gradient_checkpointing=True))
    assert plan["fits"] and 0 < len(plan["saving"]["recomputed"]) <= 4
    assert plan["activations"] < whole["activations"]
    with pytest.raises(DoesNotFit, match=r"does not fit.*gradient_checkpointing on.*'as set' trains all the same"):
        train(name="off")
    train(name="insists", memory="as set")
    assert "does not fit" in notes[-1]


def test_models_that_training_does_not_need_leave_the_device(embedded, monkeypatch):
    import comfy.model_management as management

    from stylewright.nodes.bridge.memory import leave_device

    def loaded():
        return {each.model.model for each in management.current_loaded_models if each.model is not None}

    vae, clip, model = embedded.vae.patcher, embedded.clip.patcher, embedded.model
    with torch.inference_mode():
        management.load_models_gpu([vae, clip, model])
    assert {vae.model, clip.model, model.model} <= loaded()
    leave_device(vae, clip)  # in the CPU's own memory there is nowhere to go
    assert {vae.model, clip.model, model.model} <= loaded()
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    leave_device(vae, clip)
    assert model.model in loaded() and not {vae.model, clip.model} & loaded()


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_plans_hold_through_comfyuis_modules(family, tiny, tiny_clip, latent_channels):
    """What is foretold from small passes against passes of 1.8 times the area of the largest of them."""
    from stylewright.nodes.bridge.denoiser import ComfyDenoiser
    from stylewright.nodes.bridge.prompts import PromptTable
    from stylewright.nodes.bridge.session import training_session
    from stylewright.training.adapters.attach import attached
    from stylewright.training.data.dataset import Dataset, Example
    from stylewright.training.loops.config import TrainConfig
    from stylewright.training.loops.plan import Budget
    from stylewright.training.loops.planner import Planner
    from stylewright.training.loops.probe import Bench
    from stylewright.training.loops.probe import run as pass_of
    from stylewright.training.loops.saving import ALL, Saving
    from stylewright.training.memory import Footprint

    with torch.inference_mode():
        model, prompts = tiny(family), PromptTable(tiny_clip(family))
        rows = prompts.encode(["a house by a lake"])
    config, side = TrainConfig(batch_size=2, accumulation=1), 32
    config = replace(config, adapter=replace(config.adapter, rank=4))
    data = Dataset([Example("0", torch.randn(latent_channels[family], side, side), rows, None, "a")], rows)
    cpu = torch.device("cpu")
    with torch.inference_mode(), training_session(model):
        denoiser = ComfyDenoiser(model, prompts)
        _, survey = Planner(denoiser, data, config, device=cpu).survey(Budget(0, None))
        with attached(denoiser.module, config.adapter, family=denoiser.family, seed=0) as adapter:
            bench = Bench(denoiser, adapter, config, rows, latent_channels[family], False, cpu)
            for saving in (Saving(), Saving(frozenset({ALL}))):
                with Footprint() as cost, saving.applied(denoiser.module, cpu):
                    pass_of(bench, (2, side, side))
                for parameter in adapter.parameters():
                    parameter.grad = None
                assert survey.activations(2, side * side, saving) == pytest.approx(cost.peak, rel=0.03)
                assert survey.flops(2, side * side, saving) == pytest.approx(cost.flops, rel=0.03)

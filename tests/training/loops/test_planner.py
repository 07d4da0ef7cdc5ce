"""Plans against what then happens, on a network whose blocks are unlike and whose attention keeps its scores."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.data.dataset import Dataset, Example
from stylewright.training.loops.course import Call, Course, order_of_recomputing, peak
from stylewright.training.loops.plan import Budget, choose
from stylewright.training.loops.planner import Planner
from stylewright.training.loops.saving import ALL, Saving
from stylewright.training.loops.survey import probes
from stylewright.training.loops.train import train
from stylewright.training.memory import Footprint

CPU = torch.device("cpu")
CHANNELS, WIDE = 4, 32


class Block(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.norm = nn.LayerNorm(WIDE)
        self.qkv = nn.Linear(WIDE, 3 * WIDE)
        self.up, self.down = nn.Linear(WIDE, factor * WIDE), nn.Linear(factor * WIDE, WIDE)

    def forward(self, x, *, context):
        q, k, v = self.qkv(self.norm(x) + context).chunk(3, -1)
        x = x + torch.softmax(q @ k.mT / WIDE, -1) @ v
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(CHANNELS, WIDE), nn.Linear(WIDE, CHANNELS)
        self.blocks = nn.ModuleList(Block(factor) for factor in (8, 2, 4, 1))

    def forward(self, x, context):
        tokens = self.enter(x.flatten(2).mT)
        for block in self.blocks:
            tokens = block(tokens, context=context[:, None])
        return self.leave(tokens).mT.unflatten(2, x.shape[2:])


class Denoiser:
    family, process, prediction, log_snr_range = "other", "flow", "flow", (-15.0, 15.0)

    def __init__(self):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.module = Net().eval().requires_grad_(False)

    def __call__(self, x_t, log_snr, conditioning):
        return self.module(x_t, conditioning["context"] + log_snr[:, None]).float()


HEIGHT, WIDTH = 28, 20
AREA = HEIGHT * WIDTH


def dataset(height=HEIGHT, width=WIDTH):
    draw = torch.Generator().manual_seed(1)
    rows = [{"context": torch.randn(1, WIDE, generator=draw)} for _ in range(2)]
    sizes = ((height, width), (height // 2, width))
    pictures = [torch.randn(CHANNELS, *size, generator=draw) for size in sizes]
    examples = [Example(str(i), pictures[i], rows[i], None, "a") for i in range(2)]
    return Dataset(examples, {"context": torch.zeros(1, WIDE)})


def options(**changes):
    plain = {"steps": 3, "batch_size": 2, "accumulation": 2, "gradient_checkpointing": True, "save_every": 0}
    return replace(dataclass_of(plain), **changes)


def dataclass_of(plain):
    from stylewright.training.loops.config import TrainConfig

    return TrainConfig(**plain, adapter=AdapterConfig(rank=4, targets=("qkv", "up", "down")))


def survey(config, data=None, budget=None):
    denoiser = Denoiser()
    planner = Planner(denoiser, data or dataset(), config, device="cpu", latents_per_token=1)
    return planner.survey(budget or Budget(model=0, available=None))


def trained_bytes(config, saving, data=None):
    with Footprint() as cost:
        train(Denoiser(), data or dataset(), config, run_dir=None, latents_per_token=1, saving=saving)
    return cost.peak


@pytest.fixture(scope="module")
def surveyed():
    return survey(options())


@pytest.mark.parametrize(
    "places", [(), (0,), (0, 2), (1, 2, 3), (0, 1, 2, 3)], ids=lambda places: "".join(map(str, places))
)
def test_bytes_foretold_from_small_passes_are_those_of_training(places, surveyed):
    """The data are four times larger than the largest probe. The model's own bytes count for neither."""
    plan, found = surveyed
    saving = Saving(frozenset(places))
    foretold = found.activations(2, AREA, saving) + plan.adapter
    assert foretold == pytest.approx(trained_bytes(options(steps=2), saving), rel=0.03)


@pytest.mark.parametrize(
    "changes", [{"accumulation": 1, "batch_size": 1}, {"ema_decay": 0.9}, {"optimizer": "prodigy"}]
)
def test_plans_hold_for_other_options(changes):
    config = options(**{"learning_rate": 1.0, **changes}, steps=2)
    small = dataset(16, 16)
    plan, _ = survey(config, small)
    assert plan.beyond_the_model == pytest.approx(trained_bytes(config, plan.saving, small), rel=0.06)


def test_products_are_those_of_training(surveyed):
    _, found = surveyed
    config = options(steps=1, accumulation=1, batch_size=1)
    for saving in (Saving(), Saving(frozenset({0, 1}))):
        with Footprint() as cost:
            train(Denoiser(), dataset(), config, run_dir=None, latents_per_token=1, saving=saving)
        areas = (AREA, AREA // 2)
        assert any(found.flops(1, area, saving) == pytest.approx(cost.flops, rel=1e-3) for area in areas)


def test_a_plan_knows_of_the_base_s_pass():
    config = options(loss="dco", steps=2)
    plan, found = survey(config)
    for saving in (Saving(), Saving(frozenset({0, 2})), Saving(frozenset({ALL}))):
        foretold = found.activations(2, AREA, saving) + plan.adapter
        assert foretold == pytest.approx(trained_bytes(config, saving), rel=0.04)
        with Footprint() as cost:
            train(Denoiser(), dataset(16, 16), replace(config, steps=1), run_dir=None, saving=saving)
        with Footprint() as plain:
            train(Denoiser(), dataset(16, 16), options(steps=1), run_dir=None, saving=saving)
        _, other = survey(options(steps=2))
        ratio = found.flops(2, AREA, saving) / other.flops(2, AREA, saving)
        assert 1.2 < ratio == pytest.approx(cost.flops / plain.flops, rel=0.03)


def test_no_more_is_recomputed_than_need_be(surveyed):
    _, found = surveyed
    counts = []
    for share in (1.2, 0.9, 0.7, 0.6):
        most = found.activations(2, AREA, Saving())
        plan = choose(found, options(), Budget(model=10**6, available=10**6 + share * most))
        assert plan.fits
        counts.append(len(plan.saving.recomputed))
        cheaper = found.order(2, AREA)[: counts[-1] - 1]
        if counts[-1]:
            assert found.activations(2, AREA, Saving(frozenset(cheaper))) > plan.activations
    assert counts[0] == 0 and counts == sorted(counts) and counts[-1] > 1


def course(*blocks):
    """Of blocks (rise, flops)."""
    none = torch.zeros(1, dtype=torch.float64)
    calls = [
        Call(place, torch.tensor([rise, 0.0, flops], dtype=torch.float64), none, none)
        for place, (rise, flops) in enumerate(blocks)
    ]
    return Course(tuple(calls), torch.zeros(2, dtype=torch.float64), none)


def test_what_frees_most_for_its_arithmetic_is_recomputed_first():
    kept = course((100.0, 50.0), (100.0, 10.0), (30.0, 10.0), (100.0, 10.0))
    recomputed = course(*[(10.0, 0.0)] * 4)
    assert order_of_recomputing(kept, recomputed) == [1, 3, 2, 0]


def test_levels_add_up():
    kept, recomputed = course((100.0, 1.0), (70.0, 1.0)), course((10.0, 1.0), (20.0, 1.0))
    assert [peak(kept, recomputed, chosen) for chosen in ((), (0,), (1,), (0, 1))] == [170, 80, 120, 30]


def test_a_device_that_is_too_small_is_told_what_would_help(surveyed):
    _, found = surveyed
    least = found.activations(2, AREA, Saving(frozenset({ALL})))
    config, budget = options(resolution=768), Budget(model=0, available=0.8 * least)
    plan = choose(found, config, budget)
    assert not plan.fits
    assert "batch_size 1 with accumulation 4, which trains the same" in plan.advice
    assert "a resolution of" in plan.advice and plan.advice in plan.sentence()
    assert "gradient_checkpointing on" not in plan.advice
    roomy = Budget(model=0, available=0.8 * found.activations(2, AREA, Saving()))
    assert "gradient_checkpointing on" in choose(found, replace(config, gradient_checkpointing=False), roomy).advice
    assert "nothing that can be set" in choose(found, config, Budget(model=0, available=1.0)).advice


def test_weights_are_streamed_as_a_last_resort(surveyed):
    _, found = surveyed
    least = found.activations(2, AREA, Saving(frozenset({ALL})))
    plan = choose(found, options(), Budget(model=round(least), available=1.8 * least, may_stream=True))
    assert plan.fits and 0.3 * least < plan.streamed < 0.9 * least
    assert not plan.saving.offload and len(plan.saving.recomputed) in (1, 4)


def test_as_set_is_as_set(surveyed):
    _, found = surveyed
    for checkpointing in (True, False):
        config = options(memory="as set", gradient_checkpointing=checkpointing)
        for available in (None, 1.0):
            plan = choose(found, config, Budget(model=0, available=available))
            assert plan.saving == Saving(frozenset({ALL}) if checkpointing else frozenset())
            assert plan.fits == (available is None)


def test_a_survey_leaves_nothing_behind():
    denoiser, data = Denoiser(), dataset(16, 16)
    before = {name: tensor.clone() for name, tensor in denoiser.module.state_dict().items()}
    modules = list(denoiser.module.modules())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    planner, budget = Planner(denoiser, data, options(steps=40), device="cpu", latents_per_token=1), Budget(0, None)
    plan = planner.rehearse(*planner.survey(budget), budget)
    assert torch.equal(torch.rand(3), expected)
    assert list(denoiser.module.modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in denoiser.module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in denoiser.module.parameters())
    assert plan.step_seconds is not None and plan.step_seconds > 0
    assert "in all" in plan.sentence()


def test_a_rehearsal_that_takes_more_than_foretold_changes_the_plan():
    denoiser, data, config = Denoiser(), dataset(16, 16), options(steps=40)
    planner = Planner(denoiser, data, config, device="cpu", latents_per_token=1)
    plan, found = planner.survey(Budget(0, None))
    budget, found = Budget(0, plan.beyond_the_model), replace(found, correction=0.5)
    plan = choose(found, config, budget)
    assert plan.fits and not plan.saving.recomputed
    plan = planner.rehearse(plan, found, budget)
    assert plan.fits and plan.saving.recomputed


def test_where_a_rehearsal_finds_no_memory_the_next_cheaper_setting_is_tried():
    denoiser, data = Denoiser(), dataset(16, 16)
    planner, budget = Planner(denoiser, data, options(steps=40), device="cpu", latents_per_token=1), Budget(0, None)
    plan, found = planner.survey(budget)
    assert not plan.saving.recomputed
    calls = []

    def exhausted(module, args):
        calls.append(module)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with denoiser.module.register_forward_pre_hook(exhausted):
        plan = planner.rehearse(plan, found, budget)
    assert plan.saving.recomputed == {ALL}
    assert "4 of 4 blocks recomputed" in plan.sentence()


def test_a_plan_is_kept_as_json(surveyed, tmp_path):
    plan, _ = surveyed
    plan.to_file(tmp_path / "plan.json")
    kept = json.loads((tmp_path / "plan.json").read_text())
    assert kept["needed"] == plan.needed and kept["sentence"] == plan.sentence()
    assert kept["saving"] == {"recomputed": [], "offload": False}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("largest", [(128, 128), (64, 96), (40, 40), (8, 8)])
def test_probes_are_small(batch, largest):
    shapes = probes(batch, largest, 4)
    area = largest[0] * largest[1]
    if len(shapes) == 1:
        assert shapes == [(batch, *largest)] and batch * area <= 32 * 32
        return
    assert len(shapes) == 3
    assert all(b == batch and h * w <= max(24**2, area / 16) and h % 8 == w % 8 == 0 for b, h, w in shapes)


def test_the_next_cheaper_setting():
    module = Net()
    assert Saving(frozenset({1})).cheaper(module) == Saving(frozenset({ALL}))
    assert Saving(frozenset({ALL})).cheaper(module) == Saving(frozenset({ALL}), offload=True)
    assert Saving(frozenset({0, 1, 2, 3})).cheaper(module) == Saving(frozenset({ALL}), offload=True)
    assert Saving(frozenset({ALL}), offload=True).cheaper(module) is None
    assert Saving().cheaper(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("saving", [Saving(frozenset({1, 3})), Saving(frozenset({ALL}), offload=True)])
def test_a_run_is_the_same_whatever_is_done_for_memory(saving, monkeypatch):
    monkeypatch.setattr("stylewright.training.offload.LEAST_BYTES", 1)
    config, data = options(), dataset(16, 8)
    plain, saved = (train(Denoiser(), data, config, run_dir=None, saving=way) for way in (Saving(), saving))
    assert all(torch.equal(saved.adapter_state[name], tensor) for name, tensor in plain.adapter_state.items())
    assert plain.losses == saved.losses

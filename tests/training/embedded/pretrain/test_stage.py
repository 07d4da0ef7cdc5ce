"""The loop that resumes, its optimisers and its average."""

import copy
import math

import pytest
import torch
from torch import nn

from stylewright.training.embedded.pretrain.stage import (
    flatten_kernels,
    moving_average,
    optimisers,
    restarts,
    run,
    trapezoid,
    unflatten_kernels,
)
from stylewright.training.errors import NonFiniteLoss
from stylewright.training.randomness import generator


def small_model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    return model


class Stage:
    """A training stage with all that the real ones have: two optimisers, a schedule, an average."""

    def __init__(self, checkpoint, stop_at=None, loss=None):
        self.checkpoint, self.stop_at, self.loss = checkpoint, stop_at, loss
        self.model = small_model()
        self.average = moving_average(self.model, 0.9)
        self.seen, self.rates = [], []

    def step(self, i):
        if i == self.stop_at:
            raise KeyboardInterrupt
        if i:
            self.average.update_parameters(self.model)
        self.seen.append(i)
        self.rates.append([group["lr"] for each in self.optimizers for group in each.param_groups])
        x = torch.randn(5, 3, generator=generator(1, "x", i))
        loss = (self.model(x) - x[:, :2].sin()).square().mean()
        loss.backward()
        return loss if self.loss is None else self.loss(i)

    def run(self, steps=9, **options):
        self.optimizers = optimisers(self.model.named_parameters(), lambda name: name.startswith("2."), 1e-2)
        parts = {"model": self.model, "average": self.average}
        run(self.checkpoint, self.step, steps, self.optimizers, trapezoid(steps, 3), parts, **options)
        return {**self.model.state_dict(), **{f"average {k}": v for k, v in self.average.state_dict().items()}}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("stop_at", [2, 5, 8])
def test_a_resumed_run_equals_a_straight_one(tmp_path, stop_at):
    straight = Stage(tmp_path / "straight.safetensors")
    expected = straight.run(save_every=2)
    with pytest.raises(KeyboardInterrupt):
        Stage(tmp_path / "stopped.safetensors", stop_at).run(save_every=2)
    rest = Stage(tmp_path / "stopped.safetensors")
    assert_equal(rest.run(save_every=2), expected)
    assert rest.seen == list(range(stop_at - stop_at % 2, 9))
    assert rest.rates == straight.rates[rest.seen[0] :]


def test_a_resumed_run_of_a_network_laid_out_channels_last(tmp_path):
    """The file knows no memory layout, and fused AdamW pairs elements by their place in memory."""

    def train(name, *, until=5):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Conv2d(5, 7, 3).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)

        def step(i):
            if i == until:
                raise KeyboardInterrupt
            loss = model(torch.randn(2, 5, 8, 8, generator=generator(1, "x", i))).square().mean()
            loss.backward()
            return loss

        run(tmp_path / name, step, 5, [optimizer], lambda _: 1.0, {"model": model}, save_every=1)
        return model.state_dict()

    expected = train("straight")
    with pytest.raises(KeyboardInterrupt):
        train("stopped", until=3)
    assert_equal(train("stopped"), expected)


def test_a_finished_run_is_left_as_it_is(tmp_path):
    expected = Stage(tmp_path / "a.safetensors").run()
    again = Stage(tmp_path / "a.safetensors")
    assert_equal(again.run(), expected)
    assert again.seen == []


def test_it_learns(tmp_path):
    losses = []
    stage = Stage(tmp_path / "a.safetensors")
    step = stage.step
    stage.step = lambda i: losses.append(step(i)) or losses[-1]
    stage.run(steps=60)
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])


def test_evaluation_comes_with_every_save(tmp_path):
    asked = []
    Stage(tmp_path / "a.safetensors").run(save_every=4, evaluate=lambda step: asked.append(step) or "fine")
    assert asked == [4, 8, 9]


@pytest.mark.parametrize(("bad", "saved"), [(3, 2), (8, 8)])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, bad, saved):
    loss = lambda i: torch.tensor(math.nan if i == bad else 1.0)  # noqa: E731
    with pytest.raises(NonFiniteLoss, match=r"stage, before step \d: the loss is nan"):
        Stage(tmp_path / "stage.safetensors", loss=loss).run(save_every=2)
    rest = Stage(tmp_path / "stage.safetensors")
    assert all(torch.isfinite(value).all() for value in rest.run().values())
    assert rest.seen[0] == saved


def test_reports_say_where_the_run_is(tmp_path, caplog):
    caplog.set_level("INFO")
    Stage(tmp_path / "tiny.safetensors").run(report_every=3)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(",")[0] for line in lines] == [f"tiny: step {n} of 9" for n in (3, 6, 9)]


# ---- the learning rate


def test_the_trapezoid_rises_stays_and_falls():
    factor = trapezoid(100, 10, 0.5)
    values = [factor(i) for i in range(100)]
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert values[10:51] == [1.0] * 41
    assert values[50:] == pytest.approx([1 - i / 50 for i in range(50)])
    assert factor(100) == 0


def test_a_cycle_is_a_trapezoid_of_its_own_height():
    first, second = trapezoid(100, 10), trapezoid(40, 10)
    factor = restarts(((100, 1.0), (40, 0.5)), 10)
    assert [factor(i) for i in range(100)] == [first(i) for i in range(100)]
    assert [factor(100 + i) for i in range(41)] == [0.5 * second(i) for i in range(41)]


# ---- optimisers


def test_every_parameter_has_one_optimiser():
    model = nn.ModuleDict({"inner": nn.Linear(4, 4), "outer": nn.Linear(4, 2), "norm": nn.LayerNorm(4)})
    muon, adam = optimisers(model.named_parameters(), lambda name: name.startswith(("inner", "norm")), 1e-3)
    hidden = [p for group in muon.param_groups for p in group["params"]]
    rest = [p for group in adam.param_groups for p in group["params"]]
    assert [id(p) for p in hidden] == [id(model["inner"].weight)]  # Muon is for matrices alone
    assert {id(p) for p in [*hidden, *rest]} == {id(p) for p in model.parameters()}
    assert len(hidden) + len(rest) == len(list(model.parameters()))


# ---- kernels as matrices


def test_flattened_kernels_compute_the_same_and_are_matrices():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False))
    before, x = copy.deepcopy(model.state_dict()), torch.randn(2, 3, 9, 10)
    expected = model(x)
    flatten_kernels(model)
    assert torch.equal(model(x), expected)
    matrices = {name: tuple(p.shape) for name, p in model.named_parameters() if "original" in name}
    assert matrices == {f"{i}.parametrizations.weight.original": (8, 72) for i in (1, 3)}
    unflatten_kernels(model)
    assert_equal(model.state_dict(), before)
    assert torch.equal(model(x), expected)


def test_what_is_learned_as_a_matrix_stays():
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    flatten_kernels(model)
    with torch.no_grad():
        model[0].parametrizations.weight.original += 1
    expected = model[0].weight.detach().clone()
    unflatten_kernels(model)
    assert torch.equal(model[0].weight, expected)


# ---- the average


def test_the_average_is_exponential_and_short_at_first():
    model = nn.Linear(1, 1, bias=False)
    average, decay, expected = moving_average(model, 0.5), 0.5, None
    for n, value in enumerate([3.0, 5.0, -2.0, 7.0, 1.0, 1.0, 4.0]):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update_parameters(model)
        keep = min(decay, (1 + n) / (10 + n))
        expected = value if expected is None else keep * expected + (1 - keep) * value
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-6)


def test_the_average_of_what_does_not_move_is_itself():
    model = small_model()
    average = moving_average(model, 0.999)
    for _ in range(20):
        average.update_parameters(model)
    for one, other in zip(average.module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other)

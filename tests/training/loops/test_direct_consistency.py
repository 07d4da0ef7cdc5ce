"""Direct Consistency Optimization in the loop: the base is asked for the same noise, without gradients."""

import math

import pytest
import torch

from stylewright.training.loops import train as loop
from stylewright.training.loops.config import TrainConfig
from stylewright.training.memory import Footprint
from stylewright.training.weightings import WEIGHTINGS


class Watched:
    """A denoiser that notes what it was asked, and whether with gradients."""

    def __init__(self, denoiser):
        self._denoiser, self.calls = denoiser, []
        self.module, self.family, self.log_snr_range = denoiser.module, denoiser.family, denoiser.log_snr_range
        self.process, self.prediction = denoiser.process, denoiser.prediction

    def __call__(self, x_t, log_snr, conditioning):
        answer = self._denoiser(x_t, log_snr, conditioning)
        self.calls.append((x_t, log_snr, conditioning["context"], answer.detach(), answer.requires_grad))
        return answer


@pytest.fixture
def gradients(monkeypatch, denoiser, dataset, make_config):
    """The gradients of a run's first step, and its loss."""

    def of(**changes):
        seen = []

        def note(parameters, limit):
            seen.append([parameter.grad.clone() for parameter in parameters])
            return torch.tensor(0.0)

        monkeypatch.setattr(loop, "clip_grad_norm_", note)
        result = loop.train(denoiser, dataset, make_config(steps=1, **changes), run_dir=None)
        return seen[0], result.losses[0]

    return of


@pytest.mark.parametrize("changes", [{}, {"adapter_dropout": 0.5}, {"precision": "bfloat16"}])
def test_the_base_is_asked_the_same_without_gradients(changes, denoiser, dataset, make_config):
    from stylewright.training.adapters.methods import AdapterConfig

    changes = dict(changes)
    adapter = AdapterConfig(rank=2, dropout=changes.pop("adapter_dropout", 0.0))
    watched = Watched(denoiser)
    loop.train(watched, dataset, make_config(loss="dco", steps=3, adapter=adapter, **changes), run_dir=None)
    assert len(watched.calls) == 2 * 3 * 2
    answers = []
    for base, adapted in zip(watched.calls[::2], watched.calls[1::2], strict=True):
        assert [base[4], adapted[4]] == [False, True]
        assert all(torch.equal(one, other) for one, other in zip(base[:3], adapted[:3], strict=True))
        with torch.no_grad():
            if not changes:
                assert torch.equal(base[3], denoiser(*base[:2], {"context": base[2]}))
        answers.append(torch.equal(base[3], adapted[3]))
    assert answers == [True] * 2 + [False] * 4  # the adapter does nothing in the first step


@pytest.mark.parametrize("weighting", ["none", "min-snr-5"])
@pytest.mark.parametrize("beta", [None, 40.0])
def test_the_first_step_is_that_of_mse_times_half_of_beta(beta, weighting, gradients):
    plain, _ = gradients(weighting=weighting)
    found, loss = gradients(loss="dco", dco_beta=beta, weighting=weighting)
    assert loss == pytest.approx(math.log(2))
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, (beta or 1.0) / 2 * other)


@pytest.mark.parametrize(("process", "beta"), [("flow", 1.0), ("vp", 1000.0)])
def test_beta_is_by_default_the_one_that_is_published_for_the_process(process, beta, denoiser, dataset, make_config):
    denoiser.process, denoiser.prediction = process, "flow" if process == "flow" else "eps"
    runs = [
        loop.train(denoiser, dataset, make_config(loss="dco", dco_beta=each), run_dir=None) for each in (None, beta)
    ]
    assert runs[0].losses == runs[1].losses and runs[0].losses[-1] != runs[0].losses[0]


def test_a_weighting_is_a_factor_on_beta():
    from stylewright.training.loops.passes import Noised, _losses
    from stylewright.training.losses import direct_consistency

    draw = torch.Generator().manual_seed(0)
    pred, wanted, base = torch.randn(3, 2, 4, 6, 8, generator=draw)
    log_snr = torch.tensor([-3.0, 5.0])
    kind = type("Kind", (), {"process": "vp", "prediction": "eps"})
    batch = Noised(wanted, log_snr, wanted, None, {})
    found = _losses(pred, wanted, base, batch, kind, TrainConfig(loss="dco", dco_beta=7.0, weighting="min-snr-5"))
    weights = WEIGHTINGS["min-snr-5"](log_snr, "eps", "vp")
    assert weights[0] != weights[1]
    torch.testing.assert_close(found, direct_consistency(pred, wanted, base, 7 * weights))


def test_it_learns_and_stays_nearer_to_the_base(denoiser, dataset, make_config):
    """With a large beta it stops where it is a little better than the base."""

    def trained(**changes):
        config = make_config(steps=60, save_every=0, clip_norm=0.0, **changes)
        return loop.train(denoiser, dataset, config, run_dir=None)

    def size(result):
        return sum(float(tensor.square().sum()) for name, tensor in result.adapter_state.items() if "lora_B" in name)

    plain, consistent = trained(), trained(loss="dco", dco_beta=1000.0)
    assert sum(consistent.losses[-10:]) / 10 < 0.9 * math.log(2)
    assert size(consistent) < 0.7 * size(plain)


def test_masks_count(denoiser, make_dataset, make_config):
    masked = loop.train(denoiser, make_dataset(masked=True), make_config(loss="dco", dco_beta=50.0), run_dir=None)
    whole = loop.train(denoiser, make_dataset(), make_config(loss="dco", dco_beta=50.0), run_dir=None)
    assert masked.losses != whole.losses


def test_checkpointing_changes_nothing(denoiser, dataset, make_config):
    plain, small = (
        loop.train(denoiser, dataset, make_config(loss="dco", gradient_checkpointing=on), run_dir=None)
        for on in (False, True)
    )
    assert plain.losses == small.losses
    assert all(torch.equal(small.adapter_state[name], tensor) for name, tensor in plain.adapter_state.items())


def test_a_continued_run_equals_a_straight_one(run_to):
    def stop(event):
        if event.step >= 4:
            raise KeyboardInterrupt

    options = {"loss": "dco", "dco_beta": 20.0}
    with pytest.raises(KeyboardInterrupt):
        run_to("parts", report=stop, **options)
    continued, _ = run_to("parts", **options)
    straight, _ = run_to("whole", **options)
    assert continued.losses == straight.losses
    assert all(torch.equal(continued.adapter_state[k], tensor) for k, tensor in straight.adapter_state.items())


def test_another_beta_is_another_run(run_to):
    from stylewright.training.errors import IncompatibleCheckpoint

    run_to("run", steps=3, loss="dco")
    with pytest.raises(IncompatibleCheckpoint, match=r"dco_beta was not given and is 2\.0"):
        run_to("run", steps=5, loss="dco", dco_beta=2.0)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_a_beta_that_means_nothing_is_refused(beta):
    with pytest.raises(ValueError, match=r"dco_beta=.*expected a positive number"):
        TrainConfig(loss="dco", dco_beta=beta)


def test_the_second_pass_costs_arithmetic_and_keeps_no_activations(denoiser, dataset, make_config):
    costs = {}
    for loss in ("mse", "dco"):
        with Footprint() as costs[loss]:
            loop.train(denoiser, dataset, make_config(loss=loss, steps=1), run_dir=None)
    assert 1.2 < costs["dco"].flops / costs["mse"].flops < 1.6
    assert costs["dco"].peak < 1.2 * costs["mse"].peak


def test_a_beta_that_would_have_no_effect_is_refused():
    with pytest.raises(ValueError, match=r"dco_beta=500.*no effect"):
        TrainConfig(loss="mse", dco_beta=500.0)
    assert TrainConfig(loss="dco", dco_beta=500.0).dco_beta == 500

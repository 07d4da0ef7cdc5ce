import math

import pytest
import torch
from gaussian import GaussianDenoiser

from stylewright.training import losses, noise, predictions, weightings

SHAPE = (3, 4, 5, 6)
TORCH = {
    "mse": torch.nn.functional.mse_loss,
    "l1": torch.nn.functional.l1_loss,
    "huber": lambda pred, target: 2 * torch.nn.functional.huber_loss(pred, target),
}


def pair():
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)) * 1.5


@pytest.mark.parametrize("name", losses.LOSSES)
def test_losses_are_torchs_for_each_sample(name):
    pred, target = pair()
    loss = losses.LOSSES[name](pred, target)
    assert loss.shape == (3,)
    torch.testing.assert_close(loss, torch.stack([TORCH[name](p, t) for p, t in zip(pred, target, strict=True)]))
    assert losses.LOSSES[name](target, target).tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_mask_restricts_each_sample_to_its_own_part(name):
    pred, target = pair()
    mask = torch.zeros(3, 1, 5, 6)
    mask[0, :, 1:3, 2:6], mask[1, :, 0, 0], mask[2] = 1, 1, 1
    loss = losses.LOSSES[name](pred, target, mask)
    parts = [(slice(None), slice(1, 3), slice(2, 6)), (slice(None), 0, 0), ...]
    expected = [TORCH[name](pred[i][part], target[i][part]) for i, part in enumerate(parts)]
    torch.testing.assert_close(loss, torch.stack(expected))


def test_a_soft_mask_is_a_weighted_mean_and_its_scale_does_not_matter():
    pred, target = pair()
    mask = torch.rand(3, 1, 5, 6, generator=torch.Generator().manual_seed(1))
    weights = mask.expand(SHAPE)
    expected = ((pred - target).square() * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3))
    torch.testing.assert_close(losses.mse(pred, target, mask), expected)
    torch.testing.assert_close(losses.mse(pred, target, 0.1 * mask), expected)
    torch.testing.assert_close(losses.mse(pred, target, torch.ones(3, 1, 5, 6)), losses.mse(pred, target))


def test_an_empty_mask_is_not_a_number():
    pred, target = pair()
    mask = torch.ones(3, 1, 5, 6)
    mask[1] = 0
    assert losses.mse(pred, target, mask).isnan().tolist() == [False, True, False]


def test_half_precision_is_summed_in_float32():
    pred, target = pair()
    loss = losses.mse(pred.bfloat16(), target.bfloat16())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, losses.mse(pred.bfloat16().float(), target.bfloat16().float()))


def test_shapes_that_would_broadcast_are_refused():
    pred, target = pair()
    with pytest.raises(ValueError, match=r"\(3, 4, 5, 6\).*\(3, 4, 5, 1\)"):
        losses.mse(pred, target[..., :1])
    with pytest.raises(ValueError, match=r"mask of shape \(3, 5, 6\).*\(3, 1, 5, 6\)"):
        losses.mse(pred, target, torch.ones(3, 5, 6))
    with pytest.raises(ValueError, match="mask of shape"):
        losses.mse(pred, target, torch.ones(3, 1, 6, 5))


# ---- Direct Consistency Optimization


def trio(seed=0):
    """A prediction, its target, and what the base predicts."""
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("beta", [1.0, 1000.0])
def test_at_the_base_dco_is_log_2_with_half_of_beta_times_the_gradient_of_mse(beta):
    pred, target, _ = trio()
    pred.requires_grad_()
    loss = losses.direct_consistency(pred, target, pred.detach().clone(), beta)
    assert loss.tolist() == pytest.approx([math.log(2)] * 3)
    (found,) = torch.autograd.grad(loss.sum(), pred)
    (expected,) = torch.autograd.grad(losses.mse(pred, target).sum(), pred)
    torch.testing.assert_close(found, beta / 2 * expected)


def test_no_gradient_goes_into_the_base():
    pred, target, base = (tensor.requires_grad_() for tensor in trio())
    losses.direct_consistency(pred, target, base, 1.0).sum().backward()
    assert pred.grad is not None and base.grad is None


def test_dco_is_below_log_2_exactly_where_the_adapter_beats_the_base():
    for seed in range(20):
        pred, target, base = trio(seed)
        better = losses.mse(pred, target) < losses.mse(base, target)
        assert torch.equal(losses.direct_consistency(pred, target, base, 3.0) < math.log(2), better)


def test_dco_is_of_each_sample_with_its_own_beta_and_mask():
    pred, target, base = trio()
    mask = torch.rand(3, 1, 5, 6, generator=torch.Generator().manual_seed(1)).round()
    beta = torch.tensor([0.5, 2.0, 30.0])
    together = losses.direct_consistency(pred, target, base, beta, mask)
    for i in range(3):
        gain = losses.mse(pred, target, mask)[i] - losses.mse(base, target, mask)[i]
        assert together[i].item() == pytest.approx(-torch.sigmoid(-beta[i] * gain).log().item(), rel=1e-5)
    torch.testing.assert_close(together, losses.direct_consistency(pred, target, base, beta, 0.1 * mask))


def test_dco_stays_finite_far_from_the_base_and_saturates():
    pred, target, base = trio()
    far = losses.direct_consistency(base + 100, target, base, 1000.0)
    assert far.isfinite().all() and (far > 1e6).all()
    best = target.clone().requires_grad_()
    losses.direct_consistency(best + 1e-3 * pred, target, base + 100, 1000.0).sum().backward()
    assert best.grad.abs().max() == 0  # far better than the base: nothing is left to learn


# ---- with Gaussian data the best denoiser is known exactly

LEVELS = torch.tensor([-6.0, -2.0, 0.0, 3.0])
DRAWS = 20_000


def world(process, prediction):
    """The ideal denoiser of a Gaussian, and draws of it at ``LEVELS``: (denoiser, log_snr, x_t, target)."""
    draw = torch.Generator().manual_seed(0)
    mean = torch.tensor([[[0.7]], [[-1.5]]])  # two channels
    ideal = GaussianDenoiser(mean, torch.tensor([[[0.5]], [[1.3]]]), process, prediction)
    log_snr = LEVELS.repeat_interleave(DRAWS)
    x0 = ideal.data((len(log_snr), 2, 1, 3), draw)
    eps = noise.gaussian(x0.shape, draw)
    x_t = noise.add_noise(process, x0, eps, log_snr)
    return ideal, log_snr, x_t, predictions.target(prediction, process, x0, eps, log_snr)


@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
@pytest.mark.parametrize("process", noise.PROCESSES)
def test_the_ideal_denoiser_reaches_the_smallest_possible_loss(process, prediction):
    ideal, log_snr, x_t, target = world(process, prediction)
    loss = losses.mse(ideal(x_t, log_snr, {}), target).reshape(len(LEVELS), DRAWS).mean(1)
    torch.testing.assert_close(loss, ideal.loss(LEVELS).mean((1, 2, 3)), rtol=0.02, atol=0)


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
@pytest.mark.parametrize("process", noise.PROCESSES)
def test_the_ideal_denoiser_minimises_each_loss(name, process, prediction):
    """No other offset or slope does better, at any level: the losses are convex in both, so the four sides suffice."""
    ideal, log_snr, x_t, target = world(process, prediction)
    best = ideal(x_t, log_snr, {})
    spread = (best - target).std()

    def loss(pred):
        return losses.LOSSES[name](pred, target).reshape(len(LEVELS), DRAWS).mean(1)

    for change in (0.1 * spread, -0.1 * spread, 0.1 * (best - best.mean(0)), -0.1 * (best - best.mean(0))):
        assert (loss(best + change) > loss(best) * (1 - 1e-3)).all()
        assert loss(best + change).sum() > loss(best).sum()


@pytest.mark.parametrize("name", weightings.WEIGHTINGS)
def test_a_weighting_does_not_move_the_minimum(name):
    ideal, log_snr, x_t, target = world("flow", "flow")
    pred = ideal(x_t, log_snr, {}).requires_grad_()
    weights = weightings.WEIGHTINGS[name](log_snr, "flow", "flow")
    (weights * losses.mse(pred, target)).mean().backward()
    per_level = pred.grad.reshape(len(LEVELS), DRAWS, -1)
    uncertainty = per_level.std(1) / DRAWS**0.5
    assert (per_level.mean(1).abs() < 4 * uncertainty).all()

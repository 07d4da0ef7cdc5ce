"""Prior preservation in the loop: the gradient is style + weight * prior, and the base's own answer is no change."""

import dataclasses

import pytest
import torch

from stylewright.training.adapters.attach import attached
from stylewright.training.data.dataset import Dataset
from stylewright.training.densities import stratified_uniform
from stylewright.training.density_presets import build_density
from stylewright.training.loops import train as loop
from stylewright.training.losses import mse
from stylewright.training.noise import add_noise, gaussian
from stylewright.training.predictions import target
from stylewright.training.randomness import generator


@pytest.fixture
def with_priors(make_dataset):
    """Two pictures of a style, and two for prior preservation."""

    def make(role="pictures", weight=1.0, share=0.5, **changes):
        *style, third, fourth = make_dataset(4).examples
        priors = [dataclasses.replace(each, role=role, weight=weight, **changes) for each in (third, fourth)]
        return Dataset([*style, *priors], {"context": torch.zeros(1, 5)}, 0.0, share)

    return make


@pytest.fixture
def gradients(monkeypatch, denoiser, make_config):
    """The gradients of each step of a run."""

    def of(dataset, **changes):
        seen = []

        def note(parameters, limit):
            seen.append([parameter.grad.clone() for parameter in parameters])
            return torch.tensor(0.0)

        monkeypatch.setattr(loop, "clip_grad_norm_", note)
        result = loop.train(denoiser, dataset, make_config(**{"steps": 1, **changes}), run_dir=None)
        return seen, result

    return of


def by_hand(denoiser, dataset, config, micro):
    """The gradient of the plain mean loss of one pass at the first step."""
    batch = dataset.batch(config.seed, 0, micro, config.batch_size, config.accumulation)
    u = stratified_uniform(config.samples_a_step, generator(config.seed, "log_snr", 0)).split(config.batch_size)[micro]
    log_snr = build_density(config.density, denoiser.log_snr_range, 12).icdf(u)
    places = range(micro * config.batch_size, (micro + 1) * config.batch_size)
    shape = (1, *batch.latents.shape[1:])
    eps = torch.cat([gaussian(shape, generator(config.seed, "noise", 0, place)) for place in places])
    with attached(denoiser.module, config.adapter, family="toy", seed=config.seed) as adapter:
        x_t = add_noise(denoiser.process, batch.latents, eps, log_snr)
        wanted = target(denoiser.prediction, denoiser.process, batch.latents, eps, log_snr)
        mse(denoiser(x_t, log_snr, batch.conditioning), wanted).mean().backward()
        return [parameter.grad for parameter in adapter.parameters()]


@pytest.mark.parametrize("weight", [1.0, 0.3, 4.0])
def test_the_gradient_is_that_of_the_style_plus_weight_times_that_of_the_prior(
    weight, with_priors, gradients, denoiser, make_config
):
    dataset, config = with_priors(weight=weight), make_config(steps=1)
    (found,), _ = gradients(dataset)
    micros = {dataset.batch(config.seed, 0, micro, 2, 2).captions[0][8] >= "2": micro for micro in (0, 1)}
    style, prior = (by_hand(denoiser, dataset, config, micros[which]) for which in (False, True))
    for together, one, other in zip(found, style, prior, strict=True):
        torch.testing.assert_close(together, one + weight * other)


def test_the_share_changes_the_work_and_not_the_objective(with_priors, gradients):
    """With weights that undo the shares, the mean loss of a cycle is style + weight * prior whatever the share."""
    wide = {"batch_size": 50, "learning_rate": 1e-9, "steps": 2}
    _, half = gradients(with_priors(share=0.5, weight=2.0), accumulation=2, **wide)
    _, quarter = gradients(with_priors(share=0.25, weight=2.0), accumulation=4, **wide)
    assert sum(half.losses) / 2 == pytest.approx(sum(quarter.losses) / 2, rel=0.1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_base_s_answer_is_reached_at_the_start_and_asks_for_nothing(precision, with_priors, gradients):
    (one,), first = gradients(with_priors("base", weight=1.0), precision=precision)
    (other,), second = gradients(with_priors("base", weight=1000.0), precision=precision)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert first.losses == second.losses
    (pictures,), third = gradients(with_priors("pictures", weight=1000.0), precision=precision)
    assert third.losses[0] > 100 * first.losses[0]
    assert not all(torch.equal(a, b) for a, b in zip(one, pictures, strict=True))


def test_the_base_is_preserved_where_it_is_asked_for(with_priors, denoiser, make_config):
    def drift(weight):
        dataset = with_priors("base", weight=weight)
        config = make_config(steps=30, learning_rate=3e-2, save_every=0)
        result = loop.train(denoiser, dataset, config, run_dir=None)
        x_t = torch.randn(64, 4, 6, 8, generator=generator(0, "test"))
        levels = torch.linspace(-6, 2, 64)
        kept = {"context": dataset.examples[2].conditioning["context"].expand(64, -1)}
        with torch.no_grad():
            before = denoiser(x_t, levels, kept)
            with attached(denoiser.module, config.adapter, family="toy", seed=0) as adapter:
                adapter.load_state_dict(result.adapter_state)
                return float((denoiser(x_t, levels, kept) - before).square().mean())

    assert drift(30.0) < 0.5 * drift(1e-3)


@pytest.mark.parametrize("role", ["pictures", "base"])
def test_a_continued_run_equals_a_straight_one(role, with_priors, run_to):
    data = with_priors(role, 0.7, 0.25)

    def stop(event):
        if event.step >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_to("parts", data=data, report=stop)
    continued, _ = run_to("parts", data=data)
    straight, _ = run_to("whole", data=data)
    assert continued.losses == straight.losses
    assert all(torch.equal(continued.adapter_state[k], tensor) for k, tensor in straight.adapter_state.items())


def test_a_run_with_other_weights_is_another_run(with_priors, run_to):
    from stylewright.training.errors import IncompatibleCheckpoint

    run_to("run", data=with_priors(weight=1.0))
    for other in (with_priors(weight=2.0), with_priors("base")):
        with pytest.raises(IncompatibleCheckpoint, match="the pictures, captions or masks are others"):
            run_to("run", data=other)

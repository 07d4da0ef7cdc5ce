"""The training loop: what it minimises, that it leaves no trace, and that stopping it changes nothing."""

import copy
import random
from dataclasses import replace

import pytest
import torch

from stylewright.training.adapters.attach import attached
from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.data.dataset import Dataset
from stylewright.training.densities import stratified_uniform
from stylewright.training.density_presets import build_density
from stylewright.training.errors import IncompatibleCheckpoint, NonFiniteLoss
from stylewright.training.formats.contents import read_adapter
from stylewright.training.formats.metadata import read_metadata
from stylewright.training.formats.starting import Start
from stylewright.training.formats.state import load_state
from stylewright.training.loops import checkpoint
from stylewright.training.loops.checkpoint import RunDirectory
from stylewright.training.loops.events import read_events
from stylewright.training.loops.train import train
from stylewright.training.randomness import generator


class Stop(BaseException):
    """Like ComfyUI's interrupt and like Ctrl-C: no Exception."""


def stop_at(step):
    def report(event):
        if event.step >= step:
            raise Stop

    return report


def learner_of(folder):
    return load_state(folder / "checkpoint.safetensors")["learner"]


def assert_same(left, right):
    """Equal trees, tensors bit for bit; wall time is no state."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left.keys() - {"seconds"}:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


def assert_same_run(one, other):
    (result, folder), (again, folder_again) = one, other
    assert_same(result.adapter_state, again.adapter_state)
    assert result.losses == again.losses
    assert_same(learner_of(folder), learner_of(folder_again))


# --------------------------------------------------------------------------------------------------------------------
# What is minimised


@pytest.mark.parametrize(
    "optimizer", [{}, {"optimizer": "prodigy", "learning_rate": 1.0}, {"optimizer": "schedule-free"}]
)
def test_the_loss_falls(run_to, optimizer):
    result, _ = run_to("run", steps=80, report_every=80, save_every=0, clip_norm=0.0, **optimizer)
    assert len(result.losses) == 80
    assert sum(result.losses[-10:]) < 0.75 * sum(result.losses[:10])


def test_the_loss_is_the_papers_formula(denoiser, dataset, make_config):
    """|| (eps - x0) - v(x_t, t) ||^2 with t = sigmoid(-log_snr / 2), over the draws that the seed gives.

    At a learning rate that moves nothing, so that the model stays the base model.
    """
    config = make_config(steps=2, learning_rate=1e-30)
    law = build_density(config.density, denoiser.log_snr_range, tokens=12)
    expected = []
    for step in range(2):
        t = torch.sigmoid(-law.icdf(stratified_uniform(4, generator(config.seed, "log_snr", step))) / 2)
        losses = []
        for place in range(4):
            batch = dataset.batch(config.seed, step, place // 2, 2, 2)
            x0, row = batch.latents[place % 2], slice(place % 2, place % 2 + 1)
            eps = torch.randn(1, *x0.shape, generator=generator(config.seed, "noise", step, place))[0]
            x_t = (1 - t[place]) * x0 + t[place] * eps
            velocity = denoiser.module(x_t[None], t[place : place + 1], batch.conditioning["context"][row])[0]
            losses.append((eps - x0 - velocity).square().mean().item())
        expected.append(sum(losses) / 4)
    result = train(denoiser, dataset, config, run_dir=None)
    assert result.losses == pytest.approx(expected, rel=1e-5)
    bins = [b for event in result.history for b in event.loss_by_bin]
    assert sum(b.loss * b.samples for b in bins) / 8 == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_accumulation_equals_one_large_batch(denoiser, dataset, make_config):
    """The same samples, noise and noise levels, so that the sums of the gradients agree to rounding."""
    at_once = train(denoiser, dataset, make_config(steps=3, batch_size=4, accumulation=1), run_dir=None)
    one_by_one = train(denoiser, dataset, make_config(steps=3, batch_size=1, accumulation=4), run_dir=None)
    assert at_once.losses == pytest.approx(one_by_one.losses, rel=1e-5)
    for name, tensor in at_once.adapter_state.items():
        torch.testing.assert_close(tensor, one_by_one.adapter_state[name], rtol=1e-3, atol=1e-5)


def test_a_step_has_one_noise_level_in_each_stratum(denoiser, dataset, make_config):
    seen = []

    class Watched(type(denoiser)):
        def __call__(self, x_t, log_snr, conditioning):
            seen.append(log_snr)
            return super().__call__(x_t, log_snr, conditioning)

    config = make_config(steps=2, batch_size=2, accumulation=4)
    train(Watched(), dataset, config, run_dir=None)
    law = build_density(config.density, denoiser.log_snr_range, tokens=12)
    for step in (seen[:4], seen[4:]):
        strata = (law.cdf(torch.cat(step)) * 8).floor()
        assert sorted(strata.tolist()) == list(range(8))


def test_only_what_the_mask_shows_is_learned(denoiser, make_dataset, make_config):
    """What lies outside the mask may be anything: this network sees each position by itself."""
    dataset = make_dataset(masked=True)
    spoilt = [copy.copy(example) for example in dataset.examples]
    for example in spoilt:
        object.__setattr__(example, "latent", example.latent + 50 * (1 - example.mask))
    whole = train(denoiser, dataset, make_config(steps=3), run_dir=None)
    other = train(denoiser, Dataset(spoilt, dataset.null), make_config(steps=3), run_dir=None)
    assert whole.losses == other.losses
    assert_same(whole.adapter_state, other.adapter_state)


def test_options_reach_the_step(denoiser, dataset, make_config):
    plain = train(denoiser, dataset, make_config(steps=2), run_dir=None)
    for changes in (
        {"seed": 1},
        {"loss": "huber"},
        {"weighting": "min-snr-5"},
        {"offset_noise": 0.3},
        {"precision": "bfloat16"},
        {"adapter": AdapterConfig(rank=2, dropout=0.5)},
    ):
        other = train(denoiser, dataset, make_config(steps=2, **changes), run_dir=None)
        assert other.losses != plain.losses, changes
        assert {tensor.dtype for tensor in other.adapter_state.values()} == {torch.float32}


def test_gradient_checkpointing_changes_nothing(denoiser, dataset, make_config):
    plain = train(denoiser, dataset, make_config(steps=3), run_dir=None)
    small = train(denoiser, dataset, make_config(steps=3, gradient_checkpointing=True), run_dir=None)
    assert_same(plain.adapter_state, small.adapter_state)


def test_more_conditioning_reaches_every_sample(denoiser, dataset, make_config):
    seen = []

    class Guided(type(denoiser)):
        def __call__(self, x_t, log_snr, conditioning):
            seen.append(conditioning["guidance"])
            return super().__call__(x_t, log_snr, conditioning)

    train(Guided(), dataset, make_config(steps=1), run_dir=None, conditioning={"guidance": torch.tensor([1.5])})
    assert [guidance.tolist() for guidance in seen] == [[1.5, 1.5]] * 2


# --------------------------------------------------------------------------------------------------------------------
# No trace


def test_the_model_and_the_global_generators_are_left_as_they_were(denoiser, dataset, make_config):
    before = copy.deepcopy(denoiser.module.state_dict())
    names = [name for name, _ in denoiser.module.named_modules()]
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    config = make_config(adapter=AdapterConfig(rank=2, dropout=0.1))
    result = train(denoiser, dataset, config, run_dir=None)
    assert any(bool(tensor.any()) for name, tensor in result.adapter_state.items() if "lora_B" in name)
    assert_same(dict(before), dict(denoiser.module.state_dict()))
    assert [name for name, _ in denoiser.module.named_modules()] == names
    assert all(p.grad is None and not p.requires_grad for p in denoiser.module.parameters())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


def test_the_result_is_what_the_model_answers_with(denoiser, dataset, make_config):
    """The adapter's state, put on a fresh model, gives the loss that training ended with."""
    config = make_config(steps=5)
    result = train(denoiser, dataset, config, run_dir=None)
    x_t, log_snr = torch.randn(2, 4, 6, 8), torch.tensor([-3.0, 1.0])
    context = {"context": torch.randn(2, 5)}
    base = denoiser(x_t, log_snr, context)
    with attached(denoiser.module, config.adapter, family="toy", seed=9) as adapter:
        adapter.load_state_dict(result.adapter_state)
        assert not torch.equal(denoiser(x_t, log_snr, context), base)
    assert torch.equal(denoiser(x_t, log_snr, context), base)


# --------------------------------------------------------------------------------------------------------------------
# Stopping changes nothing

KINDS = {
    "adam": {},
    "average": {"ema_decay": 0.9, "warm_up": 2},
    "cosine": {"optimizer": "adamw", "scheduler": "cosine", "weight_decay": 0.1},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "schedule-free": {"optimizer": "schedule-free", "warm_up": 3},
    "dropout": {"adapter": AdapterConfig(method="dora", rank=2, dropout=0.2), "precision": "bfloat16"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_continued_run_equals_a_straight_one(run_to, kind):
    """Stopped twice, once between checkpoints: adapter, average, optimiser and schedule agree bit for bit."""
    straight = run_to("straight", **KINDS[kind])
    for step in (2, 6):
        with pytest.raises(Stop):
            run_to("stopped", report=stop_at(step), **KINDS[kind])
    assert learner_of(straight[1].parent / "stopped")["step"] == 6
    again = run_to("stopped", **KINDS[kind])
    assert_same_run(straight, again)
    assert [e.step for e in again[0].history] == sorted({e.step for e in again[0].history})
    assert again[0].history[-1].step == 8


@pytest.mark.parametrize("kind", ["adam", "prodigy", "schedule-free"])
def test_two_runs_of_half_the_steps_equal_one(run_to, kind):
    straight = run_to("straight", **KINDS[kind])
    run_to("halves", steps=4, **KINDS[kind])
    assert_same_run(straight, run_to("halves", steps=8, **KINDS[kind]))


def test_a_finished_run_returns_at_once(run_to, dataset):
    first = run_to("run")
    written = (first[1] / "checkpoint.safetensors").stat().st_mtime_ns
    again = run_to("run", report=stop_at(0))
    assert_same_run(first, again)
    assert again[0].history == first[0].history
    assert (first[1] / "checkpoint.safetensors").stat().st_mtime_ns == written


def test_reports_samples_and_saves_do_not_change_what_is_learned(run_to):
    for kind in ("average", "schedule-free"):
        quiet = run_to(f"quiet-{kind}", save_every=0, report_every=1000, **KINDS[kind])
        seen = []
        chatty = run_to(
            f"chatty-{kind}",
            save_every=1,
            report_every=1,
            sample_every=2,
            report=seen.append,
            sample=lambda step: torch.zeros(1, 3, 4, 6),
            **KINDS[kind],
        )
        assert_same_run(quiet, chatty)
        assert [event.step for event in seen] == list(range(1, 9))


def test_a_failure_to_save_does_not_hide_what_was_raised(run_to, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    def report(event):
        monkeypatch.setattr(checkpoint, "save_state", full)
        raise Stop

    with pytest.raises(Stop):
        run_to("run", report=report)
    assert "The checkpoint of step 0 is the last one of this run" in caplog.text


@pytest.mark.parametrize("micro", [0, 1])
def test_what_the_model_raises_stops_after_the_last_complete_step(run_to, denoiser, micro, tmp_path):
    straight = run_to("straight")
    calls = []

    class Breaking(type(denoiser)):
        def __call__(self, x_t, log_snr, conditioning):
            calls.append(None)
            if len(calls) == 2 * 5 + micro + 1:
                raise Stop
            return super().__call__(x_t, log_snr, conditioning)

    with pytest.raises(Stop):
        run_to("stopped", on=Breaking())
    assert learner_of(tmp_path / "stopped")["step"] == 5
    assert (tmp_path / "stopped" / "adapter.safetensors").exists()
    assert read_events(tmp_path / "stopped" / "events.jsonl")[-1].step == 5
    assert_same_run(straight, run_to("stopped"))


def test_every_batch_is_a_moment_to_stop(denoiser, dataset, make_config, tmp_path):
    """Within an optimizer step too: what is saved is the step before."""
    calls = []

    def check():
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt

    config = make_config(steps=4, accumulation=4)
    with pytest.raises(KeyboardInterrupt):
        train(denoiser, dataset, config, run_dir=tmp_path / "run", check=check)
    assert RunDirectory(tmp_path / "run").stored().step == 1
    straight = train(denoiser, dataset, config, run_dir=None)
    assert train(denoiser, dataset, config, run_dir=tmp_path / "run").losses == straight.losses


def test_pictures_that_an_interrupt_came_before_are_drawn_when_the_run_goes_on(run_to, tmp_path):
    drawn = []

    def stopped(step):
        raise KeyboardInterrupt

    def sample(step):
        drawn.append(step)
        return torch.zeros(1, 3, 8, 8)

    sampled = {"sample_prompts": ("a cat",), "sample_every": 3}
    with pytest.raises(KeyboardInterrupt):
        run_to("run", sample=stopped, **sampled)
    run_to("run", sample=sample, **sampled)
    assert drawn == [3, 6, 8]
    run_to("run", sample=sample, **sampled)
    assert drawn == [3, 6, 8]


def test_a_torn_update_is_not_saved(run_to, monkeypatch, tmp_path):
    """Ctrl-C in the middle of an optimizer step: the weights are new and the averages old."""
    straight = run_to("straight")
    step, calls = torch.optim.Adam.step, []

    def interrupted(self, *args):
        result = step(self, *args)
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.Adam, "step", interrupted)
        run_to("torn")
    assert learner_of(tmp_path / "torn")["step"] == 3  # save_every
    assert_same_run(straight, run_to("torn"))


# --------------------------------------------------------------------------------------------------------------------
# Losses that are not finite


def spoiling(dataset, at):
    """The same data, except that the second batch of step ``at`` has a NaN."""

    class Spoilt(Dataset):
        def batch(self, seed, step, micro, *rest):
            batch = super().batch(seed, step, micro, *rest)
            if (step, micro) == (at, 1):
                batch.latents[0, 0, 0, 0] = float("nan")
            return batch

    return Spoilt(dataset.examples, dataset.null)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_state_before(run_to, dataset, tmp_path):
    straight = run_to("straight")
    with pytest.raises(NonFiniteLoss) as error:
        run_to("bad", data=spoiling(dataset, at=4))
    assert all(word in str(error.value) for word in ("step 5", "in dotted style", "log_snr", "nan"))
    assert learner_of(tmp_path / "bad")["step"] == 4
    assert_same_run(straight, run_to("bad"))


def test_seen_late_as_on_a_gpu_the_last_checkpoint_is_kept(run_to, dataset, tmp_path, monkeypatch):
    straight = run_to("straight")
    with monkeypatch.context() as patch, pytest.raises(NonFiniteLoss, match="step 5"):
        patch.setattr("stylewright.training.loops.meter.Meter.check", lambda self, step: None)
        run_to("bad", data=spoiling(dataset, at=4))
    assert learner_of(tmp_path / "bad")["step"] == 3
    assert all(event.step <= 4 for event in read_events(tmp_path / "bad" / "events.jsonl"))
    assert_same_run(straight, run_to("bad"))


# --------------------------------------------------------------------------------------------------------------------
# Averages and reports


def test_the_average_is_what_is_saved(denoiser, dataset, make_config):
    """Against the weights of every step, averaged here."""

    def after(steps, **changes):
        return train(denoiser, dataset, make_config(steps=steps, **changes), run_dir=None).adapter_state

    states = [after(steps) for steps in range(1, 5)]
    average = after(1, learning_rate=1e-30)  # the weights before the first step
    for n, state in enumerate(states, start=1):
        decay = min(0.3, (1 + n) / (10 + n))
        average = {name: decay * average[name] + (1 - decay) * tensor for name, tensor in state.items()}
    for name, tensor in after(4, ema_decay=0.3).items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(tensor, states[-1][name])


def test_reports_say_where_the_run_is(run_to):
    seen = []
    result, folder = run_to("run", report=seen.append)
    assert {2, 3, 4, 6, 8} <= {event.step for event in seen}
    assert all(event.steps == 8 and event.samples == 4 * event.step for event in seen)
    assert all(b.low <= -2 for event in seen for b in event.loss_by_bin[:1])
    assert [event.seconds for event in seen] == sorted(event.seconds for event in seen)
    assert {event.learning_rate for event in seen} == {1e-2}
    assert read_events(folder / "events.jsonl") == result.history
    by_event = sum(b.loss * b.samples for event in seen for b in event.loss_by_bin)
    assert by_event == pytest.approx(4 * sum(result.losses), rel=1e-5)


def test_samples_are_reported_and_written_as_pictures(run_to):
    from PIL import Image

    steps, seen = [], []

    def sample(step):
        steps.append(step)
        assert not torch.is_grad_enabled()
        return torch.stack([torch.zeros(3, 4, 6), torch.ones(3, 4, 6)])

    _, folder = run_to("run", sample=sample, sample_every=5, report=seen.append)
    assert steps == [5, 8]  # and at the end
    assert [event.step for event in seen if event.images is not None] == [5, 8]
    names = sorted(path.name for path in (folder / "samples").iterdir())
    assert names == [f"step-00000{step}-{index}.png" for step in steps for index in range(2)]
    with Image.open(folder / "samples" / "step-000008-1.png") as picture:
        assert picture.size == (6, 4)
        assert picture.getextrema() == ((255, 255),) * 3


def test_the_law_is_in_the_log(denoiser, dataset, make_config, caplog):
    caplog.set_level("INFO")
    train(denoiser, dataset, make_config(steps=1), run_dir=None)
    assert "noise levels: " in caplog.text and "; at 12 tokens, mean time" in caplog.text
    assert "normal mu=-2 sigma=2" in caplog.text


def test_a_weighting_without_effect_is_refused_before_work(denoiser, dataset, make_config, tmp_path):
    denoiser.prediction = "x0"
    with pytest.raises(ValueError, match="no effect"):
        train(denoiser, dataset, make_config(weighting="x0"), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
def test_on_a_gpu(denoiser, dataset, make_config, tmp_path):
    """The draws are the CPU's, a continued run equals a straight one, and a bad loss leaves the last checkpoint."""
    denoiser.module.cuda()
    on_cpu = train(type(denoiser)(), dataset, make_config(), run_dir=None)
    straight = train(denoiser, dataset, make_config(), run_dir=tmp_path / "straight", device="cuda")
    assert straight.losses == pytest.approx(on_cpu.losses, rel=1e-2)
    with pytest.raises(NonFiniteLoss, match="step 5"):
        train(denoiser, spoiling(dataset, at=4), make_config(), run_dir=tmp_path / "bad", device="cuda")
    assert learner_of(tmp_path / "bad")["step"] == 3
    again = train(denoiser, dataset, make_config(), run_dir=tmp_path / "bad", device="cuda")
    assert_same_run((straight, tmp_path / "straight"), (again, tmp_path / "bad"))


def test_a_run_begins_with_another_adapter_and_continues_with_the_same_one_only(
    denoiser, dataset, make_config, tmp_path
):
    config = make_config(steps=2)
    learned = train(denoiser, dataset, config, run_dir=None).adapter_state
    names = tuple(dict.fromkeys(name.partition(".lora_")[0] for name in learned))
    start = Start("first", learned, names, "begins with first")
    still = replace(config, steps=1, learning_rate=1e-30)
    assert_same(train(denoiser, dataset, still, run_dir=tmp_path / "still", start=start).adapter_state, learned)
    run = tmp_path / "run"
    train(denoiser, dataset, config, run_dir=run, start=start)
    further = replace(config, steps=4)
    straight = train(denoiser, dataset, further, run_dir=None, start=start)
    assert_same(train(denoiser, dataset, further, run_dir=run, start=start).adapter_state, straight.adapter_state)
    with pytest.raises(IncompatibleCheckpoint, match="to begin with is given no more"):
        train(denoiser, dataset, further, run_dir=run)
    assert read_metadata(read_adapter(run / "adapter.safetensors").header, "it").started_from == "first"

"""The loop of distillation on a network of a thousand weights."""

import json

import pytest
import torch
from safetensors import safe_open

from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.clocks import FlowClock
from stylewright.training.data.prompts import Prompts
from stylewright.training.errors import IncompatibleCheckpoint, NonFiniteLoss
from stylewright.training.formats.adapters import load_adapter
from stylewright.training.formats.contents import read_about
from stylewright.training.formats.metadata import read_metadata
from stylewright.training.formats.starting import Start
from stylewright.training.formats.state import load_state, save_state
from stylewright.training.loops.distil import distil
from stylewright.training.loops.distil_config import DistilConfig
from stylewright.training.randomness import generator

from .conftest import CHANNELS, CONTEXT, HEIGHT, WIDTH, ToyDenoiser

PROMPTS = Prompts(("{circle|star} in {red|blue} style", "a tree"))


class Timed(ToyDenoiser):
    clock = FlowClock()

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __call__(self, x_t, log_snr, conditioning):
        self.calls.append((log_snr, conditioning["context"]))
        return super().__call__(x_t, log_snr, conditioning)


def encode(prompts):
    rows = [
        torch.randn(1, CONTEXT, generator=generator(0, prompt)) if prompt else torch.zeros(1, CONTEXT)
        for prompt in prompts
    ]
    return {"context": torch.cat(rows)}


def config_of(**changes):
    defaults = {
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "fake_learning_rate": 2e-2,
        "ema_decay": 0.9,
        "save_every": 2,
        "report_every": 1,
        "adapter": AdapterConfig(rank=2, targets="all"),
        "fake_rank": 3,
        "fake_alpha": 6.0,
    }
    return DistilConfig(**{**defaults, **changes})


MORE = ("start", "worn", "likeness")  # of the loop's arguments


def run(folder=None, *, on=None, report=None, check=None, sample=None, prompts=PROMPTS, **changes):
    more = {name: changes.pop(name) for name in MORE if name in changes}
    return distil(
        on or Timed(),
        prompts,
        encode,
        config_of(**changes),
        latent_size=(CHANNELS, HEIGHT, WIDTH),
        run_dir=folder,
        report=report,
        check=check,
        sample=sample,
        **more,
    )


@pytest.mark.parametrize("convention", ["pg-sb", "dmd"])
def test_it_begins_with_no_gradient_and_leaves_the_model_as_it_was(convention):
    model = Timed()
    before = {name: (value, value.clone()) for name, value in model.module.state_dict(keep_vars=True).items()}
    guidance = {"guidance_low": 1.0, "guidance_high": 1.0} if convention == "dmd" else {}
    history = run(on=model, convention=convention, **guidance).history
    assert history[0].loss == 0 and history[0].others["apart"] == 0  # the fake is the teacher, whatever the scale
    assert all(event.others["apart"] > 0 for event in history[1:])
    after = model.module.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for name, (tensor, value) in before.items():
        assert after[name] is tensor and torch.equal(tensor, value) and not tensor.requires_grad


def test_dmds_convention_guides_the_teacher_alone():
    assert run(convention="dmd", guidance_low=3.0, guidance_high=3.0).history[0].others["apart"] > 0


@pytest.mark.parametrize("method", ["lora", "dora", "loha"])
def test_stopped_and_continued_is_the_run_that_never_stopped(method, tmp_path):
    options = {"adapter": AdapterConfig(method=method, rank=2, targets="all")}
    whole = run(tmp_path / "whole", **options)

    def stop(event):
        if event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", report=stop, **options)
    again = run(tmp_path / "parts", **options)
    assert again.steps_done == 6 and len(again.history) == len(whole.history)
    for name, tensor in whole.adapter_state.items():
        assert torch.equal(again.adapter_state[name], tensor)
    assert [event.loss for event in again.history] == [event.loss for event in whole.history]


def test_the_students_file_says_how_it_is_called(tmp_path):
    result = run(tmp_path, time=0.4)
    with safe_open(result.path, framework="pt") as file:
        about = read_metadata(file.metadata(), "it")
    assert about.one_step == {"level": pytest.approx(0.4), "unit": "sigma", "start": "unit", "prediction": "flow"}
    assert about.steps == 6 and about.training["guidance_high"] == 4.0
    loaded = load_adapter(result.path)
    assert loaded.rank == 2 and loaded.state.keys() == result.adapter_state.keys()


def test_the_student_is_called_at_its_time_and_its_pictures_judged_within_the_range():
    model = Timed()
    run(on=model, steps=30, time=0.4, lowest_time=0.5, highest_time=0.6, fake_updates=2)
    times = [torch.sigmoid(-log_snr / 2) for log_snr, _ in model.calls]
    students, teachers, fakes, lessons = (times[part::5] for part in range(4))
    assert all(torch.allclose(time, torch.tensor(0.4)) for time in students)
    for teacher, fake in zip(teachers, fakes, strict=True):
        assert torch.equal(teacher, fake) and teacher.min() >= 0.5 and teacher.max() <= 0.6
    assert torch.cat(lessons).min() < 0.1 and torch.cat(lessons).max() > 0.9


def empty_share(model):
    lessons = torch.cat([context for _, context in model.calls[3::4]])
    return (lessons == 0).all(1).float().mean().item()


def test_a_tenth_of_the_fakes_lessons_has_no_prompt_and_none_where_it_is_not_guided():
    model = Timed()
    run(on=model, steps=250)
    assert empty_share(model) == pytest.approx(0.1, abs=0.04)  # 1000 draws: four deviations
    model = Timed()
    run(on=model, steps=20, convention="dmd", null_share=0.5)
    assert empty_share(model) == 0


def test_negative_prompts_reach_the_teacher_and_the_student_and_never_the_fake(monkeypatch):
    from stylewright.training.loops import score_passes

    told = []
    monkeypatch.setattr(
        score_passes, "NegativeDenoiser", lambda denoiser, guidance, away: told.append((guidance, away)) or denoiser
    )
    model, ugly = Timed(), encode(["ugly"])["context"]
    run(on=model, steps=20, negative_prompts=("ugly",), nasa_high=0.5)
    students, teachers, fakes, lessons = ([c for _, c in model.calls[part::4]] for part in range(4))
    assert all(torch.equal(context[:4], ugly.expand(4, -1)) for context in teachers)
    assert all(not context[:4].any() for context in fakes)
    assert not any((context == ugly).all(1).any() for context in (*students, *lessons))
    scales = [guidance.scale for guidance, _ in told]
    assert len(scales) == 20 and max(scales) <= 0.5 and len(set(scales)) == 20
    assert all(torch.equal(away["context"], ugly.expand(4, -1)) for _, away in told)


def test_a_student_to_begin_with_is_where_the_run_begins(tmp_path):
    learned = run(ema_decay=0.0).adapter_state
    layers = tuple(name.removesuffix(".lora_A.weight") for name in learned if name.endswith("lora_A.weight"))
    start = Start("first", learned, layers, "begins with first")
    after = run(tmp_path, start=start, steps=1, learning_rate=1e-9, ema_decay=0.0)
    assert all(torch.allclose(after.adapter_state[name], tensor, atol=1e-7) for name, tensor in learned.items())
    assert read_about(after.path).started_from == "first"
    early = Start("early", learned, layers, "", {"level": 0.4, "unit": "sigma", "prediction": "flow", "start": "unit"})
    with pytest.raises(ValueError, match=r"level is 0\.4"):
        run(start=early)
    with pytest.raises(IncompatibleCheckpoint, match="an adapter or model to begin with is given"):
        run(tmp_path, steps=1, learning_rate=1e-9, ema_decay=0.0)


def test_what_is_drawn_does_not_depend_on_interruptions_nor_on_global_generators(tmp_path):
    torch.manual_seed(1)
    first = run()
    torch.manual_seed(2)
    second = run()
    assert all(torch.equal(first.adapter_state[name], tensor) for name, tensor in second.adapter_state.items())


def test_pictures_are_drawn_by_the_averaged_student(tmp_path):
    model, drawn = Timed(), []

    def sample(step):
        drawn.append(model(torch.ones(1, CHANNELS, HEIGHT, WIDTH), torch.zeros(1), encode(["a tree"])))

    run(on=model, steps=4, sample_every=2, sample=sample)
    assert len(drawn) == 2 and not torch.equal(*drawn)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_was_learned(tmp_path):
    model = Timed()

    def spoil(event):
        if event.step == 3:
            next(model.module.parameters()).data.fill_(float("nan"))

    with pytest.raises(NonFiniteLoss, match="step 4"):
        run(tmp_path, on=model, report=spoil)
    saved = load_adapter(tmp_path / "adapter.safetensors")
    assert saved.about.steps == 3 and all(tensor.isfinite().all() for tensor in saved.state.values())


def test_another_run_in_the_folder_is_named(tmp_path):
    run(tmp_path)
    with pytest.raises(IncompatibleCheckpoint, match=r"guidance_high was 4\.0 and is 3\.0"):
        run(tmp_path, guidance_high=3.0)
    with pytest.raises(IncompatibleCheckpoint, match="the prompts are others"):
        run(tmp_path, prompts=Prompts(("a house",)))


def test_a_newer_checkpoint_is_said_to_be_one_and_stays_as_it_is(tmp_path):
    run(tmp_path, steps=2)
    path = tmp_path / "checkpoint.safetensors"
    content = load_state(path)
    save_state(path, {**content, "config": {**content["config"], "of_tomorrow": 1}})
    before = path.read_bytes()
    with pytest.raises(IncompatibleCheckpoint, match=r"Unknown option of_tomorrow.*a newer Stylewright: update it"):
        run(tmp_path)
    assert path.read_bytes() == before


def test_events_tell_of_the_fake(tmp_path):
    run(tmp_path)
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert {"apart", "fake_loss", "fake_norm"} <= json.loads(lines[-1])["others"].keys()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"time": 1.5}, "time=1.5"),
        ({"time": 0.0}, "above 0"),
        ({"guidance_low": 5.0}, "guidance_low=5.0"),
        ({"lowest_time": 0.99}, "lowest_time=0.99"),
        ({"convention": "vsd"}, "pg-sb, dmd"),
        ({"null_share": 1.5}, "null_share"),
        ({"nasa_low": 2.0}, "nasa_low=2.0"),
        ({"fake_learning_rate": 0.0}, "fake_learning_rate"),
        ({"fake_rank": 0}, "fake_rank=0"),
        ({"negative_prompts": ("{blurry",)}, "brace"),
    ],
)
def test_options_that_mean_nothing_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        config_of(**changes)

"""Students that are more than an adapter on their teacher: with its style in their file, or with all weights."""

import pytest
import torch

from stylewright.training.adapters.attach import attached_together
from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.adapters.whole import trained_whole
from stylewright.training.data.prompts import Prompts
from stylewright.training.errors import IncompatibleCheckpoint
from stylewright.training.formats.adapters import LoadedAdapter, load_adapter
from stylewright.training.formats.contents import read_about
from stylewright.training.formats.starting import WholeStart
from stylewright.training.formats.whole import is_whole, load_whole
from stylewright.training.loops.networks import Worn, in_three_roles

from .conftest import CHANNELS, HEIGHT, WIDTH
from .test_distil import Timed, config_of, encode, run

RANK = 2
CONFIG = AdapterConfig(rank=RANK, alpha=4.0, targets="all")
X, LEVEL = torch.randn((3, CHANNELS, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(3)), torch.zeros(3)
TOLD = encode(["a tree"] * 3)


def style(method="lora", rank=RANK):
    """Random factors on every layer of the toy but its last."""
    with attached_together(Timed().module, {"style": CONFIG}, family="toy", seed=5) as adapters:
        state = {name: tensor for name, tensor in adapters["style"].state_dict().items() if "outer" not in name}
    source = torch.Generator().manual_seed(5)
    state = {name: 0.5 * torch.randn(tensor.shape, generator=source) for name, tensor in state.items()}
    names = tuple(name.removesuffix(".lora_A.weight") for name in state if name.endswith("lora_A.weight"))
    return Worn("ink.safetensors", LoadedAdapter(state, names, "native", "toy", method, rank, 4.0, None))


def run_full(folder=None, **changes):
    return run(folder, full=True, **{"learning_rate": 1e-2, **changes})


def with_its_weights(path):
    """The toy with what is in a student's file."""
    model = Timed()
    model.module.load_state_dict(load_whole(path))
    return model


def answers(model, state, config):
    with attached_together(model.module, {"it": config}, family="toy", seed=0) as adapters, torch.no_grad():
        adapters["it"].load_state_dict({**adapters["it"].state_dict(), **state})
        return model(X, LEVEL, TOLD)


def test_the_three_roles_begin_alike_and_are_the_network_with_the_style():
    model, worn = Timed(), style()
    wearing = answers(model, worn.loaded.state, CONFIG)
    plain = model(X, LEVEL, TOLD)
    roles = in_three_roles(model, config_of(), worn=worn, start=None, against=None, device=torch.device("cpu"))
    with roles as networks, torch.no_grad():
        for adapter in (networks.teacher, networks.student, networks.fake):
            with networks.acting_as(adapter):
                torch.testing.assert_close(model(X, LEVEL, TOLD), wearing)
        torch.testing.assert_close(model(X, LEVEL, TOLD), wearing)  # at rest it is the student
    assert (wearing - plain).abs().max() > 0.1 and torch.equal(model(X, LEVEL, TOLD), plain)


def test_it_begins_with_no_gradient_and_the_teacher_never_learns():
    worn = style()
    before = {name: tensor.clone() for name, tensor in worn.loaded.state.items()}
    history = run(worn=worn).history
    assert history[0].loss < 1e-10 and history[0].others["apart"] < 1e-6 < history[-1].others["apart"]
    assert all(torch.equal(worn.loaded.state[name], tensor) for name, tensor in before.items())


def test_the_file_on_the_plain_network_has_the_style_and_says_where_it_comes_from(tmp_path):
    worn = style()
    result = run(tmp_path, worn=worn, steps=1, learning_rate=1e-9, prompts=Prompts(("a tree",), style_phrase="ink"))
    loaded = load_adapter(result.path)
    assert loaded.about.style_phrase == "ink" and loaded.about.started_from == "ink.safetensors"
    made = answers(Timed(), loaded.state, AdapterConfig(rank=2, alpha=loaded.alpha, targets="all"))
    torch.testing.assert_close(made, answers(Timed(), worn.loaded.state, CONFIG), atol=1e-5, rtol=1e-5)


def test_one_step_pictures_come_nearer_to_what_the_styled_teacher_draws_than_to_the_plain_ones():
    """Without a prompt's influence a student of a deterministic toy goes to its teacher's data."""
    model, worn = Timed(), style()
    options = {"steps": 40, "guidance_low": 1.0, "guidance_high": 1.0, "save_every": 0, "learning_rate": 5e-3}
    styled, plain = (run(on=model, **more, **options).adapter_state for more in ({"worn": worn}, {}))
    target, other = (answers(model, state, CONFIG) for state in (worn.loaded.state, {}))
    config = config_of().adapter
    styled, plain = (answers(model, state, config) for state in (styled, plain))
    assert (styled - target).square().mean() < (styled - other).square().mean() / 2
    assert (plain - other).square().mean() < (plain - target).square().mean() / 2


def test_stopped_and_continued_is_the_run_that_never_stopped_and_another_style_another_run(tmp_path):
    whole = run(tmp_path / "whole", worn=style())

    def stop(event):
        if event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", report=stop, worn=style())
    again = run(tmp_path / "parts", worn=style())
    assert all(torch.equal(again.adapter_state[name], tensor) for name, tensor in whole.adapter_state.items())
    with pytest.raises(IncompatibleCheckpoint, match="an adapter of the teacher is given no more"):
        run(tmp_path / "parts")


def test_a_style_that_the_student_cannot_begin_with_is_named():
    with pytest.raises(ValueError, match=r"ink\.safetensors adapts layers that this run does not"):
        run(worn=style(), adapter=AdapterConfig(rank=2, targets=("outer",)))
    with pytest.raises(ValueError, match="is a dora adapter, and this run trains lora"):
        run(worn=style("dora"))


def test_all_weights_learn_and_the_model_is_afterwards_what_it_was():
    model = Timed()
    before = {name: (value, value.clone()) for name, value in model.module.state_dict(keep_vars=True).items()}
    result = run(on=model, full=True, learning_rate=1e-2)
    after = model.module.state_dict(keep_vars=True)
    assert after.keys() == before.keys() == result.adapter_state.keys()
    for name, (tensor, value) in before.items():
        assert after[name] is tensor and torch.equal(tensor, value) and not tensor.requires_grad and tensor.grad is None
        assert not torch.equal(result.adapter_state[name], value)


def test_a_whole_student_begins_with_no_gradient_and_only_it_learns_from_its_loss():
    history = run_full().history
    assert history[0].loss == 0 and history[0].others["apart"] == 0 < history[-1].others["apart"]


def test_its_file_has_every_weight_under_the_networks_names_and_says_how_it_is_called(tmp_path):
    result = run_full(tmp_path, time=0.4)
    assert result.path == tmp_path / "student.safetensors" and is_whole(result.path)
    about = read_about(result.path)
    assert about.method == "full" and about.one_step["level"] == pytest.approx(0.4) and about.steps == 6
    assert not (tmp_path / "adapter.safetensors").exists()
    state = load_whole(result.path)
    assert all(torch.equal(state[name], tensor) for name, tensor in result.adapter_state.items())


def test_a_file_has_the_types_that_the_network_has(tmp_path):
    model = Timed()
    model.module.inner.bfloat16()
    with pytest.raises(RuntimeError):  # such a mixture is no network, which only training makes one
        model(X, LEVEL, TOLD)
    with trained_whole(model.module) as (whole, frozen):
        assert {tensor.dtype for tensor in whole.parameters()} == {torch.float32}
        stored = whole.as_stored(whole.tensors)
    assert stored["inner.weight"].dtype == torch.bfloat16 and stored["outer.weight"].dtype == torch.float32
    assert model.module.inner.weight.dtype == torch.bfloat16 and frozen.inner.weight.dtype == torch.bfloat16


def test_a_whole_student_is_stopped_and_continued_exactly(tmp_path):
    whole = run_full(tmp_path / "whole")

    def stop(event):
        if event.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_full(tmp_path / "parts", report=stop)
    again = run_full(tmp_path / "parts")
    assert all(torch.equal(again.adapter_state[name], tensor) for name, tensor in whole.adapter_state.items())
    assert [event.loss for event in again.history] == [event.loss for event in whole.history]
    with pytest.raises(IncompatibleCheckpoint, match="full was True and is False"):
        run(tmp_path / "parts", learning_rate=1e-2)


def test_a_whole_student_of_a_styled_teacher_begins_with_the_style_in_its_weights(tmp_path):
    worn = style()
    result = run_full(tmp_path, worn=worn, steps=1, learning_rate=1e-9)
    made = with_its_weights(result.path)(X, LEVEL, TOLD)
    torch.testing.assert_close(made, answers(Timed(), worn.loaded.state, CONFIG), atol=1e-5, rtol=1e-5)
    assert run_full(worn=worn).history[0].loss < 1e-10


def test_a_whole_student_is_drawn_with_while_it_learns():
    model, drawn = Timed(), []

    def sample(step):
        drawn.append(model(X, LEVEL, TOLD))

    run(on=model, full=True, learning_rate=1e-2, steps=4, sample_every=2, sample=sample)
    assert len(drawn) == 2 and not torch.equal(*drawn) and not torch.equal(drawn[0], model(X, LEVEL, TOLD))


def another(shift):
    """A model of other weights."""
    model = Timed()
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter += shift
    return model


def test_a_whole_student_begins_with_another_models_weights(tmp_path):
    """The frozen networks stay the teacher's."""
    other, model = another(0.1).module.state_dict(), Timed()
    begun = WholeStart("other", other)
    config = config_of(full=True)
    with (
        in_three_roles(model, config, worn=None, start=begun, against=None, device=torch.device("cpu")) as networks,
        torch.no_grad(),
    ):
        with networks.acting_as(networks.student) as acting:
            found = acting(X, LEVEL, TOLD)
        with networks.acting_as(networks.teacher) as acting:
            assert torch.equal(acting(X, LEVEL, TOLD), Timed()(X, LEVEL, TOLD))
    assert torch.equal(found, another(0.1)(X, LEVEL, TOLD))
    assert torch.equal(model(X, LEVEL, TOLD), Timed()(X, LEVEL, TOLD))
    result = run_full(tmp_path, start=begun, steps=1, learning_rate=1e-12, ema_decay=0.0)
    assert all(torch.allclose(tensor, other[name]) for name, tensor in result.adapter_state.items())
    assert read_about(result.path).started_from == "other"
    with pytest.raises(IncompatibleCheckpoint, match="the adapter or model to begin with is another"):
        run_full(tmp_path, start=WholeStart("other", another(0.2).module.state_dict()), steps=2, ema_decay=0.0)


@pytest.mark.parametrize("full", [True, False])
def test_weights_that_no_student_can_begin_with_are_refused(full):
    """Of another architecture, and without weights of its own."""
    lacking = WholeStart(
        "other", {name: value for name, value in Timed().module.state_dict().items() if "bias" in name}
    )
    with pytest.raises(ValueError, match="other is no model of this one" if full else "all weights of other"):
        run(None, full=full, start=lacking)

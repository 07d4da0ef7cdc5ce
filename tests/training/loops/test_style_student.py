"""A teacher that wears a style: the student's file alone, on the plain network, then has it."""

import pytest
import torch

from stylewright.training.adapters.attach import attached_together
from stylewright.training.adapters.methods import AdapterConfig
from stylewright.training.data.prompts import Prompts
from stylewright.training.errors import IncompatibleCheckpoint
from stylewright.training.formats.adapters import LoadedAdapter, load_adapter
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
    with pytest.raises(IncompatibleCheckpoint, match="teacher"):
        run(tmp_path / "parts")


def test_a_style_that_the_student_cannot_begin_with_is_named():
    with pytest.raises(ValueError, match=r"ink\.safetensors adapts layers that this run does not"):
        run(worn=style(), adapter=AdapterConfig(rank=2, targets=("outer",)))
    with pytest.raises(ValueError, match="is a dora adapter, and this run trains lora"):
        run(worn=style("dora"))

"""What pages are told of a run: what is new, all of it on demand, and no more often than a person can look."""

from dataclasses import replace

import pytest

pytestmark = pytest.mark.comfy


@pytest.fixture
def sent(monkeypatch):
    """Messages as they leave, with a clock that only the test moves."""
    from stylewright.nodes.bridge import board

    class Clock(list):
        now = 100.0

    messages = Clock()
    monkeypatch.setattr(board, "send", lambda kind, content: messages.append(content))
    monkeypatch.setattr(board.time, "monotonic", lambda: messages.now)
    return messages


def event(step, loss=0.5, **changes):
    from stylewright.training.loops.events import Event, LossBin

    bins = (LossBin(-8.0, -6.0, loss, 3), LossBin(0.0, 2.0, 2 * loss, 1))
    plain = Event(
        step=step, steps=40, samples=4 * step, loss=loss, loss_by_bin=bins, learning_rate=1e-4, seconds=2.0 * step,
        peak_bytes=7,
    )  # fmt: skip
    return replace(plain, **changes)


def state(node="5", workflow="w"):
    from stylewright.nodes.bridge.board import RunState

    return RunState(node, workflow, 40)


def test_messages_carry_what_is_new_and_all_of_it_is_kept(sent):
    from stylewright.nodes.bridge.board import Board

    board, run = Board(), state()
    board.open(run)
    for step in (1, 2, 3, 4):
        run.add(event(step, loss=step / 10))
        board.show(run, at_once=step != 3)
    assert [message["points"] for message in sent] == [[], [[1, 0.1]], [[2, 0.2]], [[3, 0.3], [4, 0.4]]]
    assert [message["previous"] for message in sent] == [0, 0, 1, 2]
    (whole,) = board.runs()
    assert whole["points"] == [[1, 0.1], [2, 0.2], [3, 0.3], [4, 0.4]] and whole["previous"] == 0
    assert whole["bins"] == [[-8.0, -6.0, pytest.approx(0.25), 12], [0.0, 2.0, pytest.approx(0.5), 4]]
    assert whole["left"] == pytest.approx(36 * 2.0) and whole["step"] == 4


def test_reports_in_quick_succession_are_one_message(sent):
    from stylewright.nodes.bridge.board import SHORTEST, Board

    board, run = Board(), state()
    board.open(run)
    for step in range(1, 21):
        run.add(event(step))
        board.show(run)
        sent.now += SHORTEST / 5
    assert 3 <= len(sent) <= 6
    board.show(run, at_once=True)
    assert [step for message in sent for step, _ in message["points"]] == list(range(1, 21))


def test_a_new_run_replaces_the_one_of_its_node_and_old_ones_are_forgotten(sent):
    from stylewright.nodes.bridge.board import MOST_RUNS, Board

    board, first, second, other = Board(), state(), state(), state(node="12:3")
    for run in (first, second, other, state(workflow="another")):
        board.open(run)
    board.show(first, at_once=True)
    assert len(sent) == 4, "a run that was replaced says nothing more"
    assert [(run["node"], run["workflow"]) for run in board.runs()] == [("5", "w"), ("12:3", "w"), ("5", "another")]
    for node in range(100):
        board.open(state(node=str(node)))
    assert len(board.runs()) == MOST_RUNS


def test_a_long_curve_is_thinned_to_means():
    from stylewright.nodes.bridge.board import MOST_POINTS, thinned

    points = [(step, float(step)) for step in range(1, 10_001)]
    few = thinned(points, MOST_POINTS)
    assert len(few) <= MOST_POINTS and few[-1][0] == 10_000
    assert sum(loss for _, loss in few) / len(few) == pytest.approx(5000.5, rel=2e-3)
    assert [step for step, _ in few] == sorted(step for step, _ in few)
    assert thinned(points[:7], 7) == points[:7] and thinned([], 7) == []


def test_a_continued_run_shows_its_earlier_sessions(sent, tmp_path, monkeypatch):
    import comfy.model_management
    import folder_paths

    from stylewright.nodes.bridge import previews
    from stylewright.nodes.bridge.board import Address
    from stylewright.training.loops.checkpoint import RunDirectory
    from stylewright.training.loops.events import to_line

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    run = RunDirectory(tmp_path)
    run.events.write_text("".join(to_line(event(step)) + "\n" for step in (10, 20, 30)))
    progress = previews.TrainingProgress(40, Address("9.0.1", "9", None))
    progress.opened(run, ["tree"], -6.0)
    with pytest.raises(comfy.model_management.InterruptProcessingException), progress.watched():
        progress.report(event(30, loss=0.1))
        progress.planned("Needs 3 of 8 GiB.")
        progress.noted("No more pictures.")
        comfy.model_management.interrupt_current_processing()
        progress.report(event(31))
    last = sent[-1]
    assert [step for message in sent for step, _ in message["points"]] == [10, 20, 30, 31]
    assert last["phase"] == "stopped" and "after step 31" in last["text"] and last["node"] == "9"
    assert last["plan"] == "Needs 3 of 8 GiB." and last["notes"] == ["No more pictures."]
    assert progress.ui()["stylewright_training"][0]["points"][-1] == [31, 0.5]
    with pytest.raises(ValueError, match="foreign"), progress.watched():
        raise ValueError("the VAE is foreign\nand more")
    assert (sent[-1]["phase"], sent[-1]["text"]) == ("failed", "the VAE is foreign")


def test_outside_a_server_nobody_is_told(sent):
    from types import SimpleNamespace

    from stylewright.nodes.bridge.board import address_of
    from stylewright.nodes.bridge.previews import TrainingProgress

    assert address_of(SimpleNamespace(unique_id=None)) is None
    progress = TrainingProgress(40, None)
    progress.report(event(1))
    progress.finished("done")
    assert not sent and progress.ui() is None


def test_a_node_is_addressed_as_the_page_knows_it():
    from types import SimpleNamespace

    from stylewright.nodes.bridge.board import Address, address_of

    hidden = SimpleNamespace(unique_id="12:3", extra_pnginfo={"workflow": {"id": "w"}})
    assert address_of(hidden) == Address("12:3", "12:3", "w")
    assert address_of(SimpleNamespace(unique_id="4", extra_pnginfo=None)) == Address("4", "4", None)

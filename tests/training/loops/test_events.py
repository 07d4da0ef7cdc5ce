"""Events: the bins are exact, and the log survives what a kill does to it."""

import json
import math

import pytest
import torch

from stylewright.training.loops.events import Event, EventLog, bins_of, from_line, peak_memory, read_events, to_line


def event(step: int, **changes) -> Event:
    bins = bins_of(torch.tensor([-6.5, -3.0]), torch.tensor([0.5, 0.25]))
    values = {"steps": 10, "samples": 4 * step, "loss": 0.375, "learning_rate": 1e-4, "seconds": 1.5}
    return Event(step=step, **{**values, "loss_by_bin": bins, "peak_bytes": 123, **changes})


def test_bins_hold_what_lies_in_them():
    log_snr = torch.tensor([-6.0, -4.1, -4.0, 3.9, -5.0])
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, 6.0])
    bins = bins_of(log_snr, losses)
    assert [(b.low, b.high, b.samples) for b in bins] == [(-6, -4, 3), (-4, -2, 1), (2, 4, 1)]
    assert [b.loss for b in bins] == [3.0, 4.0, 8.0]
    assert sum(b.loss * b.samples for b in bins) == losses.sum()


def test_an_event_is_one_line_of_plain_json_and_back():
    before = event(3, images=torch.zeros(1, 3, 4, 6))
    line = to_line(before)
    assert "\n" not in line
    assert json.loads(line)["step"] == 3
    assert "images" not in json.loads(line)
    assert from_line(line) == event(3)
    assert json.loads(to_line(event(1, loss=math.inf)))["loss"] is None


@pytest.mark.parametrize("line", ['{"step": 1}', "[]", '{"loss_by_bin": []}'])
def test_a_line_that_is_no_event_is_refused(line):
    with pytest.raises(ValueError, match="Not an event"):
        from_line(line)


def test_the_log_grows_by_lines_and_keeps_no_images(tmp_path):
    log = EventLog(tmp_path / "events.jsonl", 0)
    for step in (2, 4):
        log.append(event(step, images=torch.zeros(1, 3, 2, 2)))
    assert read_events(tmp_path / "events.jsonl") == log.events == [event(2), event(4)]


def test_a_continued_run_drops_what_lies_beyond_its_checkpoint(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path, 0)
    for step in (2, 4, 6):
        log.append(event(step))
    path.write_text(path.read_text() + '{"step": 8, "st')  # cut short by a kill
    continued = EventLog(path, 4)
    assert continued.events == [event(2), event(4)]
    continued.append(event(5))
    assert [e.step for e in read_events(path)] == [2, 4, 5]


def test_without_a_path_the_log_is_in_memory():
    log = EventLog(None, 0)
    log.append(event(2))
    assert log.events == [event(2)]


def test_peak_memory_is_in_bytes():
    peak = peak_memory(torch.device("cpu"))
    assert peak is None or 10 * 2**20 < peak < 2**40

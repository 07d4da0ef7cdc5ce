from dataclasses import dataclass, field, fields

import pytest
import typer
from typer.testing import CliRunner

from stylewright.training.cli.flags import Flag, flags_of, merge, nest, with_flags
from stylewright.training.cli.job import HELP as JOB_HELP
from stylewright.training.cli.job import Job
from stylewright.training.cli.train import FLAGS, HELP
from stylewright.training.loops.config import TrainConfig, config_to_table


@dataclass(frozen=True)
class Inner:
    rank: int = 4
    layers: str | tuple[str, ...] = "style"


@dataclass(frozen=True)
class Outer:
    learning_rate: float = 1e-4
    name: str | None = None
    fast: bool = False
    words: tuple[str, ...] = ()
    inner: Inner = field(default_factory=Inner)


HELPS = dict.fromkeys(("learning_rate", "name", "fast", "words", "inner.rank", "inner.layers"), "a line")


def given(*arguments: str) -> dict:
    """The table that a command with the flags of Outer receives."""
    received = []
    app = typer.Typer()

    @app.command()
    @with_flags(*flags_of(Outer, HELPS, "Options"))
    def command(table: dict) -> None:
        received.append(table)

    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return received[0]


@pytest.mark.parametrize(
    ("arguments", "table"),
    [
        ([], {}),
        (["--learning-rate", "1e-3"], {"learning_rate": 1e-3}),
        (["--learning-rate", "0"], {"learning_rate": 0.0}),
        (["--inner.rank", "8"], {"inner": {"rank": 8}}),
        (["--rank", "8"], {"inner": {"rank": 8}}),
        (["--fast"], {"fast": True}),
        (["--no-fast"], {"fast": False}),
        (["--words", "a b", "--words", "c"], {"words": ["a b", "c"]}),
        (["--layers", "style"], {"inner": {"layers": "style"}}),
        (["--layers", ".*to_q"], {"inner": {"layers": [".*to_q"]}}),
        (["--layers", "a", "--layers", "b"], {"inner": {"layers": ["a", "b"]}}),
        (["--words", "a"], {"words": ["a"]}),
    ],
)
def test_flags_become_a_table(arguments, table):
    assert given(*arguments) == table


def test_flags_override_the_file():
    file = {"steps": 5, "adapter": {"rank": 8, "method": "dora"}, "density": {"mu": -4.0}}
    flags = {"steps": 7, "adapter": {"rank": 2}}
    expected = {"steps": 7, "adapter": {"rank": 2, "method": "dora"}, "density": {"mu": -4.0}}
    assert merge(file, flags) == expected
    assert file["adapter"]["rank"] == 8, "the file's table is left alone"


def test_nest():
    assert nest({("a", "b"): 1, ("a", "c"): 2, ("d",): 3}) == {"a": {"b": 1, "c": 2}, "d": 3}


def test_every_option_of_a_run_is_a_flag_with_a_help_line():
    paths = {".".join(flag.path) for flag in FLAGS}
    assert paths == set(HELP) | set(JOB_HELP)
    top = {path.partition(".")[0] for path in paths}
    assert top == {f.name for f in fields(TrainConfig)} | {f.name for f in fields(Job)} - {"concepts"}  # tables
    nested = {f"{k}.{name}" for k, v in config_to_table(TrainConfig()).items() if isinstance(v, dict) for name in v}
    assert nested <= paths


def test_no_two_flags_share_a_name():
    names = [name for flag in FLAGS for name in flag.names]
    assert len(names) == len(set(names))


def test_a_missing_help_line_is_noticed():
    with pytest.raises(KeyError, match="learning_rate"):
        list(flags_of(Outer, {}, "Options"))


def test_flag_names():
    assert Flag(("adapter", "mid_rank"), int, "", "").names == ("--adapter.mid-rank", "--mid-rank")

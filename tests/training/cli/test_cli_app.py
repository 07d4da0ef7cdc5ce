import pytest
import typer

from stylewright.training.cli import app
from stylewright.training.cli.app import run
from stylewright.training.errors import TrainingError


@pytest.fixture
def failing(monkeypatch):
    """Registers a command ``fail`` for one test: call with the exception that it raises."""

    def add(error: BaseException) -> None:
        command_line = typer.Typer(pretty_exceptions_enable=False)
        command_line.callback()(app.options)

        @command_line.command()
        def fail() -> None:
            raise error

        monkeypatch.setattr(app, "app", command_line)

    return add


@pytest.mark.parametrize(
    "error",
    [ValueError("got 3, expected 4"), TrainingError("lost"), OSError(28, "No space left on device", "a/b")],
    ids=lambda error: type(error).__name__,
)
def test_expected_errors_are_one_line(failing, capsys, error):
    failing(error)
    assert run(["fail"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"stylewright: {error}\n"


def test_debug_shows_where(failing):
    failing(ValueError("got 3, expected 4"))
    with pytest.raises(ValueError, match="got 3"):
        run(["fail", "--debug"])


def test_interrupted_commands_leave_with_130(monkeypatch, capsys):
    from stylewright.training.cli import density

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(density, "measure", interrupt)
    assert run(["density"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_flags_may_be_spelled_as_in_the_file(capsys):
    assert run(["density", "--reference_tokens=4096", "--tokens", "64"]) == 0
    assert "shifted" in capsys.readouterr().out


def test_our_own_mistakes_are_not_hidden(failing):
    failing(KeyError("a bug"))
    with pytest.raises(KeyError):
        run(["fail"])


def test_a_missing_library_is_named(failing, capsys):
    failing(ModuleNotFoundError("No module named 'peft'", name="peft"))
    assert run(["fail"]) == 1
    assert "peft" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["nix"], ["density", "--nix"], ["density", "--mu", "x"], ["convert", "a"]])
def test_wrong_usage_is_code_2(capsys, arguments):
    assert run(arguments) == 2
    assert capsys.readouterr().out == ""


def test_help_lists_the_commands(capsys):
    assert run(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("density", "inspect", "convert", "train", "resume", "generate"))

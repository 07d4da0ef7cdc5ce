"""The prompts of a distillation: read from a node's text and a file, and encoded before they are needed."""

from ...training.data.captions import styled
from ...training.data.prompts import Prompts, read_line, read_prompts
from ...training.hosts.host import Host
from ...training.loops.distil_config import DistilConfig
from .files import index_folder, input_file
from .previews import TrainingProgress

MOST = 1024  # prompts that are kept encoded: of FLUX.1's T5 they take 4 GiB


def prompts_of(text: str, file: str, style_phrase: str) -> Prompts:
    """What a node was given: lines with alternatives in braces, and the name of a text file below the input folder.

    ValueError where there are none, and for braces that do not match.
    """
    path = input_file(file.strip()) if file.strip() else None
    lines = styled_lines(text, style_phrase)
    if not lines and path is None:
        raise ValueError("there are no prompts: write some, one a line, or name a text file in prompt_file")
    return Prompts(lines, read_prompts(path, index_folder()) if path else None, style_phrase)


def lines_of(text: str) -> tuple[str, ...]:
    """Of a widget, without the white space around them; empty ones, and those that begin with #, are none."""
    lines = (line.strip() for line in text.splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def styled_lines(text: str, style_phrase: str) -> tuple[str, ...]:
    """The same, with the words of a style where there are any."""
    return tuple(styled(line, style_phrase) if style_phrase else line for line in lines_of(text))


def encode_before(host: Host, prompts: Prompts, config: DistilConfig, progress: TrainingProgress) -> list[str]:
    """Encodes what the run will ask for, the empty prompt too. The prompts.

    ValueError where there are too many to keep.
    """
    drawn = _drawn(prompts, config, "prompts")
    away = _drawn(Prompts(config.negative_prompts), config, "negative prompts") if config.negative_prompts else []
    every = list(dict.fromkeys(["", *drawn, *away]))
    for number, prompt in enumerate(every, start=1):
        host.encode_prompts([prompt])
        progress.encoded(number, len(every))
    return every


def _drawn(prompts: Prompts, config: DistilConfig, use: str) -> list[str]:
    """All that may be drawn in the run; where that is much, what will be."""
    lines = [] if prompts.file else [read_line(line) for line in prompts.lines]
    if lines and sum(map(len, lines)) <= MOST:
        return [line.prompt(number) for line in lines for number in range(len(line))]
    found: dict[str, None] = {}
    for step in range(config.steps):
        found.update(dict.fromkeys(prompts.drawn(config.seed, step, config.samples_a_step, use)))
        if len(found) > MOST:
            raise ValueError(f"more than {MOST} different prompts are drawn in this run")
    return list(found)

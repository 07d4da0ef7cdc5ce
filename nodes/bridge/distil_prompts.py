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
    """Encodes all that the run may ask for, or the first step's prompts where that is too much: :func:`few` says it."""
    sources = {"prompts": prompts, **negatives_of(config)}
    found = [may_be_drawn(each, config, use) or _of_step(each, config, use, 0) for use, each in sources.items()]
    every = list(dict.fromkeys(["", *(prompt for each in found for prompt in each)]))
    for number, prompt in enumerate(every, start=1):
        host.encode_prompts([prompt])
        progress.encoded(number, len(every))
    return every


def few(prompts: Prompts, config: DistilConfig) -> bool:
    """Whether all prompts of a run can be kept encoded."""
    sources = {"prompts": prompts, **negatives_of(config)}
    return all(may_be_drawn(each, config, use) is not None for use, each in sources.items())


def negatives_of(config: DistilConfig) -> dict[str, Prompts]:
    """By what they are drawn for."""
    return {"negative prompts": Prompts(config.negative_prompts)} if config.negative_prompts else {}


def own_negatives(prompts: Prompts, config: DistilConfig) -> str:
    """What is to be said of prompts that are negative prompts, too; "" = nothing, or too many to look at."""
    for use, negatives in negatives_of(config).items():
        ours, theirs = may_be_drawn(prompts, config, "prompts"), may_be_drawn(negatives, config, use)
        if same := [each for each in ours or () if each in (theirs or ())]:
            return (
                f"{same[0][:80]!r} is among the prompts and among the negatives: where both are drawn at once, "
                "the teacher is guided away from what it is asked for"
            )
    return ""


def may_be_drawn(prompts: Prompts, config: DistilConfig, use: str) -> list[str] | None:
    """The different prompts that a run may draw; None where they are more than MOST."""
    if prompts.count <= MOST:
        lines = [read_line(prompts.line(number)) for number in range(prompts.count)]
        if sum(map(len, lines)) <= MOST:
            return [line.prompt(number) for line in lines for number in range(len(line))]
    if config.steps * config.samples_a_step > MOST:
        return None
    drawn = (_of_step(prompts, config, use, step) for step in range(config.steps))
    return list(dict.fromkeys(prompt for each in drawn for prompt in each))


def _of_step(prompts: Prompts, config: DistilConfig, use: str, step: int) -> list[str]:
    return prompts.drawn(config.seed, step, config.samples_a_step, use)

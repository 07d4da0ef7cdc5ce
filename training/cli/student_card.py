"""The card of the embedded model's one-step student: how it was made, and its figures beside its teacher's."""

import shlex
from pathlib import Path

from ..embedded.evaluate import PROMPT_SETS, figures, judge
from ..embedded.oracle import load_oracle
from ..embedded.weights import Weights
from ..formats.contents import read_outline
from ..formats.metadata import AdapterMetadata
from ..formats.state import write_atomically
from ..hosts.embedded import load_embedded
from ..loops.distil_config import DistilConfig
from ..loops.tables import from_table, to_table
from ..metrics import Interval
from .generate import level_of, wearing

TEACHER_STEPS, TEACHER_GUIDANCE = 28, 5.0
# Of a run, what does not change its result.
FREE = ("steps", "save_every", "report_every", "sample_every", "sample_prompts", "gradient_checkpointing")


def write_student_card(weights: Weights, *, student: Path | None = None, n: int = 500, seed: int = 0) -> Path:
    """Measures the student (None = the shipped one) and writes ``STUDENT.md`` beside the weights.

    n pictures of the student for each kind of prompt, and a fifth of that of its teacher. Gives the card's path.
    """
    file = student or weights.student
    about = read_outline(file).about
    if about is None or not about.one_step:
        raise ValueError(f"{file} does not say that it is a one-step student")
    host, oracle = load_embedded(weights), load_oracle(weights.oracle)
    level, few = level_of(file, host), max(1, n // 5)
    rows: dict[str, dict[str, Interval]] = {}
    for name, prompts in PROMPT_SETS.items():
        with wearing(host, file):
            drawn = judge(host, oracle, prompts(n, seed), seed=seed, one_step=level)
        rows[f"{name}, student, 1 step, n = {n}"] = figures(drawn)
        drawn = judge(host, oracle, prompts(few, seed), seed=seed, guidance_scale=TEACHER_GUIDANCE, steps=TEACHER_STEPS)
        teacher = f"{name}, teacher, {TEACHER_STEPS} steps, guidance {TEACHER_GUIDANCE:g}, n = {few}"
        rows[teacher] = figures(drawn)
    text = CARD.format(size=file.stat().st_size / 1e6, rank=about.rank, command=command_of(about), table=_table(rows))
    path = weights.folder / "STUDENT.md"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def command_of(about: AdapterMetadata) -> str:
    """The command that makes this student again."""
    made, usual = from_table(DistilConfig, about.training), to_table(DistilConfig(steps=about.steps or 1))
    table = {name: value for name, value in to_table(made).items() if name not in FREE and usual.get(name) != value}
    words = ["stylewright", "distill", "--model", about.base_model, "--out", "RUN", "--steps", str(about.steps)]
    for name, value in table.items():
        inner = value if isinstance(value, dict) else {"": value}
        for part, each in inner.items():
            if not part or usual[name].get(part) != each:
                words += [f"--{'.'.join(filter(None, (name, part))).replace('_', '-')}", f"{each}"]
    return shlex.join(words)


def _table(rows: dict[str, dict[str, Interval]]) -> str:
    heads = list(next(iter(rows.values())))
    lines = [f"| prompts | {' | '.join(heads)} |", "|" + " --- |" * (len(heads) + 1)]
    for name, values in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{value.mean:.3f}" for value in values.values()) + " |")
    return "\n".join(lines)


CARD = """# The embedded model's one-step student

`student.safetensors` ({size:.1f} MB, bfloat16): a LoRA of rank {rank} on the embedded transformer, with which it draws
in one evaluation, without classifier-free guidance. Distilled from the embedded model and from prompts alone, without a
picture. Apache-2.0.

Made again by

```sh
{command}
stylewright convert RUN/adapter.safetensors student.safetensors --style diffusers --dtype bfloat16
```

and measured by `stylewright embedded student-card`. The teacher alone is guided, by a scale that is drawn anew in each
iteration (`--convention dmd`): the embedded model is usually drawn with guidance, and so this convention carries its
guided pictures over. With one common scale for both networks (PG-SB) the student would go to the teacher's unguided
pictures.

It learned from prompts that name a style, or all four of its attributes. Of a prompt that leaves some out it draws a
blur of what they might be, which its teacher does not.

Share of pictures in which the oracle sees what the prompt asked for:

{table}
"""

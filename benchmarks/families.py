"""The table of families in ``docs/families.md``: what holds of a tiny random model of each, found out by training it.

Run it once with each ComfyUI that the table has a column for, with ComfyUI's own Python:

    COMFYUI_PATH=…/ComfyUI python benchmarks/families.py

It adds its findings to ``benchmarks/results/families.json`` under the version of that ComfyUI, prints the table, and
writes it into the document. Names of families after it limit the run to these.
"""

import importlib.util
import json
import logging
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from comfyui import comfyui_path, open_comfyui, why_absent
from filelock import FileLock
from package import ROOT, load_package

RESULTS = ROOT / "benchmarks" / "results" / "families.json"
DOCUMENT = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- table: made by benchmarks/families.py -->", "<!-- end of table -->"
DEVELOPED_AGAINST, FLOOR = "0.33.0", "0.14.0"


@dataclass(frozen=True)
class Row:
    """What was found out of one tiny model. None = this ComfyUI does not have the family."""

    kind: str  # class in comfy.supported_models
    family: str
    process: str
    prediction: str
    layers: int  # of the tiny model, that the preset "style" adapts
    trained: bool  # three steps, with gradients that are finite, right, and the adapter's alone
    seeds_equal: bool  # two runs of one seed give one file
    complete: bool  # ComfyUI's own loader finds a place for every tensor
    same_output: bool  # and then computes what was trained, to 1e-3
    base_unchanged: bool  # the model answers bit for bit as before

    def holds(self) -> bool:
        return self.trained and self.seeds_equal and self.complete and self.same_output and self.base_unchanged


def load_tests(name: str):
    """A module beside the tests, which no folder on ``sys.path`` leads to."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "nodes" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row_of(family: str, proof, tiny_models, folder: Path) -> Row:
    import torch

    from stylewright.nodes.bridge.families import family_of
    from stylewright.nodes.bridge.noise_levels import noise_levels

    parts = proof.load(family)
    levels = noise_levels(parts.model)
    found = proof.gradients(parts)
    right = abs(found.slope - found.difference) < 1e-2 * abs(found.difference) and found.influence_of_idle == 0.0
    before = proof.answer(parts.model, parts)
    path, again = (proof.train(parts, folder / name) for name in ("first", "second"))
    trained, stock = proof.answer_as_trained(parts, path), proof.answer_of_stock_loader(parts, path)
    return Row(
        kind=tiny_models.TINY[family].kind,
        family=family_of(parts.model),
        process=levels.process,
        prediction=levels.prediction,
        layers=stock.layers,
        trained=found.finite and right and not found.foreign and proof.relative(trained, before) > 1e-2,
        seeds_equal=proof.same_content(path, again),
        complete=not stock.unmatched,
        same_output=proof.relative(stock.answer, trained) < 1e-3,
        base_unchanged=torch.equal(proof.answer(parts.model, parts), before),
    )


def table(results: dict[str, dict[str, dict]]) -> str:
    """Markdown: a row for each tiny model, with a column for the floor's version at the end."""
    heads = ["class in ComfyUI", "family", "process / prediction", "trained", "seeds equal", "file complete"]
    heads += ["same output", "base unchanged", f"in {FLOOR}"]
    lines = [heads, ["---"] * len(heads)]
    for name, found in results.get(DEVELOPED_AGAINST, {}).items():
        row, floor = Row(**found), results.get(FLOOR, {}).get(name)
        marks = [row.trained, row.seeds_equal, row.complete, row.same_output, row.base_unchanged]
        there = "not known there" if floor is None else yes(Row(**floor).holds())
        variant = row.kind if variant_of(name, row) is None else f"{row.kind} ({variant_of(name, row)})"
        lines.append([variant, row.family, f"{row.process} / {row.prediction}", *map(yes, marks), there])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def variant_of(name: str, row: Row) -> str | None:
    """What tells two tiny models of one class apart."""
    return {"sd21": "eps", "sd21-v": "v", "sdxl-v": "v, zero terminal SNR", "sdxl-edm": "Playground 2.5, EDM",
            "sd35-medium": "3.5 medium", "cogvideox15": "1.5"}.get(name)  # fmt: skip


def yes(value: bool) -> str:
    return "yes" if value else "**no**"


def refusals() -> str:
    from stylewright.nodes.bridge.families import REFUSED

    return (
        "\n".join(["| class in ComfyUI | why not |", "| --- | --- |"])
        + "\n"
        + "\n".join(f"| {name} | {reason} |" for name, reason in REFUSED.items())
    )


def write_document(text: str) -> None:
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main(names: list[str]) -> None:
    if reason := why_absent():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as base:
        open_comfyui(Path(base) / "comfy", "cpu")
        load_package()
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        tiny_models, proof = load_tests("tiny_models"), load_tests("family_proof")
        version = next(
            line.split('"')[1]
            for line in (comfyui_path() / "comfyui_version.py").read_text().splitlines()
            if line.startswith("__version__")
        )
        for family in names or tiny_models.TINY:
            if tiny_models.is_known(family):
                row = row_of(family, proof, tiny_models, Path(base) / family)
                print(family, *(f"{key}={value}" for key, value in asdict(row).items()), flush=True)
                keep(version, family, row, list(tiny_models.TINY))
        results = json.loads(RESULTS.read_text())
        text = f"{table(results)}\n\n## Refused, by name\n\n{refusals()}"
        print(text)
        write_document(text)


def keep(version: str, family: str, row: Row, order: list[str]) -> None:
    """Adds a row to the findings, which several runs may do at a time."""
    with FileLock(Path(tempfile.gettempdir()) / "stylewright-families.lock"):
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        rows = {**results.get(version, {}), family: asdict(row)}
        results[version] = {name: rows[name] for name in order if name in rows}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])

"""The demo's page: plain HTML beside its pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """A strip of pictures with its caption."""

    title: str
    detail: str
    image: str  # file name beside the page


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; }
.row { display: grid; grid-template-columns: 13rem 1fr; gap: 1rem; align-items: center; margin: .35rem 0; }
.row b { display: block; } .row span { color: #666; font-size: .85rem; }
.row img, .plots img { max-width: 100%; border-radius: 4px; }
.plots { display: grid; grid-template-columns: repeat(2, 1fr); gap: 1rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: left; }
td { font-variant-numeric: tabular-nums; }
"""


def write_page(
    path: Path,
    *,
    title: str,
    introduction: str,
    rows: Sequence[Row],
    plots: Sequence[str],
    table: Sequence[Sequence[str]],
) -> None:
    """Writes the page; the first row of ``table`` is its head."""
    strips = "\n".join(
        f'<div class="row"><div><b>{escape(row.title)}</b><span>{escape(row.detail)}</span></div>'
        f'<img src="{escape(row.image)}" alt="{escape(row.title)}"></div>'
        for row in rows
    )
    head, *body = table
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in body)
    images = "\n".join(f'<img src="{escape(plot)}" alt="">' for plot in plots)
    path.write_text(
        f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE}</style>
<h1>{escape(title)}</h1><p>{escape(introduction)}</p>
{strips}
<h2>After training</h2><table><tr>{cells}</tr>{lines}</table>
<h2>Where the steps went, and what they bought</h2><div class="plots">{images}</div>
</html>
""",
        encoding="utf-8",
    )

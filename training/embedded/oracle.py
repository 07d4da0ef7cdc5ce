"""The oracle: a small classifier, trained on renders, that reads subject and style off a picture.

Because every picture of this world has known attributes, its answers are exact scores instead of estimates:
the share of pictures whose subject, or whose style attribute, is the one that was asked for.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..hosts.parts import reading
from ..metrics import leakage
from .renderer import EDGES, FILLS, GROUNDS, PALETTES, SUBJECTS, Style

STYLE_HEADS = {"palette": len(PALETTES), "ground": len(GROUNDS), "fill": len(FILLS), "edge": len(EDGES)}
HEADS = {"subject": len(SUBJECTS), **STYLE_HEADS}  # classes by attribute


class Oracle(nn.Module):
    """Five classifications of pictures (b, 3, 128, 128) in [0, 1], seen at half resolution."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        self.body = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(n, m, 3, stride=2, padding=1), nn.GroupNorm(8, m), nn.SiLU())
                for n, m in zip(widths, widths[1:], strict=False)
            ),
            nn.Conv2d(128, 128, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(128 * 16, classes) for name, classes in HEADS.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits (b, classes) by head."""
        features = self.body(F.avg_pool2d(pictures, pictures.shape[-1] // 64) - 0.5)
        return {name: head(features) for name, head in self.heads.items()}


@dataclass(frozen=True)
class Scores:
    """What the oracle says of pictures (b,): True where the attribute is the wanted one."""

    subject: Tensor
    style: dict[str, Tensor]  # by palette, ground, fill, edge

    @property
    def style_share(self) -> Tensor:
        """Share of the four style attributes that are right, (b,) in [0, 1]."""
        return torch.stack([right.float() for right in self.style.values()]).mean(0)

    @property
    def whole_style(self) -> Tensor:
        """True where all four are right."""
        return torch.stack(list(self.style.values())).all(0)


@torch.no_grad()
def score(oracle: Oracle, pictures: Tensor, subjects: Tensor, styles: list[Style]) -> Scores:
    """Scores pictures (b, 3, 128, 128) in [0, 1] against the wanted subjects (b,) and styles (b of them)."""
    seen = {name: logits.argmax(1).cpu() for name, logits in oracle(pictures).items()}
    wanted = {name: torch.tensor([getattr(style, name) for style in styles]) for name in STYLE_HEADS}
    return Scores(seen["subject"] == subjects.cpu(), {name: seen[name] == wanted[name] for name in STYLE_HEADS})


@torch.no_grad()
def subject_leakage(oracle: Oracle, pictures: Tensor, asked: Tensor, shown: list[int]) -> Tensor:
    """How likely each picture (b, 3, 128, 128) shows a subject of the reference, ``shown``, that was not ``asked`` for.

    Of those pictures whose asked subject (b,) is not all that the reference shows: (m,) in [0, 1], 1 = certainly.
    """
    subjects = torch.arange(len(SUBJECTS))
    presence = oracle(pictures)["subject"].softmax(1).cpu()
    return leakage(presence, torch.isin(subjects, torch.tensor(shown)), asked.cpu()[:, None] == subjects)


def load_oracle(path: Path) -> Oracle:
    """The oracle in float32, frozen. ValueError where the file is missing or unreadable."""
    with reading(f"the oracle in {path}"):
        oracle = Oracle()
        oracle.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return oracle.requires_grad_(False).eval()

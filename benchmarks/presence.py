"""Which subjects does a picture of the embedded model show? The oracle tells one; this tells each, for leakage.

A few minutes of training on renders with one to four subjects, in any style, from the oracle's own layers on. It is
trained again where its file is missing, and says how far it can be trusted: how often it finds a subject that is there,
and one that is not, on pictures that it has not seen, drawn by the renderer and passed through the autoencoder.

    python benchmarks/presence.py presence.safetensors
"""

import sys
from pathlib import Path

from package import load_package

load_package()

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from stylewright.training.embedded.oracle import load_oracle  # noqa: E402
from stylewright.training.embedded.pretrain.oracle import any_scene  # noqa: E402
from stylewright.training.embedded.renderer import HELD_OUT_STYLES, SUBJECTS, Style, render, scene_of  # noqa: E402
from stylewright.training.embedded.several import several  # noqa: E402
from stylewright.training.embedded.weights import Weights  # noqa: E402
from stylewright.training.hosts.embedded import load_embedded  # noqa: E402
from stylewright.training.randomness import generator  # noqa: E402

STEPS, BATCH, LR = 500, 32, 1e-3
SUBJECT_COUNT = len(SUBJECTS)


class Presence(nn.Module):
    """How likely pictures (b, 3, 128, 128) in [0, 1] show each subject: (b, subjects) in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = load_oracle(Weights().oracle).body
        self.head = nn.Linear(128 * 16, SUBJECT_COUNT)

    def logits(self, pictures: Tensor) -> Tensor:
        return self.head(self.body(F.avg_pool2d(pictures, pictures.shape[-1] // 64) - 0.5))

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        return self.logits(pictures).sigmoid()


def load_presence(path: Path) -> Presence:
    """From its file, which is made where it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(trained().state_dict(), path)
    presence = Presence()
    presence.load_state_dict(load_file(path))
    return presence.requires_grad_(False).eval()


def trained(steps: int = STEPS) -> Presence:
    torch.manual_seed(0)
    presence = Presence().requires_grad_(True)
    optimizer = torch.optim.AdamW(presence.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    for step in range(steps):
        pictures, shown = examples(BATCH, step)
        F.binary_cross_entropy_with_logits(presence.logits(pictures), shown).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return presence


def examples(n: int, number: int) -> tuple[Tensor, Tensor]:
    """Half of one subject, half of several, a little blurred and noisy; and what they show, (n, subjects)."""
    draw = generator(0, "presence", number)
    scene = any_scene(n // 2, 0, "presence", number)
    more = [several(_some(2 + i % 3, draw), _any_style(draw), draw) for i in range(n - n // 2)]
    pictures = torch.cat([render(scene), torch.stack([each.picture for each in more])])
    shown = torch.zeros(n, SUBJECT_COUNT)
    shown[torch.arange(n // 2), scene.subject] = 1
    for row, each in enumerate(more, start=n // 2):
        shown[row, [SUBJECTS.index(name) for name in each.subjects]] = 1
    side = 128 // int(torch.randint(1, 3, (), generator=draw))
    pictures = F.interpolate(F.interpolate(pictures, size=(side, side), mode="area"), size=(128, 128), mode="bilinear")
    return pictures + 0.05 * torch.randn(pictures.shape, generator=draw), shown


def _some(count: int, draw: torch.Generator) -> list[int]:
    return torch.randperm(SUBJECT_COUNT, generator=draw)[:count].tolist()


def _any_style(draw: torch.Generator) -> Style:
    return Style(*(int(torch.randint(count, (), generator=draw)) for count in (16, 7, 4, 3)))


def trust(presence: Presence, n: int = 200) -> dict[str, float]:
    """Shares of right answers on n pictures of one subject, and n of several, in held-out styles."""
    host, draw = load_embedded(), generator(1, "trust")
    styles = list(HELD_OUT_STYLES.values())
    answers: dict[str, list[Tensor]] = {}
    for i in range(n):
        style, subjects = styles[i % len(styles)], _some(2 + i % 3, draw)
        alone = render(scene_of(torch.tensor(subjects[:1]), style, draw))
        together = several(subjects, style, draw).picture[None]
        for name, picture, there in (("one", alone, subjects[:1]), ("several", together, subjects)):
            seen = presence(host.decode_latents(host.encode_images(picture)))[0] > 0.5
            is_there = torch.isin(torch.arange(SUBJECT_COUNT), torch.tensor(there))
            answers.setdefault(f"{name}: found", []).append(seen[is_there])
            answers.setdefault(f"{name}: found though not there", []).append(seen[~is_there])
    return {name: float(torch.cat(parts).float().mean()) for name, parts in answers.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, share in trust(load_presence(Path(sys.argv[1]))).items():
        print(f"{name:32} {share:.3f}")

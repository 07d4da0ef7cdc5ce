"""A LoRA in the place of an adapter that acts by its input: the nearest one on what passes while pictures are drawn.

Nothing that depends on the input can be merged into weights; what can be is the part of it that is linear. For the
inputs x of a layer and what the adapter adds to its output, y, it is the B A of rank r that minimises

    |y - B A x|^2 + ridge |B A|^2

over positions of drawn pictures: with L L^T = X^T X + ridge, the r largest singular values of L^-1 X^T Y (reduced-rank
regression, Izenman 1975). For routing that hardly changes this is the routing frozen to its mean; of what changes
the spread of features it keeps what is linear on average. How much is lost is measured on positions that were not
fitted, and by the pictures themselves.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..randomness import generator
from .attach import Adapter, attached
from .methods import STYLE_INJECT, AdapterConfig
from .targets import exactly

RIDGES = (1e-3, 1e-1, 10.0)  # of the mean square of an input: what loses least where it was not fitted is taken
A_CALL = 64  # positions that are kept of each call of a layer
MOST = 2048  # positions that are kept of a layer
TESTED = 4  # one of so many is not fitted, and tells what is lost


@dataclass(frozen=True)
class Approximation:
    """A LoRA, and how far it is from what it stands for."""

    state: dict[str, Tensor]  # peft's names, with a scale of 1
    rank: int  # the largest
    lost: dict[str, float]  # by layer: share of what the adapter adds (sum of squares) that the LoRA does not
    distance: float  # of what is drawn to what the adapter draws, over that of the base: 0 = the same, 1 = no better

    def summary(self) -> str:
        worst = max(self.lost, key=lambda name: self.lost[name])
        mean = sum(self.lost.values()) / len(self.lost)
        return (
            f"a LoRA of rank {self.rank} in {len(self.lost)} layers; of what the adapter adds to their outputs "
            f"{mean:.0%} is lost on average, and at most {self.lost[worst]:.0%}, in {worst}; what it draws is "
            f"{self.distance:.2f} of the way from the adapter's pictures back to the base's"
        )


@torch.no_grad()
def approximate(
    network: nn.Module,
    config: AdapterConfig,
    state: dict[str, Tensor],
    names: Sequence[str],
    draw: Callable[[], Tensor],  # the same noise and prompts each time
    *,
    family: str,
    rank: int,
    seed: int = 0,
    device: torch.device | None = None,
    room: int = 2**31,  # bytes for positions: where it is not enough for all layers, pictures are drawn several times
) -> Approximation:
    """The nearest LoRA to a StyleInject adapter of these layers on ``network``, which is afterwards what it was.

    ValueError for another method, and where no layer was reached.
    """
    if config.method != STYLE_INJECT:
        raise ValueError(f"the adapter's method is {config.method}, and this is for {STYLE_INJECT} alone")
    config = replace(config, targets=exactly(names), dropout=0.0)
    fitted: dict[str, tuple[Tensor, Tensor]] = {}
    lost: dict[str, float] = {}
    with attached(network, config, family=family, seed=seed, device=device) as adapter:
        adapter.load_state_dict(state)
        for group in _groups(adapter, room):
            with _collecting(adapter, group, seed) as seen:
                drawn = draw()
            for name, positions in seen.items():
                if positions.rows:
                    fitted[name], lost[name] = positions.fitted(rank)
    if not fitted:
        raise ValueError("none of the adapter's layers ran while pictures were drawn: it is for another model")
    base = draw()
    shapes = {name: network.get_submodule(name) for name in fitted}
    state = {key: value for name in fitted for key, value in lora_of(name, *fitted[name], shapes[name]).items()}
    plain = AdapterConfig(rank=max(len(a) for a, _ in fitted.values()), targets=exactly(fitted))
    with attached(network, plain, family=family, seed=seed, device=device) as adapter:
        adapter.load_state_dict(_padded(state, adapter.state_dict()))
        found = draw()
    return Approximation(state, plain.rank, lost, distance_of(found, drawn, base))


def distance_of(found: Tensor, drawn: Tensor, base: Tensor) -> float:
    """How far what was found is from what the adapter has drawn, over how far the base is."""
    return float((found - drawn).double().norm() / (base - drawn).double().norm().clamp(min=1e-12))


class Positions:
    """Some of the positions that pass through one layer."""

    def __init__(self, layer: Any, source: torch.Generator) -> None:
        self.layer, self.rows, self._source = layer, [], source

    def see(self, x: Tensor, added: Tensor) -> None:
        if sum(len(inputs) for inputs, _ in self.rows) >= MOST:
            return
        x, added = x.detach(), added.detach()
        if isinstance(self.layer, nn.Conv1d | nn.Conv2d):
            added = added.flatten(2).movedim(1, -1)
            x = _patches(self.layer, x)
        x, added = x.reshape(-1, x.shape[-1]), added.reshape(-1, added.shape[-1])
        chosen = torch.randperm(len(x), generator=self._source)[:A_CALL].to(x.device)
        self.rows.append((x[chosen].float().cpu(), added[chosen].float().cpu()))

    def fitted(self, rank: int) -> tuple[tuple[Tensor, Tensor], float]:
        """(A, B) of the nearest LoRA on what was seen, and the share of it that is lost."""
        x, y = (torch.cat(part).double() for part in zip(*self.rows, strict=True))
        return _fitted(x, y, rank)


def _patches(layer: Any, x: Tensor) -> Tensor:
    """What a convolution multiplies at each position, (b, p, in * kernel)."""
    wide = x.ndim == 3
    kernel, stride, padding, dilation = (
        ((1, *value) if wide else value) for value in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    )
    padding = (0, *layer.padding) if wide else padding
    return F.unfold(x[:, :, None] if wide else x, kernel, dilation, padding, stride).movedim(1, -1)


@contextmanager
def _collecting(adapter: Adapter, names: Iterable[str], seed: int) -> Iterator[dict[str, Positions]]:
    layers: dict[str, Any] = {name: adapter.layer(name) for name in names}
    seen = {
        name: Positions(layer.get_base_layer(), generator(seed, "positions", name)) for name, layer in layers.items()
    }
    try:
        for name, layer in layers.items():
            layer.observe = seen[name].see
        yield seen
    finally:
        for layer in layers.values():
            layer.observe = None


def _groups(adapter: Adapter, room: int) -> list[list[str]]:
    """Layers whose positions fit into ``room`` bytes together."""
    groups: list[list[str]] = [[]]
    taken = 0
    for name in adapter.names:
        tensors: Any = adapter.layer(name)
        a, b = (next(iter(getattr(tensors, part).values())) for part in ("styleinject_A", "styleinject_B"))
        size = 4 * MOST * (a[0, 0].numel() + len(b))
        if groups[-1] and taken + size > room:
            groups.append([])
            taken = 0
        groups[-1].append(name)
        taken += size
    return groups


def _fitted(x: Tensor, y: Tensor, rank: int) -> tuple[tuple[Tensor, Tensor], float]:
    """(A, B) on all positions, and the share that is lost at those which a first fit has not seen.

    Where no fit is better than none, B is zero and all is lost.
    """
    tested = torch.arange(len(x)) % TESTED == 0
    lost = {ridge: _lost(x, y, tested, reduced_rank(x[~tested], y[~tested], rank, ridge)) for ridge in RIDGES}
    best = min(RIDGES, key=lambda ridge: lost[ridge])
    a, b = reduced_rank(x, y, rank, best)
    return ((a, b), lost[best]) if lost[best] < 1 else ((a, torch.zeros_like(b)), 1.0)


def _lost(x: Tensor, y: Tensor, tested: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    a, b = factors
    rest = (y[tested] - x[tested] @ a.T @ b.T).square().sum()
    return float(rest / y[tested].square().sum().clamp(min=1e-30))


def reduced_rank(x: Tensor, y: Tensor, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
    """A (r, i) and B (o, r) with B A x nearest to y, for x (m, i) and y (m, o) in float64; r <= rank, i, o, m."""
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=1e-30))
    root = torch.linalg.cholesky(gram)
    z = torch.linalg.solve_triangular(root, x.T @ y, upper=False)  # (i, o)
    most = min(rank, len(x), *z.shape)
    # By the Gram matrix of the smaller side: there are up to 15360 outputs, and few of the singular values are wanted.
    if z.shape[0] <= z.shape[1]:
        left = torch.linalg.eigh(z @ z.T)[1].flip(1)[:, :most]
        b = z.T @ left
    else:
        right = torch.linalg.eigh(z.T @ z)[1].flip(1)[:, :most]
        left, upper = torch.linalg.qr(z @ right)
        b = right @ upper.T
    return torch.linalg.solve_triangular(root.T, left, upper=True).T, b


def lora_of(name: str, a: Tensor, b: Tensor, layer: Any) -> dict[str, Tensor]:
    """Factors under peft's names, in the shapes of a LoRA on this layer, which share the size of the product."""
    scale = (b.norm() / a.norm().clamp(min=1e-30)).sqrt().clamp(min=1e-12)
    a, b = (a * scale).float(), (b / scale).float()
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        a, b = (
            a.reshape(len(a), layer.in_channels, *layer.kernel_size),
            b.reshape(*b.shape, *[1] * len(layer.kernel_size)),
        )
    return {f"{name}.lora_A.weight": a.contiguous(), f"{name}.lora_B.weight": b.contiguous()}


def _padded(state: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zeros where a layer has less than the rank of all."""
    padded = {key: torch.zeros_like(value) for key, value in like.items()}
    for key, value in state.items():
        padded[key][tuple(slice(size) for size in value.shape)] = value.to(padded[key])
    return padded

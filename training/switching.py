"""What acts at which noise level: one thing after the other, with thresholds in log_snr between them."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Switch:
    """A partition of all noise levels: ``len(thresholds) + 1`` weights, which are 0 or more and sum to 1.

    thresholds: in log_snr, the noisiest (smallest) first. edge: width in log_snr of a straight cross-fade that is
    centred on each of them; 0 switches at once, and a level exactly at a threshold is still of the noisier side.
    """

    thresholds: tuple[float, ...]
    edge: float = 0.0

    def __post_init__(self) -> None:
        if not self.thresholds or any(not math.isfinite(each) for each in self.thresholds):
            raise ValueError(f"the thresholds are {_listed(self.thresholds)}: expected one finite log_snr or more")
        gaps = [later - earlier for earlier, later in zip(self.thresholds, self.thresholds[1:], strict=False)]
        if any(gap <= 0 for gap in gaps):
            raise ValueError(
                f"the thresholds are {_listed(self.thresholds)} in log_snr: expected the noisiest first, each later "
                "one at less noise"
            )
        if not 0 <= self.edge < math.inf:
            raise ValueError(f"the cross-fade is {self.edge:g} wide: expected 0 or more")
        if gaps and self.edge > min(gaps):
            raise ValueError(
                f"the cross-fade is {self.edge:g} wide, and two thresholds are only {min(gaps):g} apart in log_snr: "
                "expected at most that"
            )

    def weights(self, log_snr: float) -> tuple[float, ...]:
        """How much of each acts at a log_snr, which may be infinite."""
        passed = [1.0, *(self._passed(log_snr - threshold) for threshold in self.thresholds), 0.0]
        return tuple(earlier - later for earlier, later in zip(passed, passed[1:], strict=False))

    def _passed(self, distance: float) -> float:
        if self.edge:
            return min(max(distance / self.edge + 0.5, 0.0), 1.0)
        return float(distance > 0)


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "none"

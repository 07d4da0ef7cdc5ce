"""The laws of the noise level: draws of ours against closed forms that share no code with them.

The first table is that of the method's paper and its kin: mean, median and quantiles in flow time t (1 = noise), and
what falls below the paper's two thresholds of log_snr. The line below each law is exact. The second table takes laws
that are truncated to what a model knows and holds the draws against the exact CDF: D is the largest distance between
the two (Kolmogorov's and Smirnov's), p the probability of one as large from true draws. A law that was clamped
instead would show a D of its whole mass outside: 0.62 for N(-6, 2) on SD1.5.
"""

import argparse
import bisect
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import NormalDist

from package import load_package

load_package()

import torch  # noqa: E402

from stylewright.training.densities import Density, Normal, UniformTime, stratified_uniform  # noqa: E402
from stylewright.training.density_presets import DENSITIES, DensityConfig, build_density  # noqa: E402
from stylewright.training.noise import time_of_log_snr  # noqa: E402
from stylewright.training.randomness import generator  # noqa: E402

Cdf = Callable[[float], float]

SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
THRESHOLDS = (-6.52, -8.89)
FURTHEST = 200.0  # no law here has mass beyond this log_snr
SD_RANGE, PIXART_RANGE, FLOW_RANGE = (-5.3649, 7.0655), (-10.1, 9.2102), (-18.42, 18.42)


def normal(mu: float, sigma: float) -> Cdf:
    return NormalDist(mu, sigma).cdf


def logistic(shift: float) -> Cdf:
    """Uniform flow time, shifted."""
    return lambda log_snr: 1 / (1 + math.exp(-(log_snr + 2 * math.log(shift)) / 2))


def mixed(*parts: tuple[float, Cdf]) -> Cdf:
    return lambda log_snr: sum(weight * cdf(log_snr) for weight, cdf in parts)


def sd_schedule() -> Cdf:
    """Uniform over the 1000 indices of Stable Diffusion's schedule, linear in log_snr between two."""
    betas = [(0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for i in range(1000)]
    levels, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        levels.append(math.log(product / (1 - product)))
    levels.reverse()

    def cdf(log_snr: float) -> float:
        if not levels[0] < log_snr < levels[-1]:
            return float(log_snr >= levels[-1])
        right = bisect.bisect_right(levels, log_snr)
        return (right - 1 + (log_snr - levels[right - 1]) / (levels[right] - levels[right - 1])) / 999

    return cdf


def truncated(cdf: Cdf, low: float, high: float) -> Cdf:
    below, up_to = cdf(low), cdf(high)
    return lambda log_snr: min(max((cdf(log_snr) - below) / (up_to - below), 0.0), 1.0)


SD3 = normal(-2 * math.log(3), 2)
LAWS: dict[str, tuple[Density, Cdf]] = {
    "N(-6, 2)  style-friendly": (DENSITIES["style-friendly"], normal(-6, 2)),
    "N(-6, 3)  style-friendly-flux": (DENSITIES["style-friendly-flux"], normal(-6, 3)),
    "N(-6, 1)": (Normal(-6, 1), normal(-6, 1)),
    "N(-8, 2)": (Normal(-8, 2), normal(-8, 2)),
    "N(-4, 2)": (Normal(-4, 2), normal(-4, 2)),
    "N(-2.2, 2)  objects": (DENSITIES["objects"], normal(-2.2, 2)),
    "logit-normal, shift 3  sd3": (DENSITIES["sd3"], SD3),
    "N(0, 2)  logit-normal": (DENSITIES["logit-normal"], normal(0, 2)),
    "uniform time": (UniformTime(), logistic(1)),
    "uniform time, shift 3": (DENSITIES["schedule-sd3"], logistic(3)),
    "uniform in SD's schedule": (DENSITIES["schedule-sd"], sd_schedule()),
    "style-and-detail": (DENSITIES["style-and-detail"], mixed((0.75, normal(-6, 2)), (0.25, SD3))),
}
TRUNCATED: dict[str, tuple[DensityConfig, tuple[float, float], Cdf]] = {
    "N(-6, 2) on SD1.5, SDXL": (DensityConfig("style-friendly"), SD_RANGE, normal(-6, 2)),
    "N(-6, 3) on SD1.5, SDXL": (DensityConfig("style-friendly-flux"), SD_RANGE, normal(-6, 3)),
    "N(-12, 2) on SD1.5, SDXL": (DensityConfig(mu=-12.0), SD_RANGE, normal(-12, 2)),
    "sd3 on SD1.5, SDXL": (DensityConfig("sd3"), SD_RANGE, SD3),
    "N(-6, 2) on PixArt": (DensityConfig("style-friendly"), PIXART_RANGE, normal(-6, 2)),
    "N(-6, 3) on FLUX": (DensityConfig("style-friendly-flux"), FLOW_RANGE, normal(-6, 3)),
    "N(-6, 2), shift 3, on FLUX": (DensityConfig(shift=3.0), FLOW_RANGE, normal(-6 - 2 * math.log(3), 2)),
    "N(-6, 2) at 4096 carried to 64": (
        DensityConfig(reference_tokens=4096),  # build_density gets 64 tokens
        FLOW_RANGE,
        normal(-6 + math.log(4096 / 64), 2),
    ),
    "uniform time on SD1.5, SDXL": (DensityConfig("uniform"), SD_RANGE, logistic(1)),
}
TOKENS = 64


@dataclass(frozen=True)
class Figures:
    """What a law looks like."""

    mean_t: float
    t: dict[str, float]  # at shares of the draws, from data (small t) to noise
    log_snr_median: float
    below: dict[str, float]  # P(log_snr < threshold)


@dataclass(frozen=True)
class Distance:
    """Between the draws and the exact law."""

    range: tuple[float, float]
    d: float
    p: float
    outside: int  # draws beyond the range


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    options = parser.parse_args()
    if options.draws < 100:
        parser.error("--draws is at least 100")

    def draw(name: str, density: Density) -> torch.Tensor:
        source = generator(options.seed, name)  # draws of its own: D is the same for all laws of the same uniforms
        return density.icdf(torch.rand(options.draws, generator=source, dtype=torch.float64))

    laws = {name: (drawn_figures(draw(name, law)), exact_figures(cdf)) for name, (law, cdf) in LAWS.items()}
    distances = {}
    for name, (config, log_snr_range, cdf) in TRUNCATED.items():
        law = build_density(config, log_snr_range, TOKENS)
        distances[name] = distance(draw(name, law), cdf, log_snr_range)
    fours = torch.cat([stratified_uniform(4, generator(options.seed, "stratified", i)) for i in range(5000)])
    config, log_snr_range, cdf = TRUNCATED["N(-6, 2) on SD1.5, SDXL"]
    distances["the same, 20000 stratified by fours"] = distance(
        build_density(config, log_snr_range, TOKENS).icdf(fours), cdf, log_snr_range
    )
    if options.json:
        print(json.dumps(as_json(options.draws, laws, distances), indent=2))
    else:
        show(options.draws, laws, distances)


def drawn_figures(log_snr: torch.Tensor) -> Figures:
    t = time_of_log_snr(log_snr.double())
    ordered = t.sort().values
    at = {f"{share:g}": ordered[int(share * (len(t) - 1))].item() for share in SHARES}
    below = {f"{x:g}": (log_snr < x).double().mean().item() for x in THRESHOLDS}
    return Figures(t.mean().item(), at, log_snr.double().median().item(), below)


def exact_figures(cdf: Cdf) -> Figures:
    at = {f"{share:g}": time_of(quantile(cdf, 1 - share)) for share in SHARES}
    return Figures(mean_time(cdf), at, quantile(cdf, 0.5), {f"{x:g}": cdf(x) for x in THRESHOLDS})


def time_of(log_snr: float) -> float:
    return 1 / (1 + math.exp(log_snr / 2))


def quantile(cdf: Cdf, share: float) -> float:
    low, high = -FURTHEST, FURTHEST
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if cdf(middle) < share else (low, middle)
    return (low + high) / 2


def mean_time(cdf: Cdf, step: float = 0.01) -> float:
    """E[t] by parts: the integral of -dt/dlog_snr = t (1 - t) / 2 times the CDF."""
    points = (i * step for i in range(-8000, 8001))
    return step * sum(time_of(x) * (1 - time_of(x)) / 2 * cdf(x) for x in points)


def distance(log_snr: torch.Tensor, cdf: Cdf, log_snr_range: tuple[float, float]) -> Distance:
    low, high = log_snr_range
    ordered = log_snr.double().sort().values.tolist()
    exact, n = truncated(cdf, low, high), len(ordered)
    d = max(max((i + 1) / n - share, share - i / n) for i, share in enumerate(map(exact, ordered)))
    slack = 1e-5  # of float32
    outside = sum(not low - slack <= x <= high + slack for x in ordered)
    return Distance(log_snr_range, d, kolmogorov(d * math.sqrt(n)), outside)


def kolmogorov(x: float) -> float:
    """P(sqrt(n) D > x) for large n."""
    if x < 0.3:  # the series below needs many terms there, and says 1
        return 1.0
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101)))


# --------------------------------------------------------------------------------------------------------------------


def as_json(draws: int, laws: dict[str, tuple[Figures, Figures]], distances: dict[str, Distance]) -> dict:
    return {
        "draws": draws,
        "laws": {name: {"drawn": asdict(drawn), "exact": asdict(exact)} for name, (drawn, exact) in laws.items()},
        "truncated": {name: asdict(found) for name, found in distances.items()},
    }


def show(draws: int, laws: dict[str, tuple[Figures, Figures]], distances: dict[str, Distance]) -> None:
    head = f"{'mean t':>8}{'median':>8}" + "".join(f"{f't {share:g}':>8}" for share in SHARES if share != 0.5)
    head += "".join(f"{f'P(<{x:g})':>11}" for x in THRESHOLDS)
    print(f"{f'{draws} draws, and exact':36}{head}")
    for name, pair in laws.items():
        for label, figures in zip((name, ""), pair, strict=True):
            quantiles = "".join(f"{t:>8.4f}" for share, t in figures.t.items() if share != "0.5")
            below = "".join(f"{share:>11.5f}" for share in figures.below.values())
            print(f"{label:36}{figures.mean_t:>8.4f}{figures.t['0.5']:>8.4f}{quantiles}{below}")
    print(f"\n{'truncated laws':36}{'range of log_snr':>18}{'D':>10}{'p':>8}{'outside':>9}")
    for name, found in distances.items():
        low, high = found.range
        print(f"{name:36}{f'[{low:.2f}, {high:.2f}]':>18}{found.d:>10.5f}{found.p:>8.3f}{found.outside:>9}")


if __name__ == "__main__":
    main()

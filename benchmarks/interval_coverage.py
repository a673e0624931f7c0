"""Do the 95 % limits hold? How often they contain the truth in simulated campaigns whose runs are not independent.

    python -m benchmarks.interval_coverage --campaigns 2000

A campaign has clusters of runs. Each cluster draws its own probability from a beta distribution around the rate, with
the intra-cluster correlation as its width (beta-binomial); its runs then follow that. Printed beside: the naive limits
(Wilson's), which take all runs for independent. Of means: each cluster draws a centre, each run a value around it, both
log-normal. 2,000 campaigns know a coverage to half a percentage point (one standard error).

Public names: ``main``, ``RateSetting``, ``MeanSetting``, ``Coverage``, ``rate_coverage``, ``mean_coverage``, ``RATES``,
``MEANS``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.analysis.clusters import ClusterSums, ratio
from experiments.analysis.intervals import wilson_limits
from experiments.analysis.rates import rate_of
from experiments.analysis.resampling import bootstrap_limits, ratio_influence


@dataclass(frozen=True)
class RateSetting:
    """A campaign: clusters of ``runs`` runs each, or of 1 to ``2 runs - 1`` where they are ``uneven``."""

    clusters: int
    runs: int
    rate: float
    correlation: float
    uneven: bool = False


@dataclass(frozen=True)
class MeanSetting:
    """A campaign of values whose logarithms vary by ``between`` clusters and ``within`` them (standard deviations)."""

    clusters: int
    runs: int
    between: float
    within: float


@dataclass(frozen=True)
class Coverage:
    """Shares of campaigns whose limits contain the truth, and how wide the printed ones are on average."""

    printed: float
    naive: float
    width: float


RATES = (
    RateSetting(60, 16, 0.2, 0.2),
    RateSetting(30, 16, 0.2, 0.2),
    RateSetting(30, 16, 0.05, 0.2),
    RateSetting(60, 16, 0.05, 0.2),
    RateSetting(60, 16, 0.05, 0.05),
    RateSetting(60, 16, 0.5, 0.2),
    RateSetting(15, 16, 0.2, 0.2),
    RateSetting(60, 16, 0.2, 0.2, uneven=True),
    RateSetting(30, 16, 0.05, 0.2, uneven=True),
    RateSetting(60, 16, 0.01, 0.1),
    RateSetting(144, 10, 0.1, 0.1, uneven=True),
)

MEANS = (MeanSetting(60, 16, 0.5, 0.5), MeanSetting(30, 16, 0.5, 0.5), MeanSetting(15, 4, 0.5, 1.0))


def rate_coverage(setting: RateSetting, campaigns: int, seed: int = 0) -> Coverage:
    """Return how often limits of a rate contain it."""
    generator = np.random.default_rng(seed)
    spread = (1 - setting.correlation) / setting.correlation
    shape = (campaigns, setting.clusters)
    chances = generator.beta(setting.rate * spread, (1 - setting.rate) * spread, shape)
    sizes = generator.integers(1, 2 * setting.runs, shape) if setting.uneven else np.full(shape, setting.runs)
    hits = generator.binomial(sizes, chances).astype(np.float64)
    limits = np.empty((campaigns, 4))
    for place in range(campaigns):
        runs = sizes[place].astype(np.float64)
        row = rate_of(ClusterSums(hits[place], runs, runs, runs, hits[place]))
        limits[place] = [row[name] for name in ("low", "high", "wilson_low", "wilson_high")]
    return _coverage(limits, setting.rate)


def mean_coverage(setting: MeanSetting, campaigns: int, seed: int = 0) -> Coverage:
    """Return how often limits of a mean contain it; naive are those of the normal distribution over all runs."""
    generator = np.random.default_rng(seed)
    truth = float(np.exp((setting.between**2 + setting.within**2) / 2))
    runs = np.full(setting.clusters, float(setting.runs))
    limits = np.empty((campaigns, 4))
    for place in range(campaigns):
        centres = generator.normal(0, setting.between, (setting.clusters, 1))
        values = np.exp(centres + generator.normal(0, setting.within, (setting.clusters, setting.runs)))
        totals = values.sum(axis=1)
        sums = ClusterSums(totals, runs, runs, runs, totals)
        mean = ratio(sums).value
        found = bootstrap_limits(mean, ratio_influence(sums))
        half = 1.96 * float(values.std(ddof=1)) / values.size**0.5
        limits[place] = found.low, found.high, mean - half, mean + half
    return _coverage(limits, truth)


def _coverage(limits: NDArray[np.float64], truth: float) -> Coverage:
    low, high, naive_low, naive_high = limits.T
    return Coverage(
        float(((low <= truth) & (truth <= high)).mean()),
        float(((naive_low <= truth) & (truth <= naive_high)).mean()),
        float((high - low).mean()),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate every setting and print the coverage."""
    parser = argparse.ArgumentParser(description="Coverage of the 95 % limits of correlated runs.")
    parser.add_argument("--campaigns", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    if chosen.campaigns < 1:
        parser.error(f"--campaigns: got {chosen.campaigns}, allowed 1 or more")
    nothing = wilson_limits(0.0, 1000)[1]
    print(f"0 of 1,000 independent runs: upper Wilson limit {nothing:.4f}\n")
    print(f"{'clusters':>8} {'runs':>6} {'rate':>6} {'correlation':>11}  {'printed':>8} {'naive':>8} {'width':>7}")
    for setting in RATES:
        found = rate_coverage(setting, chosen.campaigns, chosen.seed)
        runs = f"1-{2 * setting.runs - 1}" if setting.uneven else str(setting.runs)
        print(
            f"{setting.clusters:8} {runs:>6} {setting.rate:6} {setting.correlation:11}  {100 * found.printed:6.1f} % "
            f"{100 * found.naive:6.1f} % {found.width:7.3f}",
            flush=True,
        )
    print(f"\n{'clusters':>8} {'runs':>6} {'between':>7} {'within':>10}  {'printed':>8} {'naive':>8} {'width':>7}")
    for mean in MEANS:
        found = mean_coverage(mean, chosen.campaigns, chosen.seed)
        print(
            f"{mean.clusters:8} {mean.runs:6} {mean.between:7} {mean.within:10}  {100 * found.printed:6.1f} % "
            f"{100 * found.naive:6.1f} % {found.width:7.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

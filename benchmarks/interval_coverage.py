"""Do the 95 % limits hold? How often they contain the truth in simulated campaigns whose runs are not independent.

    python -m benchmarks.interval_coverage --campaigns 2000

A campaign has clusters of runs. Each cluster draws its own probability from a beta distribution around the rate, with
the intra-cluster correlation as its width (beta-binomial); its runs then follow that. Printed beside: the naive limits
(Wilson's), which take all runs for independent. Of means: each cluster draws a centre, each run a value around it, both
log-normal.

Where two effects cross, every input and every head has one of its own (random, independent), and runs that share
either are correlated; a run is a hit where the sum of both and its own noise, all normal, passes a threshold. The
correlation given is that of two runs which share the input alone, or the head alone.

2,000 campaigns know a coverage to half a percentage point (one standard error).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import multivariate_normal, norm

from experiments.analysis.rates import rate_of
from experiments.analysis.statistics.cluster_sums import ClusterSums, ratio
from experiments.analysis.statistics.clusters import crossed
from experiments.analysis.statistics.intervals import wilson_limits
from experiments.analysis.statistics.resampling import mean_limits


@dataclass(frozen=True)
class RateSetting:
    """A campaign: clusters of ``runs`` runs each, or of 1 to ``2 runs - 1`` where they are ``uneven``."""

    clusters: int
    runs: int
    rate: float
    correlation: float
    uneven: bool = False


@dataclass(frozen=True)
class CrossedSetting:
    """A campaign of ``runs`` runs of every head on every input, each of which has an effect of its own."""

    inputs: int
    heads: int
    runs: int
    rate: float
    of_inputs: float
    of_heads: float


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

CROSSED = (
    CrossedSetting(16, 16, 3, 0.2, 0.05, 0.05),
    CrossedSetting(16, 16, 3, 0.2, 0.1, 0.1),
    CrossedSetting(16, 16, 3, 0.05, 0.05, 0.05),
    CrossedSetting(60, 16, 3, 0.2, 0.05, 0.05),
    CrossedSetting(60, 16, 3, 0.05, 0.05, 0.05),
    CrossedSetting(16, 16, 3, 0.2, 0.05, 0.0),
    CrossedSetting(16, 16, 3, 0.2, 0.0, 0.05),
    CrossedSetting(16, 16, 3, 0.2, 0.0, 0.0),
    CrossedSetting(60, 60, 1, 0.2, 0.05, 0.05),
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


def crossed_coverage(setting: CrossedSetting, campaigns: int, seed: int = 0) -> Coverage:
    """Return how often limits of a rate contain it where inputs and heads have effects."""
    generator = np.random.default_rng(seed)
    threshold = float(norm.ppf(setting.rate))
    shares = [_latent(setting.rate, correlation) for correlation in (setting.of_inputs, setting.of_heads)]
    limits = np.empty((campaigns, 4))
    for place in range(campaigns):
        inputs = generator.normal(0, shares[0] ** 0.5, (setting.inputs, 1))
        heads = generator.normal(0, shares[1] ** 0.5, (1, setting.heads))
        chances = norm.cdf((threshold - inputs - heads) / (1 - sum(shares)) ** 0.5)
        hits = generator.binomial(setting.runs, chances).astype(np.float64)
        parts = {(0,): hits.sum(axis=1), (1,): hits.sum(axis=0), (0, 1): hits.ravel()}
        sums = {}
        for ways, found in parts.items():
            runs = np.full(len(found), setting.runs * hits.size / len(found))
            sums[ways] = ClusterSums(found, runs, runs, runs, found)
        row = rate_of(crossed(sums))
        limits[place] = [row[name] for name in ("low", "high", "wilson_low", "wilson_high")]
    return _coverage(limits, setting.rate)


def _latent(rate: float, correlation: float) -> float:
    """Return the correlation of two normal numbers whose being below the threshold of ``rate`` has this one."""
    if not correlation:
        return 0.0
    threshold = float(norm.ppf(rate))
    both = rate**2 + correlation * rate * (1 - rate)

    def beyond(latent: float) -> float:
        joint = multivariate_normal.cdf([threshold, threshold], mean=[0.0, 0.0], cov=[[1.0, latent], [latent, 1.0]])
        return float(joint) - both

    return float(brentq(beyond, 0.0, 0.99))


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
        found = mean_limits(sums)
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
    print(f"\n{'inputs':>8} {'heads':>6} {'runs':>6} {'rate':>6} {'correlations':>12}", end="  ")
    print(f"{'printed':>8} {'naive':>8} {'width':>7}")
    for two in CROSSED:
        found = crossed_coverage(two, chosen.campaigns, chosen.seed)
        print(
            f"{two.inputs:8} {two.heads:6} {two.runs:6} {two.rate:6} {two.of_inputs:6} {two.of_heads:5}  "
            f"{100 * found.printed:6.1f} % {100 * found.naive:6.1f} % {found.width:7.3f}",
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

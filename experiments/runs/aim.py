"""Draw the open part of a fault (``fault.aim``), and compute the weight that corrects for unequal probabilities.

    faults, weight = draw_by_bits(spec, sites, random)
    faults, weight = EffectAim(subject, batches).draw(spec, sites, layers, baseline, batch_index, random)

A run's ``sampling_weight`` is the probability of its fault under uniform drawing, divided by its probability under this
aim.
Input and layers are always drawn uniformly.

``bits``: the element is uniform; a bit of sign or exponent is drawn 8 times as often as a bit of the mantissa.

``effect``: m candidates are drawn uniformly, and one of them, J, with probability g_J / (g_1 + ... + g_m), where g
grows with the predicted change of the layer's output (``bounds.effects.fault_severity``).
Its weight is W = mean(g) / g_J.
For any outcome h, whatever g > 0 is,

    E[h(X_J) W] = E[ sum_j (g_j / sum(g)) h(X_j) (sum(g) / m) / g_j ] = E[ mean_j h(X_j) ] = E[h(X)],  X uniform,

so weighted means are unbiased, and E[W] = 1. A bad prediction costs variance, never correctness. (Sampling importance
resampling: Rubin 1987; weights and defensive mixtures: Owen and Zhou, JASA 95, 2000.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.passes.baseline import Baseline
from experiments.passes.subject import Subject
from experiments.runs.clean_sites import CleanSites
from fault_injection import Fault, FaultSpec, Site, bit_field, draw_fault
from fault_injection.faults.candidates import ElementPool, draw_candidates
from fault_injection.faults.fault import bit_choices

OFTEN = 8.0
"""How many times as often a bit of sign or exponent is drawn as a bit of the mantissa; no weight then exceeds 3. The
variance would be smallest at the root of the ratio of their rates of harmful flips, 10 to 20 for float32
(docs/sampling.md)."""

CANDIDATES = 128
FLOOR = 0.05
"""The preference for a fault without a predicted effect. It limits weights to 1 / FLOOR."""
HALF = 0.5
"""At this relative change of a row of the layer's output about half of the flips are critical (docs/sampling.md)."""
KEPT_POOLS = 16


def draw_by_bits(
    spec: FaultSpec, sites: Sequence[Site], random: np.random.Generator
) -> tuple[tuple[Fault, ...], float]:
    """Draw a fault at each site, bits of sign and exponent more often; return the faults and their weight.

    Args:
        spec: a specification with open bits.
        sites: one site in each chosen layer.
        random: the generator of the run.
    """
    faults, weight = [], 1.0
    for site in sites:
        if isinstance(spec.bits, tuple):
            raise ValueError(f"fault.aim: got 'bits', allowed only where fault.bit is open, got {spec.bits}")
        choices = bit_choices(spec.bits, site.dtype)
        often = np.array([1.0 if bit_field(site.dtype, bit) == "mantissa" else OFTEN for bit in choices])
        chosen = _choose(often, random)
        weight *= float(often.mean() / often[chosen])
        faults.append(draw_fault(replace(spec, bits=(choices[chosen],)), site, random))
    return tuple(faults), weight


def preference(severity: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return g of predicted severities, from FLOOR to 1; a severity that cannot be predicted (NaN) counts as severe.

    The best g is the root of the probability of harm. A logistic curve in the logarithm of the severity s describes
    this probability, 1 / (1 + (HALF / s)^2), and the floor makes g a defensive mixture.
    """
    with np.errstate(divide="ignore", over="ignore"):
        harm = 1 / (1 + np.square(HALF / severity))
    return FLOOR + (1 - FLOOR) * np.sqrt(np.where(np.isnan(harm), 1.0, harm))


class EffectAim:
    """Draws faults by their predicted effect.

    Args:
        subject: the patched model.
        batches: batches on its device.
    """

    def __init__(self, subject: Subject, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self._clean = CleanSites(subject, batches)
        self._pools: OrderedDict[tuple[object, ...], ElementPool] = OrderedDict()

    def draw(
        self,
        spec: FaultSpec,
        sites: Sequence[Site],
        layers: Sequence[int],
        baseline: Baseline,
        batch_index: int,
        random: np.random.Generator,
    ) -> tuple[tuple[Fault, ...], float]:
        """Draw a fault at each site, large predicted effects more often; return the faults and their weight.

        Args:
            spec: a specification whose faults hit one element.
            sites: one site in each chosen layer.
            layers: all layers that may be chosen; their clean tensors are computed together.
            baseline: the fault-free pass of the input.
            batch_index: the number of the input.
            random: the generator of the run.
        """
        clean = self._clean.get(batch_index, spec.location, tuple(layers), baseline.situation)
        drawn, severities = [], []
        for site in sites:
            candidates = draw_candidates(spec, site, self._pool(spec, site, batch_index), CANDIDATES, random)
            before, after = candidates.values(clean[site.layer].elements)
            device = clean[site.layer].elements.device
            indices = torch.from_numpy(candidates.indices)
            found = clean[site.layer].terms.severity(*(part.to(device) for part in (indices, before, after)))
            drawn.append(candidates)
            severities.append(found.cpu().numpy())
        # If a run has faults in several layers, the most severe one counts.
        preferred = preference(np.max(severities, axis=0))
        chosen = _choose(preferred, random)
        weight = float(preferred.mean() / preferred[chosen])
        return tuple(candidates.fault(chosen) for candidates in drawn), weight

    def _pool(self, spec: FaultSpec, site: Site, batch_index: int) -> ElementPool:
        key = batch_index, site.layer, site.location, spec.index, spec.include_masked
        if key not in self._pools:
            self._pools[key] = ElementPool.of(site, spec.index, include_masked=spec.include_masked)
            if len(self._pools) > KEPT_POOLS:
                self._pools.popitem(last=False)
        self._pools.move_to_end(key)
        return self._pools[key]


def _choose(shares: NDArray[np.float64], random: np.random.Generator) -> int:
    ends = np.cumsum(shares)
    return min(int(np.searchsorted(ends, random.random() * ends[-1], side="right")), len(shares) - 1)

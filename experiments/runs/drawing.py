"""Draw the input and the faults of a run.

    drawing = FaultDrawing(subject, batches, baselines)
    drawing.check(config)                                   # refuses faults that this model cannot have
    drawn = drawing.draw(planned, config)                   # a DrawnRun: input, faults, their weight

The run's own generator draws everything random, in this order: batch, layers, element, bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from experiments.config import ExperimentConfig
from experiments.passes.baseline import Baseline
from experiments.passes.baselines import Baselines
from experiments.passes.subject import Subject
from experiments.plan.plan import PlannedRun
from experiments.runs.aim import EffectAim, draw_by_bits
from experiments.runs.record import DrawnRun
from fault_injection import Fault, Site, candidate_layers, choose_layers, draw_fault, instrumentation_of
from fault_injection.numbers.bits import check_bits
from monitoring.cache.fingerprints import digest
from monitoring.cache.model_fingerprints import model_fingerprint


class FaultDrawing:
    """Draws runs of one model and one set of batches.

    Args:
        subject: the patched model.
        batches: batches on its device.
        baselines: their fault-free passes.
    """

    def __init__(self, subject: Subject, batches: Sequence[Mapping[str, Tensor]], baselines: Baselines) -> None:
        self._subject, self._batches, self._baselines = subject, batches, baselines
        self._effect_aim = EffectAim(subject, batches)
        self._first_sites: Mapping[tuple[int, str], Site] | None = None

    def layers(self, config: ExperimentConfig) -> list[int]:
        """Return the candidate layers of a run; raise ``ValueError`` if the configuration names a missing layer."""
        fault = config.fault
        allowed = instrumentation_of(self._subject.model).injection_layers
        layers = fault.layer_list()
        if allowed is None:
            return candidate_layers(self._subject.layer_names, layers, fault.layer_pattern)
        refused = sorted(set(layers or ()) - set(allowed))
        if refused:
            raise ValueError(f"fault.layers: got {refused[0]}, allowed {list(allowed)} (injection_layers of the patch)")
        return candidate_layers(self._subject.layer_names, layers or list(allowed), fault.layer_pattern)

    def check(self, config: ExperimentConfig) -> None:
        """Raise ``ValueError`` or ``IndexError`` if this fault cannot be drawn on the first batch."""
        spec = config.fault.spec()
        # Reading the cache costs a copy of the baseline.
        if self._first_sites is None:
            self._first_sites = self._baselines.get(0, config).sites
        sites = self._first_sites
        for layer in self.layers(config):
            site = sites[layer, spec.location]
            site.check(spec.index)
            if isinstance(spec.bits, tuple):
                check_bits(spec.bits, site.dtype)

    def draw(
        self, planned: PlannedRun, config: ExperimentConfig, known: tuple[str, Baseline] | None = None
    ) -> DrawnRun:
        """Draw everything random in a run.

        Args:
            planned: the run's identity.
            config: the configuration of this run alone.
            known: fingerprint of the model and baseline of the input, if the caller has them: they cost milliseconds.

        Raises:
            ValueError, IndexError: the model does not have the layers, the bits or the index.
        """
        model_id = known[0] if known else model_fingerprint(self._subject.model)
        random = planned.generator()
        batch_index = int(random.integers(len(self._batches)))
        baseline = known[1] if known else self._baselines.get(batch_index, config, planned.run_id, model_id)
        faults, weight = self._draw(config, baseline, batch_index, random)
        fault_id = digest(model_id, self._baselines.input_ids[batch_index], *(fault.to_json() for fault in faults))[:16]
        first = bool(random.integers(2))
        return DrawnRun(planned, config, batch_index, baseline, faults, fault_id, first, model_id, weight)

    def _draw(
        self, config: ExperimentConfig, baseline: Baseline, batch_index: int, random: np.random.Generator
    ) -> tuple[tuple[Fault, ...], float]:
        """Return the faults and their weight (``fault.aim``)."""
        candidates, mode = self.layers(config), config.fault.effective_layer_mode()
        layers = choose_layers(candidates, mode, random)
        spec = config.fault.spec()
        sites = [baseline.sites[layer, spec.location] for layer in layers]
        if config.fault.aim == "bits":
            return draw_by_bits(spec, sites, random)
        if config.fault.aim == "effect":
            possible = candidates if mode == "random" else layers
            return self._effect_aim.draw(spec, sites, possible, baseline, batch_index, random)
        return tuple(draw_fault(spec, site, random) for site in sites), 1.0

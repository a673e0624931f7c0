"""What the plain injected pass says of a fault, to hold faster ways against it bit for bit.

check = PlainCheck(workload)
check.differing(fault, found)          # None, or the name of what differs
"""

from __future__ import annotations

from benchmarks.variants import CRITICAL_LOSS, Found
from benchmarks.workloads import DEFAULT_DETECTORS, Workload
from experiments.effects.outcome import effect_of
from experiments.engine.opened_batch import recorded_part
from experiments.passes.injected_pass import InjectedPass, Observed
from experiments.passes.taps.output_keeper import OutputKeeper, change_of
from fault_injection import Fault
from monitoring import PerformanceMonitor


class PlainCheck:
    """Runs faults by whole passes under the default detectors; a fault is run once, however often it is asked for."""

    def __init__(self, work: Workload) -> None:
        self._work = work
        self._expected: dict[Fault, Found] = {}
        self._clean: dict[int, OutputKeeper] = {}

    def differing(self, fault: Fault, found: Found) -> str | None:
        """Return what of ``found`` is not bitwise what the plain pass gives; what is not said is not compared."""
        if fault not in self._expected:
            self._expected[fault] = self._run(fault)
        expected = self._expected[fault]
        for name in ("effect", "local"):
            # As text, so that NaN is equal to NaN.
            if (got := getattr(found, name)) is not None and repr(got) != repr(getattr(expected, name)):
                return name
        for name, verdict in found.verdicts.items():
            if recorded_part(verdict) != recorded_part(expected.verdicts[name]):
                return name
        return None

    def _run(self, fault: Fault) -> Found:
        work, config = self._work, self._work.config(DEFAULT_DETECTORS)
        baseline = work.baseline(DEFAULT_DETECTORS)
        detectors = work.pairs.detectors(config)
        observed = Observed(baseline.situation, detectors, config.detect, keep_output=True)
        monitor = PerformanceMonitor(work.subject.device)
        injected = InjectedPass.of(work.subject, work.batch, [fault], observed, monitor)
        if injected.keeper is None:
            raise RuntimeError("the output of the layer was asked for, and not kept")
        if fault.layer not in self._clean:
            self._clean[fault.layer] = OutputKeeper(fault.layer)
            work.subject.forward(work.batch, self._clean[fault.layer])
        local = change_of(fault, injected.keeper, self._clean[fault.layer])
        effect = effect_of(baseline.evaluation, injected.evaluation, work.batch, work.subject.family, CRITICAL_LOSS)
        verdicts = {name: said for (name, layer), said in injected.watcher.verdicts.items() if layer == fault.layer}
        return Found(effect, local, verdicts)

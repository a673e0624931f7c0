"""Many faults in one forward pass: one in each sequence of a batch, each judged on its own.

A batch of F + 1 windows is run once without faults and then again and again with F faults, one per sequence, all in
one layer; the last sequence has none and must stay bitwise what it was. Both passes have one shape, so a sequence is
paired with itself. Detectors look at the injected layer and those behind it, and judge each sequence on its own.

    trial = Trials(subject, batch, detectors).run(layer, faults)[0]
    trial.fired, trial.effect.outcome
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bounds import AttentionState, Detector
from experiments.effects.loss import Evaluation
from experiments.effects.outcome import Effect, effect_of
from experiments.passes.subject import Subject
from experiments.passes.taps.call_state import COMPLETE, Origins, Situation, call_state, keep_tensor
from experiments.passes.taps.origins import recorded_origins
from experiments.passes.taps.watcher import Watcher
from fault_injection import AttentionCall, Fault, InjectionRecord, Injector, SiteSurvey, tapped
from fault_injection.attention.call_tensors import CallTensors
from fault_injection.numbers.model_outputs import bitwise_equal


@dataclass(frozen=True)
class Trial:
    """What one fault did, and which detectors fired in its sequence."""

    fault: Fault
    record: InjectionRecord
    effect: Effect
    fired: frozenset[str]


class Trials:
    """Runs faults on one batch.

    Args:
        subject: the patched model.
        batch: F + 1 windows, as ``Subject.to_device`` returns them.
        detectors: prepared ones.
        critical_loss: as in the configuration of campaigns.

    Attributes:
        clean: what the detectors said of the fault-free pass, by name and layer.
        false_positives: those of them that fired although a theorem forbids it.
    """

    def __init__(
        self,
        subject: Subject,
        batch: Mapping[str, Tensor],
        detectors: Sequence[Detector],
        critical_loss: float = 1e-3,
    ) -> None:
        self.subject, self.batch, self.detectors = subject, batch, detectors
        self.faults_per_pass = len(batch["input_ids"]) - 1
        survey = SiteSurvey(subject.dtype)
        subject.forward(batch, survey)
        self.sites = survey.sites()
        situation = Situation.of(survey, subject.kv_equal)
        with recorded_origins(subject.model, detectors) as origins:
            clean = Watcher(detectors, situation, origins=origins)
            self._baseline = subject.forward(batch, clean)
        # The others may fire here: no theorem forbids it.
        proved = {detector.name for detector in detectors if detector.proved}
        self.clean = clean.verdicts
        self.false_positives = {key: v for key, v in clean.verdicts.items() if v.fired and key[0] in proved}
        self._situation = dataclasses.replace(situation, baseline=clean.statistics)
        self._critical_loss = critical_loss
        self._parts = [self._sequence(self._baseline, b) for b in range(self.faults_per_pass)]

    def run(self, layer: int, faults: Sequence[Fault]) -> list[Trial]:
        """Inject ``faults[b]``, which must lie in sequence b of ``layer``, in one pass.

        Raises:
            RuntimeError: the sequence without a fault changed.
        """
        injector = Injector(faults)
        with recorded_origins(self.subject.model, self.detectors) as origins:
            watcher = _SequenceWatcher(self.detectors, self._situation, layer, len(faults), origins)
            with tapped(self.subject.model, injector):
                injected = self.subject.forward(self.batch, watcher)
        injector.finish()
        if not bitwise_equal(injected.output[-1], self._baseline.output[-1]):
            raise RuntimeError("the sequence without a fault changed: the sequences of this batch are not independent")
        trials = []
        for b, fault in enumerate(faults):
            record = next(record for record in injector.records if record.fault is fault)
            part = {name: tensor[b : b + 1] for name, tensor in self.batch.items()}
            effect = effect_of(
                self._parts[b], self._sequence(injected, b), part, self.subject.family, self._critical_loss
            )
            fired = set(watcher.fired[b])
            if effect.nonfinite_rows:
                fired.add("finite")
            trials.append(Trial(fault, record, effect, frozenset(fired)))
        return trials

    def _sequence(self, evaluation: Evaluation, b: int) -> Evaluation:
        losses = evaluation.sequence_losses
        own = None if losses is None else losses[b : b + 1]
        return Evaluation(None if own is None else float(own[0]), own, evaluation.output[b : b + 1])


class _SequenceWatcher:
    """A tap that notes for each sequence which detectors fire in it."""

    locations = COMPLETE

    def __init__(
        self,
        detectors: Sequence[Detector],
        situation: Situation,
        layer: int,
        sequences: int,
        origins: Origins | None,
    ) -> None:
        self.layers: frozenset[int] | None = None
        self.fired: list[set[str]] = [set() for _ in range(sequences)]
        self._detectors, self._situation, self._layer, self._origins = detectors, situation, layer, origins
        self._kept = CallTensors()

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        if call.core.index < self._layer:
            return
        keep_tensor(self._kept, location, tensor, call, self._situation)
        if location != "out":
            return
        with torch.no_grad():
            self._look(
                call_state(call, self._kept.take(call), self._situation, self._origins), (call.core.index, call.number)
            )

    def _look(self, state: AttentionState, key: tuple[int, int]) -> None:
        statistics = self._situation.baseline.get(key, {})
        for detector in self._detectors:
            kept = statistics.get(detector.name)
            if detector.oracle and kept is None:
                continue
            verdicts = detector.check_each(state, kept)
            # The last sequence has no fault.
            for fired, verdict in zip(self.fired, verdicts, strict=False):
                if verdict.fired:
                    fired.add(detector.name)

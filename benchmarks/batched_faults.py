"""Many faults in one forward pass: one in each sequence of a batch, each judged on its own.

A batch of F + 1 windows is run once without faults and then again and again with F faults, one per sequence, all in
one layer; the last sequence has none and must stay bitwise what it was. Both passes have one shape, so a sequence is
paired with itself. Detectors look at the injected layer and those behind it; the rows where they fire tell the
sequence.

    trial = Trials(subject, batch, detectors).run(layer, faults)[0]
    trial.fired, trial.effect.outcome

Public names: ``Trials``, ``Trial``.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bounds.detector
from bounds import AttentionState, Detector, Verdict
from bounds.attention_state import ProjectedOperand
from experiments.call_state import COMPLETE, Origins, Situation, call_state, keep_tensor
from experiments.objective import Evaluation
from experiments.origins import recorded_origins
from experiments.outcome import Effect, effect_of
from experiments.subject import Subject
from experiments.watcher import Watcher
from fault_injection import AttentionCall, Fault, InjectionRecord, Injector, SiteSurvey, tapped
from fault_injection.model_outputs import bitwise_equal


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
            with tapped(self.subject.model, injector), _all_positions():
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

    def on(self, location: str, tensor: Tensor, call: AttentionCall) -> None:
        if call.core.index < self._layer:
            return
        keep_tensor(location, tensor, call, self._situation)
        if location != "out":
            return
        with torch.no_grad():
            self._look(call_state(call, self._situation, self._origins), (call.core.index, call.number))
        call.tensors.clear()

    def _look(self, state: AttentionState, key: tuple[int, int]) -> None:
        statistics = self._situation.baseline.get(key, {})
        for detector in self._detectors:
            kept = statistics.get(detector.name)
            verdict = _verdict(detector, state, kept)
            if verdict is None or not verdict.fired:
                continue
            if len(verdict.positions) == verdict.violations:
                broken = {position[0] for position in verdict.positions}
            else:
                broken = _guilty(detector, state, kept, range(len(self.fired)))
            for b in broken & set(range(len(self.fired))):
                self.fired[b].add(detector.name)


def _guilty(detector: Detector, state: AttentionState, baseline: Any, sequences: range) -> set[int]:
    """Return the sequences in which a detector fires, by halving."""
    part = slice(sequences.start, sequences.stop)
    verdict = _verdict(detector, _sequences_of(state, part), _slice(baseline, part))
    if verdict is None or not verdict.fired:
        return set()
    if len(sequences) == 1:
        return set(sequences)
    middle = len(sequences) // 2
    halves = sequences[:middle], sequences[middle:]
    return set().union(*(_guilty(detector, state, baseline, half) for half in halves))


def _verdict(detector: Detector, state: AttentionState, baseline: Any) -> Verdict | None:
    if detector.oracle and baseline is None:
        return None
    return detector.check(state, baseline if detector.oracle else None)


@contextmanager
def _all_positions() -> Iterator[None]:
    """Let verdicts list every violating row, not the first few."""
    limit = bounds.detector.MAX_POSITIONS
    bounds.detector.MAX_POSITIONS = sys.maxsize
    try:
        yield
    finally:
        bounds.detector.MAX_POSITIONS = limit


def _slice(value: Any, part: slice) -> Any:
    """Return some sequences of nested dataclasses of tensors; an axis of size 1 stands for all of them."""
    if isinstance(value, Tensor):
        return value if value.ndim == 0 or value.shape[0] == 1 else value[part]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _slice(getattr(value, f.name), part) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return value


def _sequences_of(state: AttentionState, part: slice) -> AttentionState:
    changed: dict[str, Any] = {}
    for f in dataclasses.fields(state):
        if f.init and f.name != "mass" and isinstance(value := getattr(state, f.name), Tensor):
            changed[f.name] = _slice(value, part)
    # One tensor must stay one tensor: detectors that see it read it once.
    changed["mass"] = changed["weights"] if state.mass is state.weights else _slice(state.mass, part)
    if state.projected is not None:
        changed["projected"] = {name: _operand(operand, part) for name, operand in state.projected.items()}
    return dataclasses.replace(state, **changed)


def _operand(operand: ProjectedOperand, part: slice) -> ProjectedOperand:
    rotation = operand.rotation
    return ProjectedOperand(
        _slice(operand.hidden, part),
        _slice(operand.projected, part),
        None if rotation is None else (_slice(rotation[0], part), _slice(rotation[1], part)),
    )

"""One input, ready for fast runs: its recorded fault-free pass, and the facts found in it.

opening = Opening(subject, chain, detectors)
baseline = baselines.get(number, config, recorder=opening)               # one pass for both
opened = opening.opened(batch, baseline)                                 # or the reason why it cannot be
engine = opened.engine(batch_runs=None)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bounds import Detector, Verdict
from experiments.effects.baseline_rows import BaselineRows
from experiments.effects.block_outputs import BlockOutputs
from experiments.effects.loss import Evaluation, output_of
from experiments.engine.fast.engine import CleanPass, FastEngine
from experiments.engine.fast.recording import Recording, record, recorded_pass
from experiments.engine.fast.site_verdicts import CleanGroups, unsupported
from experiments.engine.fast.wide_linear import OutputBuffer
from experiments.inputs.blocks import Chain
from experiments.passes.baseline import Baseline, Judge
from experiments.passes.subject import Subject
from experiments.passes.taps.call_state import Origins, Situation
from experiments.passes.taps.origins import recorded_origins
from experiments.passes.taps.watcher import Watcher
from fault_injection import Tap
from fault_injection.numbers.model_outputs import bitwise_equal
from monitoring.cache.cached_value import value_digest
from monitoring.performance.memory import give_back_free_memory


@dataclass(frozen=True, eq=False)
class OpenedBatch(CleanPass):
    """What the runs of one input share, and how it is made."""

    @classmethod
    def of(
        cls,
        subject: Subject,
        chain: Chain,
        batch: Mapping[str, Tensor],
        baseline: Baseline,
        detectors: Sequence[Detector],
    ) -> OpenedBatch | str:
        """Run a fault-free pass of its own and keep what runs can begin from, or say why they cannot."""
        groups = None
        # The fault-free pass and its recording leave many large holes in memory.
        give_back_free_memory()
        with recorded_origins(subject.model, detectors) as origins:
            if detectors and unsupported(detectors) is None:
                groups = CleanGroups(detectors, baseline.situation, origins, subject.synchronize)
            taps = () if groups is None else (groups,)
            recording = record(subject, chain, batch, *taps, origins=origins)
        if isinstance(recording, str):
            return recording
        if not bitwise_equal(recording.evaluation.output, baseline.evaluation.output):
            return "a recorded pass gives another output than the plain one"
        rows = BaselineRows.of(subject.family, baseline.evaluation.output, batch)
        return cls.recorded(subject, chain, baseline, recording, groups, rows)

    @classmethod
    def recorded(
        cls,
        subject: Subject,
        chain: Chain,
        baseline: Baseline,
        recording: Recording,
        groups: CleanGroups | None,
        rows: BaselineRows,
    ) -> OpenedBatch:
        """Return what runs share, of a pass that was recorded and gave the output of the baseline."""
        # The two outputs are equal, and one of them is enough to keep.
        recording = replace(recording, evaluation=baseline.evaluation)
        give_back_free_memory()
        length = recording.hidden[0].shape[1]
        causal = is_causal(baseline.situation, length)
        overwritten = frozenset(layer for layer, _ in baseline.situation.overwritten)
        return cls(subject, chain, recording, groups, rows, causal, overwritten)

    @cached_property
    def outputs(self) -> BlockOutputs:
        """What the blocks returned."""
        return BlockOutputs.of(self.recording.hidden[1:], self.rows.real)

    def engine(self, batch_runs: int | None, buffer: OutputBuffer | None, *, propagation: bool = False) -> FastEngine:
        """Return the engine for this input; see ``FastEngine``. With ``propagation`` it follows runs through blocks."""
        outputs = self.outputs if propagation else None
        return FastEngine(self, batch_runs=batch_runs, buffer=buffer, outputs=outputs)

    def differing_verdict(self, baseline: Baseline) -> str | None:
        """Return which detector says or keeps something else of groups of heads than of whole calls, or None."""
        if self.groups is None:
            return None
        for key, kept in self.groups.statistics.items():
            for name, value in kept.items():
                if value_digest(value) != value_digest(baseline.situation.baseline[key][name]):
                    return f"detector {name} in layer {key[0]} keeps something else of its groups of heads"
        for (name, layer), verdict in self.groups.whole().items():
            # Oracles do not judge the fault-free pass itself.
            whole = baseline.verdicts.get((name, layer), verdict)
            if recorded_part(whole) != recorded_part(verdict):
                return (
                    f"detector {name} in layer {layer} says {verdict} of its groups of heads, and {whole} of the call"
                )
        return None


class Opening:
    """Records the fault-free pass of one input while its baseline is computed, so that one pass is enough for both.

    Args:
        subject, chain: the model and its blocks.
        detectors: prepared and calibrated.
        by_groups: let the detectors look at groups of heads, which are then those of ``OpenedBatch.groups``; what they
            say of the whole calls is made of that. It must have been compared once with the whole calls
            (``OpenedBatch.differing_verdict``).
    """

    def __init__(self, subject: Subject, chain: Chain, detectors: Sequence[Detector], *, by_groups: bool) -> None:
        self._subject, self._chain, self._detectors, self._by_groups = subject, chain, detectors, by_groups
        self._groups: CleanGroups | None = None
        self._recording: Recording | str | None = None
        self._rows: BaselineRows | None = None

    def judge(self, situation: Situation, origins: Origins | None) -> Judge:
        """Return the tap that lets the detectors look."""
        if not self._by_groups or not self._detectors or unsupported(self._detectors) is not None:
            return Watcher(self._detectors, situation, origins=origins)
        self._groups = CleanGroups(self._detectors, situation, origins, self._subject.synchronize)
        return self._groups

    def forward(self, batch: Mapping[str, Tensor], *taps: Tap, origins: Origins | None) -> Evaluation:
        """Run the pass with the taps, and keep what runs can begin from."""
        evaluation, self._recording = recorded_pass(
            self._subject, self._chain, batch, *taps, origins=origins, evaluate=self._evaluate
        )
        return evaluation

    def _evaluate(self, family: str, outputs: Any, batch: Mapping[str, Tensor]) -> Evaluation:
        self._rows = BaselineRows.of(family, output_of(family, outputs), batch)
        return self._rows.evaluation()

    def opened(self, batch: Mapping[str, Tensor], baseline: Baseline) -> OpenedBatch | str:
        """Return the input ready for runs, or the reason why it cannot be.

        Where the baseline was known before, it was not computed here: a pass of its own is made.
        """
        recording, rows = self._recording, self._rows
        if recording is None or rows is None:
            return OpenedBatch.of(self._subject, self._chain, batch, baseline, self._detectors)
        if isinstance(recording, str):
            return recording
        return OpenedBatch.recorded(self._subject, self._chain, baseline, recording, self._groups, rows)


def recorded_part(verdict: Verdict) -> Any:
    """Return what result files say of a verdict, so that equal numbers compare equal, NaN included."""
    return repr(replace(verdict, positions=(), detail=""))


def is_causal(situation: Situation, length: int) -> bool:
    """Whether in every layer each position sees some key, and none that comes later.

    A row that sees no key is no exception to attention: its masked keys share its weight, later ones too.
    """
    for visible in situation.visible.values():
        if visible.shape[-2] not in (1, length) or visible.shape[-1] < length:
            return False
        keys = visible[..., :length].expand(*visible.shape[:2], length, length)
        if bool(torch.triu(keys, 1).any()) or not bool(keys.any(-1).all()):
            return False
    return True

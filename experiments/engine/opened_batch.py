"""One input, ready for fast runs: its recorded fault-free pass, and what was found out about it.

    opened = OpenedBatch.of(subject, chain, batch, baseline, detectors)      # or the reason why it cannot be
    engine = opened.engine(batch_runs=None)

Public names: ``OpenedBatch``, ``is_causal``.
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
from experiments.engine.fast.engine import FastEngine
from experiments.engine.fast.recording import Recording, record
from experiments.engine.fast.site_verdicts import CleanGroups, unsupported
from experiments.engine.fast.wide_linear import OutputBuffer
from experiments.inputs.blocks import Chain
from experiments.passes.baseline import Baseline
from experiments.passes.subject import Subject
from experiments.passes.taps.call_state import Situation
from experiments.passes.taps.origins import recorded_origins
from fault_injection.numbers.model_outputs import bitwise_equal
from monitoring.performance.memory import give_back_free_memory


@dataclass(frozen=True, eq=False)
class OpenedBatch:
    """What the runs of one input share.

    Attributes:
        subject, chain: the model and its blocks.
        recording: the fault-free pass.
        groups: what detectors say of single groups of heads; None if some detector cannot, or there are none.
        rows: the baseline's side of effects.
        causal: whether no position depends on a later one.
        overwritten: the layers whose scores are changed in place.
    """

    subject: Subject
    chain: Chain
    recording: Recording
    groups: CleanGroups | None
    rows: BaselineRows
    causal: bool
    overwritten: frozenset[int]

    @classmethod
    def of(
        cls,
        subject: Subject,
        chain: Chain,
        batch: Mapping[str, Tensor],
        baseline: Baseline,
        detectors: Sequence[Detector],
    ) -> OpenedBatch | str:
        """Run a fault-free pass and keep what runs can begin from, or say why they cannot."""
        groups = None
        # Behind the fault-free pass, and behind its recording, lie many large holes.
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
        # They are equal, and one of them is enough to keep.
        recording = replace(recording, evaluation=baseline.evaluation)
        rows = BaselineRows.of(subject.family, recording.evaluation.output, batch)
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
        return FastEngine(
            self.subject,
            self.chain,
            self.recording,
            self.groups,
            self.rows,
            causal=self.causal,
            overwritten=self.overwritten,
            batch_runs=batch_runs,
            buffer=buffer,
            outputs=self.outputs if propagation else None,
        )

    def differing_verdict(self, baseline: Baseline) -> str | None:
        """Return which detector says something else of groups of heads than of whole calls, or None."""
        for (name, layer), verdict in ({} if self.groups is None else self.groups.whole()).items():
            # Oracles do not judge the fault-free pass itself.
            whole = baseline.verdicts.get((name, layer), verdict)
            if recorded_part(whole) != recorded_part(verdict):
                return (
                    f"detector {name} in layer {layer} says {verdict} of its groups of heads, and {whole} of the call"
                )
        return None


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

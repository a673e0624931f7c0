"""Many runs of one input: site steps, then waves of packs, then the head on the rows that differ.

    engine = FastEngine(CleanPass(subject, chain, recording, groups, rows, causal=True))
    runs = engine.run([(fault, True), (fault, False)], critical_loss=1e-3)      # whether to propagate each

A run ends as early as it can: at its site (if nothing changed there, or only the site is requested), or after the first
block whose output equals the fault-free one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from experiments.effects.block_outputs import BlockOutputs
from experiments.effects.local_change import local_changes, output_lengths
from experiments.effects.row_effects import BaselineRows, RowEffect, effects_of_rows
from experiments.engine.fast.front import EngineMismatchError, Front, Newcomers
from experiments.engine.fast.pack import CONTROL, TILE, Stretch
from experiments.engine.fast.propagation import Wave
from experiments.engine.fast.recording import AttentionRecord, Recording, changed_rows
from experiments.engine.fast.run import FastRun, OpenRun, shared_time
from experiments.engine.fast.site_step import Keeper, site_step
from experiments.engine.fast.site_verdicts import CleanGroups
from experiments.engine.fast.wide_linear import OutputBuffer
from experiments.inputs.blocks import Chain
from experiments.passes.subject import Subject
from fault_injection import Fault
from fault_injection.faults.one_head import FaultSite, site_of
from fault_injection.locations import LOCATION_TABLE

SITE_ELEMENTS = 1 << 20
"""Scores of one site step."""

MANY = 64
"""This many runs are worth a site step of their own: detectors that their location cannot affect are then skipped."""

HEAD_ROWS = 256
"""Rows whose logits are there at one time, unless a single run has more."""


@dataclass(frozen=True, eq=False)
class CleanPass:
    """What the runs of one input share.

    Attributes:
        subject, chain: the patched model and its blocks.
        recording: the fault-free pass of the input.
        groups: what detectors said of single groups of heads in that pass; None if one of them cannot say, or there
            are no detectors.
        rows: the baseline's side of effects on the output.
        causal: whether no position of the input depends on a later one.
        overwritten: the layers whose architecture changes the scores in place.
    """

    subject: Subject
    chain: Chain
    recording: Recording
    groups: CleanGroups | None
    rows: BaselineRows
    causal: bool
    overwritten: frozenset[int] = frozenset()


class FastEngine:
    """Runs faults on one input.

    Args:
        clean: the fault-free pass of the input.
        batch_runs: most runs in one pass; None: as many as ``max_rows`` holds.
        max_rows: most rows in one pass, unless a single run has more.
        buffer: for a wide head in pieces; None: the head as the model computes it.
        outputs: what the blocks returned, to say how far propagated runs move it; None: nobody asks.
    """

    def __init__(
        self,
        clean: CleanPass,
        *,
        batch_runs: int | None = None,
        max_rows: int = 512,
        buffer: OutputBuffer | None = None,
        outputs: BlockOutputs | None = None,
    ) -> None:
        self._outputs = outputs
        self._subject, self._chain, self._recording = clean.subject, clean.chain, clean.recording
        self._groups, self._rows, self._causal = clean.groups, clean.rows, clean.causal
        self._overwritten, self._batch_runs, self._max_rows = clean.overwritten, batch_runs, max_rows
        self._buffer = buffer
        self._length = clean.recording.hidden[0].shape[1]
        self._lengths = {layer: output_lengths(kept.out) for layer, kept in clean.recording.attention.items()}

    def site_of(self, fault: Fault) -> FaultSite | None:
        """Return where a fault lies in its group of heads; None if this engine cannot run it.

        The start-up proof speaks of the default set of locations; faults elsewhere go another way.
        """
        if not LOCATION_TABLE[fault.location].default:
            return None
        kept = self._recording.attention.get(fault.layer)
        return None if kept is None else site_of(fault, kept.group)

    def run(self, faults: Sequence[tuple[FaultSite, bool]], critical_loss: float) -> list[FastRun]:
        """Run faults, each with whether to propagate it.

        Raises:
            EngineMismatchError: rows without a fault changed; none of the results is to be trusted.
        """
        runs = [OpenRun(number, site, propagate) for number, (site, propagate) in enumerate(faults)]
        for chunk in self._site_chunks(runs):
            with shared_time(chunk, self._subject.synchronize):
                self._at_site(chunk)
        for run in runs:
            run.block_changes = self._unmoved(run)
        effects = {run.number: self._masked(critical_loss) for run in runs if run.positions is None}
        moving = [run for run in runs if run.propagate and run.positions is not None]
        for whole in (False, True):
            for wave in self._waves([run for run in moving if run.number not in effects], whole):
                with shared_time(wave, self._subject.synchronize):
                    effects |= self._propagate(wave, critical_loss, whole)
        effect_of = {number: found.effect for number, found in effects.items()}
        return [run.finished(effect_of.get(run.number)) for run in runs]

    def _unmoved(self, run: OpenRun) -> dict[int, float]:
        """Return what is said of the blocks of a run that changes nothing behind its site."""
        if self._outputs is None or not run.propagate:
            return {}
        first = self._chain.block_of[run.site.fault.layer]
        return dict.fromkeys(range(first, len(self._chain.blocks)), 0.0)

    def _masked(self, critical_loss: float) -> RowEffect:
        rows = torch.empty(0, dtype=torch.int64, device=self._subject.device)
        logits = self._recording.evaluation.output.flatten(0, 1)[rows]
        return effects_of_rows(self._rows, rows, logits, rows, 1, critical_loss)[0]

    def _site_chunks(self, runs: Sequence[OpenRun]) -> Iterator[list[OpenRun]]:
        """Yield runs of one layer, few enough for one site step; if there are many, those of one location together."""
        by_layer = sorted(runs, key=lambda run: (run.site.fault.layer, run.site.fault.location))
        for layer, group in itertools.groupby(by_layer, key=lambda run: run.site.fault.layer):
            kept = self._recording.attention[layer]
            most = max(1, SITE_ELEMENTS // (kept.group * kept.query.shape[2] * kept.key.shape[2]))
            chunk: list[OpenRun] = []
            for run in group:
                other = bool(chunk) and run.site.fault.location != chunk[-1].site.fault.location
                if len(chunk) == most or (other and len(chunk) >= MANY):
                    yield chunk
                    chunk = []
                chunk.append(run)
            yield chunk

    def _at_site(self, runs: Sequence[OpenRun]) -> None:
        layer = runs[0].site.fault.layer
        kept = self._recording.attention[layer]
        step = site_step(
            self._subject,
            kept,
            [run.site for run in runs],
            watched=self._groups is not None,
            overwritten=layer in self._overwritten,
        )
        verdicts = [{} for _ in runs] if self._groups is None else self._groups.judge(kept, step)
        lengths = self._lengths[layer][[run.site.sequence for run in runs]]
        changes = local_changes(step.out, step.expected, lengths)
        moved = step.changed.any(1).tolist()
        for number, run in enumerate(runs):
            run.record, run.verdicts, run.local = step.records[number], verdicts[number], changes[number]
            if moved[number]:
                run.positions = step.changed[number].nonzero()[:, 0]
                run.out = step.out[number][run.positions] if run.propagate else None

    def _waves(self, runs: Sequence[OpenRun], whole: bool) -> Iterator[list[OpenRun]]:
        """Yield runs that go through the blocks together: neighbours by layer and row, few enough for one pass."""
        wave: list[OpenRun] = []
        rows = 0
        for run in sorted(runs, key=lambda run: (run.site.fault.layer, self._start(run))):
            needed = self._length - (0 if whole else self._start(run))
            if wave and (rows + needed > self._max_rows or len(wave) == self._batch_runs):
                yield wave
                wave, rows = [], 0
            wave.append(run)
            rows += needed
        if wave:
            yield wave

    def _start(self, run: OpenRun) -> int:
        """Return the first position that a run can change behind its layer."""
        return int(run.positions[0]) if self._causal and run.positions is not None else 0

    def _propagate(self, runs: Sequence[OpenRun], critical_loss: float, whole: bool) -> dict[int, RowEffect]:
        """Return the effects of runs by number, but not of those that must be taken through whole sequences."""
        look = None
        if whole and self._groups is not None:
            look = partial(self._note_behind, self._groups, runs)
        wave = Wave(self._subject, self._chain, self._recording, self._buffer, whole=whole, look=look)
        front, block_of = Front(wave, len(runs)), self._chain.block_of
        last = len(self._chain.blocks)
        for number in range(block_of[runs[0].site.fault.layer], last):
            front.advance(number)
            new = [i for i, run in enumerate(runs) if block_of[run.site.fault.layer] == number]
            front.settle(number + 1, self._behind_site(wave, runs, new, whole) if new else None)
            if self._outputs is not None:
                self._note_changes(self._outputs, number, runs, *front.changed(number + 1))
        effects: dict[int, RowEffect] = {}
        for rows, owner, hidden, some in _by_run(*front.changed(last), len(runs), HEAD_ROWS):
            logits = self._logits(wave, rows, hidden)
            found = effects_of_rows(self._rows, rows, logits, owner - some[0], len(some), critical_loss)
            effects |= {runs[i].number: effect for i, effect in zip(some, found, strict=True)}
        return {number: effect for number, effect in effects.items() if number not in self._escaped(wave, runs)}

    @staticmethod
    def _note_changes(
        outputs: BlockOutputs, number: int, runs: Sequence[OpenRun], rows: Tensor, owner: Tensor, hidden: Tensor
    ) -> None:
        changes = outputs.changes(number, rows, hidden, owner, len(runs))
        for run, change in zip(runs, changes, strict=True):
            # Zeros, too: earlier notes on a run become void when it must go through whole sequences.
            if number in run.block_changes:
                run.block_changes[number] = change

    @staticmethod
    def _note_behind(
        groups: CleanGroups,
        runs: Sequence[OpenRun],
        kept: AttentionRecord,
        seen: Keeper,
        stretches: Sequence[Stretch],
    ) -> None:
        verdicts = groups.finite_behind(kept, seen, [stretch.sequence for stretch in stretches])
        for stretch, verdict in zip(stretches, verdicts or (), strict=verdicts is not None):
            if stretch.run != CONTROL:
                runs[stretch.run].behind[kept.core.index] = verdict

    def _escaped(self, wave: Wave, runs: Sequence[OpenRun]) -> set[int]:
        return {runs[i].number for i in wave.escaped if i != CONTROL}

    def _behind_site(self, wave: Wave, runs: Sequence[OpenRun], new: Sequence[int], whole: bool) -> Newcomers | None:
        """Take the rows that faults changed at their sites through the rest of their block."""
        layer = runs[new[0]].site.fault.layer
        kept = self._recording.attention[layer]
        rows, owner, outs, groups = [], [], [], []
        for i in new:
            run = runs[i]
            if run.positions is None or run.out is None:
                raise ValueError("a run that changed nothing at its site has nothing to propagate")
            rows.append(run.positions + run.site.sequence * self._length)
            owner.append(torch.full_like(run.positions, i))
            groups.append(torch.full_like(run.positions, run.site.group))
            outs.append(run.out)
        changed, owners = torch.cat(rows), torch.cat(owner)
        # The first rows of the input fill the last tile; they must stay as they are.
        filling = torch.arange(TILE - len(changed) % TILE, device=changed.device)
        every = torch.cat([changed, filling])
        out = kept.out.flatten(0, 1)[every]
        out.unflatten(1, (-1, kept.group))[torch.arange(len(changed), device=out.device), torch.cat(groups)] = (
            torch.cat(outs)
        )
        hidden = wave.behind_site(layer, every, out)
        number = self._chain.block_of[layer] + 1
        differ = changed_rows(hidden, wave.clean(number, every))
        if bool(differ[len(changed) :].any()):
            raise EngineMismatchError(f"rows without a fault changed in block {number - 1}")
        differ = differ[: len(changed)]
        owners, changed, hidden = owners[differ], changed[differ], hidden[: len(changed)][differ]
        first = torch.full((len(runs),), self._length, device=changed.device)
        first.scatter_reduce_(0, owners, changed % self._length, "amin")
        starts = first.tolist()
        stretches = tuple(
            Stretch(i, runs[i].site.sequence, starts[i] if self._causal and not whole else 0)
            for i in sorted(set(owners.tolist()))
        )
        return Newcomers(stretches, changed, owners, hidden) if stretches else None

    def _logits(self, wave: Wave, rows: Tensor, hidden: Tensor) -> Tensor:
        """Return the model's output (n, V) at some rows; rows that are known fill the last tile, and are checked."""
        count, clean = len(rows), self._recording.evaluation.output.flatten(0, 1)
        if not count:
            return clean[rows]
        filling = torch.arange(TILE - count % TILE, device=rows.device)
        logits = wave.head(torch.cat([hidden, wave.clean(len(self._chain.blocks), filling)]))
        if bool(changed_rows(logits[count:], clean[filling]).any()):
            raise EngineMismatchError("rows without a fault changed in the head")
        return logits[:count]


def _by_run(
    rows: Tensor, owner: Tensor, hidden: Tensor, runs: int, most: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, range]]:
    """Yield rows, owners and hidden states of consecutive runs, ``most`` rows at a time unless one run has more."""
    order = torch.argsort(owner, stable=True)
    rows, owner, hidden = rows[order], owner[order], hidden[order]
    ends = torch.bincount(owner, minlength=runs).cumsum(0).tolist()
    first, begin = 0, 0
    while first < runs:
        last = first + 1
        while last < runs and ends[last] - begin <= most:
            last += 1
        part = slice(begin, ends[last - 1])
        yield rows[part], owner[part], hidden[part], range(first, last)
        first, begin = last, ends[last - 1]

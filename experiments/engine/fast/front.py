"""The front of a wave: which rows of which runs go on, and their hidden states.

front = Front(wave, runs=8)
for number in range(first, last):
front.advance(number)                        # through block ``number``
front.settle(number + 1, newcomers)          # runs that are as if nothing had happened leave, new ones join
rows, owner, hidden = front.changed()
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.engine.fast.pack import CONTROL, Pack, Stretch
from experiments.engine.fast.propagation import Wave
from experiments.engine.fast.recording import changed_rows


class EngineMismatchError(RuntimeError):
    """Rows without a fault changed: passes of these shapes are not exact."""


@dataclass(frozen=True, eq=False)
class Newcomers:
    """Runs that begin behind a block.

    Attributes:
        stretches: the rows they can change from there on.
        rows: (n,), the rows they have changed.
        owner: (n,), the run of each.
        hidden: (n, D), the rows' hidden states.
    """

    stretches: tuple[Stretch, ...]
    rows: Tensor
    owner: Tensor
    hidden: Tensor


class Front:
    """The rows in front of a block. Runs are numbered 0 .. ``runs`` - 1."""

    def __init__(self, wave: Wave, runs: int) -> None:
        self._wave, self._runs = wave, runs
        self._pack: Pack | None = None
        self._differing: Tensor | None = None
        self._hidden = wave.clean(0, torch.empty(0, dtype=torch.int64))

    def advance(self, number: int) -> None:
        """Take the rows through block ``number``."""
        self._differing = None
        if self._pack is not None:
            self._hidden = self._wave.through(number, self._pack, self._hidden)

    def settle(self, number: int, newcomers: Newcomers | None) -> None:
        """Move to the input of block ``number``: drop runs without a changed row and escaped runs, and add others.

        Raises:
            EngineMismatchError: the rows of the control run changed.
        """
        going, self._differing = self._going_on(number)
        if newcomers is None and self._pack is not None and len(going) == len(self._pack.stretches) - 1:
            return
        old, hidden = self._pack, self._hidden
        stretches = sorted([*going, *(newcomers.stretches if newcomers else ())], key=lambda each: each.start)
        if not stretches:
            self._pack = None
            return
        # What differs was found in the old pack.
        self._differing = None
        length = self._wave.shape[1]
        pack = self._pack = Pack.of(stretches, length, hidden.device)
        self._hidden = self._wave.clean(number, pack.rows)
        offset = torch.full((self._runs + 1,), -1, device=hidden.device)
        for stretch, (begin, _) in zip(pack.stretches[:-1], pack.spans, strict=False):
            offset[stretch.run] = begin - stretch.start
        present = torch.zeros(self._runs + 1, dtype=torch.bool, device=hidden.device)
        present[[stretch.run for stretch in going]] = True
        if old is not None and going:
            keep = present[old.owner]
            self._place(offset, old.owner[keep], old.rows[keep], hidden[keep])
        if newcomers is not None:
            self._place(offset, newcomers.owner, newcomers.rows, newcomers.hidden)

    def _place(self, offset: Tensor, owner: Tensor, rows: Tensor, hidden: Tensor) -> None:
        self._hidden[offset[owner] + rows % self._wave.shape[1]] = hidden

    def _going_on(self, number: int) -> tuple[list[Stretch], Tensor | None]:
        if self._pack is None:
            return [], None
        differ = self._differ(self._pack, number)
        counts = [int(differ[begin:end].any()) for begin, end in self._pack.spans]
        if counts[-1]:
            raise EngineMismatchError(f"rows without a fault changed in front of block {number}")
        going = [
            stretch
            for stretch, count in zip(self._pack.stretches[:-1], counts, strict=False)
            if count and stretch.run not in self._wave.escaped
        ]
        return going, differ

    def _differ(self, pack: Pack, number: int) -> Tensor:
        return changed_rows(self._hidden, self._wave.clean(number, pack.rows))

    def changed(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return row numbers, runs and hidden states of all rows that differ in front of block ``number``."""
        if self._pack is None:
            nothing = torch.empty(0, dtype=torch.int64, device=self._hidden.device)
            return nothing, nothing, self._hidden[:0]
        differ = self._differ(self._pack, number) if self._differing is None else self._differing
        differ = differ & (self._pack.owner != CONTROL)
        return self._pack.rows[differ], self._pack.owner[differ], self._hidden[differ]

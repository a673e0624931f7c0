"""A run of the fast engine: its state while it is open, and its result.

run = OpenRun(number=0, site=site, propagate=True)
with shared_time([run], synchronize):
...                                 # its site, then its blocks
run.finished(effect)                    # a FastRun
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from bounds import Verdict
from experiments.effects.local_change import LocalChange
from experiments.effects.outcome import Effect
from experiments.engine.fast.site_verdicts import Verdicts
from fault_injection import InjectionRecord
from fault_injection.faults.one_head import FaultSite


@dataclass(frozen=True)
class FastRun:
    """The result of one run.

    Attributes:
        record: the element that the fault hit.
        verdicts: by detector, the verdicts on its layer.
        local: how far the layer's attention output moved.
        behind: by layer behind the fault, what ``finite`` says there, where it is not what it says of the clean pass.
        effect: on the model's output; None if it was not propagated.
        block_changes: by number of the block, how far what it returns moved, relatively; empty unless it was asked for.
        seconds: its share of the passes it was part of.
    """

    record: InjectionRecord
    verdicts: Verdicts
    local: LocalChange
    behind: Mapping[int, Verdict]
    effect: Effect | None
    block_changes: Mapping[int, float]
    seconds: float


@dataclass(eq=False)
class OpenRun:
    """A run that has not ended.

    Attributes:
        number: its place among the runs of a call.
        site: where its fault lies.
        propagate: whether to follow it behind its layer.
        positions: (n,) the positions of its sequence that its layer's output changes at; None if at none.
        out: (n, ...) the output there.
        record, verdicts, local, behind, block_changes, seconds: of the ``FastRun`` that it becomes.
    """

    number: int
    site: FaultSite
    propagate: bool
    record: InjectionRecord | None = None
    verdicts: Verdicts = field(default_factory=dict)
    local: LocalChange | None = None
    behind: dict[int, Verdict] = field(default_factory=dict)
    positions: Tensor | None = None
    out: Tensor | None = None
    block_changes: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0

    def finished(self, effect: Effect | None) -> FastRun:
        """Return what the fault did, with its effect on the model's output if it was followed so far.

        Raises:
            ValueError: it never was at its site.
        """
        if self.record is None or self.local is None:
            raise ValueError(f"run {self.number}: got no site step")
        return FastRun(
            self.record,
            self.verdicts,
            self.local,
            self.behind,
            effect,
            self.block_changes,
            self.seconds,
        )


@contextmanager
def shared_time(runs: Sequence[OpenRun], synchronize: Callable[[], None]) -> Iterator[None]:
    """Divide the time of the block among the runs."""
    synchronize()
    start = time.perf_counter()
    yield
    synchronize()
    seconds = (time.perf_counter() - start) / len(runs)
    for run in runs:
        run.seconds += seconds

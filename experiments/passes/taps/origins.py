"""Where queries, keys and values come from, for the detectors that check their projections.

with recorded_origins(model, detectors) as origins:
    ...                                              # one or more passes
    origins(core)                                    # inside a pass: {"q": ProjectedOperand, ...}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from bounds import Detector
from bounds.core.attention_state import ProjectedOperand
from bounds.effects.certifier import Certifier
from experiments.passes.taps.call_state import Origins
from fault_injection import AttentionCore
from fault_injection.operands.finding import operand_sources
from fault_injection.operands.operand_recorder import OperandRecorder


@contextmanager
def recorded_origins(model: nn.Module, readers: Iterable[Detector | Certifier]) -> Iterator[Origins | None]:
    """Record what the projections of a patched model read and return, if one of the readers needs it."""
    if not any("projected" in reader.needs for reader in readers):
        yield None
        return
    with OperandRecorder(model, operand_sources(model)) as recorder:

        def origins(core: AttentionCore) -> Mapping[str, ProjectedOperand]:
            recorded = recorder.recorded(core)
            return {
                name: ProjectedOperand(operand.hidden, operand.projected, operand.rotation)
                for name, operand in recorded.items()
            }

        yield origins

"""Faults in a single head, which can be evaluated as a small attention call of its own."""

from __future__ import annotations

from dataclasses import dataclass

from fault_injection.faults.fault import Fault
from fault_injection.locations import LOCATION_TABLE


@dataclass(frozen=True)
class FaultSite:
    """The position of a fault in its group of heads.

    Attributes:
        fault: the fault.
        sequence: the sequence of the batch that it hits.
        group: the key/value head, which determines the query heads.
        head: the head within the group (0 for keys and values).
        elements: the position of each element in the (rows, columns) of its head.
    """

    fault: Fault
    sequence: int
    group: int
    head: int
    elements: tuple[int, ...]


def site_of(fault: Fault, group: int) -> FaultSite | None:
    """Return the position of a fault, with ``group`` query heads per key/value head; None if it hits several heads."""
    if not fault.elements or fault.call != 0:
        return None
    flat = [element.flat for element in fault.elements]
    plane = fault.shape[2] * fault.shape[3]
    planes = {position // plane for position in flat}
    if len(planes) != 1:
        return None
    sequence, head = divmod(planes.pop(), fault.shape[1])
    elements = tuple(position % plane for position in flat)
    if LOCATION_TABLE[fault.location].shared:
        return FaultSite(fault, sequence, head, 0, elements)
    return FaultSite(fault, sequence, head // group, head % group, elements)

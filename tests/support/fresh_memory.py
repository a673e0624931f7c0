"""Memory that was not resident before, for tests of what is measured of a process.

A block of any size may come out of the free list of the heap, whose pages a long-lived process already
has: then nothing grows. A mapping of its own is new, and is given back as soon as the tensor dies.

>>> int(touch(1).sum()) == 2**20
True
"""

from __future__ import annotations

import mmap

import torch


def touch(megabytes: int) -> torch.Tensor:
    """Return ``megabytes`` MB (2**20 bytes) of ones, uint8, every page of them written."""
    return torch.frombuffer(mmap.mmap(-1, megabytes * 2**20), dtype=torch.uint8).fill_(1)

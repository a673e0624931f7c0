"""How much arithmetic a run needs at least, beside that of the pair of whole passes it stands for.

    work = least_work(workload, recording, faults, masked)
    work.pair / work.run                  # the speed-up over the pair, were all arithmetic equally fast

Counted are matrix products, a multiply-add as two operations. A run whose fault changes something needs the rest of its
block for the rows that its attention output changed, the blocks behind it and the head for the rows from the fault on,
and keys up to each row. A masked run needs nothing that counts: its site is one row of one head, or one head.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.workloads import Workload
from experiments.engine.fast.recording import AttentionRecord, Recording
from fault_injection import Fault
from monitoring.performance.flops import linear_flops


@dataclass(frozen=True)
class Work:
    """Floating-point operations.

    Attributes:
        pair: two whole eager forward passes.
        site, behind, head: of the mean run, at least: the rest of the fault's block, the blocks behind it, the rows
            of the output.
    """

    pair: float
    site: float
    behind: float
    head: float

    @property
    def run(self) -> float:
        """The sum of the parts."""
        return self.site + self.behind + self.head


def least_work(work: Workload, recording: Recording, faults: Sequence[Fault], masked: Sequence[bool]) -> Work:
    """Return the operations of the mean run.

    Args:
        work: a causal model and its input.
        recording: its fault-free pass.
        faults: the faults of the runs.
        masked: which of them change nothing.
    """
    sequences, length = recording.hidden[0].shape[:2]
    blocks = [linear_flops(block, 1) for block in work.chain.blocks]
    head = linear_flops(work.subject.model, 1) - sum(blocks)
    kept = recording.attention
    pair = 2.0 * sequences * length * (sum(blocks) + head)
    pair += 2.0 * sequences * length**2 * sum(_per_key(record) for record in kept.values())
    site = behind = rows_of_head = 0.0
    for fault, is_masked in zip(faults, masked, strict=True):
        if is_masked or fault.index is None:
            continue
        start, own = fault.index[2], work.chain.block_of[fault.layer]
        rows = length - start
        keys = (length * (length + 1) - start * (start + 1)) // 2
        # A key or a value is read by all rows from its own on, all else by one.
        touched = rows if fault.location in ("k", "v") else 1
        site += touched * _behind_attention(work, kept[fault.layer], blocks[own])
        for layer, record in kept.items():
            if layer > fault.layer:
                behind += rows * blocks[work.chain.block_of[layer]] + keys * _per_key(record)
        rows_of_head += rows * head
    return Work(pair, site / len(faults), behind / len(faults), rows_of_head / len(faults))


def _per_key(record: AttentionRecord) -> float:
    """Return the operations of one query row and one key, all heads: its score, and its share of the output."""
    return 2.0 * record.query.shape[1] * (record.query.shape[-1] + record.value.shape[-1])


def _behind_attention(work: Workload, record: AttentionRecord, block: float) -> float:
    """Return the operations of a row in a block whose queries, keys and values are known: output projection and MLP."""
    attention = linear_flops(record.core.module, 1)
    width = record.out.shape[2] * record.out.shape[3]
    hidden: int = work.subject.model.config.hidden_size
    return block - attention + 2.0 * width * hidden


def product_rate(dtype: torch.dtype, rows: int = 512, width: int = 768, wide: int = 3072) -> float:
    """Return the operations a second of a large matrix product, with the threads torch has now: the best of many."""
    left, right = torch.ones(rows, width, dtype=dtype), torch.ones(wide, width, dtype=dtype)
    seconds = []
    for _ in range(30):
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        seconds.append(time.perf_counter() - start)
    return 2.0 * rows * width * wide / min(seconds)

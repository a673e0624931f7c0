"""Counters of forward passes and lookups, with the published nine-key summary.

One ``BackendStats`` belongs to one ``ForwardCache`` and is changed only under that cache's lock, so every
snapshot taken there satisfies

    total_lookups  = cache_hits + cache_misses = trace lines with status "ok"
    forward_passes = cache_misses              = trace lines with hit false
    rows           = sum of "rows" over the trace lines with hit false

A pass that never consults the cache (a faulty one) counts as a miss and as ``uncached``, so the rate of real
lookups is ``cache_hits / (total_lookups - uncached)``; a failed computation counts in ``errors`` alone.

>>> stats = BackendStats()
>>> stats.record_miss(0.5, rows=4); stats.record_hit(0.25)
>>> stats.total_lookups, stats.hit_rate, stats.to_dict()["scoring_wall_s"]
(2, 0.5, 0.75)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class BackendStats:
    """What a campaign asked of the model and what the cache answered; times in seconds.

    Attributes:
        cache_hits: lookups served without a pass: from memory, from disk or from a computation under way.
        cache_misses, forward_passes: passes that were run; equal by construction.
        scoring_wall_s: wall time of all successful lookups and passes.
        batches_sent, batched_prompts, max_batch_size: batched computations, the prompts in them, the largest.
        coalesced: hits that waited for, or shared, a computation under way.
        uncached: misses that never consulted the cache.
        errors: computations that raised.
        rows: sequences that went through the model.
    """

    cache_hits: int = 0
    cache_misses: int = 0
    forward_passes: int = 0
    scoring_wall_s: float = 0.0
    batches_sent: int = 0
    batched_prompts: int = 0
    max_batch_size: int = 0
    coalesced: int = 0
    uncached: int = 0
    errors: int = 0
    rows: int = 0

    @property
    def total_lookups(self) -> int:
        """Hits and misses together."""
        return self.cache_hits + self.cache_misses

    @property
    def hit_rate(self) -> float:
        """Share of hits among all lookups, 0..1; 0 before the first lookup."""
        return self.cache_hits / self.total_lookups if self.total_lookups else 0.0

    @property
    def avg_batch_size(self) -> float:
        """Prompts per batched computation; 0 before the first one."""
        return self.batched_prompts / self.batches_sent if self.batches_sent else 0.0

    def record_hit(self, wall_s: float, *, coalesced: bool = False) -> None:
        """Count one lookup that was served without a pass."""
        self.cache_hits += 1
        self.coalesced += coalesced
        self.scoring_wall_s += wall_s

    def record_miss(self, wall_s: float, *, rows: int, uncached: bool = False) -> None:
        """Count one computed result."""
        self.cache_misses += 1
        self.forward_passes += 1
        self.uncached += uncached
        self.rows += rows
        self.scoring_wall_s += wall_s

    def record_batch(self, size: int) -> None:
        """Count one batched computation of ``size`` prompts."""
        self.batches_sent += 1
        self.batched_prompts += size
        self.max_batch_size = max(self.max_batch_size, size)

    def record_error(self) -> None:
        """Count one computation that raised."""
        self.errors += 1

    def to_dict(self) -> dict[str, float | int]:
        """Return the nine published keys; ``total_lookups`` is the sum of the first two."""
        return {
            "cache_hits": self.cache_hits,
            "cache_misses": self.cache_misses,
            "hit_rate": self.hit_rate,
            "forward_passes": self.forward_passes,
            "scoring_wall_s": self.scoring_wall_s,
            "batches_sent": self.batches_sent,
            "batched_prompts": self.batched_prompts,
            "avg_batch_size": self.avg_batch_size,
            "max_batch_size": self.max_batch_size,
        }

"""A bounded store for the results of forward passes: exact keys, owned values, one computation per key.

    ForwardCache   least-recently-used store, bounded by entries and by tensor bytes
    CacheKey       (op, view, model, input, params): everything that determines a result
    Flight, Entry  a computation under way, and a stored value; used by ``monitoring.cache.cached_forward``

``put`` stores a copy and ``get`` returns a copy, so callers own their values. No edit of a returned tensor can reach a
later hit. (Torch has no read-only tensors, so only a copy is safe; fetch a large baseline once per group of runs, not
once per run.)

>>> cache = ForwardCache(maxsize=2)
>>> cache.put("a", 1); cache.put("b", None); cache.get("a"); cache.put("c", 3)
1
>>> cache.get("b") is MISS, cache.get("c"), len(cache)
(True, 3, 2)
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import psutil

from monitoring.cache.cached_value import clone_value, value_digest, value_nbytes
from monitoring.cache.fingerprints import canonical_json, digest

if TYPE_CHECKING:
    from monitoring.cache.disk_tier import DiskTier

FREE_MEMORY_SHARE = 0.25


class _Miss:
    """The type of the one object that means "not in the cache", so that None can be a cached value."""

    def __repr__(self) -> str:
        return "<miss>"


_MISS: Final = _Miss()
MISS: Final = _MISS


class CacheCorruptionError(RuntimeError):
    """A stored value no longer has the bits it was stored with."""


@dataclass(frozen=True)
class CacheKey:
    """Everything that determines the bits of a result; see ``monitoring.cache.fingerprints`` for the parts."""

    op: str
    view_id: str
    model_fp: str
    input_fp: str
    params_fp: str

    @property
    def digest(self) -> str:
        """The key in 32 hexadecimal digits, for file names."""
        return digest(canonical_json(asdict(self)))


@dataclass(frozen=True)
class Entry:
    """A stored value (owned by the cache, never lent), its tensor bytes and, if paranoid, its digest."""

    value: Any
    nbytes: int
    digest: str | None


class Flight:
    """One computation under way: its owner computes, everyone else waits for it to land."""

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self._owner = threading.get_ident()
        self._landed = threading.Event()
        self._entry: Entry | None = None

    @property
    def mine(self) -> bool:
        """Whether the calling thread is the one that must compute and land this flight."""
        return self._owner == threading.get_ident()

    def land(self, entry: Entry | None) -> None:
        """Wake the waiting threads, with the entry or, after a failure, with None."""
        self._entry = entry
        self._landed.set()

    def wait(self) -> Entry | None:
        """Return what the owner computed; None: it failed or could not be kept, so claim again."""
        self._landed.wait()
        return self._entry


class ForwardCache:
    """Least-recently-used store of nested results, bounded by entries and bytes, safe for threads.

    Args:
        maxsize: most entries kept.
        max_bytes: most tensor bytes kept; None: a quarter of the memory that is free now.
        paranoid: check the digest of an entry on every hit (``CacheCorruptionError`` if it changed).
        disk: a second tier shared between processes; keys must then be ``CacheKey``.

    Attributes:
        lock: the re-entrant lock that guards the entries and everything counted together with them.
        nbytes, evictions, uncacheable, disk_hits: tensor bytes held now; entries dropped for room; values
            larger than ``max_bytes``, which were handed through; entries that came from the disk tier.

    Raises:
        ValueError: a bound that is not a positive integer.
    """

    def __init__(
        self,
        maxsize: int = 256,
        max_bytes: int | None = None,
        *,
        paranoid: bool = False,
        disk: DiskTier | None = None,
    ) -> None:
        if max_bytes is None:
            max_bytes = max(1, int(psutil.virtual_memory().available * FREE_MEMORY_SHARE))
        for name, bound in (("maxsize", maxsize), ("max_bytes", max_bytes)):
            if isinstance(bound, bool) or not isinstance(bound, int) or bound <= 0:
                raise ValueError(f"{name}: got {bound!r}, allowed are integers from 1")
        self.maxsize = maxsize
        self.max_bytes = max_bytes
        self.paranoid = paranoid
        self.disk = disk
        self.lock = threading.RLock()
        self.nbytes = self.evictions = self.uncacheable = self.disk_hits = 0
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._flights: dict[Hashable, Flight] = {}

    def __len__(self) -> int:
        with self.lock:
            return len(self._entries)

    def get(self, key: Hashable) -> Any:
        """Return a copy of the value and make it the most recently used, or ``MISS``."""
        entry = self._find(key)
        if entry is None:
            entry = self.recall(key)
            if entry is None:
                return MISS
            self._keep(key, entry)
        return self.lend(entry)

    def put(self, key: Hashable, value: Any) -> None:
        """Store a copy as the most recently used entry; drop the least recently used ones to make room."""
        entry = self.admit(key, value)
        if entry is not None:
            self._keep(key, entry)

    def clear(self) -> None:
        """Forget every entry in memory; the disk tier and computations under way stay."""
        with self.lock:
            self._entries.clear()
            self.nbytes = 0

    # ------------------------------------------------------------------ steps of a lookup, for CachedForward

    def claim(self, key: Hashable) -> Entry | Flight:
        """Return the entry, or the flight that will bring it: the caller's own (``mine``) or another thread's.

        Who gets his own flight must end it with ``land``, whatever happens.

        Raises:
            RuntimeError: the thread that computes a key asks for the same key.
        """
        with self.lock:
            entry = self._find(key)
            if entry is not None:
                return entry
            flight = self._flights.get(key)
            if flight is not None:
                if flight.mine:
                    raise RuntimeError(f"forward cache: computing {key} asks for its own result")
                return flight
            flight = self._flights[key] = Flight(key)
        try:
            entry = self.recall(key)
        except BaseException:
            self.land(flight, None)
            raise
        if entry is None:
            return flight
        self.land(flight, entry)
        return entry

    def land(self, flight: Flight, entry: Entry | None) -> None:
        """End a flight: keep its entry and wake the waiters; None (failed, not kept) lets them try again."""
        with self.lock:
            if self._flights.get(flight.key) is flight:
                del self._flights[flight.key]
            if entry is not None:
                self._keep(flight.key, entry)
            flight.land(entry)

    def admit(self, key: Hashable, value: Any) -> Entry | None:
        """Return an owned copy, also written to the disk tier; None (counted) if it exceeds ``max_bytes``."""
        nbytes = value_nbytes(value)
        if nbytes > self.max_bytes:
            with self.lock:
                self.uncacheable += 1
            return None
        owned = clone_value(value)
        if self.disk is not None:
            self.disk.store(_disk_key(key), owned)
        return Entry(owned, nbytes, value_digest(owned) if self.paranoid else None)

    def recall(self, key: Hashable) -> Entry | None:
        """Return the entry from the disk tier, not yet kept in memory; None if there is none."""
        value = MISS if self.disk is None else self.disk.load(_disk_key(key))
        if value is MISS or (nbytes := value_nbytes(value)) > self.max_bytes:
            return None
        with self.lock:
            self.disk_hits += 1
        return Entry(value, nbytes, value_digest(value) if self.paranoid else None)

    def lend(self, entry: Entry) -> Any:
        """Return a copy of an entry's value, after checking its digest if paranoid."""
        if entry.digest is not None and value_digest(entry.value) != entry.digest:
            raise CacheCorruptionError("forward cache: a stored value changed since it was stored")
        return clone_value(entry.value)

    def _find(self, key: Hashable) -> Entry | None:
        with self.lock:
            entry = self._entries.get(key)
            if entry is not None:
                self._entries.move_to_end(key)
            return entry

    def _keep(self, key: Hashable, entry: Entry) -> None:
        with self.lock:
            old = self._entries.pop(key, None)
            self.nbytes += entry.nbytes - (old.nbytes if old else 0)
            self._entries[key] = entry
            while len(self._entries) > self.maxsize or self.nbytes > self.max_bytes:
                _, dropped = self._entries.popitem(last=False)
                self.nbytes -= dropped.nbytes
                self.evictions += 1


def _disk_key(key: Hashable) -> CacheKey:
    if not isinstance(key, CacheKey):
        raise TypeError(f"forward cache: the disk tier needs a CacheKey, got {type(key).__name__}")
    return key

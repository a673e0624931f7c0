"""Start-up proofs that are kept: in the campaign's folder, and in a cache of the user.

kept = KeptProofs.of(config.run.proof_cache, folder.path)
found = kept.find(key)                       # what was kept under this very key, and where; None: nothing was
kept.keep(key, {"resume": None, "rows": None, "head": None, "faults": 15})

A key names everything that a proof depends on (``proof_key``). A file holds its key whole, and is used only if that is
equal to the one asked for in every part. A file that cannot be read, or is not what was written, is not used, and the
log says so. Files are JSON and appear whole or not at all, so any number of processes may keep the same proof at once.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from experiments.tables.csv_file import write_text
from monitoring.cache.fingerprints import canonical_json, digest

logger = logging.getLogger(__name__)

VARIABLE = "FAULT_INJECTION_PROOF_CACHE"
"""Environment variable: ``off`` keeps and reads no proof at all, a path is the cache instead of the user's own."""

SAID = ("resume", "rows", "head")
"""Parts of a proof: each a reason, or None where the shortcut is exact."""

Said = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A folder of proofs.

    Attributes:
        name: what provenance and log call it.
        folder: where the files are.
        inside: the folder that must be there before anything is written; None: all is made.
    """

    name: str
    folder: Path
    inside: Path | None = None


class KeptProofs:
    """Finds and keeps proofs in some places, the first one first."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = tuple(places)

    @classmethod
    def of(cls, setting: bool | str, campaign: Path) -> KeptProofs:
        """Return the proofs that ``run.proof_cache`` allows for the campaign in this folder."""
        variable = os.environ.get(VARIABLE, "")
        if setting is False or variable == "off":
            return cls(())
        chosen = variable or (setting if isinstance(setting, str) else "")
        cache = Path(chosen).expanduser() if chosen else user_cache()
        own = Place("the campaign's folder", campaign / "proofs", inside=campaign)
        return cls((own, Place("the cache" if chosen else "the user's cache", cache)))

    def find(self, key: Mapping[str, Any]) -> tuple[Said, str] | None:
        """Return the proof with this key and the name of its place; it is copied to the places that lack it."""
        for place in self._places:
            said = _read(place.folder / _file_name(key), key)
            if said is not None:
                for other in self._places:
                    if not (other.folder / _file_name(key)).exists():
                        self._write(other, key, said)
                return said, place.name
        return None

    def keep(self, key: Mapping[str, Any], said: Said) -> None:
        """Write a proof to every place. One that cannot be written to is named in the log."""
        for place in self._places:
            self._write(place, key, said)

    @staticmethod
    def _write(place: Place, key: Mapping[str, Any], said: Said) -> None:
        if place.inside is not None and not place.inside.is_dir():
            return
        content = {"key": dict(key), "proof": said, "digest": _digest(key, said)}
        try:
            write_text(place.folder / _file_name(key), json.dumps(content, indent=1, sort_keys=True) + "\n")
        except OSError as error:
            logger.warning("the start-up proof could not be kept in %s: %s", place.name, error)


def user_cache() -> Path:
    """Return the user's folder of proofs, by the rules of XDG."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "attention-fault-injection" / "proofs"


def _file_name(key: Mapping[str, Any]) -> str:
    return f"{digest(canonical_json(key))}.json"


def _digest(key: Mapping[str, Any], said: Said) -> str:
    return digest(canonical_json(key), canonical_json(said))


def _read(path: Path, key: Mapping[str, Any]) -> Said | None:
    """Return what a file says if it is whole and of this key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("%s: the start-up proof kept there cannot be read and is not used: %s", path, error)
        return None
    said = content.get("proof") if isinstance(content, dict) else None
    if not _well_formed(said) or content.get("digest") != _digest(key, said) or content.get("key") != _plain(key):
        logger.warning("%s: the start-up proof kept there is damaged, or of something else, and is not used", path)
        return None
    return said


def _well_formed(said: Any) -> TypeGuard[Said]:
    return (
        isinstance(said, dict)
        and set(said) == {*SAID, "faults"}
        and all(said[name] is None or isinstance(said[name], str) for name in SAID)
        and type(said["faults"]) is int
        and said["faults"] > 0
    )


def _plain(key: Mapping[str, Any]) -> Any:
    """Return a key as JSON gives it back."""
    return json.loads(json.dumps(dict(key)))

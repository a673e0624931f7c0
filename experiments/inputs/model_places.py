"""Where a model is: built in, a local folder, or a name on the hub; and what its configuration file says.

    place = find_place(config.model)        # Place(source="/.../reference", files=frozenset({...}), ...)
    facts = read_model_facts(config.model)  # ModelFacts(num_layers=4, ...) from config.json alone, or None

Neither torch nor transformers is needed for a built-in model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.errors import MissingResourceError, UsageError, nearest
from experiments.inputs.model_facts import ModelFacts, facts_from_config

if TYPE_CHECKING:
    from experiments.config import ModelConfig

logger = logging.getLogger(__name__)

BUILT_IN_MODELS = ("reference", "reference-kv")

_REFERENCE_FOLDER = Path(__file__).resolve().parents[1] / "reference_models"


def read_model_facts(config: ModelConfig) -> ModelFacts | None:
    """Read the facts in ``config.json``, without weights and without the network.

    Returns:
        The facts; None for a name that is not built in, not a local folder, and not in the local hub cache.

    Raises:
        MissingResourceError: A local folder is missing or has no readable ``config.json``.
        UsageError: The configuration has an unknown type.
    """
    folder = _local_folder(config)
    place = _folder_place(folder) if folder is not None else _cached_place(config)
    return None if place is None else read_facts(place, config)


@dataclass(frozen=True)
class Place:
    """Where a model was found: the argument of ``from_pretrained``, and the names of the files there."""

    source: str
    commit: str | None
    files: frozenset[str]
    local: bool

    def options(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keywords of ``from_pretrained`` beside the source."""
        if self.local:
            return {"local_files_only": True, "trust_remote_code": config.trust_remote_code}
        return {"revision": self.commit, "trust_remote_code": config.trust_remote_code}


def find_place(config: ModelConfig) -> Place:
    """Return where the model is, the hub asked if need be; ``MissingResourceError`` if it is nowhere."""
    folder = _local_folder(config)
    if folder is not None:
        return _folder_place(folder)
    # Imported here: what is built in or in a folder needs no hub.
    from experiments.inputs.hub import HubUnreachableError, hub_files, pinned_commit

    try:
        files = hub_files(config.path, "model", config.revision)
    except HubUnreachableError as error:
        cached = _cached_place(config)
        if cached is None:
            raise MissingResourceError(
                f"{_not_found(config.path)}, nor in the hub's local cache, and {error}"
            ) from error
        logger.warning("model.path: %s; taking %s from the local cache, commit %s", error, config.path, cached.commit)
        return cached
    except MissingResourceError as error:
        raise MissingResourceError(f"{_not_found(config.path)}, and {error}") from error
    except UsageError as error:
        raise UsageError(f"model.path: {error}{nearest(config.path, BUILT_IN_MODELS)}") from error
    _refuse_without_config(config.path, files)
    return Place(config.path, pinned_commit(config.path, config.revision), files, local=False)


def _local_folder(config: ModelConfig) -> Path | None:
    """Return the folder that ``config.path`` names, or None if it can only be a name on the hub."""
    if config.path in BUILT_IN_MODELS:
        folder = _REFERENCE_FOLDER / config.path
    else:
        folder = Path(config.path).expanduser()
        if not folder.exists() and not _looks_like_path(config.path):
            return None
    if not folder.exists():
        raise MissingResourceError(f"{_not_found(config.path)} (looked for {folder.absolute()})")
    if not folder.is_dir():
        raise UsageError(f"model.path: got the file {config.path!r}, allowed the folder with its config.json")
    if config.revision is not None:
        raise UsageError(f"model.revision: got {config.revision!r}, but {config.path!r} is a folder, not a hub name")
    return folder.resolve()


def _looks_like_path(path: str) -> bool:
    return path.startswith((".", "/", "~")) or "\\" in path or path.count("/") > 1


def _folder_place(folder: Path, commit: str | None = None) -> Place:
    return Place(str(folder), commit, frozenset(entry.name for entry in folder.iterdir()), local=True)


def _cached_place(config: ModelConfig) -> Place | None:
    from experiments.inputs.hub import cached_model_folder

    folder = cached_model_folder(config.path, config.revision)
    return None if folder is None else _folder_place(folder, commit=folder.name)


def _not_found(path: str) -> str:
    built_in = ", ".join(BUILT_IN_MODELS)
    hint = nearest(path, BUILT_IN_MODELS)
    return f"model.path: got {path!r}, which is no built-in model ({built_in}{hint}) and no folder here"


def read_facts(place: Place, config: ModelConfig) -> ModelFacts:
    """Read ``config.json``; ``MissingResourceError`` or ``UsageError`` where that is impossible."""
    _refuse_without_config(place.source, place.files)
    if config.path in BUILT_IN_MODELS:
        return _built_in_facts(Path(place.source))
    # Imported here: slow to load, and not needed for what is built in.
    import transformers

    from experiments.inputs.hub import first_line

    try:
        return facts_from_config(transformers.AutoConfig.from_pretrained(place.source, **place.options(config)))
    except (OSError, KeyError) as error:
        raise MissingResourceError(
            f"model.path: cannot read the config.json of {place.source}: {first_line(error)}"
        ) from error
    except ValueError as error:
        hint = "" if config.trust_remote_code else "; model.trust_remote_code allows a model's own code to run"
        raise UsageError(f"model.path: {first_line(error)}{hint}") from error


def _built_in_facts(folder: Path) -> ModelFacts:
    """Return what the library reads from a built-in model's file; these are causal models of the GPT-2 kind."""
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return ModelFacts(
        family="causal",
        architecture=said["architectures"][0],
        num_layers=said["n_layer"],
        num_heads=said["n_head"],
        max_positions=said["n_positions"],
        vocab_size=said["vocab_size"],
    )


def _refuse_without_config(path: str, files: frozenset[str]) -> None:
    if "config.json" not in files:
        raise MissingResourceError(f"model.path: {path} has no config.json; it has {some_of(files)}")


def some_of(names: Iterable[str], limit: int = 5) -> str:
    """Return the first names in words, for an error."""
    ordered = sorted(names)
    return (", ".join(ordered[:limit]) + (", ..." if len(ordered) > limit else "")) or "no files"

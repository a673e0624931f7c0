"""The origin of a campaign's numbers: every shard records it in a file of its own.

    provenance = ShardProvenance(folder, shard, environment_facts(arguments))
    provenance.note(contexts.facts)              # shards/0003.json; refused if another shard has another model or data
    write_campaign_provenance(folder)            # provenance.json, from the files of all shards

No file has two writers, so shards that start at the same moment do not overwrite each other's facts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.campaign.folder import CampaignFolder
from experiments.errors import CheckRefusedError
from experiments.plan.plan import canonical_json
from experiments.plan.shards import Shard
from experiments.tables.csv_file import write_text

FINGERPRINTS = ("model_fingerprint", "data_fingerprint")

Facts = dict[str, Any]


class ShardProvenance:
    """Notes the environment and the contexts of one shard."""

    def __init__(self, folder: CampaignFolder, shard: Shard, environment: Facts) -> None:
        self._folder, self._name, self._environment = folder, shard.file_name, environment
        self._known = ""

    def note(self, contexts: Mapping[str, Facts]) -> None:
        """Write the facts about contexts if they have changed since the last call."""
        known = canonical_json(contexts)
        if known != self._known:
            note_provenance(self._folder, self._name, {**self._environment, "contexts": dict(contexts)})
            self._known = known


def note_provenance(folder: CampaignFolder, shard_name: str, facts: Facts) -> None:
    """Write facts about the origin of a shard's numbers into its file; they replace older facts of the same name.

    Raises:
        CheckRefusedError: another shard, or an earlier session of this one, had other weights or data. The file is
            restored.
    """
    path = folder.shards / f"{shard_name}.json"
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    _check_fingerprints(folder, facts["contexts"])
    known = {} if before is None else _read(path)
    contexts = {**known.get("contexts", {}), **facts["contexts"]}
    write_text(path, json.dumps({**known, **facts, "contexts": contexts}, indent=1) + "\n")
    try:
        # Another shard may have written its file since the first check. At least one of the two finds the other here.
        _check_fingerprints(folder, facts["contexts"])
    except CheckRefusedError:
        if before is None:
            path.unlink()
        else:
            write_text(path, before)
        raise


def write_campaign_provenance(folder: CampaignFolder) -> None:
    """Write ``provenance.json``: the facts of the first shard, all contexts, and the differing facts of other shards.

    If no shard has recorded anything, write nothing.

    Raises:
        CheckRefusedError: two shards had different weights or data.
    """
    shards = _shard_facts(folder)
    if not shards:
        return
    contexts: dict[str, Facts] = {}
    for name, facts in shards.items():
        _compare(folder, name, contexts, facts["contexts"])
        contexts.update(facts["contexts"])
    first = {key: value for key, value in next(iter(shards.values())).items() if key != "contexts"}
    differing = {
        name: {key: value for key, value in facts.items() if key != "contexts" and first.get(key) != value}
        for name, facts in shards.items()
    }
    others = {name: facts for name, facts in differing.items() if facts}
    text = json.dumps({**first, "contexts": contexts, "shards": others}, indent=1)
    write_text(folder.file("provenance.json"), text + "\n")


def _check_fingerprints(folder: CampaignFolder, contexts: Mapping[str, Facts]) -> None:
    for name, facts in _shard_facts(folder).items():
        _compare(folder, name, facts["contexts"], contexts)


def _compare(
    folder: CampaignFolder, shard_name: str, known: Mapping[str, Facts], contexts: Mapping[str, Facts]
) -> None:
    for key in known.keys() & contexts.keys():
        for what in FINGERPRINTS:
            if known[key][what] != contexts[key][what]:
                raise CheckRefusedError(
                    f"{folder.path}: the {what.replace('_', ' ')} is {contexts[key][what][:12]}, but the campaign was "
                    f"begun with {known[key][what][:12]} (shard {shard_name}); results of two different experiments "
                    "would be mixed"
                )


def _shard_facts(folder: CampaignFolder) -> dict[str, Facts]:
    """Return the recorded facts of every shard, in the order of the shards."""
    paths = [path for path in folder.shards.glob("*.json") if re.fullmatch(r"\d{4,}\.json", path.name)]
    return {path.stem: _read(path) for path in sorted(paths, key=lambda path: int(path.stem))}


def _read(path: Path) -> Facts:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckRefusedError(
            f"{path}: is no JSON; the file is damaged. Delete it to have it written anew"
        ) from error
    if not isinstance(facts, dict) or not isinstance(facts.get("contexts"), dict):
        raise CheckRefusedError(f"{path}: has no contexts; the file is damaged. Delete it to have it written anew")
    return facts

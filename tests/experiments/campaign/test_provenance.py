from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from micro_campaign import files_below

from experiments.campaign import provenance as shard_provenance
from experiments.campaign.folder import CampaignFolder
from experiments.campaign.provenance import ShardProvenance, note_provenance, write_campaign_provenance
from experiments.errors import CheckRefusedError
from experiments.plan.shards import Shard


@pytest.fixture
def folder(tmp_path: Path) -> CampaignFolder:
    return CampaignFolder(tmp_path / "x")


def context(model: str = "a", data: str = "b") -> dict[str, Any]:
    return {"model_fingerprint": model * 32, "data_fingerprint": data * 32}


def facts(host: str = "one", **contexts: dict[str, Any]) -> dict[str, Any]:
    return {"threads": 1, "host": host, "contexts": contexts or {"key": context()}}


def known(folder: CampaignFolder, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(folder.file(name).read_text())
    return found


def test_a_shard_writes_its_own_file_and_no_other(folder: CampaignFolder) -> None:
    note_provenance(folder, "0001", facts("one"))
    first = folder.file("shards/0001.json").read_bytes()
    note_provenance(folder, "0002", facts("two", other=context("c", "d")))
    assert files_below(folder.path) == ["shards", "shards/0001.json", "shards/0002.json"]
    assert folder.file("shards/0001.json").read_bytes() == first


def test_a_shard_keeps_what_was_known_of_it_and_takes_what_is_new(folder: CampaignFolder) -> None:
    note_provenance(folder, "0001", facts("first"))
    note_provenance(folder, "0001", facts("second", other=context("c", "d")))
    assert known(folder, "shards/0001.json")["host"] == "second"
    assert set(known(folder, "shards/0001.json")["contexts"]) == {"key", "other"}


def test_a_shard_writes_only_when_something_is_new(folder: CampaignFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    real = shard_provenance.write_text
    monkeypatch.setattr(shard_provenance, "write_text", lambda path, text: (written.append(path), real(path, text)))
    provenance = ShardProvenance(folder, Shard(3, 4), {"threads": 1})
    for contexts in ({"key": context()}, {"key": context()}, {"key": {**context(), "execution": "plain"}}):
        provenance.note(contexts)
    assert [path.name for path in written] == ["0003.json", "0003.json"]
    assert known(folder, "shards/0003.json") == {
        "threads": 1, "contexts": {"key": {**context(), "execution": "plain"}},
    }  # fmt: skip


@pytest.mark.parametrize("shard", ["0001", "0002"])
@pytest.mark.parametrize(
    ("other", "what"), [(context(model="c"), "model fingerprint"), (context(data="c"), "data fingerprint")]
)
def test_other_weights_or_data_are_refused_whichever_shard_has_them(
    folder: CampaignFolder, shard: str, other: dict[str, Any], what: str
) -> None:
    note_provenance(folder, "0001", facts())
    before = {name: folder.file(name).read_bytes() for name in files_below(folder.path) if name.endswith("json")}
    with pytest.raises(
        CheckRefusedError, match=rf"the {what} is cccccccccccc, but the campaign was begun with .* \(shard 0001\)"
    ):
        note_provenance(folder, shard, facts(key=other))
    assert {n: folder.file(n).read_bytes() for n in files_below(folder.path) if n.endswith("json")} == before


@pytest.mark.parametrize("earlier", [False, True])
def test_of_two_shards_that_start_at_one_moment_with_two_models_one_is_refused(
    folder: CampaignFolder, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    if earlier:
        note_provenance(folder, "0002", facts(old=context("e", "f")))
    before = files_below(folder.path)
    real, calls = shard_provenance.write_text, list[Path]()

    def write_after_another(path: Path, text: str) -> None:
        if not calls:
            # Between the check and the writing of shard 2, shard 1 gets through both.
            calls.append(path)
            note_provenance(folder, "0001", facts(key=context("c")))
        real(path, text)

    monkeypatch.setattr(shard_provenance, "write_text", write_after_another)
    with pytest.raises(CheckRefusedError, match=r"begun with cccccccccccc \(shard 0001\)"):
        note_provenance(folder, "0002", facts())
    assert set(files_below(folder.path)) == {"shards", *before, "shards/0001.json"}
    if earlier:
        assert set(known(folder, "shards/0002.json")["contexts"]) == {"old"}


def test_shards_that_note_at_the_same_time_lose_nothing(folder: CampaignFolder) -> None:
    def note(number: int) -> None:
        for step in range(5):
            note_provenance(folder, f"{number:04d}", facts(f"host {number}", **{f"{number}-{step}": context()}))

    workers = [threading.Thread(target=note, args=(number,)) for number in range(1, 9)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    write_campaign_provenance(folder)
    assert set(known(folder, "provenance.json")["contexts"]) == {f"{n}-{s}" for n in range(1, 9) for s in range(5)}


def test_the_campaign_has_the_facts_of_the_first_shard_and_what_differs_in_others(folder: CampaignFolder) -> None:
    note_provenance(folder, "0002", facts("two", other=context("c", "d")))
    note_provenance(folder, "0001", facts("one"))
    note_provenance(folder, "0003", facts("one"))
    write_campaign_provenance(folder)
    assert known(folder, "provenance.json") == {
        "threads": 1, "host": "one", "contexts": {"key": context(), "other": context("c", "d")},
        "shards": {"0002": {"host": "two"}},
    }  # fmt: skip


def test_shards_that_disagree_are_not_put_together(folder: CampaignFolder) -> None:
    folder.shards.mkdir(parents=True)
    for name, model in (("0001", "a"), ("0002", "c")):
        (folder.shards / f"{name}.json").write_text(json.dumps(facts(key=context(model))))
    with pytest.raises(CheckRefusedError, match="the model fingerprint is cccccccccccc"):
        write_campaign_provenance(folder)
    assert not folder.file("provenance.json").exists()


def test_without_shards_nothing_is_written(folder: CampaignFolder) -> None:
    folder.shards.mkdir(parents=True)
    write_campaign_provenance(folder)
    assert files_below(folder.path) == ["shards"]


@pytest.mark.parametrize("content", ["", '{"contexts": {', "[]", '{"threads": 1}'])
def test_a_damaged_file_is_refused_by_name(folder: CampaignFolder, content: str) -> None:
    folder.shards.mkdir(parents=True)
    (folder.shards / "0001.json").write_text(content)
    for refused in (lambda: note_provenance(folder, "0002", facts()), lambda: write_campaign_provenance(folder)):
        with pytest.raises(CheckRefusedError, match=r"0001\.json: .* damaged"):
            refused()

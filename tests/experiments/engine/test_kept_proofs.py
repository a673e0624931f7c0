"""Start-up proofs that are kept: used where nothing differs, and nowhere else."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from micro_campaign import MicroPlace, files_below, numbers, start
from safetensors.torch import load_file, save_file

from experiments.command_line import main
from experiments.config import ExperimentConfig
from experiments.engine import proof_key, proofs
from experiments.engine.kept_proofs import VARIABLE, KeptProofs, user_cache
from experiments.engine.proof import Proof, prove
from experiments.errors import UsageError
from experiments.machine import environment

EXACT: dict[str, Any] = {"resume": None, "rows": None, "head": None, "faults": 15}
KEY = {"model": "0123", "inputs": {"input_ids": ["torch.int64", [1, 16]]}, "padded": False}
FIXED = {
    "--data.num_samples": "1", "--data.seq_len": "16", "--num_runs": "8", "--sweep.fault.location": "q,out",
    "--detect.detectors": "[lite]",
}  # fmt: skip
MADE, KEPT, CACHED = "made at this start", "kept in the campaign's folder", "kept in the user's cache"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, an empty one."""
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "attention-fault-injection" / "proofs"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Proof]:
    """The proofs that are made while a test runs."""
    found: list[Proof] = []

    def noted(*arguments: Any) -> Proof:
        found.append(prove(*arguments))
        return found[-1]

    monkeypatch.setattr(proofs, "prove", noted)
    return found


def campaign(place: MicroPlace, output: Path, *more: str) -> str:
    """Run a small campaign that is worth a proof; return what provenance says of the proof."""
    given = more[::2]
    fixed = [text for key, value in FIXED.items() if key not in given for text in (key, value)]
    assert main(place.arguments(output, *fixed, *more, bits="3,14")) == 0
    (context,) = json.loads((output / "micro/provenance.json").read_text(encoding="utf-8"))["contexts"].values()
    return str(context["execution"]["proof"])


# --------------------------------------------------------------------------------------------- campaigns


def test_the_second_campaign_makes_no_proof_and_gives_the_same_rows(
    place: MicroPlace, tmp_path: Path, cache: Path, made: list[Proof]
) -> None:
    assert campaign(place, tmp_path / "first") == MADE
    assert len(made) == 1
    assert campaign(place, tmp_path / "second") == CACHED
    assert len(made) == 1
    assert numbers(tmp_path / "first/micro/runs.csv") == numbers(tmp_path / "second/micro/runs.csv")
    names = files_below(cache)
    assert len(names) == 1
    assert files_below(tmp_path / "first/micro/proofs") == files_below(tmp_path / "second/micro/proofs") == names


def test_a_copy_of_the_folder_brings_its_proof_along(
    place: MicroPlace, tmp_path: Path, cache: Path, made: list[Proof]
) -> None:
    campaign(place, tmp_path / "first")
    shutil.copytree(tmp_path / "first/micro", tmp_path / "copy/micro")
    shutil.rmtree(cache)
    for name in ("runs.csv", "provenance.json"):
        (tmp_path / "copy/micro" / name).unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "copy/micro/shards")
    assert campaign(place, tmp_path / "copy") == KEPT
    assert len(made) == 1
    # What was found in one place is there in the other, too.
    assert len(files_below(cache)) == 1


CHANGES = {
    "--detect.tolerance": "0.5",
    "--detect.detectors": "[]",
    "--data.seq_len": "17",
    "--model.dtype": "bfloat16",
    "--run.propagation": "false",
}


@pytest.mark.parametrize("option", CHANGES)
def test_another_configuration_has_a_proof_of_its_own(
    place: MicroPlace, tmp_path: Path, made: list[Proof], option: str
) -> None:
    campaign(place, tmp_path / "first")
    assert campaign(place, tmp_path / "second", option, CHANGES[option]) == MADE
    assert len(made) == 2


def test_other_weights_have_a_proof_of_their_own(place: MicroPlace, tmp_path: Path, made: list[Proof]) -> None:
    campaign(place, tmp_path / "first")
    shutil.copytree(place.model, tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name].view(torch.int32).view(-1)[0] ^= 1
    save_file(weights, path, metadata={"format": "pt"})
    assert campaign(place, tmp_path / "second", "--model.path", str(tmp_path / "model")) == MADE
    assert len(made) == 2


@pytest.mark.parametrize("part", ["program_fingerprint", "kernel_facts", "execution_flags", "_code"])
def test_another_program_library_or_processor_makes_its_own(
    place: MicroPlace, tmp_path: Path, made: list[Proof], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    campaign(place, tmp_path / "first")
    monkeypatch.setattr(proof_key, part, lambda *arguments: "another")
    assert campaign(place, tmp_path / "second") == MADE
    assert len(made) == 2


def test_kernel_facts_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR"):
        monkeypatch.delenv(name, raising=False)
    before = proof_key.kernel_facts()
    assert before == proof_key.kernel_facts()
    for name, value in (
        ("ATEN_CPU_CAPABILITY", "default"),
        ("ONEDNN_MAX_CPU_ISA", "SSE41"),
        ("MKL_CBWR", "COMPATIBLE"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert proof_key.kernel_facts() != before
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert proof_key.kernel_facts() != before


def test_what_cannot_be_named_is_not_kept(
    place: MicroPlace, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof_key, "_code", lambda model: None)
    assert campaign(place, tmp_path / "first") == MADE
    assert not cache.exists()


def test_calibrated_detectors_are_proved_anew(place: MicroPlace, tmp_path: Path, cache: Path) -> None:
    campaign(place, tmp_path / "first", "--detect.detectors", "[ranger]")
    assert not cache.exists()


def test_two_campaigns_at_once(place: MicroPlace, tmp_path: Path, cache: Path) -> None:
    fixed = [text for pair in FIXED.items() for text in pair]
    processes = [start(place.arguments(tmp_path / str(number), *fixed, bits="3,14")) for number in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    names = files_below(cache)
    assert len(names) == 1
    assert campaign(place, tmp_path / "third") in (CACHED, MADE)
    assert all(name.endswith(".json") for name in files_below(cache))


# --------------------------------------------------------------------------------------------- files


def kept(tmp_path: Path) -> KeptProofs:
    (tmp_path / "campaign").mkdir(exist_ok=True)
    return KeptProofs.of(True, tmp_path / "campaign")


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_a_proof_comes_back_as_it_was(tmp_path: Path) -> None:
    said = {**EXACT, "rows": "a reason", "head": "a reason"}
    kept(tmp_path).keep(KEY, said)
    assert kept(tmp_path).find(KEY) == (said, "the campaign's folder")
    assert kept(tmp_path).find({**KEY, "padded": True}) is None


DAMAGES: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "no JSON": lambda text: "\x00\xff not JSON",
    "a list": lambda text: "[1, 2]",
    "a null": lambda text: "null",
    "another result": lambda text: text.replace('"rows": "a reason"', '"rows": null'),
    "no result": lambda text: text.replace('"rows"', '"lines"'),
    "another key": lambda text: text.replace("0123", "4567"),
    "deep": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_not_used_and_is_written_again(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    said = {**EXACT, "rows": "a reason", "head": "a reason"}
    proofs_kept = kept(tmp_path)
    proofs_kept.keep(KEY, said)
    for folder in (cache, tmp_path / "campaign/proofs"):
        path = only_file(folder)
        text = path.read_text(encoding="utf-8")
        path.write_text(DAMAGES[damage](text), encoding="utf-8")
        assert path.read_text(encoding="utf-8") != text
    with caplog.at_level(logging.WARNING):
        assert proofs_kept.find(KEY) is None
    assert sum("not used" in record.message for record in caplog.records) == 2
    proofs_kept.keep(KEY, said)
    assert proofs_kept.find(KEY) == (said, "the campaign's folder")


def test_a_file_of_another_key_under_this_name_is_not_used(tmp_path: Path, cache: Path) -> None:
    kept(tmp_path).keep(KEY, EXACT)
    other = {**KEY, "padded": True}
    name = only_file(cache).name
    shutil.rmtree(tmp_path / "campaign/proofs")
    kept(tmp_path).keep(other, EXACT)
    path = next(path for path in cache.iterdir() if path.name != name)
    path.replace(cache / name)
    shutil.rmtree(tmp_path / "campaign/proofs")
    assert kept(tmp_path).find(KEY) is None


def test_a_place_that_cannot_be_written_to_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, cache: Path
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file stands there", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        kept(tmp_path).keep(KEY, EXACT)
    assert "could not be kept in the user's cache" in caplog.text
    assert kept(tmp_path).find(KEY) == (EXACT, "the campaign's folder")


def test_nothing_is_made_of_a_campaign_that_is_not_there(tmp_path: Path) -> None:
    KeptProofs.of(True, tmp_path / "absent").keep(KEY, EXACT)
    assert not (tmp_path / "absent").exists()


def test_where_the_user_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert user_cache() == tmp_path / "xdg/attention-fault-injection/proofs"
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert user_cache() == tmp_path / ".cache/attention-fault-injection/proofs"


def test_an_empty_folder_name_is_refused() -> None:
    with pytest.raises(UsageError, match=r"run\.proof_cache: got an empty text, allowed true, false or a folder"):
        ExperimentConfig().with_field("run.proof_cache", "")


def test_every_source_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("bounds", "experiments", "fault_injection", "monitoring"):
        (tmp_path / package / "room").mkdir(parents=True)
        (tmp_path / package / "room/module.py").write_text("VALUE = 1\n", encoding="utf-8")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "experiments/machine/environment.py"))
    fingerprint = environment.program_fingerprint.__wrapped__
    before = fingerprint()
    for package in ("bounds", "experiments", "fault_injection", "monitoring"):
        path = tmp_path / package / "room/module.py"
        path.write_text("VALUE = 2\n", encoding="utf-8")
        assert fingerprint() != before
        path.write_text("VALUE = 1\n", encoding="utf-8")
        assert fingerprint() == before

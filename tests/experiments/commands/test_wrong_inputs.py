"""Wrong inputs: the exit status, one line that names the problem, and nothing written."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from micro_campaign import MicroPlace, files_below, micro_gpt2, start
from safetensors.torch import load_file, save_file

from experiments.command_line import main
from experiments.config import ExperimentConfig
from experiments.errors import MissingResourceError, UsageError
from experiments.runner import CompleteExperimentRunner
from fault_injection import is_patched

USAGE, MISSING = UsageError.exit_status, MissingResourceError.exit_status


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> MicroPlace:
    place = MicroPlace.make(tmp_path_factory.mktemp("place"))
    root = place.root
    (root / "empty.txt").write_text("")
    (root / "blank.txt").write_text(" \n\n ")
    (root / "short.txt").write_text("too short")
    (root / "few.txt").write_text("enough for three windows of twelve tokens")
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00\x01" * 100)
    (root / "empty folder").mkdir()
    (root / "broken.json").write_text("{")
    (root / "columns.csv").write_text("a,b\n1,2\n")
    (root / "a file").write_text("")
    (root / "campaign.yaml").write_text("fault: {bitt: 3}\n")
    (root / "other.safetensors").write_bytes(b"")

    pickled = root / "pickled"
    micro_gpt2().save_pretrained(pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()

    lacking = root / "lacking"
    micro_gpt2().save_pretrained(lacking)
    weights = load_file(lacking / "model.safetensors")
    weights.pop("transformer.h.1.attn.c_attn.weight")
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})

    broken = root / "broken weights"
    micro_gpt2().save_pretrained(broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])

    untokenised = root / "untokenised"
    micro_gpt2().save_pretrained(untokenised)

    infinite = root / "infinite"
    model = micro_gpt2()
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = torch.nan
    model.save_pretrained(infinite)
    transformers.ByT5Tokenizer().save_pretrained(infinite)

    mamba = transformers.MambaConfig(
        vocab_size=384,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=4,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    transformers.MambaForCausalLM(mamba).save_pretrained(root / "mamba")
    transformers.ByT5Tokenizer().save_pretrained(root / "mamba")

    t5 = transformers.T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(root / "t5")
    vit = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    transformers.ViTModel(vit).save_pretrained(root / "vit")
    return place


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in [key for key in os.environ if key.startswith("SLURM_")]:
        monkeypatch.delenv(key)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@dataclass(frozen=True)
class Wrong:
    """Options that are wrong ({root} is the place), the exit status, and what the line must say."""

    options: str | Callable[[Path], list[str]]
    says: str
    status: int = USAGE

    def arguments(self, root: Path) -> list[str]:
        if callable(self.options):
            return self.options(root)
        return [word.replace("{root}", str(root)) for word in self.options.split(" | ")]


CASES = {
    # What is asked for.
    "unknown key": Wrong("--fault.bitt=3", "fault.bitt: no such field; did you mean 'fault.bit'?"),
    "unknown axis": Wrong("--sweep.fault.locaton | q,k", "sweep.fault.locaton: no such field"),
    "unknown key in a file": Wrong("--config={root}/campaign.yaml", "fault.bitt: no such field; did you mean"),
    "axis without field": Wrong("--sweep | fault.bit", "sweep"),
    "axis of braces": Wrong("--sweep.fault.location | {", "fault.location: got "),
    "wrong type": Wrong("--data.num_samples=many", "data.num_samples: got many, allowed int"),
    "wrong type of an axis": Wrong("--sweep.seed | 1.5,2", "sweep.seed: got 1.5, allowed int"),
    "unknown location": Wrong("--fault.location=scroes", "fault.location: got 'scroes', allowed q, k, v, scores"),
    "unknown kind": Wrong("--fault.kind=flip", "fault.kind: got 'flip', allowed bitflip"),
    "unknown detector": Wrong("--detect.detectors=[finit]", "did you mean 'finite'?"),
    "unknown dtype": Wrong("--model.dtype=float23", "model.dtype: got 'float23', allowed float64, float32"),
    "unknown device": Wrong("--model.device=tpu", "model.device: got 'tpu', allowed auto, cpu, cuda"),
    "bit 40": Wrong("--fault.bit=40", "fault.bit: got 40, allowed 0..31 for float32"),
    "bit 16 of bfloat16": Wrong(
        "--fault.bit=16 | --model.dtype=bfloat16 | --fault.location=out",
        "fault.bit: got 16, allowed 0..15 for bfloat16",
    ),
    "bit 40 on an axis": Wrong("--sweep.fault.bit | 3,40", "fault.bit: got 40, allowed 0..31 for float32"),
    "negative bit": Wrong("--fault.bit=-1", "fault.bit: got -1, allowed 0"),
    "no runs": Wrong("--num_runs=0", "num_runs: got 0, allowed 1 or more"),
    "bad name": Wrong("--name=a/b", "name: got 'a/b'"),
    "missing configuration": Wrong("--config={root}/nowhere.yaml", "nowhere.yaml", MISSING),
    # Where the fault shall be.
    "layer 99": Wrong("--fault.layers=99", "fault.layers: got 99, allowed 0..1"),
    "layer 99 on an axis": Wrong("--sweep.fault.layers | 0,99", "fault.layers: got 99, allowed 0..1"),
    "layer 99 of a dry run": Wrong("--fault.layers=99 | --dry-run", "fault.layers: got 99, allowed 0..1"),
    "window of a dry run": Wrong("--data.seq_len=33 | --dry-run", "data.seq_len: got 33, allowed 2..32"),
    "head 5": Wrong("--fault.index.head=5", "fault.index.head: got 5, allowed 0..1"),
    "row 12": Wrong("--fault.index.row=12", "fault.index.row: got 12, allowed 0..11"),
    "sequence 1": Wrong("--fault.index.batch=1", "fault.index.batch: got 1, allowed 0..0"),
    "bad expression": Wrong("--fault.layer_pattern=(", "fault.layer_pattern: '(' is no regular expression"),
    "pattern without match": Wrong("--fault.layer_pattern=encoder", "'encoder' matches no attention layer"),
    "specific layers that are not given": Wrong("--fault.layer_mode=specific", "fault.layer_mode: specific needs"),
    # What it reads.
    "missing file": Wrong("--data.source=text:{root}/txet.txt", "did you mean 'text.txt'?", MISSING),
    "empty file": Wrong("--data.source=text:{root}/empty.txt", "holds no text"),
    "blank file": Wrong("--data.source=text:{root}/blank.txt", "holds no text"),
    "empty folder": Wrong("--data.source=text:{root}/empty folder", "data.source: ", MISSING),
    "file shorter than a window": Wrong("--data.source=text:{root}/short.txt", "has 9 tokens, a window needs 12"),
    "file with too few windows": Wrong("--data.source=text:{root}/few.txt", "data.num_samples: got 4, but"),
    "file that is no text": Wrong("--data.source=text:{root}/binary.txt", "binary.txt"),
    "broken json": Wrong("--data.source=json:{root}/broken.json", "broken.json"),
    "column that is not there": Wrong("--data.source=csv:{root}/columns.csv | --data.field=text", "data.field"),
    "unknown source": Wrong("--data.source=txt:x", "did you mean 'text'?"),
    "source without path": Wrong("--data.source=text", "data.source: got 'text'"),
    "window longer than the context": Wrong("--data.seq_len=33", "data.seq_len: got 33, allowed 2..32"),
    "batches that do not fit": Wrong("--data.batch_size=3", "data.num_samples: got 4, allowed a multiple"),
    "data set while offline": Wrong("--data.source=hf:someone/something", "data.source", MISSING),
    # What it breaks.
    "missing folder": Wrong("--model.path={root}/mdoel", "model.path: got", MISSING),
    "file instead of a folder": Wrong("--model.path={root}/a file", "allowed the folder with its config.json"),
    "folder without a model": Wrong("--model.path={root}/empty folder", "has no config.json", MISSING),
    "hub name while offline": Wrong("--model.path=someone/something", "model.path: got 'someone/something'", MISSING),
    "misspelt built-in name": Wrong("--model.path=referense", "did you mean 'reference'", MISSING),
    "pickle weights": Wrong("--model.path={root}/pickled", "only pickle weights (pytorch_model.bin)"),
    "weights that lack some": Wrong("--model.path={root}/lacking", "lacks 1 weights", MISSING),
    "weights that are cut off": Wrong("--model.path={root}/broken weights", "cannot read the weights", MISSING),
    "model without tokenizer": Wrong("--model.path={root}/untokenised", "the model has no tokenizer"),
    "model without attention": Wrong("--model.path={root}/mamba", "attention"),
    "encoder-decoder": Wrong("--model.path={root}/t5", "encoder-decoder"),
    "model of images": Wrong("--model.path={root}/vit", "takes no token ids"),
    "model that is not finite": Wrong("--model.path={root}/infinite", "is not finite on the batch that is checked", 1),
    "GPU that is not there": Wrong("--model.device=cuda:97", "model.device: got 'cuda:97'", MISSING),
    # How it runs.
    "no workers": Wrong("--launcher | local | --workers | 0", "--workers: got 0, allowed a whole number from 1 to"),
    "workers of no digits": Wrong("--launcher | local | --workers | ²", "--workers: got ²"),
    "workers without number": Wrong("--launcher | local", "--workers: got None"),
    "unknown launcher": Wrong("--launcher | lokal | --workers | 2", "--launcher: got 'lokal', allowed local, slurm"),
    "slurm without workers": Wrong("--launcher | slurm", "--workers: got None"),
    "a partition that is two words": Wrong("--slurm.partition | a b", "slurm.partition: got 'a b'"),
    "a time that is none": Wrong("--slurm.time | soon", "slurm.time: got 'soon', allowed minutes"),
    "an array limit of 0": Wrong("--slurm.array_limit | 0", "slurm.array_limit: got 0, allowed 1 or more"),
    "a grace that is none": Wrong("--grace | 1.5", "--grace: got 1.5, allowed a whole number"),
    "shard and launcher": Wrong("--shard | 1/2 | --workers | 2", "--shard: cannot be given together"),
    "shard 4/3": Wrong("--shard | 4/3", "--shard: got '4/3', allowed i/n"),
    "shard 0/3": Wrong("--shard | 0/3", "--shard: got '0/3'"),
    "shard twice": Wrong("--shard | 1/2 | --shard | 2/2", "shard"),
    "shard of words": Wrong("--shard | first", "--shard: got 'first'"),
    "shard without value": Wrong("--shard", "--shard: needs a value"),
    "option without value": Wrong("--fault.kind", "--fault.kind: needs a value"),
    "argument that is no option": Wrong("bits.yaml", "bits.yaml: unexpected argument"),
    "unknown list": Wrong("--list | modles", "--list: got 'modles', allowed models"),
}


def refused(wrong: Wrong, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status = main(arguments)
    said, complained = capsys.readouterr()
    lines = complained.splitlines()
    assert status == wrong.status, complained
    assert len(lines) == 1, complained
    assert lines[0].startswith("run_sweep.py: ")
    assert wrong.says in lines[0]
    assert "Traceback" not in complained
    assert said == ""


@pytest.mark.parametrize("wrong", CASES.values(), ids=CASES.keys())
def test_it_is_refused_on_one_line_and_nothing_is_written(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: Wrong
) -> None:
    output = tmp_path / "out"
    refused(wrong, place.arguments(output, *wrong.arguments(place.root)), capsys)
    assert files_below(output) == []


@pytest.mark.parametrize("name", ["unknown key", "layer 99", "file shorter than a window", "pickle weights"])
def test_not_even_an_empty_folder_is_left_behind(place: MicroPlace, tmp_path: Path, name: str) -> None:
    wrong = CASES[name]
    assert main(place.arguments(tmp_path / "a" / "b", *wrong.arguments(place.root))) == wrong.status
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("name", ["layer 99", "pattern without match", "file shorter than a window", "bit 40"])
def test_a_campaign_that_is_there_is_left_alone(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    wrong, folder = CASES[name], tmp_path / "micro"
    assert main(place.arguments(tmp_path, "--num_runs=1", "--fault.location=q", bits="3")) == 0
    before = {path: (folder / path).read_bytes() for path in files_below(folder) if (folder / path).is_file()}
    capsys.readouterr()
    arguments = [*place.arguments(tmp_path, *wrong.arguments(place.root)), "--overwrite"]
    refused(wrong, arguments, capsys)
    assert {path: (folder / path).read_bytes() for path in files_below(folder) if (folder / path).is_file()} == before


def test_an_output_folder_below_a_file_is_refused(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    for below in ("file", "file/results"):
        refused(Wrong("", "is not a writable folder"), place.arguments(tmp_path / below), capsys)
    (tmp_path / "micro").write_text("mine")
    refused(Wrong("", "is not a writable folder"), place.arguments(tmp_path), capsys)
    assert files_below(tmp_path) == ["file", "micro"]


def test_a_folder_that_is_no_campaign_is_refused(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "micro").mkdir()
    (tmp_path / "micro" / "thesis.tex").write_text("years of work")
    refused(Wrong("", "exists and is no campaign"), place.arguments(tmp_path), capsys)
    assert files_below(tmp_path) == ["micro", "micro/thesis.tex"]


def test_overwriting_a_folder_that_is_no_campaign_keeps_its_files(place: MicroPlace, tmp_path: Path) -> None:
    (tmp_path / "micro").mkdir()
    (tmp_path / "micro" / "thesis.tex").write_text("years of work")
    main([*place.arguments(tmp_path), "--overwrite"])
    assert (tmp_path / "micro" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("arguments", "says", "status"),
    [
        (
            ["staus", "results/x"],
            "staus: no such command, allowed export, merge, plan-size, replay, report, status, trace; did you mean",
            USAGE,
        ),
        (["run"], "run: no such command", USAGE),
        (["report", "nowhere"], "nowhere: no campaign here", MISSING),
        (["report"], "report: needs one campaign folder", USAGE),
        (["status"], "status: needs one campaign folder", USAGE),
        (["status", "a", "b"], "status: needs one campaign folder", USAGE),
        (["status", "nowhere"], "nowhere: no campaign here", MISSING),
        (["merge", "nowhere"], "nowhere: no campaign here", MISSING),
        (["trace", "nowhere"], "nowhere: no campaign here", MISSING),
        (["merge"], "merge: needs one campaign folder", USAGE),
        (["trace"], "trace: needs one campaign folder", USAGE),
        (["replay", "nowhere", "0" * 16], "nowhere: no campaign here", MISSING),
        (["plan-size"], "--margin: ", USAGE),
        (["plan-size", "--margin", "2", "--confidence", "0.95", "--population", "9"], "--margin: got 2", USAGE),
        (["plan-size", "--margin", "0.1", "--confidence", "95", "--population", "9"], "--confidence: got 95", USAGE),
        (["plan-size", "--margin", "x", "--confidence", "0.95", "--population", "9"], "--margin: got x", USAGE),
        (["plan-size", "--margin", "0.1", "--confidence", "0.9", "--population", "0"], "--population: got 0", USAGE),
        (["plan-size", "--margin", "0.1", "--confidence", "0.9", "--population", "-4"], "--population: got -4", USAGE),
        (["plan-size", "--margin", "0.1", "--confidence", "0.9", "--population", "9", "--sed", "3"], "sed", USAGE),
        (["plan-size", "--margin", "0.1", "--confidence", "0.9", "--population", "²"], "--population: got ²", USAGE),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_commands_are_refused(
    arguments: list[str], says: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(Wrong("", says, status), arguments, capsys)


@pytest.mark.parametrize("what", ["config.yaml", "plan"])
def test_a_campaign_whose_configuration_was_damaged(
    place: MicroPlace, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    arguments = place.arguments(tmp_path, "--num_runs=1", "--fault.location=q", bits="3")
    assert main(arguments) == 0
    config = tmp_path / "micro" / "config.yaml"
    config.write_text("name: [" if what == "config.yaml" else config.read_text().replace("bitflip", "zero"))
    capsys.readouterr()
    for command in (arguments, ["status", str(config.parent)], ["merge", str(config.parent)]):
        assert main(command) in (1, 2)
        (line,) = capsys.readouterr().err.splitlines()
        assert "fault.bit" in line or "config.yaml" in line


def test_slurm_variables_that_make_no_sense(
    place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in (("ID", "x"), ("COUNT", "3"), ("MIN", "1")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{key}", value)
    refused(Wrong("", "SLURM_ARRAY_TASK_ID"), place.arguments(tmp_path / "out"), capsys)


def test_without_a_network_a_hub_name_is_refused_at_once(
    place: MicroPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[float] = []

    def unreachable(*_: object, **__: object) -> None:
        asked.append(time.monotonic())
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    wrong = Wrong("", "model.path: got 'someone/something'", MISSING)
    refused(wrong, place.arguments(tmp_path / "out", "--model.path=someone/something"), capsys)
    assert 1 <= len(asked) <= 2, "the hub must not be asked again and again"


# --------------------------------------------------------------------------------------------- from Python


def test_a_boolean_mask_of_four_dimensions_is_refused() -> None:
    model, tokens = micro_gpt2(), torch.arange(3, 15).view(1, 12)
    mask = torch.ones(1, 1, 12, 12).tril().bool()
    runner = CompleteExperimentRunner(ExperimentConfig())
    with pytest.raises(UsageError, match=r"attention_mask: got bool of shape \(1, 1, 12, 12\); .* mask nothing"):
        runner.run_all(model, [{"input_ids": tokens, "attention_mask": mask}])
    assert not is_patched(model)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    causal, plain = (
        CompleteExperimentRunner(ExperimentConfig(detectors=[])).run_all(model, [batch])[0]
        for batch in ({"input_ids": tokens, "attention_mask": additive}, {"input_ids": tokens})
    )
    assert causal.baseline_loss == plain.baseline_loss


def test_a_model_without_attention_is_refused_and_left_as_it_was() -> None:
    config = transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = transformers.MambaForCausalLM(config).train()
    with pytest.raises(Exception, match="attention") as refusal:
        CompleteExperimentRunner(ExperimentConfig()).run_all(model, [torch.arange(3, 15).view(1, 12)])
    assert "Mamba" in str(refusal.value)
    assert not is_patched(model)
    assert model.training


# --------------------------------------------------------------------------------------------- as a process


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["unknown key", "file shorter than a window", "pickle weights", "weights that lack some", "model without attention",
     "hub name while offline", "data set while offline"],
)  # fmt: skip
def test_a_process_says_one_line_too(place: MicroPlace, tmp_path: Path, name: str) -> None:
    wrong = CASES[name]
    process = start(place.arguments(tmp_path / "out", *wrong.arguments(place.root)))
    said, complained = process.communicate()
    assert process.returncode == wrong.status, complained
    assert said == ""
    assert len(complained.splitlines()) == 1, complained
    assert wrong.says in complained
    assert files_below(tmp_path / "out") == []

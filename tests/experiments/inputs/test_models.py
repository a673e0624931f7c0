from __future__ import annotations

import json
import logging
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from experiments.errors import MissingResourceError, UsageError
from experiments.inputs import hub as hub_module
from experiments.inputs import model_places, models
from experiments.inputs.hub import HubUnreachableError, hub_files
from experiments.inputs.model_facts import facts_from_config, model_family
from experiments.inputs.model_places import read_model_facts
from experiments.inputs.models import load_model, resolve_device
from monitoring.cache.model_fingerprints import model_fingerprint

COMMIT = "0123456789abcdef0123456789abcdef01234567"

GPT2 = transformers.GPT2Config(vocab_size=384, n_positions=64, n_embd=16, n_layer=2, n_head=2, eos_token_id=1)
BERT = transformers.BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=32,
    max_position_embeddings=64,
)


def model_config(path: Path | str, **changes: Any) -> Any:
    settings = {
        "path": str(path),
        "dtype": "float32",
        "device": "cpu",
        "force_kv_equal": False,
        "trust_remote_code": False,
        "revision": None,
    }
    return SimpleNamespace(**(settings | changes))


def save(folder: Path, model: Any, tokenizer: Any = None) -> Path:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder with a subfolder for each kind of model."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    save(root / "gpt2", transformers.GPT2LMHeadModel(GPT2), transformers.ByT5Tokenizer())
    save(root / "gpt2-untokenised", transformers.GPT2LMHeadModel(GPT2))
    save(root / "bert", transformers.BertForMaskedLM(BERT))
    save(root / "bert-bare", transformers.BertModel(BERT))
    small = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    save(root / "t5", transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=384, **small)))
    return root


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty-cache"))


class StubHub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as it takes to find and fetch a model; knows the folders of ``root``."""

    def __init__(self, *args: Any, root: Path) -> None:
        self.root = root
        super().__init__(*args)

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            folder = self.root / parts[3]
            if parts[3] == "gated":
                return self.answer(403, b"{}", X_Error_Code="GatedRepo")
            if parts[3] == "broken":
                return self.answer(500, b"{}")
            if not folder.is_dir():
                return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            if parts[4:5] == ["revision"] and parts[5] not in ("main", COMMIT):
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            if parts[4:5] == ["tree"]:
                return self.answer(200, b"[]", Content_Type="application/json")
            siblings = [{"rfilename": file.name} for file in folder.iterdir()]
            described = {"_id": "1", "id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings}
            return self.answer(200, json.dumps(described).encode(), Content_Type="application/json")
        file = self.root / parts[1] / parts[-1]
        if not file.is_file():
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        return self.answer(200, file.read_bytes(), ETag=f'"{file.name}"', X_Repo_Commit=COMMIT)

    def do_HEAD(self) -> None:
        self.do_GET()


@pytest.fixture
def hub(folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(StubHub, root=folders))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    point_hub_to(f"http://127.0.0.1:{server.server_port}", monkeypatch, tmp_path)
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        huggingface_hub.close_session()


def point_hub_to(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # transformers and huggingface_hub each keep one object that remembers the endpoint it was made with
    keepers = [huggingface_hub.hf_api.api, transformers.utils.hub.hf_api()]
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    for keeper in keepers:
        monkeypatch.setattr(keeper, "endpoint", endpoint)


# What is loaded


def test_causal_model_is_ready_to_be_measured(folders: Path) -> None:
    loaded = load_model(model_config(folders / "gpt2"))
    assert type(loaded.model).__name__ == "GPT2LMHeadModel"
    assert loaded.family == "causal"
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.config._attn_implementation == "eager"
    assert loaded.device == torch.device("cpu")
    assert (loaded.resolved, loaded.revision) == (str((folders / "gpt2").resolve()), None)
    assert loaded.tokenizer("a", add_special_tokens=False)["input_ids"] == [100]


def test_weights_are_those_of_the_file(folders: Path) -> None:
    loaded = load_model(model_config(folders / "gpt2"))
    saved = load_file(folders / "gpt2" / "model.safetensors")
    parameters = dict(loaded.model.named_parameters())
    assert set(saved) <= set(parameters)
    assert all(torch.equal(parameters[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16", "float16"])
def test_dtype(folders: Path, name: str) -> None:
    loaded = load_model(model_config(folders / "gpt2", dtype=name))
    assert loaded.dtype == getattr(torch, name)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {loaded.dtype}


@pytest.mark.parametrize(
    ("folder", "family", "architecture"),
    [
        ("bert", "masked", "BertForMaskedLM"),
        ("bert-bare", "encoder", "BertModel"),
        ("gpt2", "causal", "GPT2LMHeadModel"),
    ],
)
def test_family_and_class(folders: Path, folder: str, family: str, architecture: str) -> None:
    loaded = load_model(model_config(folders / folder))
    assert (loaded.family, type(loaded.model).__name__) == (family, architecture)


def test_family_without_architectures_follows_the_model_type(folders: Path, tmp_path: Path) -> None:
    for name, family in (("gpt2", "causal"), ("bert", "masked")):
        folder = shutil.copytree(folders / name, tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        del config["architectures"]
        (folder / "config.json").write_text(json.dumps(config))
        assert load_model(model_config(folder)).family == family


def test_family_of_a_model_in_memory() -> None:
    class Mine(transformers.GPT2LMHeadModel):
        pass

    assert model_family(Mine(GPT2)) == "causal"
    assert model_family(transformers.BertModel(BERT)) == "encoder"
    assert model_family(transformers.BertForMaskedLM(BERT)) == "masked"
    assert model_family(transformers.GPT2Model(GPT2)) == "encoder"


def test_missing_tokenizer_is_none_not_an_empty_one(folders: Path) -> None:
    assert load_model(model_config(folders / "gpt2-untokenised")).tokenizer is None


def test_built_in_model_without_a_tokenizer_has_the_byte_tokenizer(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_places, "_REFERENCE_FOLDER", folders)
    for module in (models, model_places):
        monkeypatch.setattr(module, "BUILT_IN_MODELS", ("gpt2-untokenised",))
    loaded = load_model(model_config("gpt2-untokenised"))
    assert type(loaded.tokenizer).__name__ == "ByT5Tokenizer"


@pytest.mark.parametrize("name", model_places.BUILT_IN_MODELS)
def test_built_in_models_are_in_the_checkout(name: str) -> None:
    loaded = load_model(model_config(name))
    assert (loaded.family, type(loaded.tokenizer).__name__) == ("causal", "ByT5Tokenizer")
    assert loaded.facts.vocab_size == len(loaded.tokenizer)


def test_fingerprint_is_of_the_weights(folders: Path) -> None:
    first, second = (load_model(model_config(folders / "gpt2")).model for _ in range(2))
    assert model_fingerprint(first) == model_fingerprint(second)
    weight = second.transformer.h[1].attn.c_attn.weight
    weight.view(torch.int32)[3, 5] ^= 1
    assert model_fingerprint(first) != model_fingerprint(second)
    assert len(model_fingerprint(first)) == 32


# What is refused


def test_encoder_decoder_is_refused_by_name(folders: Path) -> None:
    with pytest.raises(UsageError, match=r"encoder-decoder T5ForConditionalGeneration.*run_all\(model, dataloader\)"):
        load_model(model_config(folders / "t5"))


def test_model_of_images_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    save(tmp_path, transformers.ViTModel(transformers.ViTConfig(image_size=32, **sizes)))
    with pytest.raises(UsageError, match="ViTModel, which takes no token ids"):
        load_model(model_config(tmp_path))


def test_pickle_weights_are_refused(folders: Path, tmp_path: Path) -> None:
    shutil.copy(folders / "gpt2" / "config.json", tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"only pickle weights \(pytorch_model.bin\).*save_pretrained\(NEW\)"):
        load_model(model_config(tmp_path))


def test_folder_without_weights(folders: Path, tmp_path: Path) -> None:
    shutil.copy(folders / "gpt2" / "config.json", tmp_path)
    with pytest.raises(MissingResourceError, match=r"has no model.safetensors; it has config.json"):
        load_model(model_config(tmp_path))


def test_truncated_weights(folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders / "gpt2", tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(MissingResourceError, match=r"cannot read the weights of .*cut: SafetensorError"):
        load_model(model_config(folder))


def test_incomplete_weights_are_refused_not_made_up(folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders / "gpt2", tmp_path / "holes")
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.attn.c_attn.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        MissingResourceError, match=r"lacks 1 weights of a GPT2LMHeadModel.*transformer\.h\.1\.attn\.c_attn"
    ):
        load_model(model_config(folder))


def test_missing_pooler_is_no_reason_to_refuse(folders: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folders / "bert-bare", tmp_path / "poolerless")
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("pooler.")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_model(model_config(folder)).family == "encoder"


def test_missing_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(MissingResourceError, match=r"no folder here \(looked for .*/nowhere\)"):
        load_model(model_config(tmp_path / "nowhere"))


def test_missing_config(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(MissingResourceError, match=r"has no config.json; it has notes.txt"):
        load_model(model_config(tmp_path))


def test_unknown_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gtp2"}')
    with pytest.raises(UsageError, match=r"gtp2.*model.trust_remote_code"):
        load_model(model_config(tmp_path))


def test_broken_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(MissingResourceError, match=r"cannot read the config.json"):
        load_model(model_config(tmp_path))


def test_file_instead_of_folder(folders: Path) -> None:
    with pytest.raises(UsageError, match=r"got the file .* allowed the folder"):
        load_model(model_config(folders / "gpt2" / "model.safetensors"))


def test_revision_of_a_folder(folders: Path) -> None:
    with pytest.raises(UsageError, match=r"model.revision: got 'v1', but .* is a folder"):
        load_model(model_config(folders / "gpt2", revision="v1"))


@pytest.fixture
def own_code(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose classes come with it, in a file of Python."""
    modules = tmp_path / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(modules)
    folder = shutil.copytree(folders / "gpt2", tmp_path / "coded")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"], config["architectures"] = "mine", ["MyModel"]
    config["auto_map"] = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "class MyConfig(GPT2Config):\n    model_type = 'mine'\n"
        "class MyModel(GPT2LMHeadModel):\n    config_class = MyConfig\n"
    )
    return folder


def test_own_code_needs_permission(own_code: Path, tmp_path: Path) -> None:
    for refuse in (load_model, read_model_facts):
        with pytest.raises(UsageError, match=r"model.path: .*; model.trust_remote_code allows"):
            refuse(model_config(own_code))
    assert not list(tmp_path.rglob("modules/**/mine.py"))


def test_own_code_runs_with_permission(own_code: Path) -> None:
    loaded = load_model(model_config(own_code, trust_remote_code=True))
    assert (type(loaded.model).__name__, loaded.family) == ("MyModel", "causal")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("float23", r"model.dtype: got 'float23', allowed float64, .*did you mean 'float32'"),
        ("int8", r"model.dtype: got 'int8', allowed float64, float32, bfloat16, float16"),
    ],
)
def test_dtype_names(folders: Path, name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_model(model_config(folders / "gpt2", dtype=name))


# Devices


def test_device_names() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match=r"model.device: got 'cdua', allowed .*did you mean 'cuda'"):
        resolve_device("cdua")
    with pytest.raises(UsageError, match=r"model.device: got 'cuda:-1'"):
        resolve_device("cuda:-1")


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    for name in ("cuda", "cuda:0"):
        with pytest.raises(MissingResourceError, match=rf"got '{name}', but torch .* sees no CUDA GPU"):
            resolve_device(name)


def test_gpus_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(MissingResourceError, match=r"got 'cuda:7', but the GPUs here are cuda:0 .. cuda:1"):
        resolve_device("cuda:7")


# Facts


def test_facts_need_no_weights(folders: Path, tmp_path: Path) -> None:
    shutil.copy(folders / "bert" / "config.json", tmp_path)
    facts = read_model_facts(model_config(tmp_path))
    assert facts is not None
    assert (facts.family, facts.architecture) == ("masked", "BertForMaskedLM")
    assert (facts.num_layers, facts.num_heads, facts.max_positions, facts.vocab_size) == (3, 4, 64, 40)


def test_facts_are_those_of_the_loaded_model(folders: Path) -> None:
    loaded = load_model(model_config(folders / "gpt2"))
    assert loaded.facts == read_model_facts(model_config(folders / "gpt2"))
    assert loaded.facts.num_layers == len(loaded.model.transformer.h)
    assert loaded.facts.max_positions == loaded.model.transformer.wpe.num_embeddings
    assert loaded.facts.vocab_size == loaded.model.get_input_embeddings().num_embeddings


def test_facts_of_an_unknown_name_are_none_and_ask_nobody(offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "hub_files", lambda *_: pytest.fail("asked the hub"))
    assert read_model_facts(model_config("someone/something")) is None


def test_facts_of_a_missing_folder() -> None:
    with pytest.raises(MissingResourceError, match="looked for /no/such/model"):
        read_model_facts(model_config("/no/such/model"))


def test_longest_roberta_sequence_really_is_the_longest() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = transformers.RobertaConfig(vocab_size=20, max_position_embeddings=10, pad_token_id=1, **sizes)
    longest = facts_from_config(config).max_positions
    assert longest == 8
    model = transformers.RobertaModel(config).eval()
    assert model(torch.full((1, longest), 5)).last_hidden_state.shape == (1, 8, 8)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5))


@pytest.mark.parametrize(
    ("config", "layers", "positions"),
    [
        (transformers.BloomConfig(n_layer=5), 5, None),
        (transformers.OPTConfig(num_hidden_layers=3, max_position_embeddings=2048), 3, 2048),
        (transformers.Qwen3NextConfig(num_hidden_layers=8), 2, 32768),
    ],
)
def test_facts_of_other_architectures(config: Any, layers: int, positions: int | None) -> None:
    facts = facts_from_config(config)
    assert (facts.num_layers, facts.max_positions, facts.family) == (layers, positions, "causal")


# The hub


def test_hub_model_is_pinned_to_its_commit(hub: None, folders: Path) -> None:
    loaded = load_model(model_config("owner/gpt2"))
    assert (loaded.resolved, loaded.revision, loaded.family) == ("owner/gpt2", COMMIT, "causal")
    assert model_fingerprint(loaded.model) == model_fingerprint(load_model(model_config(folders / "gpt2")).model)
    assert loaded.tokenizer("a", add_special_tokens=False)["input_ids"] == [100]


def test_cached_hub_model_serves_when_the_hub_does_not_answer(
    hub: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    online = load_model(model_config("owner/gpt2"))
    point_hub_to("http://127.0.0.1:9", monkeypatch, tmp_path)
    with caplog.at_level(logging.WARNING, logger="experiments.inputs.models"):
        cached = load_model(model_config("owner/gpt2"))
    assert (cached.revision, cached.resolved.endswith(COMMIT)) == (COMMIT, True)
    assert model_fingerprint(cached.model) == model_fingerprint(online.model)
    assert f"from the local cache, commit {COMMIT}" in caplog.text
    facts = read_model_facts(model_config("owner/gpt2"))
    assert facts is not None
    assert facts.num_layers == 2


def test_hub_has_no_such_model(hub: None) -> None:
    with pytest.raises(MissingResourceError, match=r"'owner/gpt3'.* no folder here, and the hub has no public model"):
        load_model(model_config("owner/gpt3"))
    with pytest.raises(MissingResourceError, match="has no revision 'v9' on the hub"):
        load_model(model_config("owner/gpt2", revision="v9"))


def test_hub_does_not_let_us(hub: None) -> None:
    with pytest.raises(MissingResourceError, match=r"'owner/gated' is gated on the hub; log in"):
        load_model(model_config("owner/gated"))
    with pytest.raises(MissingResourceError, match=r"the hub refused to answer \(HfHubHTTPError"):
        load_model(model_config("owner/broken"))


def test_pickle_on_the_hub_is_refused_before_it_is_fetched(hub: None, folders: Path, tmp_path: Path) -> None:
    pickled = folders / "pickled"
    pickled.mkdir()
    shutil.copy(folders / "gpt2" / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(UsageError, match="only pickle weights"):
        load_model(model_config("owner/pickled"))
    assert not list((tmp_path / "hub-cache").rglob("pytorch_model.bin"))


def test_offline_name_fails_with_the_nearest_built_in(offline: None) -> None:
    with pytest.raises(
        MissingResourceError, match=r"'referense'.*did you mean 'reference'.*hub's local cache.*offline mode"
    ):
        load_model(model_config("referense"))


def test_unreachable_hub_fails_promptly_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    point_hub_to("http://127.0.0.1:9", monkeypatch, tmp_path)
    # the libraries' own retries sleep between one request and the next, 23 seconds in all
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"slept {seconds} s to retry"))
    with pytest.raises(MissingResourceError, match=r"the hub cannot be reached \(ConnectError") as caught:
        load_model(model_config("owner/gpt2"))
    assert "\n" not in str(caught.value)


def test_silent_hub_is_given_up_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub_module, "TIMEOUT_SECONDS", 0.2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        point_hub_to(f"http://127.0.0.1:{listener.getsockname()[1]}", monkeypatch, tmp_path)
        with pytest.raises(HubUnreachableError, match=r"cannot be reached .*timed out"):
            hub_files("owner/gpt2", "model")


def test_impossible_hub_name(offline: None) -> None:
    with pytest.raises(UsageError, match=r"model.path: got 'two words', which cannot be the name of a model"):
        load_model(model_config("two words"))

"""The two models that ship with the project, and the program that makes them."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

from experiments.errors import UsageError
from experiments.inputs.pydoc_text import held_out_topics
from experiments.reference_models.architecture import (
    SharedKeyValue,
    build_reference,
    encode_documents,
    finish_reference,
    key_value_columns,
)
from experiments.reference_models.train import (
    DEFAULT_OUTPUT,
    NAMES,
    Recipe,
    main,
    make_reference,
    mean_loss,
    ngram_losses,
    train,
)

MICRO = GPT2Config(vocab_size=384, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
LARGEST_LOSS = 1.75


@pytest.fixture(scope="module", params=NAMES)
def shipped(request: pytest.FixtureRequest) -> tuple[str, GPT2LMHeadModel]:
    return request.param, AutoModelForCausalLM.from_pretrained(DEFAULT_OUTPUT / request.param).eval()


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    return encode_documents(held_out_topics().values())


def shared_layers(model: GPT2LMHeadModel) -> list[tuple[bool, bool]]:
    """Say of every layer whether the key and value columns of its weight and of its bias are bitwise equal."""
    projections = [block.attn.c_attn for block in model.transformer.h]
    return [
        (torch.equal(*key_value_columns(fused.weight)), torch.equal(*key_value_columns(fused.bias)))
        for fused in projections
    ]


def micro_training(steps: int, *, shared: bool, seed: int = 0) -> GPT2LMHeadModel:
    tokens = encode_documents(["the quick brown fox jumps over the lazy dog " * 4])
    recipe = Recipe(steps=steps, warmup=1, batch=2, seed=seed)
    return train(MICRO, recipe, tokens, key_value_shared=shared)


def test_shipped_model_has_the_stated_size_and_dtype(shipped: tuple[str, GPT2LMHeadModel]) -> None:
    name, model = shipped
    assert type(model) is GPT2LMHeadModel
    assert model.num_parameters() == 875_264
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(file.stat().st_size for file in (DEFAULT_OUTPUT / name).iterdir()) < 4_000_000


def test_shipped_folder_holds_no_pickle(shipped: tuple[str, GPT2LMHeadModel]) -> None:
    suffixes = {file.suffix for file in (DEFAULT_OUTPUT / shipped[0]).iterdir()}
    assert suffixes == {".json", ".safetensors", ".md"}


def test_shipped_model_does_not_drop_out_when_trained(shipped: tuple[str, GPT2LMHeadModel]) -> None:
    model = shipped[1]
    tokens = torch.arange(3, 67)[None]
    with torch.inference_mode():
        before = model(tokens).logits
        in_training = model.train()(tokens).logits
        model.eval()
    assert torch.equal(before, in_training)


def test_key_and_value_columns(shipped: tuple[str, GPT2LMHeadModel]) -> None:
    name, model = shipped
    expected = (True, True) if name == "reference-kv" else (False, False)
    assert shared_layers(model) == [expected] * 4
    for block in model.transformer.h:
        key, _ = key_value_columns(block.attn.c_attn.weight)
        assert key.std() > 0.02  # trained, not left at its initial spread


def test_shipped_tokenizer_loads_offline_and_numbers_bytes(shipped: tuple[str, GPT2LMHeadModel]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEFAULT_OUTPUT / shipped[0], local_files_only=True)
    ids = tokenizer("naïve").input_ids
    assert ids == encode_documents(["naïve"]).tolist()
    assert tokenizer.decode(ids, skip_special_tokens=True) == "naïve"
    assert len(tokenizer) == shipped[1].config.vocab_size
    assert tokenizer.model_max_length == shipped[1].config.n_positions


def test_held_out_loss_of_a_few_windows(shipped: tuple[str, GPT2LMHeadModel], held_out: torch.Tensor) -> None:
    windows = held_out[: len(held_out) // 256 * 256].view(-1, 256)[::16]
    with torch.inference_mode():
        loss = shipped[1](windows, labels=windows).loss.item()
    assert 1.0 < loss < LARGEST_LOSS


@pytest.mark.slow
def test_held_out_loss_is_what_the_card_says(shipped: tuple[str, GPT2LMHeadModel], held_out: torch.Tensor) -> None:
    name, model = shipped
    card = (DEFAULT_OUTPUT / name / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"^\| model, held-out text \| ([0-9.]+) \|$", card, re.MULTILINE)
    assert stated is not None
    loss = mean_loss(model, held_out)
    assert loss < LARGEST_LOSS
    # Another Python carries a slightly different text.
    assert loss == pytest.approx(float(stated.group(1)), abs=0.05)


def test_attention_matters_to_the_loss(shipped: tuple[str, GPT2LMHeadModel], held_out: torch.Tensor) -> None:
    """A model that ignored its attention would make every fault look harmless."""
    model = shipped[1]
    windows = held_out[: 8 * 257].view(8, 257)

    def silence(*_: object) -> tuple[torch.Tensor, None]:
        return torch.zeros(8, 257 - 1, model.config.n_embd), None

    def loss() -> float:
        with torch.inference_mode():
            logits = model(windows[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()

    intact = loss()
    for block in model.transformer.h:
        hook = block.attn.register_forward_hook(silence)
        try:
            assert loss() > intact + 0.02
        finally:
            hook.remove()


@pytest.mark.parametrize("shared", [False, True])
def test_training_is_bitwise_repeatable(shared: bool) -> None:
    first, second = (micro_training(3, shared=shared).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = micro_training(3, shared=shared, seed=1).state_dict()
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def test_training_keeps_key_and_value_equal_only_where_asked() -> None:
    assert shared_layers(micro_training(5, shared=True)) == [(True, True)] * 2
    assert shared_layers(micro_training(5, shared=False)) == [(False, False)] * 2


def test_shared_columns_receive_both_gradients() -> None:
    """The constraint is part of the training: one column moves by what its key and its value ask for together."""
    shared = build_reference(MICRO, key_value_shared=True, seed=0)
    free = build_reference(MICRO, key_value_shared=False, seed=0)
    finished = finish_reference(build_reference(MICRO, key_value_shared=True, seed=0))
    free.load_state_dict(finished.state_dict())  # values that started equal to the keys
    tokens = torch.arange(3, 19)[None]
    for model in (shared, free):
        model(tokens, labels=tokens).loss.backward()
    got = shared.transformer.h[0].attn.c_attn.parametrizations.weight.original.grad
    query, key, value = free.transformer.h[0].attn.c_attn.weight.grad.chunk(3, dim=-1)
    torch.testing.assert_close(got, torch.cat([query, key + value], dim=-1))


def test_shared_key_value_forgets_the_value_columns() -> None:
    fused = torch.arange(12.0).view(2, 6)
    shared = SharedKeyValue()
    expected = torch.tensor([[0.0, 1, 2, 3, 2, 3], [6, 7, 8, 9, 8, 9]])
    assert torch.equal(shared(shared.right_inverse(fused)), expected)


def test_building_leaves_the_global_generator_and_the_config_alone() -> None:
    before, config = torch.get_rng_state(), MICRO.to_dict()
    build_reference(MICRO, key_value_shared=True, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert MICRO.to_dict() == config


def test_encoding_is_that_of_the_byte_tokenizer() -> None:
    texts = ["def f(x):\n\treturn x", "naïve ≤", ""]
    expected = [token for text in texts for token in ByT5Tokenizer()(text).input_ids]
    assert encode_documents(texts).tolist() == expected


@pytest.mark.parametrize("length", [2, 16, 17, 18, 33, 50])
def test_mean_loss_predicts_every_token_once(length: int) -> None:
    model = finish_reference(build_reference(MICRO, key_value_shared=False, seed=0)).double()
    tokens = torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(length))
    losses = []
    for position in range(1, length):
        start = (position - 1) // MICRO.n_positions * MICRO.n_positions
        with torch.inference_mode():
            last = model(tokens[None, start:position]).logits[0, -1]
        losses.append(-torch.log_softmax(last, dim=0)[tokens[position]].item())
    assert mean_loss(model, tokens, batch=1) == pytest.approx(np.mean(losses), rel=1e-12)
    assert mean_loss(model, tokens, batch=7) == pytest.approx(np.mean(losses), rel=1e-12)


def test_ngram_losses_by_hand() -> None:
    training, held_out = encode_documents(["aab"]), encode_documents(["ab"])
    # counts plus one: a 3, b 2, end 2, each of the other 254 bytes 1
    total = 3 + 2 + 2 + 254
    unigram, bigram = ngram_losses(training, held_out)
    assert unigram == pytest.approx(-(math.log(2 / total) + math.log(2 / total)) / 2)
    after_a = (1 + 2 / total) / 3
    after_b = (1 + 2 / total) / 2
    assert bigram == pytest.approx(-(math.log(after_a) + math.log(after_b)) / 2)


def test_rate_rises_to_its_peak_and_ends_at_zero() -> None:
    recipe = Recipe(steps=50, warmup=10)
    rates = [recipe.rate(step) for step in range(50)]
    assert max(rates) == rates[9] == recipe.learning_rate
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)


def test_make_writes_a_whole_folder_and_replaces_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for side in ("training_topics", "held_out_topics"):
        monkeypatch.setattr(f"experiments.reference_models.train.{side}", lambda: {"fox": "the quick brown fox\n" * 9})
    recipe = Recipe(steps=2, warmup=1, batch=2)
    losses = make_reference("reference-kv", tmp_path, recipe, MICRO)
    folder = tmp_path / "reference-kv"
    (folder / "stale.txt").write_text("from before", encoding="utf-8")
    make_reference("reference-kv", tmp_path, Recipe(steps=3, warmup=1, batch=2), MICRO)
    assert [entry.name for entry in tmp_path.iterdir()] == ["reference-kv"]
    assert not (folder / "stale.txt").exists()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "--only reference-kv --steps 3" in card
    assert "equal, bit for bit" in card
    assert f"| unigram counts, held-out text | {losses.unigram:.3f} |" in card
    assert shared_layers(AutoModelForCausalLM.from_pretrained(folder)) == [(True, True)] * 2
    assert all(os.access(file, os.R_OK) and file.stat().st_mode & 0o044 == 0o044 for file in folder.iterdir())


def test_make_refuses_to_replace_a_folder_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(UsageError, match=r"holds something else; allowed a new folder or one of a model"):
        make_reference("reference", tmp_path, Recipe(steps=1), MICRO)
    assert main(["--only", "reference", "--output", str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "reference").iterdir()] == ["thesis.tex"]


def test_steps_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"steps: got 0, allowed 1 or more"):
        Recipe(steps=0)
    assert main(["--steps", "-1"]) == 2
    assert "steps: got -1" in capsys.readouterr().err

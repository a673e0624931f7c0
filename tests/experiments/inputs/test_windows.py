from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from experiments.errors import MissingResourceError, UsageError
from experiments.inputs.pydoc_text import held_out_topics
from experiments.inputs.windows import (
    IGNORED,
    data_fingerprint,
    draw_windows,
    make_batches,
    model_inputs,
    pack_windows,
    real_positions,
    validate_batch,
)

BYTES = transformers.ByT5Tokenizer()
BYTE_VOCABULARY = 384


def data_config(source: str = "pydoc", **changes: Any) -> Any:
    settings = {"source": source, "num_samples": 4, "seq_len": 16, "batch_size": 2, "field": None, "split": "test"}
    return SimpleNamespace(**(settings | changes))


def byte_batches(source: str = "pydoc", seed: int = 0, **changes: Any) -> list[dict[str, torch.Tensor]]:
    return make_batches(data_config(source, **changes), BYTES, seed, "causal", BYTE_VOCABULARY)


def tokens_of(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([batch["input_ids"] for batch in batches])


@pytest.fixture(scope="module")
def word_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(50))]
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(vocabulary))
    return transformers.BertTokenizer(str(path))


# 400 words of which no two windows of 14 are the same
STREAM = [(number * number * 7 + number // 13) % 50 for number in range(400)]


@pytest.fixture
def words(tmp_path: Path) -> str:
    (tmp_path / "words.txt").write_text(" ".join(f"w{number}" for number in STREAM))
    return f"text:{tmp_path}/words.txt"


# Packing


@given(st.lists(st.integers(0, 99), max_size=60), st.integers(3, 9), st.integers(0, 1), st.integers(0, 1))
def test_packing_keeps_the_stream(stream: list[int], seq_len: int, before: int, after: int) -> None:
    prefix, suffix = [-1] * before, [-2] * after
    windows = pack_windows(torch.tensor(stream, dtype=torch.int64), seq_len, prefix, suffix)
    body = seq_len - before - after
    assert windows.shape == (len(stream) // body, seq_len)
    rows = windows.tolist()
    assert all(row[:before] == prefix and row[seq_len - after :] == suffix for row in rows)
    assert [token for row in rows for token in row[before : seq_len - after]] == stream[: len(rows) * body]


def test_no_room_beside_special_tokens() -> None:
    with pytest.raises(UsageError, match=r"data.seq_len: got 2, allowed 3 or more"):
        pack_windows(torch.arange(9), 2, prefix=[1], suffix=[2])


def test_windows_are_the_documents_with_an_end_between(tmp_path: Path) -> None:
    for name, text in (("a.txt", "abc"), ("b.txt", "dé"), ("c.txt", "fghijk")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    batches = byte_batches(f"text:{tmp_path}", num_samples=3, seq_len=4, batch_size=1)
    stream = [byte + 3 for byte in b"abc"] + [1] + [byte + 3 for byte in "dé".encode()] + [1]
    stream += [byte + 3 for byte in b"fghijk"]
    expected = [stream[start : start + 4] for start in (0, 4, 8)]
    assert sorted(tokens_of(batches).tolist()) == sorted(expected)


def test_causal_windows_of_pydoc() -> None:
    batches = byte_batches(num_samples=6, seq_len=64, batch_size=3)
    assert [sorted(batch) for batch in batches] == [["input_ids", "labels"]] * 2
    text = BYTES.eos_token.join(held_out_topics().values())
    for batch in batches:
        assert batch["input_ids"].shape == (3, 64)
        assert batch["input_ids"].dtype == torch.int64
        assert torch.equal(batch["input_ids"], batch["labels"])
        assert batch["input_ids"].data_ptr() != batch["labels"].data_ptr()
        assert all(BYTES.decode(row) in text for row in batch["input_ids"] if row.max() < 128)


def test_first_special_token_leads_every_causal_window(words: str, word_tokenizer: Any) -> None:
    batches = make_batches(data_config(words), word_tokenizer, 0, "causal", 55)
    rows = tokens_of(batches)
    assert set(rows[:, 0].tolist()) == {word_tokenizer.cls_token_id}
    assert word_tokenizer.sep_token_id not in rows
    assert word_tokenizer.cls_token_id not in rows[:, 1:]


def test_encoder_windows_are_framed_and_have_no_labels(words: str, word_tokenizer: Any) -> None:
    batches = make_batches(data_config(words), word_tokenizer, 0, "encoder", 55)
    assert [sorted(batch) for batch in batches] == [["input_ids"]] * 2
    rows = tokens_of(batches)
    assert set(rows[:, 0].tolist()) == {word_tokenizer.cls_token_id}
    assert set(rows[:, -1].tolist()) == {word_tokenizer.sep_token_id}
    whole = [[number + 5 for number in STREAM[start : start + 14]] for start in range(0, 400 - 13, 14)]
    assert all(row in whole for row in rows[:, 1:-1].tolist())


# Drawing


@given(st.integers(1, 200), st.data(), st.integers(0, 2**63))
def test_drawn_windows_are_different_and_exist(available: int, data: st.DataObject, seed: int) -> None:
    wanted = data.draw(st.integers(1, available))
    numbers = draw_windows(available, wanted, seed)
    assert len(numbers) == len(set(numbers)) == wanted
    assert set(numbers) <= set(range(available))
    assert numbers == draw_windows(available, wanted, seed)


def test_every_window_is_equally_likely() -> None:
    counts = torch.zeros(10)
    for seed in range(2000):
        counts[draw_windows(10, 3, seed)] += 1
    # 600 each; the standard deviation is about 20
    assert (counts - 600).abs().max() < 110


def test_seeds_draw_different_data_and_one_seed_the_same() -> None:
    for source in ("pydoc", "synthetic"):
        prints = [data_fingerprint(byte_batches(source, seed)) for seed in range(20)]
        assert len(set(prints)) == 20
        assert prints == [data_fingerprint(byte_batches(source, seed)) for seed in range(20)]


def test_drawing_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    byte_batches("pydoc")
    byte_batches("synthetic")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("source", ["pydoc", "synthetic"])
def test_batch_size_does_not_change_the_data(source: str) -> None:
    one, four = (tokens_of(byte_batches(source, 3, num_samples=8, batch_size=size)) for size in (1, 4))
    assert torch.equal(one, four)


def test_synthetic_tokens_are_ordinary_and_all_of_them() -> None:
    tokens = tokens_of(byte_batches("synthetic", num_samples=64, seq_len=128))
    special = set(BYTES.all_special_ids)
    assert not special & set(tokens.flatten().tolist())
    assert set(tokens.flatten().tolist()) == set(range(3, 259)) - special


def test_synthetic_without_a_tokenizer_uses_the_whole_vocabulary() -> None:
    batches = make_batches(data_config("synthetic", num_samples=32), None, 0, "causal", 7)
    assert set(tokens_of(batches).flatten().tolist()) == set(range(7))


# Masking


def test_masked_windows(words: str, word_tokenizer: Any) -> None:
    masked = make_batches(data_config(words, num_samples=8, batch_size=4), word_tokenizer, 5, "masked", 55)
    plain = make_batches(data_config(words, num_samples=8, batch_size=4), word_tokenizer, 5, "encoder", 55)
    tokens, labels, original = tokens_of(masked), torch.cat([batch["labels"] for batch in masked]), tokens_of(plain)
    hidden = tokens == word_tokenizer.mask_token_id
    assert (hidden.sum(dim=1) == 2).all()  # 15 % of 14 ordinary tokens
    assert torch.equal(labels[hidden], original[hidden])
    assert (labels[~hidden] == IGNORED).all()
    assert torch.equal(tokens[~hidden], original[~hidden])
    assert not torch.isin(labels, torch.tensor(word_tokenizer.all_special_ids)).any()


def test_masking_depends_on_seed_and_window_not_on_the_batch(words: str, word_tokenizer: Any) -> None:
    def masked_positions(seed: int, batch_size: int) -> dict[tuple[int, ...], tuple[int, ...]]:
        config = data_config(words, num_samples=28, batch_size=batch_size)
        masked = make_batches(config, word_tokenizer, seed, "masked", 55)
        plain = make_batches(config, word_tokenizer, seed, "encoder", 55)
        hidden = (tokens_of(masked) == 4).nonzero().view(28, -1, 2)[..., 1]
        return {tuple(row): tuple(where) for row, where in zip(tokens_of(plain).tolist(), hidden.tolist(), strict=True)}

    # all windows of the text are drawn, so both seeds read the same ones
    first, again, other = masked_positions(1, 4), masked_positions(1, 7), masked_positions(2, 4)
    assert len(first) == 28
    assert first == again
    assert first.keys() == other.keys()
    assert first != other
    assert len(set(first.values())) > 10


def test_masked_model_without_mask_token() -> None:
    with pytest.raises(UsageError, match="has no mask token"):
        make_batches(data_config(), BYTES, 0, "masked", BYTE_VOCABULARY)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3}, r"data.batch_size: got 3, allowed a divisor of data.num_samples \(4\)"),
        ({"num_samples": 0}, r"data.num_samples: got 0, allowed 1 or more"),
        ({"seq_len": 1}, r"data.seq_len: got 1, allowed 2 or more"),
        ({"batch_size": -2}, r"data.batch_size: got -2, allowed 1 or more"),
    ],
)
def test_sizes(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        byte_batches(**changes)


def test_text_shorter_than_a_window(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefg")
    with pytest.raises(UsageError, match=r"has 7 tokens, a window needs 16"):
        byte_batches(f"text:{tmp_path}/a.txt")
    assert tokens_of(byte_batches(f"text:{tmp_path}/a.txt", num_samples=1, batch_size=1, seq_len=7)).shape == (1, 7)


def test_fewer_windows_than_samples(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 55)
    with pytest.raises(UsageError, match=r"data.num_samples: got 4, but .* has 3 windows of 16 tokens \(55 tokens\)"):
        byte_batches(f"text:{tmp_path}/a.txt")


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(UsageError, match="the model has no tokenizer; allowed synthetic"):
        make_batches(data_config(), None, 0, "causal", 384)


def test_tokenizer_of_another_model() -> None:
    with pytest.raises(UsageError, match=r"data.source: got the token id \d+, allowed 0 .. 49, the vocabulary"):
        make_batches(data_config(), BYTES, 0, "causal", 50)


def test_missing_text() -> None:
    with pytest.raises(MissingResourceError, match="there is no /no/such/text"):
        byte_batches("text:/no/such/text")


def test_vocabulary_of_one() -> None:
    with pytest.raises(UsageError, match="only 1 of 1 token ids"):
        make_batches(data_config("synthetic"), None, 0, "causal", 1)


# Batches of users


TOKENS = torch.tensor([[5, 6, 7], [8, 9, 0]])
PADDING = torch.tensor([[1, 1, 1], [1, 1, 0]])


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": TOKENS},
        transformers.BatchEncoding({"input_ids": TOKENS}),
        TOKENS,
        (TOKENS,),
        [TOKENS],
        {"input_ids": TOKENS.int()},
        {"input_ids": TOKENS.to(torch.uint8)},
    ],
)
def test_accepted_forms(batch: Any) -> None:
    checked = validate_batch(batch)
    assert type(checked) is dict
    assert checked["input_ids"].dtype == torch.int64
    assert torch.equal(checked["input_ids"], TOKENS)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_padding_masks_become_one_kind(dtype: torch.dtype) -> None:
    checked = validate_batch({"input_ids": TOKENS, "attention_mask": PADDING.to(dtype)})
    assert checked["attention_mask"].dtype == torch.int64
    assert torch.equal(checked["attention_mask"], PADDING)
    assert torch.equal(real_positions(checked), PADDING.bool())


def test_what_make_batches_makes_is_valid() -> None:
    for batch in byte_batches():
        checked = validate_batch(batch, "causal", BYTE_VOCABULARY, 16)
        assert data_fingerprint([checked]) == data_fingerprint([batch])
        assert real_positions(checked).all()


MASK_4D = torch.ones(2, 1, 3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"input_ids": TOKENS, "attention_mask": MASK_4D},
            r"attention_mask: got bool of .*adds a 4-D mask.*masked_fill",
        ),
        ({"input_ids": TOKENS, "attention_mask": MASK_4D.long()}, r"attention_mask: got int64 of .*would add 1 and 0"),
        (
            {"input_ids": TOKENS, "attention_mask": torch.zeros(2, 1, 3, 4)},
            r"attention_mask: got float32 of shape \(2, 1, 3, 4\), allowed \(2 or 1, heads or 1, 3, 3\)",
        ),
        (
            {"input_ids": TOKENS, "attention_mask": torch.zeros(3, 1, 3, 3)},
            r"attention_mask: got float32 .* \(2 or 1, ",
        ),
        ({"input_ids": TOKENS, "attention_mask": PADDING[:, :2]}, r"attention_mask: got int64 .* allowed \(2, 3\)"),
        ({"input_ids": TOKENS, "attention_mask": PADDING * 2}, r"attention_mask: got values other than 0 and 1"),
        (
            {"input_ids": TOKENS, "attention_mask": PADDING * 0},
            r"attention_mask: got a sequence of nothing but padding",
        ),
        (TOKENS[:0], r"input_ids: got an empty batch of shape \(0, 3\)"),
        (TOKENS[:, :0], r"input_ids: got an empty batch of shape \(2, 0\)"),
        (TOKENS[0], r"input_ids: got int64 of shape \(3,\), allowed integers of shape \(B, T\)"),
        (TOKENS.float(), r"input_ids: got float32 of shape \(2, 3\), allowed integers"),
        (TOKENS - 1, r"input_ids: got the token id -1, allowed 0 .. 9, the vocabulary"),
        (TOKENS + 1, r"input_ids: got the token id 10, allowed 0 .. 9, the vocabulary"),
        ({"tokens": TOKENS}, r"batch: got the keys 'tokens', allowed input_ids"),
        ({}, r"batch: got the keys none"),
        ({"input_ids": TOKENS.tolist()}, r"input_ids: got list, allowed a tensor"),
        ({"input_ids": TOKENS, "text": ["a", "b"]}, r"text: got list, allowed a tensor"),
        ((TOKENS, PADDING), r"batch: got a tuple of 2, allowed a dict"),
        ([], r"batch: got a list of 0"),
        ("a text", r"batch: got str, allowed a dict"),
        (torch.zeros(1, 5, dtype=torch.int64), r"input_ids: got 5 tokens a sequence, allowed 4"),
        ({"input_ids": TOKENS, "labels": TOKENS[:, 1:]}, r"labels: got int64 of shape \(2, 2\), allowed .*\(2, 3\)"),
        ({"input_ids": TOKENS, "labels": TOKENS + 1}, r"labels: got the token id 10"),
        ({"input_ids": TOKENS, "labels": TOKENS * 0 - 100}, r"labels: got -100 everywhere"),
    ],
)
def test_refused_batches(batch: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        validate_batch(batch, "causal", vocab_size=10, max_positions=4)


def test_labels_a_family_cannot_do_without() -> None:
    for family in ("masked", "encoder-decoder"):
        with pytest.raises(UsageError, match=f"labels: missing; a batch of a {family} model"):
            validate_batch(TOKENS, family)


def test_labels_of_an_encoder_decoder_have_their_own_length() -> None:
    batch = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :2], "labels": TOKENS[:, :2]}
    assert validate_batch(batch, "encoder-decoder")["labels"].shape == (2, 2)
    with pytest.raises(UsageError, match=r"labels: got int64 of shape \(2, 2\)"):
        validate_batch(batch, "causal")


def test_boolean_4d_mask_really_gives_wrong_results() -> None:
    """The reason for the refusal, and that the conversion the message gives is right."""
    config = transformers.BertConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    model.set_attn_implementation("eager")
    mask = PADDING.bool()[:, None, None, :].expand(2, 1, 3, 3)
    additive = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, torch.finfo(model.dtype).min)
    with torch.no_grad():
        right = model(TOKENS, attention_mask=PADDING).last_hidden_state
        converted = model(**model_inputs(validate_batch({"input_ids": TOKENS, "attention_mask": additive})))
        wrong = model(TOKENS, attention_mask=mask).last_hidden_state
    assert torch.equal(converted.last_hidden_state, right)
    assert not torch.allclose(wrong, right)


def test_real_positions_of_a_4d_mask() -> None:
    lowest = torch.finfo(torch.float32).min
    mask = torch.full((2, 1, 3, 3), lowest).triu(1)
    mask[1, :, :, 2] = lowest
    batch = validate_batch({"input_ids": TOKENS, "attention_mask": mask})
    assert torch.equal(real_positions(batch), PADDING.bool())
    assert torch.equal(real_positions({"input_ids": TOKENS, "attention_mask": mask[:1]}), torch.ones(2, 3).bool())


def test_model_inputs_leave_the_labels_out() -> None:
    batch = {"input_ids": TOKENS, "attention_mask": PADDING, "labels": TOKENS}
    assert set(model_inputs(batch)) == {"input_ids", "attention_mask"}
    assert model_inputs(batch)["input_ids"] is TOKENS
    assert model_inputs(batch, "meta")["attention_mask"].device.type == "meta"


# Fingerprint


BATCH = {"input_ids": TOKENS, "attention_mask": PADDING, "labels": TOKENS}


@pytest.mark.parametrize(
    "other",
    [
        [BATCH | {"input_ids": TOKENS.roll(1, 0)}],
        [BATCH | {"attention_mask": PADDING.flip(0)}],
        [BATCH | {"labels": TOKENS + 1}],
        [BATCH | {"input_ids": TOKENS.int()}],
        [{name: tensor.view(3, 2) for name, tensor in BATCH.items()}],
        [{"input_ids": TOKENS, "labels": TOKENS}],
        [BATCH, BATCH],
        [{name: tensor[:1] for name, tensor in BATCH.items()}, {name: tensor[1:] for name, tensor in BATCH.items()}],
        [],
    ],
)
def test_fingerprint_sees_the_difference(other: list[dict[str, torch.Tensor]]) -> None:
    assert data_fingerprint(other) != data_fingerprint([BATCH])


def test_fingerprint_sees_only_the_values() -> None:
    strided = {name: tensor.t().contiguous().t() for name, tensor in reversed(BATCH.items())}
    assert data_fingerprint([strided]) == data_fingerprint([BATCH])
    assert len(data_fingerprint([BATCH])) == 32
    additive = {"attention_mask": torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16)}
    assert data_fingerprint([additive]) != data_fingerprint([{"attention_mask": -additive["attention_mask"]}])

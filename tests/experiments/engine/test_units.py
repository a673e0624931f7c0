"""The parts of the fast engine, each for itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from engine_places import LENGTH, Place, integer_view, opened_place, padded, small_gpt2, small_llama, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bounds import get_detector, list_detectors
from experiments.effects.local_change import local_changes, output_lengths
from experiments.engine.fast.pack import CONTROL, TILE, Pack, Stretch, packed_arguments, tiled
from experiments.engine.fast.propagation import window_start
from experiments.engine.fast.recording import Recording, changed_rows, record, resumed
from experiments.engine.fast.site_verdicts import unsupported
from experiments.engine.fast.wide_linear import PIECE, WIDE, OutputBuffer, WideLinear
from experiments.engine.opened_batch import is_causal
from experiments.inputs.blocks import Chain, block_chain, hidden_of, with_hidden
from experiments.passes.subject import Subject
from experiments.passes.taps.call_state import Situation
from fault_injection import LOCATIONS, AttentionCore, Fault
from fault_injection.faults.fault import Element
from fault_injection.faults.one_head import site_of

# --------------------------------------------------------------------------------------------- packs

LENGTHS = st.integers(TILE, 70)


@st.composite
def stretches_of(draw: st.DrawFn) -> tuple[int, list[Stretch]]:
    length = draw(LENGTHS)
    places = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, length - 1)), min_size=1, max_size=7))
    return length, [Stretch(run, *place) for run, place in enumerate(places)]


@given(stretches_of())
def test_a_pack_holds_every_row_of_its_stretches_and_fills_the_last_tile(drawn: tuple[int, list[Stretch]]) -> None:
    length, stretches = drawn
    pack = Pack.of(stretches, length)
    rows = [s.sequence * length + t for s in stretches for t in range(s.start, length)]
    owner = [s.run for s in stretches for _ in range(s.start, length)]
    filling = len(pack.rows) - len(rows)
    assert 1 <= filling <= TILE
    assert len(pack.rows) % TILE == 0
    assert pack.rows.tolist() == [*rows, *range(length - filling, length)]
    assert pack.owner.tolist() == [*owner, *[CONTROL] * filling]
    assert pack.stretches[:-1] == tuple(stretches)
    assert pack.stretches[-1] == Stretch(CONTROL, 0, length - filling)
    for stretch, (begin, end) in zip(pack.stretches, pack.spans, strict=True):
        assert set(pack.owner[begin:end].tolist()) == {stretch.run}
        assert end - begin == length - stretch.start
    assert pack.spans[-1][1] == len(pack.rows)
    assert tiled(pack.rows).flatten().tolist() == pack.rows.tolist()


@given(st.integers(0, 500), st.integers(1, 500))
def test_a_window_begins_at_a_tile_in_front_of_the_stretch(start: int, length: int) -> None:
    start = min(start, length - 1)
    window = window_start(start, length)
    assert 0 <= window <= start
    assert length - window >= min(TILE, length)
    assert window % TILE == 0 or window == length - TILE
    assert start - window < TILE or window == max(0, length - TILE)


def test_arguments_are_taken_at_the_rows_of_a_pack() -> None:
    rows = Pack.of([Stretch(0, 1, 13), Stretch(1, 0, 3)], 20).rows
    sequence, position = rows // 20, rows % 20
    table, one_table = torch.randn(2, 20, 4), torch.randn(1, 20, 4)
    numbers, positions = torch.arange(40).view(2, 20), torch.arange(20)
    mask, weight = torch.randn(2, 1, 20, 20), torch.randn(7)
    given_arguments = (
        (table, "name", None),
        {"pair": (one_table, one_table), "ids": numbers, "at": positions, "mask": mask, "weight": weight, "n": 3},
    )
    args, kwargs = packed_arguments(given_arguments, rows, (2, 20))
    assert torch.equal(args[0], tiled(table[sequence, position]))
    assert args[1:] == ("name", None)
    for table_part in kwargs["pair"]:
        assert torch.equal(table_part, tiled(one_table[0, position]))
    assert torch.equal(kwargs["ids"], tiled(rows))
    assert torch.equal(kwargs["at"], tiled(position))
    assert kwargs["mask"] is mask
    assert kwargs["weight"] is weight
    assert kwargs["n"] == 3


# --------------------------------------------------------------------------------------------- chains


class Attention(nn.Module):
    pass


class Nested(nn.Module):
    """Blocks in a list, each with a list of attention modules of its own."""

    def __init__(self, inner: int = 1, *, shared: bool = False) -> None:
        super().__init__()
        makers = [nn.ModuleList([Attention() for _ in range(inner)]) for _ in range(1 if shared else 3)]
        self.layers = nn.ModuleList([nn.ModuleDict({"attn": list_}) for list_ in makers])


def cores_of(model: nn.Module, names: Sequence[str]) -> list[AttentionCore]:
    modules = dict(model.named_modules())
    return [AttentionCore(number, name, modules[name], "A") for number, name in enumerate(names)]


def test_the_outermost_list_of_modules_is_the_chain() -> None:
    model = Nested()
    chain = block_chain(model, cores_of(model, [f"layers.{number}.attn.0" for number in range(3)]))
    assert isinstance(chain, Chain)
    assert chain.blocks == tuple(model.layers)
    assert chain.block_of == {0: 0, 1: 1, 2: 2}


def test_layers_without_attention_are_blocks_too() -> None:
    model = Nested()
    chain = block_chain(model, cores_of(model, ["layers.0.attn.0", "layers.2.attn.0"]))
    assert isinstance(chain, Chain)
    assert (len(chain.blocks), chain.block_of) == (3, {0: 0, 1: 2})


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["layers.0.attn.0", "layers.0.attn.1"], "a block holds several attention modules"),
        (["layers.1.attn.0", "layers.0.attn.0"], "they do not run in the order of the blocks"),
    ],
)
def test_blocks_that_make_no_chain(names: list[str], reason: str) -> None:
    model = Nested(inner=2)
    chain = block_chain(model, cores_of(model, names))
    assert isinstance(chain, str)
    assert reason in chain


def test_attention_in_two_lists_or_in_none_makes_no_chain() -> None:
    two = nn.ModuleDict({"encoder": Nested(), "decoder": Nested()})
    reason = "its attention modules do not lie in one list of blocks"
    assert block_chain(two, cores_of(two, ["encoder.layers.0.attn.0", "decoder.layers.0.attn.0"])) == reason
    none = nn.ModuleDict({"attn": Attention()})
    assert block_chain(none, cores_of(none, ["attn"])) == reason


def test_an_encoder_decoder_has_no_chain() -> None:
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    with Subject(model, "encoder-decoder") as subject:
        assert block_chain(subject.model, subject.cores) == "its attention modules do not lie in one list of blocks"


def test_a_block_that_runs_several_times_makes_no_recording() -> None:
    config = transformers.AlbertConfig(
        vocab_size=300, embedding_size=16, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64,
    )  # fmt: skip
    batch = {"input_ids": tokens(), "labels": tokens()}
    with Subject(transformers.AlbertForMaskedLM(config).eval(), "masked") as subject:
        chain = block_chain(subject.model, subject.cores)
        assert isinstance(chain, Chain)
        assert record(subject, chain, subject.to_device(batch)) == "its blocks do not run once each, in order"


def test_replaced_blocks_are_themselves_again_after_an_error() -> None:
    model = Nested()
    chain = block_chain(model, cores_of(model, [f"layers.{number}.attn.0" for number in range(3)]))
    assert isinstance(chain, Chain)
    mine = lambda hidden: hidden  # noqa: E731 - a forward of an instance, as hooks and wrappers leave it
    chain.blocks[1].__dict__["forward"] = mine

    def broken(number: int, hidden: Tensor, arguments: Any) -> Any:
        raise ArithmeticError(f"block {number}")

    with pytest.raises(ArithmeticError, match="block 2"), chain.replaced(broken):
        chain.blocks[2](torch.zeros(1))
    assert ["forward" in block.__dict__ for block in chain.blocks] == [False, True, False]
    assert chain.blocks[1].__dict__["forward"] is mine


def test_replaced_blocks_nest_and_see_what_they_were_given() -> None:
    model = Nested()
    chain = block_chain(model, cores_of(model, ["layers.0.attn.0", "layers.1.attn.0"]))
    assert isinstance(chain, Chain)
    hidden = torch.zeros(2)
    with chain.replaced(lambda number, given_hidden, arguments: ("outer", number, given_hidden, arguments)):
        with chain.replaced(lambda number, given_hidden, arguments: ("inner", number)):
            assert chain.blocks[1](hidden) == ("inner", 1)
        assert chain.blocks[0](hidden, 5, x=1) == ("outer", 0, hidden, ((hidden, 5), {"x": 1}))
        assert chain.blocks[1](hidden_states=hidden) == ("outer", 1, hidden, ((), {"hidden_states": hidden}))
        with pytest.raises(TypeError, match="a block was given int for its hidden state, allowed Tensor"):
            chain.blocks[0](3)


def test_the_hidden_state_of_arguments_and_outputs() -> None:
    old, new = torch.zeros(1), torch.ones(1)
    assert with_hidden(new, ((old, 2), {"x": 3})) == ((new, 2), {"x": 3})
    assert with_hidden(new, ((), {"hidden_states": old, "x": 3})) == ((), {"hidden_states": new, "x": 3})
    assert hidden_of(old) is old
    assert hidden_of((old, None)) is old
    with pytest.raises(TypeError, match="a block returned dict, allowed a tensor or a tuple that begins with one"):
        hidden_of({"x": old})


# --------------------------------------------------------------------------------------------- recordings


def recorded(model: Any) -> Recording | str:
    with Subject(model, "causal") as subject:
        chain = block_chain(subject.model, subject.cores)
        assert isinstance(chain, Chain)
        return record(subject, chain, subject.to_device({"input_ids": tokens()}))


def test_a_recording_keeps_the_hidden_states_of_all_blocks() -> None:
    kept = recorded(small_llama())
    assert isinstance(kept, Recording)
    assert [tuple(hidden.shape) for hidden in kept.hidden] == [(1, LENGTH, 32)] * 4
    assert sorted(kept.attention) == [0, 1, 2]
    attention = kept.attention[1]
    assert (attention.group, tuple(attention.query.shape), tuple(attention.key.shape)) == (
        2,
        (1, 4, LENGTH, 8),
        (1, 2, LENGTH, 8),
    )
    assert tuple(attention.out.shape) == (1, LENGTH, 4, 8)
    assert kept.nbytes >= 4 * LENGTH * (4 * 32 + 300)


def test_a_block_that_does_not_read_the_one_before() -> None:
    model = small_gpt2()
    model.transformer.h[1].register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
    assert recorded(model) == "block 1 reads something else than block 0 returns"


class Overwriting(nn.Module):
    """Adds to what it is given, in place."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(self, hidden: Tensor) -> Any:
        return self.own(hidden.mul_(1.0))


def test_a_model_that_overwrites_what_was_recorded() -> None:
    model = small_gpt2()
    model.transformer.h[1].ln_1 = Overwriting(model.transformer.h[1].ln_1)
    assert recorded(model) == "what block 1 reads is overwritten later in the pass"


def test_a_resumed_pass_computes_no_block_in_front() -> None:
    with opened_place(small_gpt2(), [{"input_ids": tokens()}]) as place:
        subject, chain = place.pairs.subject, place.chain
        begun: list[int] = []
        hooks = [
            block.ln_1.register_forward_hook(lambda *_, number=number: begun.append(number))
            for number, block in enumerate(chain.blocks)
        ]
        with resumed(chain, place.opened.recording, 2):
            output = subject.forward(place.batch).output
        assert begun == [2]
        assert torch.equal(output, place.baseline.evaluation.output)
        begun.clear()
        with resumed(chain, place.opened.recording, 0):
            subject.forward(place.batch)
        assert begun == [0, 1, 2]
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str)
def test_changed_rows_are_told_by_their_bits(dtype: torch.dtype) -> None:
    left = torch.tensor([[[0.0, 1.0]], [[math.nan, 1.0]], [[0.0, 1.0]], [[0.0, 1.0]], [[math.inf, 0.0]]], dtype=dtype)
    right = left.clone()
    right[2, 0, 0] = -0.0
    integer_view(right)[3, 0, 1] ^= 1
    assert changed_rows(left, right).tolist() == [False, False, True, True, False]
    payload = right.clone()
    integer_view(payload)[1, 0, 0] ^= 1
    assert bool(payload[1, 0, 0].isnan())
    assert changed_rows(right, payload).tolist() == [False, True, False, False, False]
    assert changed_rows(left.expand(5, 3, 2), left.expand(5, 3, 2)).tolist() == [False] * 5
    assert changed_rows(left[:0], right[:0]).tolist() == []


# --------------------------------------------------------------------------------------------- the wide product


@pytest.mark.parametrize("outputs", [WIDE, WIDE + 777, WIDE + PIECE + 1105], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["bare", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wide_product_in_pieces_has_the_bits_of_the_whole(outputs: int, bias: bool, dtype: torch.dtype) -> None:
    linear = nn.Linear(32, outputs, bias=bias, dtype=dtype)
    hidden = torch.randn(3, 16, 32, dtype=dtype)
    with torch.no_grad():
        whole = linear(hidden)
        with WideLinear(OutputBuffer()):
            pieces = linear(hidden)
    assert pieces.shape == whole.shape
    assert torch.equal(integer_view(pieces), integer_view(whole))


def test_what_is_not_wide_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(WideLinear, "_pieces", lambda self, given_rows, weight, bias=None: asked.append(len(weight)))
    narrow, wide = nn.Linear(8, WIDE - 1), nn.Linear(8, WIDE)
    hidden = torch.randn(16, 8)
    with torch.no_grad(), WideLinear(OutputBuffer()):
        assert torch.equal(narrow(hidden), F.linear(hidden, narrow.weight, narrow.bias))
        assert wide(hidden) is None
    assert asked == [WIDE]


def test_the_buffer_is_used_again_and_grows() -> None:
    buffer, like = OutputBuffer(), torch.zeros(1)
    first = buffer.take(4, 100, like)
    assert first.shape == (4, 100)
    assert buffer.take(2, 100, like).data_ptr() == first.data_ptr()
    assert buffer.take(8, 100, like).shape == (8, 100)
    assert buffer.take(2, 100, like.bfloat16()).dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------- local changes


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_local_changes_are_those_of_an_oracle(faults: int, rows: int, heads: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    out, expected = (random.normal(size=(faults, rows, heads, 8)).astype(np.float32) for _ in range(2))
    lengths = random.uniform(1, 2, size=faults)
    found = local_changes(torch.from_numpy(out), torch.from_numpy(expected), torch.from_numpy(lengths))
    change = out.astype(np.float64) - expected
    for number, local in enumerate(found):
        moved = math.sqrt(math.fsum((change[number] ** 2).ravel())) / lengths[number]
        assert local.relative == pytest.approx(moved, rel=1e-13)
        assert local.largest == np.abs(change[number]).max()
    together = torch.from_numpy(expected)
    for number, length in enumerate(output_lengths(together).tolist()):
        assert length == pytest.approx(np.linalg.norm(expected[number].astype(np.float64)), rel=1e-13)
    # The number of a run depends on no other run, nor on where its tensor lies in memory.
    for number in range(faults):
        own = slice(number, number + 1)
        strided = torch.from_numpy(out[own]).transpose(1, 2).contiguous().transpose(1, 2)
        alone = local_changes(strided, torch.from_numpy(expected[own]), torch.from_numpy(lengths[own]))
        assert alone == [found[number]]


def test_local_changes_keep_what_is_not_finite() -> None:
    expected = torch.zeros(3, 2, 1, 4)
    out = expected.clone()
    out[0, 1, 0, 2], out[1, 0, 0, 0] = math.nan, -math.inf
    changes = local_changes(out, expected, torch.ones(3, dtype=torch.float64))
    assert [repr((change.relative, change.largest)) for change in changes] == ["(nan, nan)", "(inf, inf)", "(0.0, 0.0)"]


# --------------------------------------------------------------------------------------------- who sees whom


def situation(*visible: Tensor) -> Situation:
    return Situation({(layer, 0): each for layer, each in enumerate(visible)}, {}, {})


def lower(length: int, keys: int | None = None) -> Tensor:
    return torch.ones(length, keys or length, dtype=torch.bool).tril().expand(1, 1, -1, -1)


def test_causal_inputs_are_told_from_others() -> None:
    causal = lower(20)
    window = causal & torch.ones(20, 20, dtype=torch.bool).triu(-3)
    both = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    right = causal.expand(2, 1, 20, 20).clone()
    right[1, :, :, 12:] = False
    left = causal.expand(2, 1, 20, 20).clone()
    left[1, :, :, :5] = False
    assert is_causal(situation(causal, window), 20)
    assert is_causal(situation(right), 20)
    assert not is_causal(situation(both), 20)
    assert not is_causal(situation(causal, both), 20)
    assert not is_causal(situation(torch.ones(1, 1, 1, 20, dtype=torch.bool)), 20)
    # Padding in front sees nothing, and shares its weight among all keys.
    assert not is_causal(situation(left), 20)
    # One later key is enough.
    late = causal.clone()
    late[0, 0, 3, 4] = True
    assert not is_causal(situation(late), 20)


def test_a_column_that_is_no_key_may_be_seen_by_all() -> None:
    sink = torch.cat([lower(20), torch.ones(1, 1, 20, 1, dtype=torch.bool)], -1)
    assert is_causal(situation(sink), 20)
    # An empty row would be hidden by the sink.
    hollow = sink.clone()
    hollow[0, 0, 0, :20] = False
    assert not is_causal(situation(hollow), 20)


def test_fewer_keys_than_positions_are_not_causal() -> None:
    assert not is_causal(situation(lower(20, 10)), 20)
    assert not is_causal(situation(torch.ones(1, 1, 20, 1, dtype=torch.bool)), 20)


@pytest.mark.parametrize(("side", "causal"), [("right", True), ("left", False)])
def test_padding_of_real_models(side: str, causal: bool) -> None:
    for model in (small_gpt2(layers=1), small_llama(layers=1)):
        with opened_place(model, [padded(side)], detectors=["finite"]) as place:
            assert place.opened.causal is causal


# --------------------------------------------------------------------------------------------- sites


@pytest.fixture(scope="module")
def grouped() -> Iterator[Place]:
    with opened_place(small_llama(), [{"input_ids": tokens(2)}], detectors=["finite"]) as place:
        yield place


@pytest.mark.parametrize("location", LOCATIONS)
def test_the_site_of_a_fault_in_grouped_heads(grouped: Place, location: str) -> None:
    for fault in grouped.draw(location, 30):
        assert fault.index is not None
        sequence, head, row, column = fault.index
        site = site_of(fault, 2)
        assert site is not None
        assert (site.fault, site.sequence) == (fault, sequence)
        expected = (head, 0) if location in ("k", "v") else (head // 2, head % 2)
        assert (site.group, site.head) == expected
        assert site.elements == (row * fault.shape[3] + column,)


def fault_at(*flat: int, call: int = 0, shape: tuple[int, int, int, int] = (2, 4, 5, 3)) -> Fault:
    elements = tuple(Element(position, -1, 1) for position in flat)
    return Fault("q", 0, "x", "bit_error_rate", "float32", shape, (0, 0, 0, 0), (), elements, call=call)


def test_faults_that_lie_in_no_single_head() -> None:
    assert site_of(fault_at(), 2) is None
    assert site_of(fault_at(0, call=1), 2) is None
    assert site_of(fault_at(14, 15), 2) is None
    # The same head of two sequences.
    assert site_of(fault_at(0, 60), 2) is None
    several = site_of(fault_at(75, 78, 89), 2)
    assert several is not None
    assert (several.sequence, several.group, several.head, several.elements) == (1, 0, 1, (0, 3, 14))


def test_which_detectors_judge_groups_of_heads() -> None:
    assert unsupported([]) is None
    assert unsupported([get_detector(name) for name in ("finite", "P_q", "s@w", "oracle_s@w")]) is None
    reason = unsupported([get_detector("finite"), get_detector("ranger")])
    assert reason is not None
    assert "ranger" in reason
    for name in list_detectors():
        detector = get_detector(name)
        if not detector.proved and not detector.oracle and name != "finite":
            assert unsupported([detector]) is not None, name

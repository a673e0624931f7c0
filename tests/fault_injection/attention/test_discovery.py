"""Discovery: what is attention is found and read rightly; what is not covered is refused by name, wholly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from zoo import ZOO

from fault_injection import (
    OBSERVED,
    NoAttentionError,
    UncoveredArchitectureError,
    attention_cores,
    is_patched,
    monkey_patch_model,
    patched,
)
from fault_injection.attention.discovery import eager_function

BATCH, TOKENS, HEADS, CHANNELS = 2, 7, 2, 4
WIDTH = HEADS * CHANNELS


def hidden_states() -> dict[str, Tensor]:
    return {"x": torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))}


class Core(nn.Module):
    """Plain attention that is no part of transformers; subclasses spoil it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            part(x).unflatten(-1, (HEADS, CHANNELS)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        return q, k, v

    def merged(self, out: Tensor) -> Tensor:
        return out.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged(torch.softmax(q @ k.mT / CHANNELS**0.5, -1) @ v)


class Net(nn.Module):
    def __init__(self, *cores: nn.Module) -> None:
        super().__init__()
        self.cores = nn.ModuleList(cores)

    def forward(self, x: Tensor) -> Tensor:
        for core in self.cores:
            x = x + core(x)
        return x


# -------------------------------------------------------------------------------------------------------- refusals


class Fused(Core):
    def forward(self, x: Tensor) -> Tensor:
        return self.merged(F.scaled_dot_product_attention(*self.heads(x)))


class Einsum(Core):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = torch.softmax(torch.einsum("bhtd,bhsd->bhts", q, k), -1)
        return self.merged(torch.einsum("bhts,bhsd->bhtd", weights, v))


class TwoSoftmaxes(Core):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        forwards, backwards = torch.softmax(q @ k.mT, -1), torch.softmax(k @ q.mT, -1)
        return self.merged(forwards @ v - backwards @ v)


class TwoScoreProducts(Core):
    """Disentangled attention: content to content plus content to position."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        positions = torch.ones(BATCH, HEADS, TOKENS, CHANNELS)
        return self.merged(torch.softmax(q @ k.mT + q @ positions.mT, -1) @ v)


class UnusedWeights(Core):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged(v * torch.softmax(q @ k.mT, -1).mean(-1, keepdim=True))


class Synthesizer(Core):
    """Weights that depend on positions alone."""

    def forward(self, x: Tensor) -> Tensor:
        _, _, v = self.heads(x)
        return self.merged(torch.softmax(torch.eye(TOKENS).expand(BATCH, HEADS, -1, -1), -1) @ v)


class ExternalSoftmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, -1)


class SoftmaxElsewhere(Core):
    """The softmax belongs to a child that is not ``nn.Softmax``."""

    def __init__(self) -> None:
        super().__init__()
        self.normalise = ExternalSoftmax()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.merged(self.normalise(q @ k.mT) @ v)


REFUSED = [
    (Fused, r"uses a fused attention kernel although eager attention was asked for"),
    (Einsum, r"applies a softmax to scores that no batched product computed"),
    (TwoSoftmaxes, r"evaluates 2 attention softmaxes in one call"),
    (
        TwoScoreProducts,
        r"has 2 score products before its softmax and 1 uses of its weights after it, expected one of each",
    ),
    (
        UnusedWeights,
        r"has 1 score products before its softmax and 0 uses of its weights after it, expected one of each",
    ),
    (Synthesizer, r"has 0 score products before its softmax and 1 uses of its weights after it, expected one of each"),
]


@pytest.mark.parametrize(("bad", "reason"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_uncovered_attention_is_refused_by_name(bad: type[Core], reason: str) -> None:
    net = Net(bad())
    with pytest.raises(
        UncoveredArchitectureError, match=rf"cores\.0 \({bad.__name__}\) {reason}; this architecture is"
    ):
        monkey_patch_model(net, example_inputs=hidden_states())


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("bad", [case[0] for case in REFUSED])
def test_a_half_covered_model_is_refused_and_left_alone(bad: type[Core], first: bool) -> None:
    good, uncovered = Core(), bad()
    net = Net(uncovered, good) if first else Net(good, uncovered)
    expected, inputs = net(**hidden_states()), hidden_states()
    with pytest.raises(UncoveredArchitectureError, match=rf"cores\.{0 if first else 1} \({bad.__name__}\)"):
        monkey_patch_model(net, example_inputs=inputs)
    assert not is_patched(net)
    assert "forward" not in good.__dict__
    assert torch.equal(net(**inputs), expected)


def test_a_softmax_in_a_child_of_its_own_is_refused() -> None:
    with pytest.raises(UncoveredArchitectureError, match=r"cores\.0\.normalise \(ExternalSoftmax\)"):
        monkey_patch_model(Net(SoftmaxElsewhere()), example_inputs=hidden_states())


class ThreeDimensionalEinsum(Core):
    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(torch.einsum("btd,bsd->bts", self.query(x), self.key(x)), -1)
        return torch.einsum("bts,bsd->btd", weights, self.value(x))


class TorchsOwn(nn.Module):
    """``nn.MultiheadAttention`` runs inside one overridable function, which hides its products and its softmax."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.attention(x, x, x, need_weights=self.need_weights)[0]
        return attended


HIDDEN = {
    "nn.MultiheadAttention": lambda: TorchsOwn(need_weights=False),
    "nn.MultiheadAttention with weights": lambda: TorchsOwn(need_weights=True),
    "nn.TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True),
    "einsum over one head": ThreeDimensionalEinsum,
}


@pytest.mark.parametrize("build", HIDDEN.values(), ids=HIDDEN)
def test_attention_that_hides_beside_covered_attention_is_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(UncoveredArchitectureError, match=r"cores\.1"):
        monkey_patch_model(Net(Core(), build()), example_inputs=hidden_states())


def test_a_vision_tower_with_a_pooling_head_of_torchs_attention_is_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.SiglipVisionConfig(**sizes, image_size=12, patch_size=4)
    model = transformers.SiglipVisionModel._from_config(config, attn_implementation="eager").eval()
    assert any(isinstance(module, nn.MultiheadAttention) for module in model.modules())
    with pytest.raises(UncoveredArchitectureError, match="head"):
        monkey_patch_model(model)


class Inconsistent(Core):
    """Attends on every second evaluation behind another batched product."""

    evaluations = 0

    def forward(self, x: Tensor) -> Tensor:
        self.evaluations += 1
        extra = (x.mT @ x).mean() if self.evaluations % 2 == 0 else 0
        return super().forward(x) + extra


def test_a_module_that_attends_in_two_ways_is_refused() -> None:
    shared = Inconsistent()
    with pytest.raises(
        UncoveredArchitectureError, match=r"cores\.0 \(Inconsistent\) computes attention in two different"
    ):
        monkey_patch_model(Net(shared, shared), example_inputs=hidden_states())


# ---------------------------------------------------------------------------------------------- no attention at all


class Perceptron(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        # A classifier's softmax, and a batched product, are no attention.
        return torch.softmax(x, -1) + (x.mT @ x).mean()


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cells(x)[0]
        return out


@pytest.mark.parametrize("build", [Perceptron, Recurrent, lambda: nn.Linear(WIDTH, WIDTH)])
def test_a_model_without_attention_is_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(NoAttentionError, match=r"Net: no attention found \(no softmax between two batched products\)"):
        monkey_patch_model(Net(build()), example_inputs=hidden_states())


def tiny(name: str, **options: Any) -> nn.Module:
    """Build a small model of transformers: ``name`` is the class, the options are those of its configuration."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**options, attn_implementation="eager")).eval()


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}
WITHOUT_ATTENTION = {
    "MambaForCausalLM": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "RwkvForCausalLM": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 32},
    "FNetModel": SIZES,
}


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
def test_recurrent_and_mixing_models_are_refused(name: str) -> None:
    with pytest.raises(NoAttentionError, match=rf"{name}: no attention found"):
        monkey_patch_model(tiny(name, **WITHOUT_ATTENTION[name]))


UNCOVERED = {
    "XLNetModel": {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    "FunnelModel": {"vocab_size": 64, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
    "LongformerModel": {**SIZES, "attention_window": 4},
    "SqueezeBertModel": {**SIZES, "embedding_size": 32},
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_architectures_with_attention_of_their_own_shape_are_refused(name: str) -> None:
    with pytest.raises(UncoveredArchitectureError, match=r"\(\w+\) applies a softmax to scores"):
        monkey_patch_model(tiny(name, **UNCOVERED[name]))


# ------------------------------------------------------------------------------------- what is read is what is meant


class Rotary(nn.Module):
    """As in Llama: angles as a batched product of frequencies and positions."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(len(x), 3, 1) @ torch.arange(float(x.shape[1])).expand(len(x), 1, -1)


class ProductInChildBefore(Core):
    def __init__(self) -> None:
        super().__init__()
        self.rotary = Rotary()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.01 * self.rotary(x).mean(1)[..., None])


class ProductBefore(Core):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.01 * (x.mT @ x).mean())


class ProductBetween(Core):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        weights = torch.softmax(q @ k.mT / CHANNELS**0.5, -1)
        return self.merged(weights @ (v + 0.01 * (x.mT @ x).mean()))


class ProductAfter(Core):
    def forward(self, x: Tensor) -> Tensor:
        attended = super().forward(x)
        return attended + 0.01 * (x.mT @ attended).mean()


class SoftmaxBefore(Core):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.softmax(x, -1))


class TwoDimensionalGate(Core):
    """A router's softmax over (tokens, experts) between the scores and their softmax."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = q @ k.mT
        gate = torch.softmax(x.flatten(0, 1), -1).mean()
        return self.merged(torch.softmax(scores * gate, -1) @ v)


@pytest.mark.parametrize(
    "build",
    [Core, ProductBefore, ProductInChildBefore, ProductBetween, ProductAfter, SoftmaxBefore, TwoDimensionalGate],
)
def test_the_tensors_of_attention_are_not_mistaken(build: type[Core], tensors_of: Any) -> None:
    net, inputs = Net(build()), hidden_states()
    try:
        monkey_patch_model(net, example_inputs=inputs)
    except UncoveredArchitectureError:
        return  # Refusing is right as well; reading another product is not.
    seen = {location: tensor for (_, _, location), tensor in tensors_of(net, inputs).items()}
    assert seen["scores"].shape == seen["weights"].shape == (BATCH, HEADS, TOKENS, TOKENS)
    torch.testing.assert_close(seen["q"] @ seen["k"].mT, seen["scores"])
    torch.testing.assert_close(seen["weights"] @ seen["v"], seen["out"])
    assert seen["out"].shape == (BATCH, HEADS, TOKENS, CHANNELS)


def spelled(
    product: Callable[[Tensor, Tensor], Tensor], softmax: Callable[[Tensor], Tensor], merge_heads: bool
) -> Core:
    class Spelled(Core):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part.flatten(0, 1) if merge_heads else part for part in self.heads(x))
            out = product(softmax(product(q, k.mT)), v)
            return self.merged(out.unflatten(0, (BATCH, HEADS)) if merge_heads else out)

    return Spelled()


def zeros(a: Tensor, b: Tensor) -> Tensor:
    return torch.zeros(*a.shape[:-1], b.shape[-1])


PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "a @ b": (lambda a, b: a @ b, False),
    "torch.matmul(a, b)": (lambda a, b: torch.matmul(a, b), False),
    "torch.matmul(a, other=b)": (lambda a, b: torch.matmul(a, other=b), False),
    "torch.matmul(input=a, other=b)": (lambda a, b: torch.matmul(input=a, other=b), False),
    "a.matmul(b)": (lambda a, b: a.matmul(b), False),
    "torch.bmm(a, b)": (lambda a, b: torch.bmm(a, b), True),
    "torch.bmm(a, mat2=b)": (lambda a, b: torch.bmm(a, mat2=b), True),
    "torch.bmm(input=a, mat2=b)": (lambda a, b: torch.bmm(input=a, mat2=b), True),
    "a.bmm(b)": (lambda a, b: a.bmm(b), True),
    "torch.baddbmm(0, a, b)": (lambda a, b: torch.baddbmm(zeros(a, b), a, b, beta=0.0), True),
    "torch.baddbmm(0, a, batch2=b)": (lambda a, b: torch.baddbmm(zeros(a, b), a, batch2=b), True),
    "zeros.baddbmm(batch1=a, batch2=b)": (lambda a, b: zeros(a, b).baddbmm(batch1=a, batch2=b), True),
    "a @ b over 3 dimensions": (lambda a, b: a @ b, True),
}
SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.softmax(x, -1)": lambda x: torch.softmax(x, -1),
    "torch.softmax(input=x, dim=-1)": lambda x: torch.softmax(input=x, dim=-1),
    "x.softmax(dim=-1)": lambda x: x.softmax(dim=-1),
    "F.softmax(x, dim=-1, dtype=float32)": lambda x: F.softmax(x, dim=-1, dtype=torch.float32),
    "F.softmax(input=x, dim=-1)": lambda x: F.softmax(input=x, dim=-1),
    "nn.Softmax(-1)(x)": nn.Softmax(-1),
    "torch.special.softmax(x, -1)": lambda x: torch.special.softmax(x, -1),
}


def check_spelling(core: Core, tensors_of: Any) -> None:
    net, inputs = Net(core), hidden_states()
    with patched(net, example_inputs=inputs):
        seen = {location: tensor for (_, _, location), tensor in tensors_of(net, inputs).items()}
    expected = dict(zip("qkv", core.heads(inputs["x"]), strict=True))
    expected["scores"] = expected["q"] @ expected["k"].mT
    expected["weights"] = torch.softmax(expected["scores"], -1)
    expected["out"] = expected["weights"] @ expected["v"]
    expected["logits"], expected["mass"] = expected["scores"], expected["weights"]
    for location in OBSERVED:
        torch.testing.assert_close(seen[location], expected[location].detach(), msg=location)


@pytest.mark.parametrize(("product", "merge_heads"), PRODUCTS.values(), ids=PRODUCTS)
def test_every_spelling_of_a_batched_product_is_seen(
    product: Callable[[Tensor, Tensor], Tensor], merge_heads: bool, tensors_of: Any
) -> None:
    check_spelling(spelled(product, lambda x: torch.softmax(x, -1), merge_heads), tensors_of)


@pytest.mark.parametrize("merge_heads", [False, True], ids=["4-D", "3-D"])
@pytest.mark.parametrize("softmax", SOFTMAXES.values(), ids=SOFTMAXES)
def test_every_spelling_of_a_softmax_is_seen(
    softmax: Callable[[Tensor], Tensor], merge_heads: bool, tensors_of: Any
) -> None:
    check_spelling(spelled(lambda a, b: a @ b, softmax, merge_heads), tensors_of)


# ------------------------------------------------------------------------------------------------- order and names


def test_cores_are_numbered_in_the_order_of_first_evaluation() -> None:
    class Backwards(Net):
        def forward(self, x: Tensor) -> Tensor:
            for core in reversed(self.cores):
                x = x + core(x)
            return x

    net = Backwards(Core(), Core(), Core())
    with patched(net, example_inputs=hidden_states()):
        assert [(core.index, core.name, core.path) for core in attention_cores(net)] == [
            (0, "cores.2", "R"),
            (1, "cores.1", "R"),
            (2, "cores.0", "R"),
        ]
        assert [core.module for core in attention_cores(net)] == list(reversed(net.cores))


def test_a_module_that_is_evaluated_twice_is_one_core_with_two_calls(tensors_of: Any) -> None:
    model = tiny("AlbertModel", **SIZES, embedding_size=16, max_position_embeddings=32)
    inputs = {"input_ids": torch.arange(1, 6)[None]}
    with patched(model, example_inputs=inputs):
        (core,) = attention_cores(model)
        assert core.path == "A"
        assert {(layer, call) for layer, call, _ in tensors_of(model, inputs)} == {(0, 0), (0, 1)}


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "vit", "gpt_oss"])
def test_the_eager_function_is_that_of_the_modelling_file(name: str, zoo_model: Any) -> None:
    model = zoo_model(name)
    with patched(model):
        for core in attention_cores(model):
            function = eager_function(core.module)
            assert function is not None
            assert function.__name__.endswith("eager_attention_forward")
            assert function.__module__ == type(core.module).__module__
    assert eager_function(nn.Linear(1, 1)) is None
    assert eager_function(zoo_model("bloom").transformer.h[0].self_attention) is None


def test_a_subclass_in_another_file_uses_the_function_of_the_file_that_defines_forward(zoo_model: Any) -> None:
    attention = zoo_model("llama").model.layers[0].self_attn

    class Renamed(type(attention)):  # type: ignore[misc]
        pass

    renamed = Renamed(attention.config, 0)
    assert eager_function(renamed) is eager_function(attention)


def test_an_error_in_the_dry_run_leaves_no_hooks() -> None:
    class Failing(Core):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of order")

    net = Net(Core(), Failing())
    with pytest.raises(RuntimeError, match="out of order"):
        monkey_patch_model(net, example_inputs=hidden_states())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("name", ["llama-gqa", "whisper", "vit", "t5", "bloom", "gemma4-shared-kv"])
def test_made_inputs_reach_every_core(name: str, zoo_model: Any) -> None:
    with patched(zoo_model(name)) as model:
        assert len(attention_cores(model)) == ZOO[name].cores


def test_a_model_whose_input_cannot_be_guessed_asks_for_example_inputs() -> None:
    with pytest.raises(ValueError, match=r"Net: cannot make an input of kind 'input_ids' .* pass example_inputs=\{"):
        monkey_patch_model(Net(Core()))

"""Comparing outputs: bits, not values; every tensor, in order."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutput

from fault_injection.numbers.model_outputs import bitwise_equal, bitwise_equal_outputs, output_tensors


def float32_of(pattern: int) -> Tensor:
    return torch.tensor([pattern], dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zeros_of_either_sign_differ_and_a_nan_equals_itself(dtype: torch.dtype) -> None:
    zero, nan = torch.zeros(2, dtype=dtype), torch.full((2,), float("nan"), dtype=dtype)
    assert not bitwise_equal(zero, -zero)
    assert bitwise_equal(nan, nan.clone())
    assert not bitwise_equal(nan, zero)


def test_nan_payloads_and_the_last_bit_count() -> None:
    assert not bitwise_equal(float32_of(0x7FC0_0000), float32_of(0x7FC0_0001))
    assert bitwise_equal(float32_of(0x7FC0_0001), float32_of(0x7FC0_0001))
    assert not bitwise_equal(float32_of(0x3F80_0000), float32_of(0x3F80_0001))


def test_shape_and_dtype_count_and_strides_do_not() -> None:
    ones = torch.ones(2, 3)
    assert not bitwise_equal(ones, torch.ones(3, 2))
    assert not bitwise_equal(ones, torch.ones(1, 2, 3))
    assert not bitwise_equal(ones, ones.double())
    grid = torch.arange(6.0).reshape(2, 3)
    assert bitwise_equal(grid, grid.T.contiguous().T)
    assert bitwise_equal(torch.tensor(1.0), torch.tensor(1.0))
    assert bitwise_equal(torch.empty(0), torch.empty(0))


def test_integers_and_booleans_are_compared_too() -> None:
    assert bitwise_equal(torch.tensor([1, 2]), torch.tensor([1, 2]))
    assert not bitwise_equal(torch.tensor([1, 2]), torch.tensor([1, 3]))
    assert not bitwise_equal(torch.tensor([True]), torch.tensor([False]))


def test_tensors_are_collected_from_nested_outputs_in_order() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    output = OrderedDict(first=a, second=(b, [c, None]), third={"x": a}, cache=DynamicCache(), number=3)
    assert [tensor.numel() for tensor in output_tensors(output)] == [1, 2, 3, 1]
    assert output_tensors(a) == [a]
    assert [tensor.numel() for tensor in output_tensors(CausalLMOutput(loss=a, logits=b, hidden_states=(c, c)))] == [
        1,
        2,
        3,
        3,
    ]


def test_one_differing_missing_or_exchanged_tensor_is_noticed() -> None:
    a, b = torch.ones(2), torch.zeros(2)
    assert bitwise_equal_outputs((a, {"x": b}), (a.clone(), {"x": b.clone()}))
    assert not bitwise_equal_outputs((a, b), (a, -b))
    assert not bitwise_equal_outputs((a, b), (a,))
    assert not bitwise_equal_outputs((a, b), (b, a))
    assert not bitwise_equal_outputs(CausalLMOutput(logits=a), CausalLMOutput(logits=b))


def test_outputs_without_a_tensor_are_not_called_equal() -> None:
    @dataclass
    class Output:
        logits: Tensor

    # Nothing would have been compared, and any patch would pass the check that ends patching.
    assert not bitwise_equal_outputs(Output(torch.ones(2)), Output(torch.zeros(2)))

"""The subject of an experiment: one patched model, and how a forward pass of it is made.

>>> import transformers
>>> config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=32)
>>> with Subject(transformers.GPT2LMHeadModel(config)) as subject:
...     found = subject.forward({"input_ids": torch.tensor([[3, 1, 4, 1]])})     # taps may follow the batch
>>> subject.family, found.output.shape, found.loss > 0
('causal', torch.Size([1, 4, 32]), True)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from experiments.effects.loss import Evaluation, loss_and_logits
from experiments.errors import UsageError
from experiments.inputs.families import FAMILIES
from experiments.inputs.model_facts import facts_from_config, model_family
from experiments.inputs.windows import model_inputs, validate_batch
from fault_injection import (
    AttentionCore,
    Tap,
    attention_cores,
    check_kv_consistency,
    is_patched,
    monkey_patch_model,
    tapped,
    unpatch_model,
)

Evaluate = Callable[[str, Any, Mapping[str, Tensor]], Evaluation]
"""Makes an evaluation of a family's outputs on a batch."""


class Subject:
    """A model that is patched for as long as the subject lives; one that came patched is left patched.

    Args:
        model: a Hugging Face model.
        family: a name of ``FAMILIES``; read from the configuration if not given.
        force_kv_equal: make K = V while the subject lives.
        first_batch: an input for the dry run that finds the attention layers (default: made from the configuration).
    """

    def __init__(
        self,
        model: Any,
        family: str | None = None,
        *,
        force_kv_equal: bool = False,
        first_batch: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self._facts = facts_from_config(model.config)
        self.family = family or model_family(model)
        self._task = FAMILIES.find(self.family)
        self._owns_patch = not is_patched(model)
        self._accepts_cache = "use_cache" in inspect.signature(model.forward).parameters
        self._training = [(module, module.training) for module in model.modules()]
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        model.eval()
        try:
            self._patch(None if first_batch is None else self._arguments(first_batch), force_kv_equal)
        except BaseException:
            self.close()
            raise

    def _patch(self, example: dict[str, Any] | None, force_kv_equal: bool) -> None:
        if self._owns_patch:
            monkey_patch_model(self.model, force_kv_equal=force_kv_equal, example_inputs=example)
        self.cores: list[AttentionCore] = attention_cores(self.model)
        consistency = check_kv_consistency(self.model, example_inputs=example)
        if force_kv_equal and not all(entry.kv_equal for entry in consistency.values()):
            raise UsageError("model.force_kv_equal: the model is already patched; patch it with force_kv_equal=True")
        self.kv_equal = {core.index: bool(consistency[core.name].kv_equal) for core in self.cores}

    def __enter__(self) -> Subject:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unpatch the model if this subject patched it, and restore its training flags."""
        if self._owns_patch and is_patched(self.model):
            unpatch_model(self.model)
        for module, flag in self._training:
            module.training = flag

    @property
    def layer_names(self) -> list[str]:
        """The qualified names of the attention modules, in the order of layers."""
        return [core.name for core in self.cores]

    def to_device(self, batch: Any) -> dict[str, Tensor]:
        """Return a valid batch on the model's device; ``UsageError`` if it is none."""
        checked = validate_batch(batch, self.family, self._facts.vocab_size, self._facts.max_positions)
        if self._task.two_stacks and "decoder_input_ids" not in checked:
            checked["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(checked["labels"])
        return {name: tensor.to(self.device) for name, tensor in checked.items()}

    def forward(self, batch: Mapping[str, Tensor], *taps: Tap, evaluate: Evaluate = loss_and_logits) -> Evaluation:
        """Run the model once on a batch from ``to_device``, with ``taps``, without gradients.

        ``evaluate(family, outputs, batch)`` makes of the model's outputs what is returned.
        """
        with torch.no_grad(), tapped(self.model, *taps):
            outputs = self.model(**self._arguments(batch))
            return evaluate(self.family, outputs, batch)

    def answer(self, batch: int, length: int) -> Tensor:
        """Return the model's output (batch, length, ...) for inputs that do not matter: its blocks are replaced."""
        tokens = torch.zeros((batch, length), dtype=torch.int64, device=self.device)
        outputs = self.model(**self._arguments({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}))
        output: Tensor = getattr(outputs, self._task.answer)
        return output

    def _arguments(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        arguments: dict[str, Any] = dict(model_inputs(batch))
        if self._accepts_cache:
            arguments["use_cache"] = False
        return arguments

    def synchronize(self) -> None:
        """Wait for the device, so that the clock can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

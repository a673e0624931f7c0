"""What the benchmarks run: a model with random weights, an input of some shape, and faults to inject.

with Workload.of("gpt2-small", "float32", (1, 64)) as work:
faults = work.faults(96)
opened = work.opened(("lite",))
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from experiments.config import ExperimentConfig, load_config
from experiments.config.sections import DetectConfig
from experiments.engine.context import Context
from experiments.engine.opened_batch import OpenedBatch
from experiments.engine.pairs import PairedRunner
from experiments.errors import CheckRefusedError
from experiments.inputs.blocks import Chain, block_chain
from experiments.inputs.models import load_model
from experiments.passes.baseline import Baseline
from experiments.passes.subject import Subject
from fault_injection import LOCATIONS, Fault, FaultSpec, draw_fault
from monitoring import ForwardCache, TraceWriter
from monitoring.cache.backend_stats import BackendStats
from monitoring.cache.cached_forward import CachedForward

MODELS = ("gpt2-small", "llama", "reference")
DEFAULT_DETECTORS = tuple(DetectConfig().detectors)

Shape = tuple[int, int]


def parse_shape(text: str) -> Shape:
    """Return (sequences, tokens) from ``B,T``, for ``argparse``."""
    try:
        rows, length = (int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"shape: got {text!r}, allowed B,T, e.g. 4,128") from None
    if rows < 1 or length < 2:
        raise argparse.ArgumentTypeError(f"shape: got {text!r}, allowed at least 1,2")
    return rows, length


def build_model(name: str, dtype: str, *, quick: bool = False) -> Any:
    """Return a causal language model: ``gpt2-small`` and ``llama`` (grouped queries, rotary positions) are random.

    Args:
        name: one of ``MODELS``.
        dtype: of its parameters, a name in ``torch``.
        quick: 4 layers of 128 channels and 2,000 tokens instead of 12 of 768 and 50,257 (llama: 32,000).
    """
    if name == "reference":
        return load_model(load_config(["--model.path=reference", f"--model.dtype={dtype}"]).model).model
    if name not in MODELS:
        raise ValueError(f"model: got {name!r}, allowed {', '.join(MODELS)}")
    torch.manual_seed(0)
    layers, width, heads, vocabulary = (4, 128, 4, 2000) if quick else (12, 768, 12, 50257)
    config: Any
    if name == "gpt2-small":
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, **ends)
    else:
        config = LlamaConfig(
            num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, num_key_value_heads=heads // 2,
            intermediate_size=8 * width // 3, vocab_size=min(vocabulary, 32000), max_position_embeddings=1024,
        )  # fmt: skip
    made = GPT2LMHeadModel if name == "gpt2-small" else LlamaForCausalLM
    return made(config).to(getattr(torch, dtype)).eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Workload:
    """One model and one input.

    Attributes:
        subject: the patched model.
        batch: its input.
        pairs: makes baselines, detectors and proofs.
        chain: the blocks of the model.
    """

    subject: Subject
    batch: dict[str, Tensor]
    pairs: PairedRunner
    chain: Chain

    @classmethod
    @contextmanager
    def of(cls, model: str, dtype: str, shape: Shape, *, quick: bool = False) -> Iterator[Workload]:
        """Build model and input; the model is unpatched at the end."""
        with Subject(build_model(model, dtype, quick=quick), "causal") as subject:
            generator = torch.Generator().manual_seed(1)
            tokens = torch.randint(0, subject.model.config.vocab_size, shape, generator=generator)
            batch = subject.to_device({"input_ids": tokens})
            forward = CachedForward(
                ForwardCache(), TraceWriter(None), BackendStats(), model=subject.model, device=subject.device
            )
            chain = block_chain(subject.model, subject.cores)
            if isinstance(chain, str):
                raise CheckRefusedError(f"{model}: {chain}")
            yield cls(subject, batch, PairedRunner(Context(subject, [batch], lambda: forward), model_name=model), chain)

    @staticmethod
    def config(detectors: Sequence[str]) -> ExperimentConfig:
        """Return a configuration with these detectors and suites, and defaults for the rest."""
        return ExperimentConfig(exp_name="benchmark", detect=DetectConfig(detectors=list(detectors)))

    def baseline(self, detectors: Sequence[str]) -> Baseline:
        """Return the fault-free pass, watched by some detectors; computed once."""
        return self.pairs.baseline(0, self.config(detectors))

    def opened(self, detectors: Sequence[str]) -> OpenedBatch:
        """Return the input ready for fast runs, judged by some detectors.

        Raises:
            CheckRefusedError: runs of this model cannot begin at a block.
        """
        made = self.pairs.detectors(self.config(detectors))
        opened = OpenedBatch.of(self.subject, self.chain, self.batch, self.baseline(detectors), made)
        if isinstance(opened, str):
            raise CheckRefusedError(f"{type(self.subject.model).__name__}: {opened}")
        return opened

    def faults(self, count: int, layer: int | None = None) -> list[Fault]:
        """Draw single-bit flips, uniform over layers, locations, positions that are not masked, and bits.

        Args:
            count: how many.
            layer: the layer of all of them; None: any.

        Returns:
            Faults sorted by layer and row.
        """
        random = np.random.Generator(np.random.Philox(key=0))
        sites, drawn = self.baseline(()).sites, []
        for _ in range(count):
            chosen = int(random.integers(len(self.subject.cores))) if layer is None else layer
            location = LOCATIONS[int(random.integers(len(LOCATIONS)))]
            drawn.append(draw_fault(FaultSpec(location), sites[chosen, location], random))
        return sorted(drawn, key=lambda fault: (fault.layer, (fault.index or (0,) * 4)[2]))

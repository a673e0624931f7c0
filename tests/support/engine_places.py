"""Small models with their batches, opened for the fast engine, and the plain pair to compare it with.

with opened_place(small_gpt2(), [batch]) as place:
    faults = place.draw("scores", 25, bits=(30,))
    compared = place.compare(faults)          # asserts that all is equal, bit for bit
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from experiments.config import DetectConfig, ExperimentConfig
from experiments.effects.outcome import effect_of
from experiments.engine.context import Context
from experiments.engine.fast import engine as fast_engine
from experiments.engine.fast.engine import FastEngine
from experiments.engine.fast.run import FastRun
from experiments.engine.fast.wide_linear import OutputBuffer
from experiments.engine.opened_batch import OpenedBatch, recorded_part
from experiments.engine.pairs import PairedRunner
from experiments.inputs.blocks import Chain, block_chain
from experiments.passes.injected_pass import InjectedPass, Observed
from experiments.passes.subject import Subject
from experiments.passes.taps.output_keeper import OutputKeeper, change_of
from fault_injection import Fault, FaultSpec, draw_fault
from fault_injection.numbers.bits import float_format
from monitoring import ForwardCache, PerformanceMonitor, TraceWriter
from monitoring.cache.backend_stats import BackendStats
from monitoring.cache.cached_forward import CachedForward

Batch = Mapping[str, Tensor]
CRITICAL = 1e-3
LENGTH = 40


def _built(model_class: type[Any], config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return model_class._from_config(config, attn_implementation="eager").eval()


def small_gpt2(layers: int = 3, **changes: Any) -> Any:
    """Return a GPT-2 of 32 channels in 4 heads whose attention is far from uniform."""
    options = {
        "vocab_size": 300, "n_positions": 64, "n_embd": 32, "n_layer": layers, "n_head": 4, "initializer_range": 0.3,
        "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    return _built(transformers.GPT2LMHeadModel, transformers.GPT2Config(**{**options, **changes}))


def small_llama(layers: int = 3, **changes: Any) -> Any:
    """Return a Llama with rotations, 4 query heads and 2 key/value heads."""
    options = {
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return _built(transformers.LlamaForCausalLM, transformers.LlamaConfig(**{**options, **changes}))


def small_bert(kind: type[Any] = transformers.BertForMaskedLM) -> Any:
    """Return a bidirectional BERT, by default with its masked-language head."""
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return _built(kind, config)


def tokens(batch: int = 1, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(17))


def padded(side: str, length: int = LENGTH, padding: int = 9) -> Batch:
    """Return two sequences, the second with padding on the left or the right."""
    ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.int64)
    mask[1, slice(padding) if side == "left" else slice(length - padding, None)] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def integer_view(tensor: Tensor) -> Tensor:
    """Return the bit patterns, in which NaN equals the same NaN and 0.0 is not -0.0."""
    return tensor.contiguous().view(float_format(tensor.dtype).integer)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are bitwise equal; a NaN equals any NaN, whose payload is the processor's affair."""
    return torch.equal(*(integer_view(torch.where(each.isnan(), torch.nan, each)) for each in (left, right)))


@dataclass(frozen=True)
class Compared:
    """Runs that were found equal; ``escaped`` counts those that went through whole sequences."""

    runs: list[FastRun]
    outcomes: list[str]

    @property
    def escaped(self) -> int:
        return sum(bool(run.behind) for run in self.runs)


class Place:
    """One model and its first batch, opened."""

    def __init__(self, pairs: PairedRunner, config: ExperimentConfig, chain: Chain, opened: OpenedBatch) -> None:
        self.pairs, self.config, self.chain, self.opened = pairs, config, chain, opened
        self.baseline = pairs.baseline(0, config)
        self.batch = pairs.batches[0]
        self._clean: dict[int, OutputKeeper] = {}

    def draw(self, location: str, count: int, *, seed: int = 0, **spec: Any) -> list[Fault]:
        """Return random faults of a location, in random layers."""
        random = np.random.Generator(np.random.Philox(key=seed))
        layers = [int(layer) for layer in random.integers(len(self.pairs.subject.cores), size=count)]
        wanted = FaultSpec(location, **spec)
        return [draw_fault(wanted, self.baseline.sites[layer, location], random) for layer in layers]

    def engine(self, batch_runs: int | None = None, *, wide: bool = False, **changes: Any) -> FastEngine:
        return replace(self.opened, **changes).engine(batch_runs, OutputBuffer() if wide else None, propagation=True)

    def plain(self, fault: Fault, *, keep_output: bool = False) -> InjectedPass:
        pairs = self.pairs
        blocks = pairs.context.watcher(self.opened.outputs, fault.layer)
        detectors, detect = pairs.detectors(self.config), self.config.detect
        observed = Observed(self.baseline.situation, detectors, detect, keep_output=keep_output, blocks=blocks)
        monitor = PerformanceMonitor(pairs.subject.device)
        return InjectedPass.of(pairs.subject, self.batch, [fault], observed, monitor)

    def compare(self, faults: Sequence[Fault], engine: FastEngine | None = None) -> Compared:
        """Run faults through the engine and one by one; assert that every number and every bit is the same."""
        engine = engine or self.engine()
        sites = [engine.site_of(fault) for fault in faults]
        assert None not in sites
        with pytest.MonkeyPatch.context() as monkeypatch:
            seen = SeenRows(monkeypatch)
            runs = engine.run([(site, True) for site in sites], CRITICAL)
        outcomes = []
        for number, (fault, run) in enumerate(zip(faults, runs, strict=True)):
            whole = self.plain(fault, keep_output=True)
            outcomes.append(self._compare_one(fault, run, whole, seen.logits.get(number, {})))
        return Compared(runs, outcomes)

    def _compare_one(self, fault: Fault, run: FastRun, whole: InjectedPass, rows: dict[int, Tensor]) -> str:
        effect = effect_of(self.baseline.evaluation, whole.evaluation, self.batch, self.pairs.subject.family, CRITICAL)
        output = self.baseline.evaluation.output.flatten(0, 1).clone()
        for row, logits in rows.items():
            output[row] = logits
        assert same_bits(output, whole.evaluation.output.flatten(0, 1)), fault
        # Where rows moved by little the loss comes from the change, which may round otherwise.
        loss = whole.evaluation.loss
        assert effect.injected_loss == (loss and pytest.approx(loss, rel=1e-14, nan_ok=True)), fault
        assert repr(run.effect) == repr(effect), fault
        assert repr(run.record) == repr(whole.records[0])
        assert list(run.block_changes) == list(range(self.chain.block_of[fault.layer], len(self.chain.blocks)))
        assert repr(run.block_changes) == repr(whole.block_changes), fault
        at_site = {name: verdict for (name, layer), verdict in whole.watcher.verdicts.items() if layer == fault.layer}
        assert list(run.verdicts) == list(at_site)
        for name, verdict in at_site.items():
            assert recorded_part(run.verdicts[name]) == recorded_part(verdict), (fault, name)
        for (name, layer), verdict in whole.watcher.verdicts.items():
            if layer > fault.layer:
                # Where nothing was seen behind the fault, all is as clean as without it.
                said = run.behind.get(layer, self.baseline.verdicts[name, layer])
                assert recorded_part(verdict) == recorded_part(said), (fault, name, layer)
        assert whole.keeper is not None
        assert repr(run.local) == repr(change_of(fault, whole.keeper, self._clean_output(fault.layer))), fault
        return effect.outcome

    def _clean_output(self, layer: int) -> OutputKeeper:
        if layer not in self._clean:
            self._clean[layer] = OutputKeeper(layer)
            self.pairs.subject.forward(self.batch, self._clean[layer])
        return self._clean[layer]


class SeenRows:
    """Keeps the rows of logits that each run of an engine handed over, by run and row."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logits: dict[int, dict[int, Tensor]] = {}
        self._wave: list[Any] = []
        own_propagate, own_effects = FastEngine._propagate, fast_engine.effects_of_rows

        def propagate(engine: FastEngine, runs: list[Any], critical: float, whole: bool) -> Any:
            self._wave = [run.number for run in runs]
            found = own_propagate(engine, runs, critical, whole)
            assert not self._wave, "some runs were not looked at"
            return found

        def effects(known: Any, rows: Tensor, logits: Tensor, runs: Tensor, count: int, critical: float) -> Any:
            if self._wave:
                numbers, self._wave = self._wave[:count], self._wave[count:]
                for row, run, values in zip(rows.tolist(), runs.tolist(), logits.clone(), strict=True):
                    assert row not in self.logits.setdefault(numbers[run], {})
                    self.logits[numbers[run]][row] = values
            return own_effects(known, rows, logits, runs, count, critical)

        monkeypatch.setattr(FastEngine, "_propagate", propagate)
        monkeypatch.setattr(fast_engine, "effects_of_rows", effects)


def runner_of(subject: Subject, batches: Sequence[Batch]) -> PairedRunner:
    forward = CachedForward(
        ForwardCache(), TraceWriter(None), BackendStats(), model=subject.model, device=subject.device
    )
    return PairedRunner(Context(subject, [subject.to_device(batch) for batch in batches], lambda: forward))


@contextmanager
def opened_place(model: nn.Module, batches: Sequence[Batch], family: str = "causal", **detect: Any) -> Iterator[Place]:
    """Yield the place of a model and its first batch; the detectors are those of a campaign unless given."""
    config = ExperimentConfig(exp_name="place", injection_location="scores", detect=DetectConfig(**detect))
    with Subject(model, family) as subject:
        pairs = runner_of(subject, batches)
        chain = block_chain(subject.model, subject.cores)
        assert isinstance(chain, Chain)
        first, baseline = pairs.batches[0], pairs.baseline(0, config)
        opened = OpenedBatch.of(subject, chain, first, baseline, pairs.detectors(config))
        assert isinstance(opened, OpenedBatch)
        yield Place(pairs, config, chain, opened)

"""Count false positives: fault-free attention of many kinds, looked at by every online detector.

    python -m benchmarks.clean_rows                          # all parts, some minutes
    python -m benchmarks.clean_rows --parts gaussian,adversarial --threads 2

Parts: ``gaussian`` (n from 1 to 1024, d from 16 to 128, four gains, four kinds of mask, grouped queries, K = V or not),
``adversarial`` (ties, one key, huge and tiny scales, equal keys, subnormal numbers), ``models`` (both reference models
and random GPT-2 and Llama layers of larger width), ``zoo`` (the architectures of the test suite) and ``fused`` (the
kernels of ``bounds.fused.fused_attention``), in four dtypes. Printed per detector: rows checked, violations, and the
largest residual in units of its tolerance: near 1 the tolerance is tight, near 0 it is loose. It runs from a
checkout: the zoo and the Gaussian attention are those of ``tests/``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bounds import Detector, Verdict, get_detector, list_detectors
from bounds.fused.fused_attention import fused_attention
from experiments.config import load_config
from experiments.inputs.models import load_model
from experiments.inputs.windows import make_batches
from experiments.passes.taps.call_state import Situation
from experiments.passes.taps.origins import recorded_origins
from experiments.passes.taps.watcher import Watcher
from fault_injection import SiteSurvey, attention_cores, check_kv_consistency, patched, tapped
from fault_injection.operands.finding import operand_sources

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))
from attention_states import attend, mask_of  # type: ignore[import-not-found]
from zoo import ZOO, logits_of  # type: ignore[import-not-found]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PARTS = ("gaussian", "adversarial", "models", "zoo", "fused")


@dataclass
class Count:
    """What one detector said of one dtype."""

    rows: int = 0
    violations: int = 0
    ratio: float = 0.0
    reasons: set[str] = field(default_factory=set)

    def add(self, verdict: Verdict) -> None:
        """Count a verdict."""
        self.rows += verdict.rows_checked
        self.violations += verdict.violations
        self.ratio = max(self.ratio, verdict.largest_ratio or 0.0)
        if verdict.reason is not None:
            self.reasons.add(verdict.reason)


Counts = defaultdict[tuple[str, torch.dtype], Count]


def _proved() -> list[Detector]:
    made = [get_detector(name) for name in list_detectors()]
    return [detector for detector in made if not detector.oracle and detector.proved]


def _check(state: Any, dtype: torch.dtype, counts: Counts) -> None:
    for detector in _proved():
        counts[detector.name, dtype].add(detector.check(state))


def gaussian(counts: Counts, dtype: torch.dtype) -> None:
    """Random attention of many sizes."""
    generator = torch.Generator().manual_seed(0)
    sizes = itertools.product((1, 2, 3, 7, 16, 33, 64, 128, 256, 512, 1024), (16, 32, 64, 128))
    masks = itertools.cycle(("causal", "all", "window", "padded"))
    for (keys, channels), gain in itertools.product(sizes, (0.3, 1.0, 4.0, 16.0)):
        mask, heads, groups = next(masks), 4, int(torch.randint(0, 3, (1,), generator=generator))
        if keys < 3 and mask == "padded":
            mask = "causal"
        shape = 2, heads // 2**groups, keys, channels
        draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
        query = (draw(2, heads, keys, channels) * gain).to(dtype)
        key = draw(*shape).to(dtype)
        for value, equal in ((draw(*shape).to(dtype), False), (key, True)):
            _check(attend(query, key, value, mask_of(mask, keys, keys), kv_equal=equal), dtype, counts)


def adversarial(counts: Counts, dtype: torch.dtype) -> None:
    """Rows at the edges: ties, one key, equal keys, huge, tiny and subnormal numbers."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    huge = {torch.float64: 1e100, torch.float32: 1e15, torch.bfloat16: 1e15, torch.float16: 30.0}[dtype]
    tiny = {torch.float64: 1e-150, torch.float32: 1e-20, torch.bfloat16: 1e-20, torch.float16: 1e-3}[dtype]
    below = torch.finfo(dtype).tiny / 8
    for keys, channels in itertools.product((1, 2, 5, 64, 300), (16, 64)):
        ones, normal = torch.ones(2, 4, keys, channels, dtype=torch.float64), draw(2, 4, keys, channels)
        one_row = normal[:, :, :1].expand_as(normal)
        cases = {
            "equal keys": (normal, one_row, normal),
            "all equal": (ones, ones, ones),
            "zeros": (0 * ones, 0 * ones, normal),
            "huge": (huge * normal, normal, huge * draw(2, 4, keys, channels)),
            "tiny": (tiny * normal, tiny * draw(2, 4, keys, channels), tiny * normal),
            "subnormal": (normal, normal, below * normal),
            "subnormal scores": (below * normal, normal, normal),
            "one-hot": (30 * torch.sign(normal), torch.sign(normal), normal),
            "mixed scales": (normal, normal * torch.logspace(-4, 2, keys, dtype=torch.float64)[:, None], normal),
        }
        for (query, key, value), kind in itertools.product(cases.values(), ("causal", "all")):
            state = attend(query.to(dtype), key.to(dtype), value.to(dtype), mask_of(kind, keys, keys))
            if all(bool(torch.isfinite(t).all()) for t in (state.query, state.scores, state.weights, state.out)):
                _check(state, dtype, counts)


def _watch(model: nn.Module, inputs: Iterable[Mapping[str, Any]], counts: Counts) -> None:
    """Let the detectors look at fault-free passes of a model."""
    dtype = next(model.parameters()).dtype
    every = list(inputs)
    with patched(model, example_inputs=every[0]), torch.no_grad():
        consistent = check_kv_consistency(model, example_inputs=every[0])
        equal = {core.index: bool(consistent[core.name].kv_equal) for core in attention_cores(model)}
        operand_sources(model, every[0])
        detectors = _proved()
        for detector in detectors:
            detector.prepare(model)
        for arguments in every:
            survey = SiteSurvey(dtype)
            with tapped(model, survey):
                model(**arguments)
            with recorded_origins(model, detectors) as origins:
                watcher = Watcher(detectors, Situation.of(survey, equal), origins=origins)
                with tapped(model, watcher):
                    model(**arguments)
            for (name, _), verdict in watcher.verdicts.items():
                counts[name, dtype].add(verdict)


def models(counts: Counts, dtype: torch.dtype) -> None:
    """Both reference models on held-out text; random layers of larger models on random tokens."""
    for path in ("reference", "reference-kv"):
        options = [f"--model.path={path}", "--data.num_samples=64", "--data.batch_size=8", "--data.seq_len=128"]
        config = load_config(options)
        loaded = load_model(config.model)
        made = make_batches(config.data, loaded.tokenizer, 0, loaded.family, vocab_size=loaded.vocabulary)
        tokens = [{"input_ids": batch["input_ids"], "use_cache": False} for batch in made]
        _watch(loaded.model.to(dtype).eval(), tokens, counts)
    for model in _random_models():
        ids = torch.randint(0, 500, (2, 256), generator=torch.Generator().manual_seed(2))
        _watch(model.to(dtype).eval(), [{"input_ids": ids, "use_cache": False}], counts)


def _random_models() -> Iterator[Any]:
    torch.manual_seed(0)
    yield GPT2LMHeadModel(GPT2Config(n_layer=2, vocab_size=512, initializer_range=0.05))
    size = {"hidden_size": 2048, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 512}
    yield LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=16, num_key_value_heads=4))


def zoo(counts: Counts, dtype: torch.dtype) -> None:
    """Every architecture of the test suite, with its own inputs."""
    for entry in ZOO.values():
        model = entry.build().to(dtype)
        inputs = entry.inputs(model)
        try:
            with torch.no_grad():
                output = logits_of(model(**inputs))
        except RuntimeError as error:
            print(f"zoo: {entry.name} does not run in {dtype}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        if not bool(torch.isfinite(output).all()):
            print(f"zoo: {entry.name} puts out NaN or Inf by itself in {dtype} (A5)", file=sys.stderr)
            continue
        _watch(model, [inputs], counts)


def fused(counts: Counts, dtype: torch.dtype) -> None:
    """The fused kernel of this device."""
    generator = torch.Generator().manual_seed(3)
    for keys, channels, causal in itertools.product((1, 2, 17, 128, 1024), (16, 64, 128), (True, False)):
        draw = lambda: torch.randn(2, 4, keys, channels, generator=generator).to(dtype)  # noqa: E731, B023
        _check(fused_attention(draw(), draw(), draw(), causal=causal), dtype, counts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description="False positives on fault-free attention.")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    counts: Counts = defaultdict(Count)
    for part in chosen.parts.split(","):
        start = time.perf_counter()
        for dtype in DTYPES:
            globals()[part](counts, dtype)
        print(f"{part}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    _print(counts)


def _print(counts: Counts) -> None:
    print("largest residual / tolerance in float64, float32, bfloat16, float16")
    print(f"{'detector':14}{'rows':>12}{'violations':>12}  ratios")
    names = list(dict.fromkeys(name for name, _ in counts))
    for name in names:
        own = [counts[name, dtype] for dtype in DTYPES]
        ratios = ", ".join(f"{count.ratio:.3g}" for count in own)
        print(f"{name:14}{sum(c.rows for c in own):12,}{sum(c.violations for c in own):12,}  {ratios}")
    total = sum(count.rows for count in counts.values())
    print(f"{total:,} rows x detectors, {sum(count.violations for count in counts.values())} violations")


if __name__ == "__main__":
    main()

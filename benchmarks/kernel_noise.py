"""How far the loss of a fault-free model moves when only the kernels change: the noise below which no fault has a name.

    python -m benchmarks.kernel_noise --dtype bfloat16

Runs the same windows in processes whose oneDNN may use different instruction sets (ONEDNN_MAX_CPU_ISA) and compares: no
fault, the same weights, another order of rounding. Printed: the largest and the median change of a window's loss, and
the share of windows that would count as critical (loss moved by more than 1e-3, or any top-1 prediction changed).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.config import load_config
from experiments.inputs.models import load_model
from experiments.inputs.windows import make_batches
from experiments.passes.subject import Subject

INSTRUCTION_SETS = ("DEFAULT", "AVX512_CORE_BF16", "AVX512_CORE", "AVX2")
CRITICAL_LOSS = 1e-3


def evaluate(model: str, dtype: str, windows: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses (windows,) and the top-1 predictions (windows, tokens) of the fault-free model."""
    options = [f"--model.path={model}", f"--model.dtype={dtype}", f"--data.seq_len={seq_len}"]
    config = load_config([*options, f"--data.num_samples={windows}", "--data.batch_size=32"])
    loaded = load_model(config.model)
    batches = make_batches(config.data, loaded.tokenizer, config.seed, loaded.family, loaded.vocabulary)
    torch.set_num_threads(1)
    with Subject(loaded.model, loaded.family) as subject:
        answers = [subject.forward(subject.to_device(batch)) for batch in batches]
    losses = [answer.sequence_losses for answer in answers if answer.sequence_losses is not None]
    return torch.cat(losses), torch.cat([answer.output.argmax(-1) for answer in answers])


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate under every instruction set and print how far the answers are apart."""
    parser = argparse.ArgumentParser(description="Change of a fault-free loss when the kernels change.")
    parser.add_argument("--models", default="reference,reference-kv")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--save", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.save:
        torch.save(evaluate(chosen.models, chosen.dtype, chosen.windows, chosen.seq_len), chosen.save)
        return
    for model in chosen.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            answers = {name: _elsewhere(Path(folder) / name, name, model, chosen) for name in INSTRUCTION_SETS}
        losses, top1 = answers["DEFAULT"]
        for name in INSTRUCTION_SETS[1:]:
            moved = (answers[name][0] - losses).abs()
            critical = (moved > CRITICAL_LOSS) | (answers[name][1] != top1).any(-1)
            print(
                f"{model:14}{chosen.dtype}  {name:18} |loss change| median {moved.median():.1e}, "
                f"largest {moved.max():.1e}; "
                f"critical without a fault: {100 * critical.double().mean():.1f} % of {len(moved)} windows"
            )


def _elsewhere(path: Path, name: str, model: str, chosen: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    options = [f"--models={model}", f"--dtype={chosen.dtype}", f"--windows={chosen.windows}", f"--save={path}"]
    command = [sys.executable, "-m", "benchmarks.kernel_noise", *options, f"--seq-len={chosen.seq_len}"]
    subprocess.run(command, env={**os.environ, "ONEDNN_MAX_CPU_ISA": name}, check=True, capture_output=True)
    answer: tuple[torch.Tensor, torch.Tensor] = torch.load(path)
    return answer


if __name__ == "__main__":
    main()

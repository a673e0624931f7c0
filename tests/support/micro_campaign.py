"""Micro campaigns: a tiny random GPT-2 and a short text in a folder, so that a whole campaign takes a second."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from experiments.tables.schema import UNREPEATABLE

ROOT = Path(__file__).resolve().parents[2]
SHARED = "text of a micro campaign, in sentences that are all alike but for their number {}. "


def micro_gpt2(layers: int = 2, vocabulary: int = 384, positions: int = 32) -> transformers.GPT2LMHeadModel:
    """Return a GPT-2 of 16 channels and 2 heads whose attention is far from uniform."""
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=positions, n_embd=16, n_layer=layers, n_head=2, initializer_range=0.4,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return transformers.GPT2LMHeadModel(config).eval()


@dataclass(frozen=True)
class MicroPlace:
    """A folder with a saved model and a text; ``arguments`` are those of a campaign of 24 runs on them."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> MicroPlace:
        micro_gpt2().save_pretrained(root / "model")
        transformers.ByT5Tokenizer().save_pretrained(root / "model")
        (root / "text.txt").write_text("".join(map(SHARED.format, range(40))))
        return cls(root)

    @classmethod
    @contextlib.contextmanager
    def entered(cls, root: Path) -> Iterator[MicroPlace]:
        """Make a place and work in it, with relative paths: they are part of a run's identity, and so of its fault."""
        cls.make(root)
        with contextlib.chdir(root):
            yield cls(Path())

    @property
    def model(self) -> str:
        return str(self.root / "model")

    @property
    def source(self) -> str:
        return f"text:{self.root / 'text.txt'}"

    def arguments(self, output: Path, *more: str, name: str = "micro", bits: str = "3,30") -> list[str]:
        fixed = {
            "name": name, "output_dir": str(output), "model.path": self.model, "model.device": "cpu",
            "data.source": self.source, "data.num_samples": "4", "data.seq_len": "12", "num_runs": "2",
        }  # fmt: skip
        given = {argument.partition("=")[0] for argument in more}
        options = [text for key, value in fixed.items() if f"--{key}" not in given for text in (f"--{key}", value)]
        axis = [] if "--fault.bit" in given or "--sweep.fault.bit" in given else ["--sweep.fault.bit", bits]
        return [*options, *axis, *more]


def table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file as mappings."""
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def numbers(path: Path) -> list[dict[str, str]]:
    """Return the rows of ``runs.csv`` without what differs from one execution to the next."""
    return [{key: value for key, value in row.items() if key not in UNREPEATABLE} for row in table(path)]


def files_below(folder: Path) -> list[str]:
    """Return what is below a folder, folders included; empty if it does not exist."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run_sweep.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def kill(process: subprocess.Popen[str]) -> None:
    """End a process without giving it a chance to clean up."""
    process.send_signal(signal.SIGKILL)
    process.communicate()

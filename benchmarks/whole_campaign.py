"""What a whole campaign costs beside naive pairs: the command and plain transformers code, alternately, all counted.

    python -m benchmarks.whole_campaign                            # both campaigns, three rounds: about half an hour
    python -m benchmarks.whole_campaign --campaign 48 --rounds 1
    python -m benchmarks.whole_campaign --quick                    # a small model, seconds; its ratios mean nothing

A round runs the campaign without a kept proof, then again with the one that is kept now, and as many naive pairs, each
in a process of its own: imports, loading, gate, proof, baselines, rows and merge are in the times. A naive pair is two
whole eager passes with loss, by transformers alone, the second one with a bit of an activation flipped. GPT-2-small
shape with random weights, windows of 1 x 128, one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCATIONS = ("q", "k", "v", "scores", "weights", "out")
TARGETS = {384: (4.5, 5.5), 48: (1.5, 3.0)}

BUILD = """
import sys
from benchmarks.workloads import build_model
build_model("gpt2-small", "float32", quick=sys.argv[2] == "quick").save_pretrained(sys.argv[1])
"""

NAIVE = """
import sys
import torch
from transformers import AutoModelForCausalLM

folder, pairs, inputs, length = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
layers, generator = model.transformer.h, torch.Generator().manual_seed(0)
windows = torch.randint(0, model.config.vocab_size, (inputs, 1, length), generator=generator)

def flip(module, arguments, output):
    hidden = output[0] if isinstance(output, tuple) else output
    hidden.view(torch.int32).view(-1)[0] ^= 1 << 20

with torch.no_grad():
    for number in range(pairs):
        tokens = windows[number % inputs]
        clean = model(input_ids=tokens, labels=tokens, use_cache=False)
        handle = layers[number % len(layers)].attn.register_forward_hook(flip)
        faulty = model(input_ids=tokens, labels=tokens, use_cache=False)
        handle.remove()
        print(float(faulty.loss) - float(clean.loss))
"""


@dataclass(frozen=True)
class Campaign:
    """So many runs, balanced over locations, on so many inputs."""

    runs: int
    inputs: int

    def command(self, folder: Path, name: str, length: int) -> list[str]:
        """Return the command of the campaign, in a folder with a model."""
        options = {
            "name": name, "output_dir": str(folder / "results"), "model.path": str(folder / "model"),
            "data.source": "synthetic", "data.num_samples": str(self.inputs), "data.seq_len": str(length),
            "num_runs": str(self.runs // len(LOCATIONS)), "fault.bit": "null",
            "sweep.fault.location": ",".join(LOCATIONS),
        }  # fmt: skip
        given = [text for key, value in options.items() for text in (f"--{key}", value)]
        return [sys.executable, str(ROOT / "run_sweep.py"), *given]


@dataclass(frozen=True)
class Seconds:
    """What a process took: on the clock of the wall, and of the processor."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, command: Sequence[str], environment: Mapping[str, str]) -> Seconds:
        """Run a command in a process of its own; ``RuntimeError`` with what it printed if it fails."""
        before, start = _children(), time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=dict(environment), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:3])} ... ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return cls(time.perf_counter() - start, _children() - before)


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(campaign: Campaign, rounds: int, *, quick: bool) -> list[dict[str, Seconds]]:
    """Return for each round what the naive pairs took, and the campaign without and with a kept proof."""
    length, found = 32 if quick else 128, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        build = [sys.executable, "-c", BUILD, str(folder / "model"), "quick" if quick else "whole"]
        Seconds.of(build, environment)
        numbers = map(str, (campaign.runs, campaign.inputs, length))
        naive = [sys.executable, "-c", NAIVE, str(folder / "model"), *numbers]
        for number in range(rounds):
            own = {**environment, "FAULT_INJECTION_PROOF_CACHE": str(folder / f"proofs-{number}")}
            found.append(
                {
                    "naive pairs": Seconds.of(naive, environment),
                    "first time": Seconds.of(campaign.command(folder, f"first-{number}", length), own),
                    "kept proof": Seconds.of(campaign.command(folder, f"kept-{number}", length), own),
                }
            )
            _check_proofs(folder, number)
    return found


def _check_proofs(folder: Path, number: int) -> None:
    for name, expected in (("first", "made"), ("kept", "kept")):
        text = (folder / f"results/{name}-{number}/provenance.json").read_text(encoding="utf-8")
        (context,) = json.loads(text)["contexts"].values()
        said = context["execution"]["proof"]
        if not said.startswith(expected):
            raise RuntimeError(f"campaign {name}-{number}: its proof was {said!r}, not {expected}")


def ratios(found: Sequence[Mapping[str, Seconds]], clock: str) -> dict[str, float]:
    """Return how many times as long as a campaign the naive pairs of its round took, medians over the rounds."""
    return {
        name: statistics.median(getattr(each["naive pairs"], clock) / getattr(each[name], clock) for each in found)
        for name in ("first time", "kept proof")
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--campaign", type=int, choices=sorted(TARGETS), help="runs of the only campaign (default: both)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu where others use the machine")
    parser.add_argument("--quick", action="store_true", help="a small model; its ratios mean nothing")
    options = parser.parse_args()
    for campaign in (Campaign(384, 8), Campaign(48, 2)):
        if options.campaign not in (None, campaign.runs):
            continue
        found = measure(campaign, options.rounds, quick=options.quick)
        print(f"{campaign.runs} runs over {campaign.inputs} inputs, medians of {options.rounds}, {options.clock} time")
        for name in found[0]:
            taken = statistics.median(getattr(each[name], options.clock) for each in found)
            print(f"  {name:12} {taken:8.1f} s")
        for (name, ratio), target in zip(ratios(found, options.clock).items(), TARGETS[campaign.runs], strict=True):
            print(f"  {name:12} {ratio:8.2f} times as fast as the naive pairs (to be at least {target})")


if __name__ == "__main__":
    main()

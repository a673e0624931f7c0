"""Make the two reference models again: ``python -m experiments.reference_models.train``.

Seeded, with a fixed number of steps, on one thread of a processor (the models are too small to gain from more): the
same versions on the same machine give the same bits. Each finished model replaces its folder as a whole, with a model
card that states its losses.

    python -m experiments.reference_models.train             # both, into experiments/reference_models
    python -m experiments.reference_models.train --only reference-kv --output /scratch/models --steps 300

>>> [round(Recipe(steps=100, warmup=10).rate(step), 5) for step in (0, 9, 54, 99)]
[0.0003, 0.003, 0.0015, 0.0]
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import ByT5Tokenizer, GPT2Config, GPT2LMHeadModel

from experiments.errors import MissingResourceError, UsageError
from experiments.inputs.pydoc_text import held_out_topics, training_topics
from experiments.reference_models.architecture import (
    END_OF_DOCUMENT,
    REFERENCE_CONFIG,
    build_reference,
    encode_documents,
    finish_reference,
)
from experiments.reference_models.card import Losses, model_card

NAMES = ("reference", "reference-kv")
BETAS = (0.9, 0.99)
DEFAULT_OUTPUT = Path(__file__).parent

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """How a reference model is trained: AdamW, linear warmup, then a cosine down to zero."""

    steps: int = 2400
    warmup: int = 100
    batch: int = 8
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps: got {self.steps}, allowed 1 or more")

    def __str__(self) -> str:
        return (
            f"AdamW (betas {BETAS[0]} and {BETAS[1]}, weight decay {self.weight_decay} on matrices),\n"
            f"{self.steps} steps of {self.batch} random windows, learning rate {self.learning_rate} after"
            f" {self.warmup} steps of linear warmup, then a cosine to zero,\n"
            f"gradients clipped to norm {self.clip_norm}, no dropout, float32, seed {self.seed}, threads {self.threads}"
        )

    def rate(self, step: int) -> float:
        """Return the learning rate of a step counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step + 1 - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def train(config: GPT2Config, recipe: Recipe, tokens: Tensor, *, key_value_shared: bool) -> GPT2LMHeadModel:
    """Return a model trained on random windows of ``tokens`` (N,), finished; bitwise repeatable on one machine."""
    model = build_reference(config, key_value_shared=key_value_shared, seed=recipe.seed)
    optimizer = _optimizer(model, recipe)
    windows = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.steps):
        starts = torch.randint(len(tokens) - config.n_positions, (recipe.batch, 1), generator=windows)
        batch = tokens[starts + torch.arange(config.n_positions + 1)]
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss = _losses(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
            logger.info("step %d of %d: loss %.3f nats per byte", step + 1, recipe.steps, loss.item())
    return finish_reference(model)


def mean_loss(model: GPT2LMHeadModel, tokens: Tensor, *, batch: int = 32) -> float:
    """Return the mean loss in nats per byte over ``tokens`` (N,), each but the first predicted exactly once.

    The windows are as long as the model's context and follow each other without overlap, so a byte is predicted from
    half a context on average. Ends of documents count as bytes.
    """
    length = model.config.n_positions
    full = (len(tokens) - 1) // length
    pieces = list(tokens[: full * length + 1].unfold(0, length + 1, length).split(batch)) if full else []
    if full * length + 1 < len(tokens):
        pieces.append(tokens[full * length :][None])
    with torch.inference_mode():
        total = sum(_losses(model, piece).double().sum().item() for piece in pieces)
    return total / (len(tokens) - 1)


def ngram_losses(training: Tensor, held_out: Tensor) -> tuple[float, float]:
    """Return the held-out losses of a unigram and a bigram model, in nats per byte, counted on ``training``.

    The unigram adds one to the count of every byte and of the end of a document; the bigram adds the unigram's
    probabilities, as one more observation, to the counts of every context.
    """
    symbols = 257
    known, asked = (np.where(tokens == END_OF_DOCUMENT, 256, tokens - 3) for tokens in (training, held_out))
    unigram = np.bincount(known, minlength=symbols) + 1.0
    unigram /= unigram.sum()
    pairs = np.bincount(known[:-1] * symbols + known[1:], minlength=symbols**2).reshape(symbols, symbols) + unigram
    bigram = pairs / pairs.sum(axis=1, keepdims=True)
    # The first symbol has no predecessor, so no model is asked for it.
    return float(-np.log(unigram[asked[1:]]).mean()), float(-np.log(bigram[asked[:-1], asked[1:]]).mean())


def make_reference(name: str, output: Path, recipe: Recipe, config: GPT2Config = REFERENCE_CONFIG) -> Losses:
    """Train the model ``name``, write it with its card to ``output / name`` and return its losses.

    Raises:
        UsageError: ``output / name`` exists and is not the folder of a model.
        MissingResourceError: This Python has no ``pydoc_data``.
    """
    folder = output / name
    if folder.exists() and not (folder / "config.json").is_file():
        raise UsageError(f"output: got {folder}, which holds something else; allowed a new folder or one of a model")
    training = encode_documents(training_topics().values())
    held_out = encode_documents(held_out_topics().values())
    model = train(config, recipe, training, key_value_shared=name == "reference-kv")
    unigram, bigram = ngram_losses(training, held_out)
    losses = Losses(mean_loss(model, held_out), mean_loss(model, training), unigram, bigram)
    _write(model, model_card(model, losses, name=name, recipe=str(recipe), steps=recipe.steps), folder)
    return losses


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reference_models.train", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder of both models")
    parser.add_argument("--only", choices=NAMES, help="make this one alone")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimiser steps (default: %(default)s)")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        recipe = Recipe(steps=options.steps)
        torch.set_num_threads(recipe.threads)
        for name in [options.only] if options.only else NAMES:
            losses = make_reference(name, options.output, recipe)
            print(f"{name}, nats per byte: {losses}", flush=True)
    except (UsageError, MissingResourceError) as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


def _optimizer(model: GPT2LMHeadModel, recipe: Recipe) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=BETAS)


def _losses(model: GPT2LMHeadModel, windows: Tensor) -> Tensor:
    """Return the losses (rows * length,) of predicting each token of windows (rows, length + 1) but the first."""
    logits = model(windows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")


def _write(model: GPT2LMHeadModel, card: str, folder: Path) -> None:
    """Replace the folder as a whole, so that a reader never meets half a model."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        model.save_pretrained(new)
        ByT5Tokenizer(model_max_length=model.config.n_positions).save_pretrained(new)
        (new / "README.md").write_text(card, encoding="utf-8")
        for file in new.iterdir():  # safetensors makes its file unreadable to others
            file.chmod(0o644)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)


if __name__ == "__main__":
    sys.exit(main())

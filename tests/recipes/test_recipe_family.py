"""The recipe for a task family: a row of ``FAMILIES``, and functions for what its batches and targets are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from micro_campaign import micro_gpt2, table

from experiments.inputs.families import FAMILIES, Family

MODULE = '''
"""A model that says of each token whether its number is odd."""


def tokens_and_parity(windows, numbers, tokenizer, seed):
    return {"input_ids": windows, "labels": windows % 2}
'''

TAGGER = Family(
    "the loss of the label of each token",
    "AutoModelForTokenClassification",
    heads="MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    targets="experiments.inputs.batches:given_labels",
    needs_labels=True,
    inputs="toy_family:tokens_and_parity",
)


def saved_tagger(folder: Path) -> None:
    config = micro_gpt2().config
    config.num_labels = 2
    with torch.random.fork_rng():
        torch.manual_seed(3)
        transformers.GPT2ForTokenClassification(config).eval().save_pretrained(folder)
    transformers.ByT5Tokenizer().save_pretrained(folder)


def test_a_family_is_a_row_and_its_functions(
    campaign: Callable[..., Path], listed: Callable[[str], str], page: Callable[[Path], str],
    toy: Callable[[str, str], None], tmp_path: Path,
) -> None:  # fmt: skip
    toy("toy_family", MODULE)
    saved_tagger(tmp_path / "tagger")
    with FAMILIES.registered("tokens", TAGGER):
        assert "tokens           the loss of the label of each token  [AutoModelForTokenClassification]" in listed(
            "families"
        )
        folder = campaign("--model.path", str(tmp_path / "tagger"))
        runs = table(folder / "runs.csv")
        assert all(0.0 < float(run["baseline_loss"]) < 10.0 for run in runs), "the loss of two labels"
        (context,) = json.loads((folder / "provenance.json").read_text())["contexts"].values()
        assert context["family"] == "tokens"
        assert ">tokens<" in page(folder)

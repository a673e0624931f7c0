"""The model card of a reference model: what it is, what it was trained on, how good it is, how to make it again.

>>> print(Losses(held_out=1.5, training=1.25, unigram=3.0, bigram=2.5))
held-out 1.500, training 1.250, unigram 3.000, bigram 2.500
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch
import transformers
from transformers import GPT2LMHeadModel

from experiments.inputs.pydoc_text import held_out_topics, text_bytes, training_topics
from experiments.reference_models.architecture import key_value_columns

_TEMPLATE = """\
# {name}

A byte-level GPT-2 of {parameters:,} parameters, small enough to ship with the source, trained well enough that its
attention does real work. Fault-injection campaigns run on it where nothing may be downloaded.

## Architecture

`GPT2LMHeadModel`: {layers} layers of {heads} heads, width {width}, context {context} bytes, tied embeddings, float32.
Tokens are bytes, numbered as `ByT5Tokenizer` does (byte + 3; 1 ends a document).

{key_value}

## Data

The topics of `pydoc_data`, the language reference that Python {python} carries for `help()`. Whole topics are
held out by a hash of their names (`experiments/inputs/pydoc_text.py`), and paragraphs that a training topic shares with
a held-out one are removed from the training text.

| | topics | bytes |
|---|---|---|
| training | {training_topics} | {training_bytes:,} |
| held out | {held_out_topics} | {held_out_bytes:,} |

Held out: {held_out_names}.

## Losses

Nats per byte. The losses of the model are means over all bytes of that text, in windows of {context} bytes that
follow each other without overlap, so that a byte is predicted from half a context on average. The last weights were
taken, whatever their loss; the recipe itself was settled after four short trials that looked at the held-out loss.

| | loss |
|---|---|
| model, held-out text | {losses.held_out:.3f} |
| model, training text | {losses.training:.3f} |
| unigram counts, held-out text | {losses.unigram:.3f} |
| bigram counts, held-out text | {losses.bigram:.3f} |

## Training

{recipe}.

Made with torch {torch} and transformers {transformers}. To make it again, from the root of the project:

    python -m experiments.reference_models.train --only {name} --steps {steps}

The same versions on the same machine give the same bits; other machines round differently and give a model of about
the same loss. Another Python carries a slightly different text; the split by names stays.

## Intended use

Subject of fault-injection experiments, tests and examples. It has learnt the look of Python documentation, not
its meaning, and is good for nothing else.

## Licence of the text

The training text is part of Python's documentation, copyright Python Software Foundation, under the PSF License
Agreement, version 2. It is not part of this folder.
"""

_SHARED = (
    "In every layer the key and the value projection are equal, bit for bit, weights and biases. They were one\n"
    "parameter throughout training."
)
_ORDINARY = "Keys and values have ordinary, separate projections."


@dataclass(frozen=True)
class Losses:
    """Losses in nats per byte: of the model on both sides of the split, of byte counts on the held-out side."""

    held_out: float
    training: float
    unigram: float
    bigram: float

    def __str__(self) -> str:
        return (
            f"held-out {self.held_out:.3f}, training {self.training:.3f},"
            f" unigram {self.unigram:.3f}, bigram {self.bigram:.3f}"
        )


def model_card(model: GPT2LMHeadModel, losses: Losses, *, name: str, recipe: str, steps: int) -> str:
    """Return the text of the README.md that stands beside the weights of a finished model."""
    training, held_out = training_topics(), held_out_topics()
    shared = all(torch.equal(*key_value_columns(block.attn.c_attn.weight)) for block in model.transformer.h)
    return _TEMPLATE.format(
        name=name,
        parameters=model.num_parameters(),
        layers=model.config.n_layer,
        heads=model.config.n_head,
        width=model.config.n_embd,
        context=model.config.n_positions,
        key_value=_SHARED if shared else _ORDINARY,
        python=platform.python_version(),
        training_topics=len(training),
        training_bytes=text_bytes(training),
        held_out_topics=len(held_out),
        held_out_bytes=text_bytes(held_out),
        held_out_names=", ".join(f"`{topic}`" for topic in held_out),
        losses=losses,
        recipe=recipe,
        steps=steps,
        torch=torch.__version__,
        transformers=transformers.__version__,
    )

"""The table of task families: what a model of each is loaded with, reads and answers.

    family = FAMILIES.find("masked")
    family.auto_class                      # "AutoModelForMaskedLM"
    loaded(family.targets)(batch)          # what each position should answer

A family is a row here and its functions, named as ``module:function`` and imported when they are needed. The family of
a model decides what a fault is measured by: ``experiments.inputs.model_facts`` finds it out.

>>> [name for name, family in FAMILIES.items() if not family.targets]
['encoder']
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.registry import Registry

_BATCHES, _WINDOWS = "experiments.inputs.batches", "experiments.inputs.windows"


@dataclass(frozen=True)
class Family:
    """One task family.

    Attributes:
        meaning: what a fault is measured by, for lists.
        auto_class: the class of transformers that loads it.
        heads: the table of transformers that names its classes; without one it is what no other family is.
        decoder: whether it is the one to take where ``config.is_decoder`` is set and several families fit.
        two_stacks: whether an encoder hands on to a decoder. The command does not run these; the Python API does.
        answer: the attribute of the model's outputs that holds what is compared.
        targets: the function of a batch that says what each position should answer; without one there is no loss.
        needs_labels: whether a user's batch must carry ``labels``.
        inputs: the function that makes a batch's tensors of windows of tokens.
        closes: whether windows end with what the tokenizer puts behind a text.
        shortest: tokens that a window needs.
        spare_weights: parts of names of weights that may be missing, since nothing measured depends on them.
    """

    meaning: str
    auto_class: str
    heads: str = ""
    decoder: bool = False
    two_stacks: bool = False
    answer: str = "logits"
    targets: str = ""
    needs_labels: bool = False
    inputs: str = f"{_WINDOWS}:tokens_and_labels"
    closes: bool = True
    shortest: int = 1
    spare_weights: tuple[str, ...] = ()


FAMILIES: Registry[Family] = Registry(
    "family",
    {
        "causal": Family(
            "the next-token loss",
            "AutoModelForCausalLM",
            heads="MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
            decoder=True,
            targets=f"{_BATCHES}:next_tokens",
            closes=False,
            shortest=2,
        ),
        "masked": Family(
            "the loss at masked tokens",
            "AutoModelForMaskedLM",
            heads="MODEL_FOR_MASKED_LM_MAPPING_NAMES",
            targets=f"{_BATCHES}:given_labels",
            needs_labels=True,
            inputs=f"{_WINDOWS}:masked_tokens_and_labels",
        ),
        "encoder": Family(
            "no loss, the last hidden state is compared; a decoder that was saved without its head counts as one",
            "AutoModel",
            answer="last_hidden_state",
            inputs=f"{_WINDOWS}:tokens_alone",
            # The pooler is behind the last hidden state.
            spare_weights=("pooler.",),
        ),
        "encoder-decoder": Family(
            "the loss of the decoder; through the Python API only",
            "AutoModelForSeq2SeqLM",
            two_stacks=True,
            targets=f"{_BATCHES}:given_labels",
            needs_labels=True,
        ),
    },
)

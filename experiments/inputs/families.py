"""The table of task families: how a model of each family is loaded, what it reads, and what it predicts.

    family = FAMILIES.find("masked")
    family.auto_class                      # "AutoModelForMaskedLM"
    loaded(family.targets)(batch)          # the target of each position

A family is a row here and its functions, named as ``module:function`` and imported when they are needed. The family of
a model decides how the effect of a fault is measured; ``experiments.inputs.model_facts`` determines the family.

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
        meaning: how the effect of a fault is measured, for lists.
        auto_class: the class of transformers that loads the model.
        heads: the table of transformers that names its classes; None for the family of all other models.
        decoder: whether to choose this family if ``config.is_decoder`` is set and several families fit.
        two_stacks: whether an encoder feeds a decoder. The command does not run these models; the Python API does.
        answer: the attribute of the model's outputs that is compared.
        targets: the function that returns the target of each position of a batch; without one there is no loss.
        needs_labels: whether a user's batch must have ``labels``.
        inputs: the function that makes a batch's tensors from windows of tokens.
        closes: whether windows end with the special tokens that the tokenizer puts after a text.
        shortest: the smallest number of tokens in a window.
        spare_weights: parts of names of weights that may be missing, because no measurement depends on them.
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
            # The pooler comes after the last hidden state.
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

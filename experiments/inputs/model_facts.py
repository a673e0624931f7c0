"""What a model's ``config.json`` says: its family, layers, heads, positions and vocabulary.

Enough to refuse a layer, a head or a sequence length that is out of range before any weight is read. The family
decides what a fault is measured by:

- ``causal``: the next-token loss;
- ``masked``: the loss at masked tokens;
- ``encoder``: no loss, the last hidden state is compared; a decoder that was saved without its head counts as one;
- ``encoder-decoder``: the loss of the decoder; through the Python API only.

Public names: ``ModelFacts``, ``facts_from_config``, ``model_family``.

>>> from transformers import RobertaConfig
>>> facts = facts_from_config(RobertaConfig(max_position_embeddings=514, architectures=["RobertaForMaskedLM"]))
>>> facts.family, facts.num_layers, facts.max_positions
('masked', 12, 512)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

# They number their first position pad_token_id + 1, so the table of positions serves that many tokens fewer.
_POSITIONS_AFTER_PADDING = {
    *("camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "mpnet", "roberta"),
    *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
_LAYERS_WITHOUT_ATTENTION = {"linear_attention", "mamba", "recurrent", "conv", "mlp", "moe"}


@dataclass(frozen=True)
class ModelFacts:
    """What ``config.json`` says about a model.

    Attributes:
        family: ``causal``, ``masked``, ``encoder`` or ``encoder-decoder``, see above.
        architecture: Name of the class that was saved; the model type when the file does not say.
        num_layers: Number of layers with attention (of one stack, for an encoder-decoder), or None if not said.
        num_heads: Query heads a layer, or None if not said or not the same in all layers.
        max_positions: Longest sequence in tokens, or None where the architecture sets no limit.
        vocab_size: Size of the embedding: token ids are ``0 .. vocab_size - 1``; None if there are no token ids.
    """

    family: str
    architecture: str
    num_layers: int | None
    num_heads: int | None
    max_positions: int | None
    vocab_size: int | None


def facts_from_config(config: Any) -> ModelFacts:
    """Read the facts from a ``PreTrainedConfig``; of several parts, those of the part that reads text.

    Raises:
        ValueError: A configuration with several text parts, of which none is the main one.
    """
    text = config.get_text_config()
    return ModelFacts(
        family=_family(config.architectures or (), config),
        architecture=(config.architectures or [config.model_type])[0],
        num_layers=_attention_layers(text),
        num_heads=_whole_number(text, "num_attention_heads"),
        max_positions=_max_positions(text),
        vocab_size=_whole_number(text, "vocab_size"),
    )


def model_family(model: nn.Module) -> str:
    """Return the family of a model in memory, by its class and the classes it derives from.

    A class that predicts no tokens is an ``encoder``.
    """
    return _family([kind.__name__ for kind in type(model).__mro__], model.config)


def _family(classes: Iterable[str], config: Any) -> str:
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder"
    classes = set(classes)
    if classes:
        causal = not classes.isdisjoint(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        masked = not classes.isdisjoint(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())
    else:
        causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    own_code = getattr(config, "auto_map", None) or {}
    causal = causal or "AutoModelForCausalLM" in own_code
    masked = masked or "AutoModelForMaskedLM" in own_code
    # BERT and its kin stand in both lists, and are decoders only where the configuration says so
    if masked and not (causal and getattr(config, "is_decoder", False)):
        return "masked"
    return "causal" if causal else "encoder"


def _attention_layers(text: Any) -> int | None:
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return sum(kind not in _LAYERS_WITHOUT_ATTENTION for kind in kinds)
    return _whole_number(text, "num_hidden_layers")


def _max_positions(text: Any) -> int | None:
    positions = _whole_number(text, "max_position_embeddings")
    if positions is None or positions <= 0:
        return None
    padding = _whole_number(text, "pad_token_id")
    if text.model_type in _POSITIONS_AFTER_PADDING and padding is not None:
        return positions - padding - 1
    return positions


def _whole_number(config: Any, name: str) -> int | None:
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers raises it for a number that differs from layer to layer
        return None
    return value if isinstance(value, int) else None

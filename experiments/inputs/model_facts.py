"""The facts in a model's ``config.json``: its family, layers, heads, positions and vocabulary.

They are enough to refuse a layer, a head or a sequence length out of range before any weight is read. The families are
rows of ``experiments.inputs.families``.

>>> from transformers import RobertaConfig
>>> facts = facts_from_config(RobertaConfig(max_position_embeddings=514, architectures=["RobertaForMaskedLM"]))
>>> facts.family, facts.num_layers, facts.max_positions
('masked', 12, 512)
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from experiments.inputs.families import FAMILIES, Family

if TYPE_CHECKING:
    from torch import nn

# They number their first position pad_token_id + 1, so the table of positions serves that many tokens fewer.
_POSITIONS_AFTER_PADDING = {
    *("camembert", "data2vec-text", "esm", "ibert", "lilt", "longformer", "luke", "mpnet", "roberta"),
    *("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
_LAYERS_WITHOUT_ATTENTION = {"linear_attention", "mamba", "recurrent", "conv", "mlp", "moe"}


@dataclass(frozen=True)
class ModelFacts:
    """The facts about a model in its ``config.json``.

    Attributes:
        family: A name of ``FAMILIES``.
        architecture: Name of the class that was saved, or the model type if the file does not name the class.
        num_layers: Number of layers with attention (of one stack, for an encoder-decoder), or None if unknown.
        num_heads: Query heads per layer, or None if unknown or not the same in all layers.
        max_positions: The longest sequence in tokens, or None if the architecture sets no limit.
        vocab_size: Size of the embedding: token ids are ``0 .. vocab_size - 1``; None if the model reads no token ids.
    """

    family: str
    architecture: str
    num_layers: int | None
    num_heads: int | None
    max_positions: int | None
    vocab_size: int | None


def facts_from_config(config: Any) -> ModelFacts:
    """Return the facts of a ``PreTrainedConfig``; if it has several parts, the facts of the part that reads text.

    Raises:
        ValueError: The configuration has several text parts, and none is the main one.
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
    two_stacks = bool(getattr(config, "is_encoder_decoder", False))
    alike = {name: family for name, family in FAMILIES.items() if family.two_stacks == two_stacks}
    names = set(classes)
    found = [name for name, family in alike.items() if family.heads and _has_head(family, names, config)]
    if not found:
        return next(name for name, family in alike.items() if not family.heads)
    # BERT and similar models are in both lists; they are decoders only if the configuration says so
    is_decoder = bool(getattr(config, "is_decoder", False))
    return next((name for name in found if alike[name].decoder == is_decoder), found[0])


def _has_head(family: Family, classes: Set[str], config: Any) -> bool:
    """Return whether transformers, or the model's own code, lists one of the classes (or the type) for a family."""
    # Imported here: slow to load, and not needed to read what is built in.
    from transformers.models.auto import modeling_auto

    listed = getattr(modeling_auto, family.heads)
    own_code = getattr(config, "auto_map", None) or {}
    known = not classes.isdisjoint(listed.values()) if classes else config.model_type in listed
    return known or family.auto_class in own_code


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

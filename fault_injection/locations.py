"""The one table of locations: every tensor of attention that a tap sees and a fault can hit.

    scores = q k^T  ->  logits (scale, bias, mask)  ->  weights = softmax  ->  mass (cast, dropout)  ->  out = mass v

A row says where its tensor is in this computation. The rows alone determine which tensors a fault there changes, which
products read it and which heads share it; everything else in the project reads them. This module does not need torch.

>>> LOCATIONS
('q', 'k', 'v', 'scores', 'weights', 'out')
>>> LOCATION_TABLE["attention_scores"].name, sorted(LOCATION_TABLE["weights"].changes)
('scores', ['mass', 'out', 'weights'])
"""

from __future__ import annotations

from dataclasses import dataclass

from fault_injection.table import Table


@dataclass(frozen=True)
class Location:
    """One place in the evaluation of attention.

    Attributes:
        name: its name in configurations, rows and run identities.
        meaning: one clause for people.
        tensor: its tensor, by the name of the field in ``bounds.AttentionState``. Two locations may share a tensor:
            taps then see it twice, in the order of the table.
        axes: the meaning of each of its four axes.
        computed_from: the tensors from which this one is computed; empty for the inputs of attention.
        aliases: other names that a configuration may use; results have the name.
        default: whether it belongs to the default set of campaigns, checks and proofs.
        closed_form: whether ``bounds.effects`` predicts the effect of a fault here (``fault.aim: effect``, the atlas,
            the certificate T26).
        widened: whether architectures compute it in float32 within a narrower model.
    """

    name: str
    meaning: str
    tensor: str
    axes: tuple[str, str, str, str]
    computed_from: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    default: bool = False
    closed_form: bool = False
    widened: bool = False

    @property
    def changes(self) -> frozenset[str]:
        """The tensors that a fault here can change: its own, and all that are computed from it."""
        changed, before = {self.tensor}, 0
        while len(changed) > before:
            before = len(changed)
            changed |= {row.tensor for row in LOCATION_TABLE if changed.intersection(row.computed_from)}
        return frozenset(changed)

    @property
    def through_softmax(self) -> bool:
        """Whether a fault here acts by changing the input of the softmax."""
        return "logits" in self.changes

    @property
    def operand(self) -> bool:
        """Whether this tensor is an input of attention."""
        return not self.computed_from

    @property
    def shared(self) -> bool:
        """Whether the query heads of a group share its heads (keys and values)."""
        return self.axes[1] == KEY_HEAD

    @property
    def over_pairs(self) -> bool:
        """Whether an element belongs to a query and a key, so that a mask may hide it."""
        return self.axes[2:] == ("query", "key")

    @property
    def over_keys(self) -> bool:
        """Whether a row belongs to a key."""
        return self.axes[2] == "key"


HEAD, KEY_HEAD = "query head", "key/value head"
_QUERIES = ("sequence", HEAD, "query", "channel")
_KEYS = ("sequence", KEY_HEAD, "key", "channel")
_PAIRS = ("sequence", HEAD, "query", "key")

# The default set comes first, in the order used everywhere; then locations that are injected into only on request.
LOCATION_TABLE = Table(
    "fault.location",
    [
        Location(
            "q",
            "queries as the score product reads them (after rotation and normalisation)",
            tensor="query",
            axes=_QUERIES,
            aliases=("query", "queries"),
            default=True,
            closed_form=True,
            widened=True,
        ),
        Location(
            "k",
            "keys as the score product reads them",
            tensor="key",
            axes=_KEYS,
            aliases=("key", "keys"),
            default=True,
            closed_form=True,
            widened=True,
        ),
        Location(
            "v",
            "values as the output product reads them",
            tensor="value",
            axes=_KEYS,
            aliases=("value", "values"),
            default=True,
            closed_form=True,
        ),
        Location(
            "scores",
            "what QK^T gave, before mask (and before the scale where the model applies it after)",
            tensor="scores",
            axes=_PAIRS,
            computed_from=("query", "key"),
            aliases=("attention_scores", "raw_scores"),
            default=True,
            closed_form=True,
            widened=True,
        ),
        Location(
            "weights",
            "what the softmax returned",
            tensor="weights",
            axes=_PAIRS,
            computed_from=("logits",),
            aliases=("attention_weights", "probabilities", "attention_probs"),
            default=True,
            closed_form=True,
            widened=True,
        ),
        Location(
            "out",
            "weights times values, per head",
            tensor="out",
            axes=_QUERIES,
            computed_from=("mass", "value"),
            aliases=("output", "context", "attention_output"),
            default=True,
            closed_form=True,
        ),
        Location(
            "logits",
            "what the softmax received: the scores after scale, bias and mask",
            tensor="logits",
            axes=_PAIRS,
            computed_from=("scores",),
            aliases=("attention_logits", "softmax_input"),
            widened=True,
        ),
        Location(
            "mass",
            "what multiplies the values: the weights after cast, dropout and removal of a sink's column",
            tensor="mass",
            axes=_PAIRS,
            computed_from=("weights",),
            aliases=("cast_weights",),
        ),
    ],
)
"""The table. ``LOCATION_TABLE.register`` adds a row, ``LOCATION_TABLE.registered`` for the duration of a block."""

LOCATIONS = tuple(row.name for row in LOCATION_TABLE if row.default)
"""The default set: the locations of faults unless a configuration names others."""

OBSERVED = LOCATION_TABLE.names()
"""Every location. A tap sees the tensor of each, and may replace it."""

OPERAND_TENSORS = {row.name: row.tensor for row in LOCATION_TABLE if row.operand}
"""Queries, keys and values: the field of ``bounds.AttentionState`` by location."""


def at(tensor: str) -> tuple[Location, ...]:
    """Return the locations at a tensor of attention, in the order in which taps see them.

    >>> [row.name for row in at("query")]
    ['q']
    """
    return tuple(row for row in LOCATION_TABLE if row.tensor == tensor)


def shared_heads(location: str) -> bool:
    """Whether the query heads of a group share the heads of a location."""
    return LOCATION_TABLE[location].shared

"""The section ``fault`` of a campaign's configuration.

>>> FaultConfig(location="attention_scores", bit="exponent", index=IndexConfig(head=3)).spec().location
'scores'
"""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments.config.checks import check_at_least, check_choice
from experiments.errors import UsageError
from fault_injection.faults.kinds import BITS, FAULT_KINDS, RATE, that_draw
from fault_injection.faults.layer_choice import LAYER_MODES, compiled_pattern
from fault_injection.faults.spec import AXES, ElementIndex, FaultSpec
from fault_injection.locations import LOCATION_TABLE
from fault_injection.numbers.formats import FORMATS

AIMS = ("uniform", "bits", "effect")


@dataclass(frozen=True)
class IndexConfig:
    """The element that a fault hits. A coordinate that is ``null`` is drawn for each run."""

    batch: int | None = None
    head: int | None = None
    row: int | None = None
    col: int | None = None

    def __post_init__(self) -> None:
        for key in AXES:
            check_at_least(f"fault.index.{key}", getattr(self, key), 0)

    def element(self) -> ElementIndex:
        """Return the index as an ``ElementIndex`` of ``fault_injection``."""
        return ElementIndex(self.batch, self.head, self.row, self.col)


@dataclass(frozen=True)
class FaultConfig:
    """The fault of a run.

    Attributes:
        location: ``q k v scores weights out``, or ``logits mass``; aliases (``query``, ``attention_weights``) are
            accepted.
        bit: a bit number, a list of them (all at once), ``sign``, ``exponent``, ``mantissa``, or ``null`` for any.
        kind: ``bitflip stuck_at_0 stuck_at_1 zero random_value bit_error_rate``.
        rate: the bit error rate.
        layers: a layer number or a list of them.
        layer_mode: ``first all random specific``; by default ``specific`` where layers are named, else ``random``.
        layer_pattern: a regular expression searched in the names of the attention modules.
        index: the element.
        include_masked: draw hidden keys of scores and weights as well.
        aim: how open fields are drawn: ``uniform``; ``bits`` (sign and exponent more often than mantissa); ``effect``
            (faults with a large predicted effect more often). Rows then have a ``sampling_weight``.
    """

    location: str = "scores"
    bit: int | list[int] | str | None = None
    kind: str = "bitflip"
    rate: float | None = None
    layers: int | list[int] | None = None
    layer_mode: str | None = None
    layer_pattern: str | None = None
    index: IndexConfig = field(default_factory=IndexConfig)
    include_masked: bool = False
    aim: str = "uniform"

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "location", LOCATION_TABLE[self.location].name)
            self.spec()
            if self.layer_pattern is not None:
                compiled_pattern(self.layer_pattern)
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(_with_key("fault.bit", str(error))) from error
        self._check_aim()
        if self.layer_mode is not None:
            check_choice("fault.layer_mode", self.layer_mode, LAYER_MODES)
        if self.layer_mode == "specific" and self.layers is None and self.layer_pattern is None:
            raise UsageError("fault.layer_mode: specific needs fault.layers or fault.layer_pattern")
        for layer in self.layer_list() or ():
            check_at_least("fault.layers", layer, 0)
        if self.layers == []:
            raise UsageError("fault.layers: got an empty list; leave it out to mean every layer")

    def _check_aim(self) -> None:
        check_choice("fault.aim", self.aim, AIMS)
        drawn = FAULT_KINDS[self.kind].draws
        if self.aim == "effect" and drawn == RATE:
            raise UsageError(f"fault.aim: got 'effect', allowed uniform where fault.kind is {self.kind}")
        if self.aim == "effect" and not LOCATION_TABLE[self.location].closed_form:
            predicted = ", ".join(row.name for row in LOCATION_TABLE if row.closed_form)
            raise UsageError(
                f"fault.aim: got 'effect', allowed where effects are predicted: fault.location {predicted} (got "
                f"{self.location}); use uniform or bits"
            )
        if self.aim == "bits" and not (drawn == BITS and isinstance(self.bit, str | None)):
            raise UsageError(
                f"fault.aim: got 'bits', allowed only where a bit is drawn: fault.kind {', '.join(that_draw(BITS))} "
                f"(got {self.kind}) and fault.bit null or the name of a field (got {self.bit})"
            )

    def layer_list(self) -> list[int] | None:
        """Return the named layers as a list."""
        return [self.layers] if isinstance(self.layers, int) else self.layers

    def effective_layer_mode(self) -> str:
        """Return the layer mode with its default filled in."""
        named = self.layers is not None or self.layer_pattern is not None
        return self.layer_mode or ("specific" if named else "random")

    def spec(self) -> FaultSpec:
        """Return the fault specification."""
        several = [self.bit] if isinstance(self.bit, int) else self.bit
        bits = tuple(several) if isinstance(several, list) else several
        return FaultSpec(self.location, self.kind, bits, self.index.element(), self.include_masked, self.rate)

    def check_bits_of(self, dtype: str) -> None:
        """Refuse bits that no tensor of a model of this dtype has. Some tensors may be wider than the model's dtype."""
        native, single = FORMATS[dtype], FORMATS["float32"]
        widened = LOCATION_TABLE[self.location].widened and native.bits < single.bits
        bits = self.spec().bits
        if isinstance(bits, tuple):
            try:
                (single if widened else native).check(bits)
            except ValueError as error:
                raise UsageError(_with_key("fault.bit", str(error))) from error


def _with_key(key: str, message: str) -> str:
    return message if message.startswith("fault.") else f"{key}: {message.removeprefix('bit: ')}"

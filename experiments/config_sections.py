"""The sections of a campaign's configuration: names, types, defaults and what is allowed.

Each section refuses values that cannot be meant when it is made, so a configuration that exists is a valid one as far
as can be known without the model and the data.

Public names: ``ModelConfig``, ``DataConfig``, ``IndexConfig``, ``FaultConfig``, ``DetectConfig``, ``RunConfig``,
``StopConfig``, ``SlurmConfig``, ``DTYPES``, ``ENGINES``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bounds import get_detector
from bounds.suites import expand
from bounds.user_detectors import is_detector_path, load_detector
from experiments.errors import UsageError
from experiments.sources import parse_source
from fault_injection.bits import check_bits
from fault_injection.fault import BIT_KINDS, FaultSpec
from fault_injection.layer_choice import LAYER_MODES, compiled_pattern
from fault_injection.names import nearest
from fault_injection.site import ElementIndex

DTYPES = ("float64", "float32", "bfloat16", "float16")
AIMS = ("uniform", "bits", "effect")
ENGINES = ("auto", "plain", "fast")


def check_choice(key: str, got: Any, allowed: Sequence[str]) -> None:
    """Raise ``UsageError`` unless ``got`` is one of the allowed names."""
    if got not in allowed:
        raise UsageError(f"{key}: got {got!r}, allowed {', '.join(allowed)}{nearest(str(got), allowed)}")


def check_at_least(key: str, got: int | None, lowest: int) -> None:
    """Raise ``UsageError`` if ``got`` is below ``lowest``."""
    if got is not None and got < lowest:
        raise UsageError(f"{key}: got {got}, allowed {lowest} or more")


@dataclass(frozen=True)
class ModelConfig:
    """The model under test.

    Attributes:
        path: a built-in name (``reference``, ``reference-kv``), a local folder, or a hub name.
        dtype: ``float64``, ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        force_kv_equal: make V's projection equal to K's in every layer for the campaign.
        trust_remote_code: allow code that comes with a hub model.
        revision: a hub model's branch, tag or commit.
    """

    path: str = "reference"
    dtype: str = "float32"
    device: str = "auto"
    force_kv_equal: bool = False
    trust_remote_code: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, DTYPES)
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"model.device: got {self.device!r}, allowed auto, cpu, cuda, cuda:N")
        if not self.path:
            raise UsageError("model.path: got an empty text, allowed a built-in name, a folder or a hub name")


@dataclass(frozen=True)
class DataConfig:
    """The text that the model reads.

    Attributes:
        source: ``pydoc``, ``synthetic``, ``text:PATH``, ``json:PATH``, ``csv:PATH`` or ``hf:NAME[:CONFIG]``.
        num_samples: windows of text, drawn by the campaign's seed.
        seq_len: tokens in a window.
        batch_size: windows in a batch.
        field: the key or column that holds the text (json, csv, hf).
        split: the split of a hub dataset.
    """

    source: str = "pydoc"
    num_samples: int = 16
    seq_len: int = 128
    batch_size: int = 1
    field: str | None = None
    split: str = "test"

    def __post_init__(self) -> None:
        parse_source(self.source)
        for key, lowest in (("num_samples", 1), ("seq_len", 2), ("batch_size", 1)):
            check_at_least(f"data.{key}", getattr(self, key), lowest)
        if self.num_samples % self.batch_size:
            raise UsageError(
                f"data.num_samples: got {self.num_samples}, allowed a multiple of data.batch_size ({self.batch_size})"
            )


@dataclass(frozen=True)
class IndexConfig:
    """The element a fault hits, in full or in part; what is ``null`` is drawn for each run."""

    batch: int | None = None
    head: int | None = None
    row: int | None = None
    col: int | None = None

    def __post_init__(self) -> None:
        for key in ("batch", "head", "row", "col"):
            check_at_least(f"fault.index.{key}", getattr(self, key), 0)

    def element(self) -> ElementIndex:
        """Return the index as ``fault_injection`` takes it."""
        return ElementIndex(self.batch, self.head, self.row, self.col)


@dataclass(frozen=True)
class FaultConfig:
    """The fault of a run.

    Attributes:
        location: ``q k v scores weights out``.
        bit: a bit number, a list of them (all at once), ``sign``, ``exponent``, ``mantissa``, or ``null`` for any.
        kind: ``bitflip stuck_at_0 stuck_at_1 zero random_value bit_error_rate``.
        rate: the bit error rate.
        layers: a layer number or a list of them.
        layer_mode: ``first all random specific``; by default ``specific`` where layers are named, else ``random``.
        layer_pattern: a regular expression searched in the names of the attention modules.
        index: the element.
        include_masked: draw hidden keys of scores and weights as well.
        aim: how what is open is drawn: ``uniform``; ``bits`` (sign and exponent more often than mantissa); ``effect``
            (faults more often that are predicted to move their layer's output). Rows have a ``sampling_weight``.
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
        if self.aim == "effect" and self.kind == "bit_error_rate":
            raise UsageError("fault.aim: got 'effect', allowed uniform where fault.kind is bit_error_rate")
        if self.aim == "bits" and not (self.kind in BIT_KINDS and isinstance(self.bit, str | None)):
            raise UsageError(
                f"fault.aim: got 'bits', allowed only where a bit is drawn: fault.kind {', '.join(BIT_KINDS)} (got "
                f"{self.kind}) and fault.bit null or the name of a field (got {self.bit})"
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
        """Refuse bits that no tensor of a model of this dtype has; scores and weights may be wider than the model."""
        native = getattr(torch, dtype)
        upcast = self.location in ("scores", "weights", "q", "k") and native.itemsize < torch.float32.itemsize
        bits = self.spec().bits
        if isinstance(bits, tuple):
            try:
                check_bits(bits, torch.float32 if upcast else native)
            except ValueError as error:
                raise UsageError(_with_key("fault.bit", str(error))) from error


def _with_key(key: str, message: str) -> str:
    return message if message.startswith("fault.") else f"{key}: {message.removeprefix('bit: ')}"


@dataclass(frozen=True)
class DetectConfig:
    """What looks for violations, and when a run counts as critical.

    Attributes:
        detectors: names of detectors and of suites (``lite``, ``full``, ``full-g4``, ``full-g1``, ``epsilon``,
            ``oracles``, ``competitors``), or ``module:Class`` and ``file.py:Class`` for your own; those
            named ``oracle_*`` read the fault-free pass and are reported apart.
        tolerance: added to the proved rounding tolerance of every detector, in the detector's own unit.
        critical_loss: the change of the loss (nats) above which a run is critical.
        certificate: bound what an undetected fault can have done to the output (a column of the runs).
        correct: repair single errors of scores, weights and outputs in the pass; outcome and loss are those after it.
        layers: ``injected``: detectors look at the layers that faults hit; behind them only those that can fire there.
            A proved detector is silent on a correct evaluation of finite inputs, whatever they are (that is what its
            proof says), so there only ``finite`` and detectors without a proof look. ``all``: every detector looks at
            every layer from the first injected one on.
        record: what ``detections.csv`` holds: ``all`` that detectors said, or only the rows in which one ``fired``.
            Who looked, and what was seen without a fault, stands in ``clean.csv`` all the same. It changes no run, but
            belongs to the campaign: a table of which nobody knows what it leaves out is worth nothing.
    """

    detectors: list[str] = field(default_factory=lambda: ["full", "epsilon", "oracles"])
    tolerance: float = 0.0
    critical_loss: float = 1e-3
    certificate: bool = False
    correct: bool = False
    layers: str = "injected"
    record: str = "all"

    def names(self) -> tuple[str, ...]:
        """Return the names of the detectors, suites replaced by their members and your own classes registered."""
        return expand(load_detector(name).name if is_detector_path(name) else name for name in self.detectors)

    def __post_init__(self) -> None:
        try:
            for name in self.names():
                get_detector(name)
        except ValueError as error:
            raise UsageError(f"detect.detectors: {error}") from error
        if len(set(self.detectors)) != len(self.detectors):
            raise UsageError(f"detect.detectors: a name is given twice in {self.detectors}")
        check_choice("detect.layers", self.layers, ("injected", "all"))
        check_choice("detect.record", self.record, ("all", "fired"))
        for key in ("tolerance", "critical_loss"):
            got = getattr(self, key)
            if not (math.isfinite(got) and got >= 0):
                raise UsageError(f"detect.{key}: got {got}, allowed a finite number of 0 or more")


@dataclass(frozen=True)
class RunConfig:
    """How runs are executed.

    Attributes:
        engine: ``plain`` computes a whole forward pass for every run; ``fast`` computes again only what a fault
            changes, many runs in one pass, to the same bits; ``auto`` is the fastest that is exact for the model.
        scope: ``full`` propagates every fault to the loss; ``site`` computes what it does to the output of its layer,
            and what detectors say there. Such rows have no outcome, unless nothing changes there (``masked``).
        full_every: with ``site``, propagate every n-th repeat of each grid point all the same (0, n, 2n, ...).
        propagation: record how far every propagated run moves what the blocks return (``propagation.csv``), from the
            block of the first injected layer on. Models whose blocks are no chain have no such rows.
        batch_runs: most runs in one pass of the fast engine (``null``: chosen from the memory).
        reuse_baseline: compute the fault-free pass of an input once; ``false`` repeats it for every run, in random
            order with the injected pass.
        threads: threads of one process. The last bit of a result can depend on it, so it is part of the configuration;
            one thread a process, and one process a core (``--workers``), is also the fastest for small models.
    """

    engine: str = "auto"
    scope: str = "full"
    full_every: int | None = None
    propagation: bool = False
    batch_runs: int | None = None
    reuse_baseline: bool = True
    threads: int = 1

    def __post_init__(self) -> None:
        for key in ("full_every", "batch_runs", "threads"):
            check_at_least(f"run.{key}", getattr(self, key), 1)
        check_choice("run.engine", self.engine, ENGINES)
        check_choice("run.scope", self.scope, ("full", "site"))
        if self.full_every is not None and self.scope != "site":
            raise UsageError(f"run.full_every: got {self.full_every}, allowed null unless run.scope is site")
        if self.engine == "fast" and not self.reuse_baseline:
            raise UsageError("run.engine: got 'fast', allowed auto or plain if run.reuse_baseline is false")

    def propagates(self, repeat: int) -> bool:
        """Whether this repeat of a grid point is propagated to the loss."""
        return self.scope == "full" or (self.full_every is not None and repeat % self.full_every == 0)


STOP_RATES = ("harmful", "critical", "nonfinite", "masked", "detected")


@dataclass(frozen=True)
class StopConfig:
    """When a cell of the grid ends before its ``num_runs`` repeats: when a rate is known well enough.

    Attributes:
        margin: half the width of the rate's interval at which the cell ends (``null``: never before its end).
        confidence: that the intervals of all looks together hold the rate.
        rate: ``harmful`` (critical or nonfinite), ``critical``, ``nonfinite``, ``masked``, or ``detected``.
        minimum: repeats before the first look.
        growth: how many times more repeats there are at each next look.
    """

    margin: float | None = None
    confidence: float = 0.95
    rate: str = "harmful"
    minimum: int = 64
    growth: float = 1.5

    def __post_init__(self) -> None:
        for key, most in (("margin", 0.5), ("confidence", 1)):
            got = getattr(self, key)
            if got is not None and not 0 < got < most:
                raise UsageError(f"stop.{key}: got {got}, allowed a number between 0 and {most}")
        check_choice("stop.rate", self.rate, STOP_RATES)
        check_at_least("stop.minimum", self.minimum, 1)
        if not 1 < self.growth <= 10:
            raise UsageError(f"stop.growth: got {self.growth}, allowed a number above 1, at most 10")

    def check_with(self, fault: FaultConfig, run: RunConfig) -> None:
        """Refuse a margin where the rule does not hold, or no run has an outcome."""
        if self.margin is None:
            return
        if fault.aim != "uniform":
            raise UsageError(
                f"stop.margin: got {self.margin} with fault.aim {fault.aim!r}, allowed uniform: its interval "
                "is one for unweighted runs"
            )
        if run.scope == "site" and self.rate != "detected":
            raise UsageError(
                f"stop.rate: got {self.rate!r} with run.scope 'site', allowed detected: such runs have no outcome"
            )


_SLURM_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?"
    r"|(?P<hours>\d+):(?P<of_hour>\d+):(?P<of_minute>\d+)|(?P<minutes>\d+)(?::(?P<seconds>\d+))?)"
)


def slurm_seconds(time: str) -> int | None:
    """Return the seconds of a time limit as ``sbatch --time`` reads it; None if it sets no limit (0 sets none, too).

    Raises:
        UsageError: not of a form that Slurm knows.

    >>> slurm_seconds("90"), slurm_seconds("1:30:00"), slurm_seconds("2-0"), slurm_seconds("UNLIMITED")
    (5400, 5400, 172800, None)
    """
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = _SLURM_TIME.fullmatch(time)
    if match is None:
        raise UsageError(f"slurm.time: got {time!r}, allowed minutes, h:mm:ss, days-hours or d-hh:mm:ss, e.g. 4:00:00")
    part = {name: int(text or 0) for name, text in match.groupdict().items()}
    hours = 24 * part["days"] + part["h"] + part["hours"]
    minutes = part["m"] + part["of_hour"] + part["minutes"]
    return (3600 * hours + 60 * minutes + part["s"] + part["of_minute"] + part["seconds"]) or None


@dataclass(frozen=True)
class SlurmConfig:
    """Options of ``--launcher slurm``; what else a cluster asks for can be given as ``SBATCH_...`` variables.

    Attributes:
        partition: where the tasks run.
        time: limit of one task; a task that needs longer is begun again and goes on.
        gres: generic resources of one task, e.g. ``gpu:1``.
        array_limit: most tasks at one time.
        setup: lines of shell before Python starts, e.g. ``module load cuda``.
    """

    partition: str | None = None
    time: str | None = None
    gres: str | None = None
    array_limit: int | None = None
    setup: str | None = None

    def __post_init__(self) -> None:
        for key in ("partition", "gres"):
            got = getattr(self, key)
            if got is not None and re.fullmatch(r"[^\s\"'#]+", got) is None:
                raise UsageError(f"slurm.{key}: got {got!r}, allowed a text without blanks, quotes and '#'")
        if self.time is not None:
            slurm_seconds(self.time)
        check_at_least("slurm.array_limit", self.array_limit, 1)

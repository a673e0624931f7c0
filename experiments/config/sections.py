"""The sections of a campaign's configuration: names, types, defaults and allowed values.

Each section refuses invalid values when it is made. So a configuration that exists is valid, as far as can be known
without the model and the data. ``fault`` and ``slurm`` have files of their own.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from bounds.registry import get_detector
from bounds.suites import expand
from bounds.user_detectors import is_detector_path, load_detector
from experiments.config.checks import check_at_least, check_choice
from experiments.config.fault_section import FaultConfig
from experiments.config.source_names import parse_source
from experiments.errors import UsageError
from fault_injection.numbers.formats import model_dtypes

ENGINES = ("auto", "plain", "fast")


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
        check_choice("model.dtype", self.dtype, model_dtypes())
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
class DetectConfig:
    """The detectors, and when a run counts as critical.

    Attributes:
        detectors: names of detectors and of suites (``lite``, ``full``, ``full-g4``, ``full-g1``, ``epsilon``,
            ``oracles``, ``competitors``), or ``module:Class`` and ``file.py:Class`` for your own; detectors
            named ``oracle_*`` read the fault-free pass and are reported separately.
        tolerance: added to the proved rounding tolerance of every detector, in the detector's own unit.
        critical_loss: the change of the loss (nats) above which a run is critical.
        certificate: bound how far an undetected fault can have moved the output (a column of the runs).
        correct: repair single errors of scores, weights and outputs in the pass; outcome and loss are measured after
            the repair.
        layers: ``injected``: all detectors check the layers that faults hit; later layers are checked only by detectors
            that can fire there. By its proof, a proved detector is silent on a correct evaluation of any finite inputs,
            so only ``finite`` and detectors without a proof check later layers. ``all``: every detector checks every
            layer from the first injected one on.
        record: the rows of ``detections.csv``: ``all``, or only those in which a detector ``fired``. ``clean.csv``
            always lists which detectors checked which layers, and their verdicts without a fault. The field changes no
            run, but belongs to the campaign: readers must know which rows the table leaves out.
    """

    detectors: list[str] = field(default_factory=lambda: ["full", "epsilon", "oracles"])
    tolerance: float = 0.0
    critical_loss: float = 1e-3
    certificate: bool = False
    correct: bool = False
    layers: str = "injected"
    record: str = "all"

    def names(self) -> tuple[str, ...]:
        """Return the names of the detectors; replace suites by their members and register your own classes."""
        return expand(load_detector(name).name if is_detector_path(name) else name for name in self.detectors)

    def __post_init__(self) -> None:
        try:
            self.names()
            for entry in filter(is_detector_path, self.detectors):
                # Nobody but its user knows whether such a class can be made.
                get_detector(load_detector(entry).name)
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
        proof_cache: keep the start-up proof of the fast engine in the campaign's folder and in the user's cache, or in
            the folder that is named here instead of the latter; ``false``: make it at every start. A kept proof is used
            only where everything it depends on is the same.
    """

    engine: str = "auto"
    scope: str = "full"
    full_every: int | None = None
    propagation: bool = False
    batch_runs: int | None = None
    reuse_baseline: bool = True
    threads: int = 1
    proof_cache: bool | str = True

    def __post_init__(self) -> None:
        for key in ("full_every", "batch_runs", "threads"):
            check_at_least(f"run.{key}", getattr(self, key), 1)
        check_choice("run.engine", self.engine, ENGINES)
        if self.proof_cache == "":
            raise UsageError("run.proof_cache: got an empty text, allowed true, false or a folder")
        check_choice("run.scope", self.scope, ("full", "site"))
        if self.full_every is not None and self.scope != "site":
            raise UsageError(f"run.full_every: got {self.full_every}, allowed null unless run.scope is site")
        if self.engine == "fast" and not self.reuse_baseline:
            raise UsageError("run.engine: got 'fast', allowed auto or plain if run.reuse_baseline is false")

    def propagates(self, repeat: int) -> bool:
        """Return whether this repeat of a grid point is propagated to the loss."""
        return self.scope == "full" or (self.full_every is not None and repeat % self.full_every == 0)


STOP_RATES = ("harmful", "critical", "nonfinite", "masked", "detected")


@dataclass(frozen=True)
class StopConfig:
    """The rule that ends a cell of the grid before its ``num_runs`` repeats: a rate is known well enough.

    Attributes:
        margin: the cell ends when half the width of the rate's interval is at most this (``null``: never early).
        confidence: the probability that the intervals of all looks together contain the rate.
        rate: ``harmful`` (critical or nonfinite), ``critical``, ``nonfinite``, ``masked``, or ``detected``.
        minimum: repeats before the first look.
        growth: the factor by which the repeats grow from one look to the next.
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
        """Refuse a margin if the rule is not valid, or if no run has an outcome."""
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

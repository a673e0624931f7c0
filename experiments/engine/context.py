"""One context: a model and its inputs, and what all runs on them share, whichever way they go.

context = Context(subject, batches, lambda: forward)
baseline = context.baseline(0, config)            # the fault-free pass of an input, made once
detectors = context.detectors(config)             # prepared and calibrated, made once
if context.follows(config):
    outputs = context.block_outputs(0, model_id)  # what the blocks return without a fault
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from bounds import Detector
from experiments.config import ExperimentConfig
from experiments.effects.block_outputs import BlockOutputs
from experiments.engine.opened_batch import OpenedBatch, Opening
from experiments.inputs.blocks import Chain
from experiments.passes.baseline import Baseline, Recorder
from experiments.passes.baselines import Baselines
from experiments.passes.block_changes import Blocks, BlockWatcher
from experiments.passes.subject import Subject
from experiments.plan.plan import canonical_json
from monitoring.cache.cached_forward import CachedForward
from monitoring.cache.model_fingerprints import model_fingerprint

logger = logging.getLogger(__name__)


class Context:
    """A model and a set of batches.

    Args:
        subject: the patched model.
        batches: batches on its device, as ``Subject.to_device`` returns them.
        forward: gives the cache, trace and counters that passes go through.
        calibration: gives fault-free inputs that no run uses, for detectors that must be calibrated (default: none).
        facts: what is known of model and data, for provenance (default: nothing).

    Attributes:
        baselines: the fault-free passes.
        facts: what is known of model and data, what was checked, and how runs are executed.
    """

    def __init__(
        self,
        subject: Subject,
        batches: Sequence[Mapping[str, Tensor]],
        forward: Callable[[], CachedForward],
        *,
        calibration: Callable[[], Sequence[Mapping[str, Tensor]]] = tuple,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.subject = subject
        self.batches = batches
        self.forward = forward
        self.facts: dict[str, Any] = dict(facts or {})
        self.baselines = Baselines(subject, batches, forward, calibration)
        self._blocks = Blocks(subject, batches, forward)
        self._opened: tuple[str, OpenedBatch | str] | None = None

    def detectors(self, config: ExperimentConfig) -> list[Detector]:
        """Return the detectors of a configuration, prepared for the model and calibrated, made once for all runs."""
        return self.baselines.detectors(config)

    def baseline(
        self,
        batch_index: int,
        config: ExperimentConfig,
        run_id: str = "",
        model_id: str | None = None,
        recorder: Recorder | None = None,
    ) -> Baseline:
        """Return the fault-free pass of a batch; see ``Baselines.get``."""
        return self.baselines.get(batch_index, config, run_id, model_id, recorder)

    def opened(
        self, batch_index: int, config: ExperimentConfig, chain: Chain, *, by_groups: bool, alone: bool = False
    ) -> OpenedBatch | str:
        """Return a batch ready for runs that begin at their fault, or the reason why it cannot be; the last is kept.

        Args:
            batch_index: which batch.
            config: its choice of detectors counts.
            chain: the blocks of the model.
            by_groups: let the baseline be what groups of heads say; see ``Opening``.
            alone: make the baseline first, and record another pass.
        """
        model_id = model_fingerprint(self.subject.model)
        key = f"{batch_index} {model_id} {detection_key(config)}"
        if self._opened is None or self._opened[0] != key:
            self._opened = None
            opening = Opening(self.subject, chain, self.detectors(config), by_groups=by_groups)
            baseline = self.baseline(batch_index, config, model_id=model_id, recorder=None if alone else opening)
            self._opened = key, opening.opened(self.batches[batch_index], baseline)
        return self._opened[1]

    def follows(self, config: ExperimentConfig) -> bool:
        """Whether propagated runs of a configuration are to be compared behind every block, and can be."""
        if config.run.propagation and "propagation" not in self.facts:
            self.facts["propagation"] = self._blocks.reason or "behind every block"
            if self._blocks.reason is not None:
                logger.warning("run.propagation: propagation.csv stays empty, since %s", self._blocks.reason)
        return config.run.propagation and self._blocks.reason is None

    def block_outputs(self, batch_index: int, model_id: str, run_id: str = "") -> BlockOutputs:
        """Return what the blocks return in the fault-free pass of a batch; see ``Blocks.outputs``."""
        return self._blocks.outputs(batch_index, model_id, run_id)

    def watcher(self, outputs: BlockOutputs, layer: int) -> BlockWatcher:
        """Return what compares what the blocks from that of a layer on return in an injected pass."""
        return self._blocks.watcher(outputs, layer)


def detection_key(config: ExperimentConfig) -> str:
    """Return a text that is equal for configurations whose detectors look in the same way."""
    detect = config.detect
    return canonical_json([*detect.names(), detect.tolerance, detect.layers, detect.certificate, detect.correct])

"""Everything that a start-up proof depends on, as the key under which it is kept.

key = proof_key(context, config, batch_index=0)      # None: something cannot be named, so that nothing may be kept

A difference in any part makes another key, so a proof is never used for a model, program, library, processor or
setting that it was not made for.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from bounds import Detector
from experiments.config import ExperimentConfig
from experiments.engine.context import Context
from experiments.machine.environment import kernel_facts, program_fingerprint
from monitoring.cache.fingerprints import digest
from monitoring.cache.model_fingerprints import execution_flags, model_fingerprint

FORM = 1
"""Of the kept files; another number makes all that were kept before void."""


def proof_key(context: Context, config: ExperimentConfig, batch_index: int) -> dict[str, Any] | None:
    """Return the key of the proof for one choice of detectors and inputs of one shape.

    It is None where the code of the model or a detector is not that of a file (or comes from the user, whose detectors
    may import anything), and where detectors have learnt from data.
    """
    code, detectors = _code(context.subject.model), context.detectors(config)
    if code is None or not all(_of_this_program(detector) for detector in detectors):
        return None
    batch, detect, subject = context.batches[batch_index], config.detect, context.subject
    mask = batch.get("attention_mask")
    return {
        "form": FORM,
        "model": model_fingerprint(subject.model),
        "code": code,
        "program": program_fingerprint(),
        "machine": kernel_facts(),
        "flags": execution_flags(),
        "subject": [subject.family, str(subject.dtype), str(subject.device), [core.path for core in subject.cores]],
        "inputs": {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in sorted(batch.items())},
        "padded": mask is not None and not bool(mask.bool().all()),
        "detectors": [*detect.names(), repr(detect.tolerance), detect.layers, detect.certificate, detect.correct],
        "critical_loss": repr(detect.critical_loss),
        "propagation": context.follows(config),
    }


def _of_this_program(detector: Detector) -> bool:
    return type(detector).__module__.partition(".")[0] == "bounds" and not detector.calibrated


def _code(model: nn.Module) -> str | None:
    """Return the digest of the classes of a model's modules and the files they come from."""
    classes = {type(module) for module in model.modules()}
    try:
        files = {inspect.getsourcefile(one) for one in classes}
    except (OSError, TypeError):
        return None
    names = sorted(f"{one.__module__}.{one.__qualname__}" for one in classes)
    return None if None in files else digest(*names, *_contents(sorted(map(str, files))))


def _contents(files: Iterable[str]) -> list[bytes]:
    return [_content(file) for file in files]


@functools.cache
def _content(file: str) -> bytes:
    return Path(file).read_bytes()

"""Where numbers come from: versions, machine, code, and the settings that decide their last bit.

Public names: ``environment_facts``, ``set_determinism``.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "torch", "transformers", "datasets", "numpy", "scipy", "pandas", "safetensors", "jsonargparse", "psutil"
)  # fmt: skip


def set_determinism(threads: int) -> None:
    """Fix what decides the last bit of a result: threads, algorithms, TF32, reduced-precision accumulation.

    Args:
        threads: threads of one process; the bits of a matrix product can depend on it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def environment_facts(arguments: Sequence[str]) -> dict[str, Any]:
    """Return versions, machine, git commit, threads, arguments and Slurm variables."""
    return {
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "arguments": list(arguments),
        "environment": {
            key: value
            for key, value in sorted(os.environ.items())
            if key.startswith(("SLURM_", "MKL_", "OMP_", "ONEDNN_", "CUBLAS_", "CUDA_VISIBLE"))
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str | None:
    information = Path("/proc/cpuinfo")
    if not information.is_file():
        return platform.processor() or None
    for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

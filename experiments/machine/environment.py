"""The origin of numbers: versions, machine, code, and the settings that decide their last bit."""

from __future__ import annotations

import functools
import hashlib
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
    """Fix the settings that decide the last bit of a result: threads, algorithms, TF32, reduced-precision accumulation.

    Args:
        threads: the number of threads of this process; the bits of a matrix product can depend on it.
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


_KERNEL_VARIABLES = (
    *("ATEN_", "BLIS_", "CUBLAS_", "CUDA_", "CUDNN_", "DNNL_", "GLIBC_TUNABLES", "GOMP_", "GOTO_", "HIP_", "KMP_"),
    *("LD_", "MKL_", "MKLDNN_", "NVIDIA_", "OMP_", "ONEDNN_", "OPENBLAS_", "PYTORCH_", "TORCH_", "TRANSFORMERS_"),
)
"""How the names of variables begin that decide which kernels and libraries compute."""


def kernel_facts() -> dict[str, Any]:
    """Return what decides which kernels compute, and so the last bit of a number: libraries, processor, variables."""
    return {
        "python": sys.version,
        "packages": {name: _version(name) for name in ("torch", "transformers", "numpy", "safetensors")},
        "build": hashlib.blake2b(torch.__config__.show().encode(), digest_size=16).hexdigest(),
        "parallel": torch.__config__.parallel_info() if hasattr(torch.__config__, "parallel_info") else "",
        "system": [platform.system(), platform.machine(), *platform.libc_ver()],
        "processor": _cpu_facts(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "cuda": _cuda_facts(),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(_KERNEL_VARIABLES)
        },
    }


def _cuda_facts() -> list[str] | None:
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return [str(device), str(torch.version.cuda), str(torch.backends.cudnn.version())]


def _cpu_facts() -> dict[str, str]:
    """Return model and instructions of the first processor."""
    information = Path("/proc/cpuinfo")
    if not information.is_file():
        return {"model name": platform.processor()}
    first = information.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    facts = {name.strip(): value.strip() for name, _, value in pairs}
    # All but what changes by the minute or names one core.
    changing = {"processor", "cpu MHz", "core id", "apicid", "initial apicid", "bogomips", "BogoMIPS", "physical id"}
    return {name: value for name, value in sorted(facts.items()) if name not in changing}


@functools.cache
def program_fingerprint() -> str:
    """Return the digest of this program: every source file of its packages."""
    root, state = Path(__file__).resolve().parents[2], hashlib.blake2b(digest_size=16)
    for package in ("bounds", "experiments", "fault_injection", "monitoring"):
        for path in sorted((root / package).rglob("*.py")):
            content = path.read_bytes()
            state.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
            state.update(content)
    return state.hexdigest()


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

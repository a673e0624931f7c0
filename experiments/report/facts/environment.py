"""The facts of ``provenance.json`` about the origin of the numbers, as pairs of a name and a text."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

_NAMES = {
    "python": "Python",
    "platform": "platform",
    "processor": "processor",
    "cpu_capability": "vector instructions",
    "cuda": "CUDA device",
    "threads": "threads of one process",
    "deterministic_algorithms": "deterministic algorithms",
    "git_commit": "git commit",
    "git_changes": "uncommitted changes",
    "arguments": "arguments",
}

_CONTEXT_NAMES = {
    "model": "model",
    "resolved": "resolved to",
    "revision": "revision",
    "family": "family",
    "model_fingerprint": "fingerprint of the weights",
    "data_fingerprint": "fingerprint of the data",
    "equivalence_gate": "equivalence gate",
    "control_run": "control run",
    "execution": "engine",
    "attention_layers": "attention layers",
    "attention_paths": "how they are observed",
    "kv_equal": "K = V",
}


def environment_rows(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return versions, machine, commit and command line; unknown names are kept unchanged."""
    rows = [(_NAMES.get(key, key), _text(value)) for key, value in _ordered(provenance, _NAMES) if not _is_group(key)]
    packages = provenance.get("packages")
    rows += [(name, _text(version)) for name, version in packages.items()] if isinstance(packages, dict) else []
    variables = provenance.get("environment")
    rows += [(f"${name}", _text(value)) for name, value in variables.items()] if isinstance(variables, dict) else []
    if isinstance(provenance.get("arguments"), list):
        command = shlex.join(["python", "run_sweep.py", *map(str, provenance["arguments"])])
        rows = [(name, command if name == "arguments" else text) for name, text in rows]
        rows = [("command" if name == "arguments" else name, text) for name, text in rows]
    return rows


def context_rows(provenance: Mapping[str, Any]) -> list[list[tuple[str, str]]]:
    """Return, for each model and data set, its fingerprints, its checks and the result of the engine's proof."""
    contexts = provenance.get("contexts")
    if not isinstance(contexts, dict):
        return []
    return [[("model and data", key), *_context(facts)] for key, facts in contexts.items() if isinstance(facts, dict)]


def _context(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in _ordered(facts, _CONTEXT_NAMES):
        name = _CONTEXT_NAMES.get(key, key)
        if isinstance(value, dict):
            rows += [(f"{name}: {inner.replace('_', ' ')}", _text(item)) for inner, item in value.items()]
        else:
            rows.append((name, _text(value)))
    return rows


def _is_group(key: str) -> bool:
    return key in ("packages", "environment", "contexts")


def _ordered(facts: Mapping[str, Any], names: Mapping[str, str]) -> list[tuple[str, Any]]:
    known = [(key, facts[key]) for key in names if key in facts]
    return known + [(key, value) for key, value in facts.items() if key not in names]


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        texts = [_text(item) for item in value]
        return f"{texts[0]} ({len(texts)} times)" if len(texts) > 1 and len(set(texts)) == 1 else ", ".join(texts)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)

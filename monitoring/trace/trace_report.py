"""What a trace says: passes and time per probe, view and phase, the slowest passes, and what is damaged.

    python -m monitoring.trace.trace_report FILE... [--format terminal|md|json] [--slowest K]

A directory stands for the ``*.jsonl`` files in it. Lines of the first trace format (``ts, probe, view_id, prompt_hash,
top_k, op, wall_ms, hit``) are read too.

Counts: ``hits`` and ``misses`` are lines with ``hit`` true and false, ``errors`` lines with another status than
"ok"; ``malformed`` lines are not strict JSON events and are left out; ``recovered_tail`` counts lines that a crash cut
off and a later writer closed; ``lost`` counts sequence numbers missing in the middle of one writer's lines.

>>> event = {"op": "baseline", "view_id": "base", "probe": "demo", "wall_ms": 4.0, "hit": False}
>>> report = summarise(Trace(events=[event, {**event, "wall_ms": 0.5, "hit": True}]), slowest=1)
>>> report["totals"]["hit_rate"], report["phases"][0]["phase"], report["slowest"][0]["wall_ms"]
(0.5, 'baseline', 4.0)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from monitoring.trace.trace_writer import PHASES

SHOWN_GROUPS = 30
Event = dict[str, Any]


@dataclass
class Trace:
    """The events of one or more files and what was wrong with the files.

    Attributes:
        events: the readable lines, in file order.
        malformed: ``file:line`` of every line that is not an event.
    """

    events: list[Event] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)


def load_trace(paths: Iterable[Path]) -> Trace:
    """Read trace files; blank lines are skipped, unreadable ones are listed.

    Raises:
        OSError: a file that cannot be read.
    """
    trace = Trace()
    for path in paths:
        for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
            if not line.strip():
                continue
            event = _parse(line)
            if event is None:
                trace.malformed.append(f"{path}:{number}")
            else:
                trace.events.append(event)
    return trace


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except ValueError:
        return None
    known = isinstance(event, dict) and {"op", "hit", "wall_ms"} <= event.keys()
    return event if known and isinstance(event["wall_ms"], (int, float, type(None))) else None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# ---------------------------------------------------------------------------------------------------- summary


def summarise(trace: Trace, slowest: int = 10) -> dict[str, Any]:
    """Return ``totals, probes, views, phases, slowest`` as plain data, ready for JSON.

    Groups are sorted by wall time, longest first. Times are in milliseconds, rates are 0..1.
    """
    done = [event for event in trace.events if _succeeded(event)]
    ranked = sorted(trace.events, key=_wall, reverse=True)
    totals = {
        **_tally(trace.events),
        "malformed": len(trace.malformed),
        "malformed_lines": trace.malformed,
        "recovered_tail": sum(event.get("recovered_tail") or 0 for event in trace.events),
        "lost": _lost(trace.events),
    }
    return {
        "totals": totals,
        "probes": _groups(trace.events, "probe", lambda event: event.get("probe")),
        "views": _groups(trace.events, "view_id", lambda event: event.get("view_id")),
        "phases": _phases(done),
        "slowest": [_brief(event) for event in ranked[:slowest]],
    }


def _wall(event: Event) -> float:
    return event["wall_ms"] or 0.0


def _succeeded(event: Event) -> bool:
    return event.get("status", "ok") == "ok"


def _tally(events: Sequence[Event]) -> dict[str, Any]:
    done = [event for event in events if _succeeded(event)]
    hits = sum(event.get("hit") is True for event in done)
    misses = sum(event.get("hit") is False for event in done)
    return {
        "events": len(events),
        "hits": hits,
        "misses": misses,
        "errors": len(events) - len(done),
        "hit_rate": hits / (hits + misses) if hits + misses else 0.0,
        "rows": sum(event.get("rows") or 0 for event in done if event.get("hit") is False),
        "wall_ms": sum(map(_wall, events)),
    }


def _groups(events: Sequence[Event], name: str, key: Callable[[Event], Any]) -> list[dict[str, Any]]:
    members: defaultdict[Any, list[Event]] = defaultdict(list)
    for event in events:
        members[key(event)].append(event)
    groups = [{name: value, **_tally(group)} for value, group in members.items()]
    return sorted(groups, key=lambda group: -group["wall_ms"])


def phase_of(event: Mapping[str, Any]) -> str:
    """Return the phase of a pass: its own ``phase``, or else the phase of its ``op``, or else by its fault."""
    for name in (event.get("phase"), event.get("op")):
        if name in PHASES:
            return str(name)
    faulty = event.get("fault") is not None or "fault:" in str(event.get("view_id"))
    return "injection" if faulty else "baseline"


def _phases(done: Sequence[Event]) -> list[dict[str, Any]]:
    """Time per phase over the passes that were run; overhead is relative to the mean baseline pass.

    ``phase_ms`` of a line says how much of its ``wall_ms`` other phases took; it counts for both, as in
    ``PerformanceMonitor``. The overhead of the injection is the time of a pass beyond a baseline pass; the overhead of
    bounds and detection is their whole time.
    """
    times: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for event in done:
        if event.get("hit") is False:
            times[phase_of(event)].append(_wall(event))
            for phase, spent in (event.get("phase_ms") or {}).items():
                times.setdefault(phase, []).append(spent or 0.0)
    means = {phase: sum(spent) / len(spent) for phase, spent in times.items() if spent}
    baseline = means.get("baseline")
    rows = []
    for phase, mean in means.items():
        overhead = None
        if baseline and phase != "baseline":
            overhead = 100 * (mean - (baseline if phase == "injection" else 0.0)) / baseline
        row = {"phase": phase, "passes": len(times[phase]), "wall_ms": sum(times[phase])}
        rows.append({**row, "mean_ms": mean, "overhead_percent": overhead})
    return rows


def _lost(events: Sequence[Event]) -> int:
    numbers: defaultdict[tuple[Any, Any], list[int]] = defaultdict(list)
    for event in events:
        if isinstance(event.get("seq"), int):
            numbers[event.get("writer"), event.get("pid")].append(event["seq"])
    return sum(max(seen) - min(seen) + 1 - len(seen) for seen in numbers.values())


def _brief(event: Event) -> dict[str, Any]:
    names = ("wall_ms", "op", "view_id", "probe", "prompt_hash", "hit", "status", "trial_id")
    return {name: event.get(name) for name in names}


# --------------------------------------------------------------------------------------------------- rendering


def render(report: Mapping[str, Any], style: str = "terminal") -> str:
    """Return a report as text: ``terminal``, ``md`` (Markdown) or ``json``."""
    if style == "json":
        return json.dumps(report, indent=2, allow_nan=False)
    title = "## {}" if style == "md" else "{}"
    totals = report["totals"]
    counts = " ".join(f"{name}={totals[name]}" for name in ("events", "hits", "misses", "errors", "rows"))
    damage = " ".join(f"{name}={totals[name]}" for name in ("malformed", "recovered_tail", "lost"))
    lines = [title.format("Trace"), "", counts, ""] if style == "md" else [counts]
    lines.append(f"hit rate {100 * totals['hit_rate']:.1f} %, wall {totals['wall_ms']:.6g} ms")
    lines += ["", damage] if style == "md" else [damage]
    lines += [f"malformed: {place}" for place in totals["malformed_lines"][:5]]
    for name in ("phases", "probes", "views", "slowest"):
        lines += ["", title.format(name.capitalize())] + ([""] if style == "md" else [])
        lines += _table(report[name], style)
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]], style: str) -> list[str]:
    if not rows:
        return ["(none)"]
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows[:SHOWN_GROUPS])]
    more = [f"and {len(rows) - SHOWN_GROUPS} more"] if len(rows) > SHOWN_GROUPS else []
    if style == "md":
        bars = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
        return [bars[0], "|" + "---|" * len(cells[0]), *bars[1:], *(["", *more] if more else [])]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
    return [*(line.rstrip() for line in padded), *more]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# ----------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report of the named traces; return 0, 2 for bad usage, 3 for a file that cannot be read."""
    parser = argparse.ArgumentParser(prog="trace", description="Summarise forward-pass traces.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a .jsonl file or a directory of them")
    parser.add_argument("--format", choices=("terminal", "md", "json"), default="terminal")
    parser.add_argument("--slowest", type=_count, default=10, metavar="K", help="how many of the slowest passes")
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        trace = load_trace(_expanded(options.files))
    except OSError as error:
        print(f"trace: {error.filename}: {error.strerror}", file=sys.stderr)
        return 3
    print(render(summarise(trace, options.slowest), options.format))
    return 0


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, allowed are integers from 0")
    return int(text)


def _expanded(paths: Iterable[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not inside:
            raise FileNotFoundError(2, "no .jsonl file in this directory", str(path))
        found += inside
    return found


if __name__ == "__main__":
    sys.exit(main())

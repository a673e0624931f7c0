"""The trace: whole strict lines from any number of writers, repaired after a crash, and what the report makes of it."""

from __future__ import annotations

import contextvars
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

import monitoring.trace.trace_writer
from monitoring.trace.trace_report import load_trace, main, phase_of, render, summarise
from monitoring.trace.trace_writer import FIELDS, ORIGINAL_FIELDS, TraceWriter, current_label, labelled

# A child process that needs the writer alone loads its file, not the package with torch behind it.
LOAD_WRITER = f"""
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("trace_writer", {monitoring.trace.trace_writer.__file__!r})
module = importlib.util.module_from_spec(spec)
sys.modules["trace_writer"] = module
spec.loader.exec_module(module)
trace = module.TraceWriter(sys.argv[1])
"""


def refuse(name: str) -> NoReturn:
    raise AssertionError(f"{name} is not JSON")


def read(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    assert content.endswith(b"\n")
    return [json.loads(line, parse_constant=refuse) for line in content.splitlines()]


def event(**changes: Any) -> dict[str, Any]:
    return {"op": "baseline", "view_id": "base", "wall_ms": 1.0, "hit": False, **changes}


# ---------------------------------------------------------------------------------------------------- lines


def test_every_line_has_every_field(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with TraceWriter(path, run_id="r1") as trace, labelled("campaign"):
        trace.write(event(loss=1.25))
        trace.write(event(run_id="r2", status="error", probe="own"))
    first, second = read(path)
    assert set(first) == {*FIELDS, "loss"}
    assert set(ORIGINAL_FIELDS) <= set(first)
    assert (first["run_id"], first["probe"], first["status"], first["loss"]) == ("r1", "campaign", "ok", 1.25)
    assert (second["run_id"], second["probe"], second["status"]) == ("r2", "own", "error")
    assert [line["seq"] for line in (first, second)] == [0, 1]
    assert first["writer"] == second["writer"]
    assert (first["pid"], first["tid"]) == (os.getpid(), threading.get_native_id())
    assert first["mono_ns"] < second["mono_ns"]
    assert abs(first["ts"] - time.time()) < 60


@dataclass(frozen=True)
class Fault:
    bit: int
    value: float


def test_s1_10_every_line_is_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    numbers = (math.nan, math.inf, -math.inf, torch.tensor(math.nan), np.float32(math.inf), np.float64(math.nan))
    with TraceWriter(path) as trace:
        for number in numbers:
            trace.write(event(loss=number, nested={"a": [1.0, number]}, fault=Fault(3, float(number))))
        trace.write(event(loss=torch.tensor(2.5), text="\ud800 é \n", where=Path("a"), count=np.int64(3)))
    lines = read(path)
    for line in lines[:-1]:
        assert line["loss"] is None
        assert line["nested"] == {"a": [1.0, None]}
        assert line["fault"] == {"bit": 3, "value": None}
        assert sorted(line["nonfinite"]) == ["fault.value", "loss", "nested.a.1"]
    assert "nonfinite" not in lines[-1]
    assert (lines[-1]["loss"], lines[-1]["where"], lines[-1]["count"]) == (2.5, "a", 3)
    script = "import json, sys\ndef fail(name): raise SystemExit(name)\n"
    script += "[json.loads(line, parse_constant=fail) for line in open(sys.argv[1])]"
    assert subprocess.run([sys.executable, "-c", script, path], check=False).returncode == 0


def test_what_json_cannot_hold_is_refused_and_leaves_no_line(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t.jsonl") as trace:
        with pytest.raises(TypeError, match="logits is Tensor, which JSON cannot hold"):
            trace.write(event(logits=torch.zeros(2)))
        with pytest.raises(TypeError, match="seq, nonfinite is set by the writer"):
            trace.write(event(seq=3, nonfinite=[]))
        trace.write(event())
    assert [line["seq"] for line in read(tmp_path / "t.jsonl")] == [0]


def test_s1_12_no_path_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with TraceWriter(None) as trace:
        trace.write(event(loss=object()))
    assert list(tmp_path.iterdir()) == []
    assert trace.lines == 0


def test_s1_12_missing_directories_are_created(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "t.jsonl"
    with TraceWriter(str(path)) as trace:
        trace.write(event())
    assert len(read(path)) == 1


def test_s1_12_an_unwritable_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "t.jsonl", tmp_path):
        with pytest.raises(OSError, match="cannot be opened for appending") as caught:
            TraceWriter(path)
        assert caught.value.filename == str(path)
        assert str(path) in str(caught.value)


def test_writes_after_close_are_counted_and_dropped(tmp_path: Path) -> None:
    trace = TraceWriter(tmp_path / "t.jsonl")
    trace.write(event())
    trace.close()
    trace.close()
    trace.write(event())
    assert (trace.lines, trace.dropped) == (1, 1)
    assert len(read(tmp_path / "t.jsonl")) == 1


def test_closing_while_threads_write_raises_nothing(tmp_path: Path) -> None:
    for round_ in range(20):
        path = tmp_path / f"{round_}.jsonl"
        trace = TraceWriter(path)
        failures: list[BaseException] = []

        def work(trace: TraceWriter = trace, failures: list[BaseException] = failures) -> None:
            try:
                for _ in range(50):
                    trace.write(event())
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        trace.close()
        for thread in threads:
            thread.join()
        assert failures == []
        assert trace.lines + trace.dropped == 200
        assert path.stat().st_size == 0 or [line["seq"] for line in read(path)] == list(range(trace.lines))


# ------------------------------------------------------------------------------------------------- processes


def test_s1_07_lines_of_four_processes_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "shared.jsonl"
    script = (
        LOAD_WRITER + "for n in range(200): trace.write({'op': 'x', 'wall_ms': 1.0, 'hit': False, 'pad': 'p' * 20000})"
    )
    children = [subprocess.Popen([sys.executable, "-c", script, str(path)]) for _ in range(4)]
    assert [child.wait(60) for child in children] == [0] * 4
    lines = read(path)
    assert len(lines) == 800
    for child in children:
        assert [line["seq"] for line in lines if line["pid"] == child.pid] == list(range(200))
    totals = summarise(load_trace([path]))["totals"]
    assert (totals["malformed"], totals["recovered_tail"], totals["lost"]) == (0, 0, 0)


def test_a_live_writer_closes_the_torn_line_of_a_dead_one(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with TraceWriter(path) as trace:
        trace.write(event())
        with path.open("ab") as file:
            file.write(b'{"op": "to')
        trace.write(event())
        assert trace.recovered_tail == 1
    totals = summarise(load_trace([path]))["totals"]
    assert (totals["events"], totals["malformed"], totals["recovered_tail"], totals["lost"]) == (2, 1, 1, 0)


def test_a_file_system_without_locks_still_gets_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: int, operation: int) -> NoReturn:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("monitoring.trace.trace_writer.fcntl.flock", no_locks)
    with TraceWriter(tmp_path / "t.jsonl") as trace:
        trace.write(event())
    assert len(read(tmp_path / "t.jsonl")) == 1


def test_a_forked_child_numbers_its_own_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    script = (
        LOAD_WRITER + "trace.write({})\nif os.fork() == 0: trace.write({}); os._exit(0)\nos.wait(); trace.write({})"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == 0
    lines = read(path)
    assert [line["seq"] for line in lines] == [0, 0, 1]
    assert len({line["writer"] for line in lines}) == 2


def test_s1_08_a_killed_writer_loses_at_most_its_torn_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.jsonl"
    # Twenty whole lines; then the process dies by SIGKILL between two halves of one write.
    script = LOAD_WRITER + (
        "line = {'op': 'x', 'wall_ms': 1.0, 'hit': False}\n"
        "for n in range(20): trace.write(line)\n"
        "write = os.write\n"
        "os.write = lambda fd, data: (write(fd, bytes(data)[:60]), os.kill(os.getpid(), signal.SIGKILL))\n"
        "trace.write(line)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, path], check=False).returncode == -signal.SIGKILL
    assert not path.read_bytes().endswith(b"\n")
    with TraceWriter(path) as trace:
        assert trace.recovered_tail == 1
        trace.write(event())
        trace.write(event())
    lines = path.read_bytes().splitlines()
    assert len(lines) == 23
    assert main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "events=22 hits=0 misses=22" in printed
    assert "malformed=1 recovered_tail=1 lost=0" in printed
    assert f"malformed: {path}:21" in printed
    with TraceWriter(path) as trace:
        assert trace.recovered_tail == 0


def test_s1_08_a_writer_killed_at_any_moment_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    script = LOAD_WRITER + "print('on', flush=True)\nwhile True: trace.write({'op': 'x', 'wall_ms': 1.0, 'hit': False})"
    for pause in (0.0, 0.01, 0.03):
        child = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
        with child:
            assert child.stdout is not None
            child.stdout.readline()
            before = path.stat().st_size
            while path.stat().st_size == before:
                assert child.poll() is None
            time.sleep(pause)
            child.send_signal(signal.SIGKILL)
    with TraceWriter(path) as trace:
        trace.write(event())
    loaded = load_trace([path])
    totals = summarise(loaded)["totals"]
    assert totals["events"] > 3
    assert totals["lost"] == 0
    assert totals["malformed"] <= totals["recovered_tail"] <= 3


def test_a_line_that_lacked_only_its_end_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(event()))
    with TraceWriter(path) as trace:
        trace.write(event())
    totals = summarise(load_trace([path]))["totals"]
    assert (totals["events"], totals["malformed"], totals["recovered_tail"]) == (2, 0, 1)


def test_a_full_disk_is_reported_and_the_torn_line_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.jsonl"
    real_write = os.write
    answers = iter([40, OSError(28, "No space left on device")])

    def full(fd: int, data: bytes) -> int:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return real_write(fd, bytes(data)[:answer])

    with TraceWriter(path) as trace:
        with monkeypatch.context() as patch:
            patch.setattr("monitoring.trace.trace_writer.os.write", full)
            with pytest.raises(OSError, match="trace line not written: No space left") as caught:
                trace.write(event())
        assert caught.value.filename == str(path)
        trace.write(event())
        trace.write(event())
    totals = summarise(load_trace([path]))["totals"]
    assert (totals["events"], totals["malformed"], totals["recovered_tail"], totals["lost"]) == (2, 1, 1, 0)


# ---------------------------------------------------------------------------------------------------- labels


def test_labels_nest_and_are_restored_after_an_exception() -> None:
    assert current_label() is None
    with labelled("bits"):
        with labelled("00ab"):
            assert current_label() == "bits/00ab"
        assert current_label() == "bits"
    with pytest.raises(KeyError), labelled("bits"):
        raise KeyError
    assert current_label() is None


def test_concurrent_trials_keep_their_own_label(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    barrier = threading.Barrier(4)

    def trial(trace: TraceWriter, name: str) -> None:
        with labelled(name):
            for _ in range(20):
                barrier.wait(10)
                trace.write(event(trial_id=name))

    with TraceWriter(path) as trace, labelled("outer"):
        contexts = [contextvars.copy_context() for _ in range(3)]
        calls = [(context.run, (trial, trace, f"t{n}")) for n, context in enumerate(contexts)]
        threads = [threading.Thread(target=run, args=arguments) for run, arguments in calls]
        threads.append(threading.Thread(target=trial, args=(trace, "bare")))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = read(path)
    assert len(lines) == 80
    for line in lines:
        assert line["probe"] == ("bare" if line["trial_id"] == "bare" else f"outer/{line['trial_id']}")


# ---------------------------------------------------------------------------------------------------- report

WALLS = (
    (520.3, False),
    (310.0, False),
    (0.1, True),
    (120.5, False),
    (95.0, False),
    (0.2, True),
    (80.0, False),
    (60.0, False),
)


@pytest.fixture
def original_file(tmp_path: Path) -> Path:
    """Eight lines as the first trace format has them: its eight fields and nothing else."""
    path = tmp_path / "original.jsonl"
    lines = [
        {
            "ts": 1700000000.0 + index,
            "probe": None if index == 7 else ("delta_kl" if index % 2 else "calibration"),
            "view_id": "ft" if index < 5 else "base",
            "prompt_hash": f"{index:012x}",
            "top_k": 256,
            "op": "next_token_dist",
            "wall_ms": wall,
            "hit": hit,
        }
        for index, (wall, hit) in enumerate(WALLS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_s1_15_the_original_format_is_read(original_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(original_file), "--format", "json", "--slowest", "2"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=refuse)
    totals = report["totals"]
    assert (totals["events"], totals["hits"], totals["misses"], totals["hit_rate"]) == (8, 2, 6, 0.25)
    assert (totals["errors"], totals["malformed"], totals["recovered_tail"], totals["lost"]) == (0, 0, 0, 0)
    assert [row["wall_ms"] for row in report["slowest"]] == [520.3, 310.0]
    assert [row["probe"] for row in report["probes"]] == ["calibration", "delta_kl", None]
    probe = report["probes"][1]
    assert (probe["events"], probe["hits"], probe["hit_rate"]) == (3, 1, pytest.approx(1 / 3))
    assert [row["view_id"] for row in report["views"]] == ["ft", "base"]
    assert sum(row["wall_ms"] for row in report["views"]) == pytest.approx(sum(wall for wall, _ in WALLS))
    assert main([str(original_file)]) == 0
    printed = capsys.readouterr().out
    assert "events=8 hits=2 misses=6" in printed
    assert "hit rate 25.0 %" in printed
    assert "520.3" in printed


def test_report_in_markdown_is_made_of_tables(original_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with original_file.open("a") as file:
        file.write(json.dumps(event(view_id="a|b", probe="x")) + "\n")
    assert main([str(original_file), "--format", "md"]) == 0
    printed = capsys.readouterr().out
    assert "## Probes\n\n| probe | events |" in printed
    assert "a\\|b" in printed
    tables = [line for line in printed.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_phases_show_what_faults_and_detectors_cost() -> None:
    from monitoring.trace.trace_report import Trace

    events = [
        event(wall_ms=10.0),
        event(wall_ms=0.01, hit=True),
        event(wall_ms=30.0, hit=None, status="error"),
        event(op="faulty", wall_ms=15.0, fault={"bit": 3}, phase_ms={"bounds": 2.0, "detection": 0.5}),
        event(op="faulty", wall_ms=13.0, view_id="fault:ab", phase_ms={"bounds": 4.0, "detection": None}),
        event(op="detection", wall_ms=1.0),
    ]
    phases = {row["phase"]: row for row in summarise(Trace(events))["phases"]}
    assert phases["baseline"] == {
        "phase": "baseline",
        "passes": 1,
        "wall_ms": 10.0,
        "mean_ms": 10.0,
        "overhead_percent": None,
    }
    assert (phases["injection"]["mean_ms"], phases["injection"]["overhead_percent"]) == (14.0, 40.0)
    assert (phases["bounds"]["mean_ms"], phases["bounds"]["overhead_percent"]) == (3.0, 30.0)
    assert (phases["detection"]["passes"], phases["detection"]["wall_ms"]) == (3, 1.5)
    assert phase_of(event(phase="bounds", fault={})) == "bounds"
    assert phase_of(event(op="pass", fault={})) == "injection"
    assert phase_of(event(op="pass")) == "baseline"


def test_bad_lines_are_counted_and_placed(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    good = json.dumps(event(seq=0, writer="w", pid=1))
    late = json.dumps(event(seq=4, writer="w", pid=1))
    bad = ["{", '{"a":1}', "[]", '{"op":"x","hit":false,"wall_ms":NaN}', '{"op":"x","hit":false,"wall_ms":"1"}']
    path.write_bytes("\n".join([good, "", *bad, late]).encode() + b"\n\xff\xfe\n")
    trace = load_trace([path])
    assert trace.malformed == [f"{path}:{number}" for number in (3, 4, 5, 6, 7, 9)]
    totals = summarise(trace)["totals"]
    assert (totals["events"], totals["malformed"], totals["lost"]) == (2, 6, 3)


def test_long_tables_are_cut_in_print_but_not_in_json(tmp_path: Path) -> None:
    from monitoring.trace.trace_report import Trace

    report = summarise(Trace([event(probe=f"p{n}", wall_ms=random.Random(n).random()) for n in range(40)]))
    assert len(report["probes"]) == 40
    assert "and 10 more" in render(report)
    assert "and 10 more" in render(report, "md")
    assert len(json.loads(render(report, "json"))["probes"]) == 40


def test_an_empty_trace_has_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.jsonl").write_text("")
    assert main([str(tmp_path)]) == 0
    assert "events=0 hits=0" in capsys.readouterr().out


def test_missing_files_and_bad_usage_have_their_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.jsonl"
    assert main([str(missing)]) == 3
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"trace: {missing}: No such file or directory\n")
    assert main([str(tmp_path)]) == 3
    assert "no .jsonl file in this directory" in capsys.readouterr().err
    assert main([]) == 2
    assert main([str(missing), "--format", "html"]) == 2
    assert main([str(missing), "--slowest", "-1"]) == 2
    assert "got '-1', allowed are integers from 0" in capsys.readouterr().err
    assert main(["--help"]) == 0


def test_the_module_is_a_command(original_file: Path) -> None:
    command = [sys.executable, "-m", "monitoring.trace.trace_report", str(original_file), "--slowest", "1"]
    root = Path(monitoring.trace.trace_writer.__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "hit rate 25.0 %" in done.stdout

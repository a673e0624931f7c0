from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from lock_holders import holder, race, started, write_dead_holder, write_elsewhere, write_holder

from experiments.campaign import lock as writer_lock
from experiments.campaign.lock import WriterLock, read_holder
from experiments.errors import CheckRefusedError


def only(path: Path) -> bool:
    """Whether nothing but the lock is in its folder."""
    return [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_lock_is_a_file_for_as_long_as_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "shards" / "0001.lock"
    with WriterLock(path):
        held = json.loads(path.read_text())
        assert only(path)
    assert (held["pid"], held["host"]) == (os.getpid(), socket.gethostname())
    assert list(path.parent.iterdir()) == []


def test_it_is_released_after_an_exception_and_can_be_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "0001.lock"
    for _ in range(2):
        with pytest.raises(RuntimeError, match="in the block"), WriterLock(path):
            raise RuntimeError("in the block")
    assert list(tmp_path.iterdir()) == []


def test_a_second_holder_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "0001.lock"
    with holder(path) as (process, pipe):
        with pytest.raises(CheckRefusedError, match=rf"0001\.lock: process {process.pid} on {socket.gethostname()}"):
            WriterLock(path).__enter__()
        assert only(path)
        assert json.loads(path.read_text())["pid"] == process.pid
        pipe.send("let go")
        process.join()
        with WriterLock(path):
            pass


def test_the_same_process_cannot_hold_it_twice(tmp_path: Path) -> None:
    path = tmp_path / "0001.lock"
    with WriterLock(path):
        with pytest.raises(CheckRefusedError, match=f"process {os.getpid()}"):
            WriterLock(path).__enter__()
        assert path.exists()


def test_two_locks_do_not_disturb_each_other(tmp_path: Path) -> None:
    with WriterLock(tmp_path / "0001.lock"), WriterLock(tmp_path / "0002.lock"):
        assert len(list(tmp_path.iterdir())) == 2


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "0001.lock"
    with holder(path) as (process, _):
        process.kill()
        process.join()
        assert path.exists()
        with WriterLock(path):
            assert json.loads(path.read_text())["pid"] == os.getpid()
            assert only(path)
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_that_nobody_waited_for_is_taken_over(tmp_path: Path) -> None:
    # A zombie writes no more; in a container without an init process it stays one for ever.
    path = tmp_path / "0001.lock"
    with holder(path) as (process, _):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        with WriterLock(path):
            assert json.loads(path.read_text())["pid"] == os.getpid()


def test_the_lock_of_a_process_whose_number_was_given_to_another_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "0001.lock"
    write_holder(path, started=psutil.Process().create_time() - 3600)
    with WriterLock(path):
        assert json.loads(path.read_text())["started"] == psutil.Process().create_time()


def test_the_lock_of_another_host_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "0001.lock"
    write_holder(path, pid=1, host="node-17.example", started=0.0)
    before = path.read_bytes()
    with pytest.raises(CheckRefusedError, match=r"process 1 on node-17\.example .* delete the file"):
        WriterLock(path).__enter__()
    assert path.read_bytes() == before
    assert only(path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\x00\x01"])
def test_a_lock_that_says_nothing_is_taken_over(tmp_path: Path, content: str) -> None:
    path = tmp_path / "0001.lock"
    path.write_text(content)
    with WriterLock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_one_who_takes_over_late_does_not_take_the_lock_of_one_who_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes find the same dead holder; the second acts only after the first has taken over."""
    path = tmp_path / "0001.lock"
    write_dead_holder(path)
    real = writer_lock._may_live
    faster: list[WriterLock] = []

    def overtaken(found: dict[str, object]) -> bool:
        dead = not real(found)
        if dead and not faster:
            faster.append(WriterLock(path))
            faster[0].__enter__()
        return not dead

    monkeypatch.setattr(writer_lock, "_may_live", overtaken)
    with pytest.raises(CheckRefusedError):
        WriterLock(path).__enter__()
    assert path.exists()
    faster[0].__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_third_process_finds_no_gap_while_two_others_take_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has taken over; the second, too late, moves the first's lock away; now the third arrives."""
    path = tmp_path / "0001.lock"
    write_dead_holder(path)
    may_live, rename = writer_lock._may_live, os.rename
    holders: list[str] = []
    begun: list[str] = []

    def enter(name: str) -> None:
        begun.append(name)
        try:
            WriterLock(path).__enter__()
        except CheckRefusedError:
            return
        holders.append(name)

    def overtaken(found: dict[str, object]) -> bool:
        dead = not may_live(found)
        if dead and begun == ["second"]:
            enter("first")
        return not dead

    def interrupted(source: Any, target: Any) -> None:
        rename(source, target)
        if holders == ["first"] and "third" not in begun:
            enter("third")

    monkeypatch.setattr(writer_lock, "_may_live", overtaken)
    monkeypatch.setattr(os, "rename", interrupted)
    enter("second")
    assert holders == ["first"]


def one_of_many_wins(path: Path) -> None:
    racers = [started(race, path) for _ in range(8)]
    assert [pipe.recv() for _, pipe in racers] == ["ready"] * 8
    for _, pipe in racers:
        pipe.send("go")
    results = [pipe.recv() for _, pipe in racers]
    for (process, pipe), result in zip(racers, results, strict=True):
        if result == "won":
            pipe.send("let go")
        process.join()
        pipe.close()
    assert sorted(results) == ["refused"] * 7 + ["won"]
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("dead_holder", [False, True], ids=["free", "dead holder"])
def test_of_many_that_race_exactly_one_wins(tmp_path: Path, dead_holder: bool) -> None:
    path = tmp_path / "shards" / "0001.lock"
    if dead_holder:
        write_dead_holder(path)
    one_of_many_wins(path)


# ------------------------------------------------------------------------------------------------- Slurm


def as_task(monkeypatch: pytest.MonkeyPatch, restarts: int, *, task: str = "3", cluster: str = "big") -> None:
    """Let this process be a task of array job 812."""
    for key, value in {
        "ARRAY_JOB_ID": "812", "ARRAY_TASK_ID": task, "JOB_ID": "815", "RESTART_COUNT": str(restarts),
        "CLUSTER_NAME": cluster,
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{key}", value)


def test_a_lock_says_which_task_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_task(monkeypatch, 2)
    with WriterLock(tmp_path / "0003.lock") as lock:
        held = json.loads(lock.path.read_text())
        assert (held["job"], held["restarts"], held["cluster"]) == ("812_3", 2, "big")
        assert read_holder(lock.path) == f"process {os.getpid()} on {socket.gethostname()} (Slurm job 812_3)"


def test_a_task_that_was_requeued_takes_over_from_its_former_life_on_another_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_lock, "is_gone", lambda *_: pytest.fail("its own number of lives says enough"))
    path = tmp_path / "0003.lock"
    write_elsewhere(path, restarts=0)
    as_task(monkeypatch, 1)
    with WriterLock(path) as lock:
        assert lock.from_elsewhere
        assert only(path)
    write_elsewhere(path, restarts=1)
    with pytest.raises(CheckRefusedError, match=r"node-17\.example \(Slurm job 812_3\) is writing this shard"):
        WriterLock(path).__enter__()


@pytest.mark.parametrize("gone", [True, False])
@pytest.mark.parametrize("task", [None, "4"], ids=["no task", "another task"])
def test_of_other_jobs_on_other_nodes_slurm_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: bool, task: str | None
) -> None:
    asked: list[tuple[str, str]] = []

    def is_gone(job: str, cluster: str) -> bool:
        asked.append((job, cluster))
        return gone

    monkeypatch.setattr(writer_lock, "is_gone", is_gone)
    if task:
        as_task(monkeypatch, 5, task=task)
    path = tmp_path / "0003.lock"
    write_elsewhere(path)
    before = path.read_bytes()
    if gone:
        with WriterLock(path) as lock:
            assert lock.from_elsewhere
    else:
        with pytest.raises(CheckRefusedError, match="is writing"):
            WriterLock(path).__enter__()
        assert path.read_bytes() == before
    assert set(asked) == {("812_3", "big")}


@pytest.mark.parametrize("changes", [{"job": None}, {"job": 3}, {"restarts": "1"}, {"cluster": None}], ids=str)
def test_a_lock_elsewhere_that_names_no_job_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(writer_lock, "is_gone", lambda *_: True)
    as_task(monkeypatch, 9)
    path = tmp_path / "0003.lock"
    write_elsewhere(path, **changes)
    with pytest.raises(CheckRefusedError, match="is writing"):
        WriterLock(path).__enter__()


def test_the_same_number_on_another_cluster_is_another_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_lock, "is_gone", lambda *_: False)
    as_task(monkeypatch, 1, cluster="small")
    path = tmp_path / "0003.lock"
    write_elsewhere(path)
    with pytest.raises(CheckRefusedError, match="is writing"):
        WriterLock(path).__enter__()


def test_who_was_taken_over_is_told_and_leaves_the_lock_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "0003.lock"
    with WriterLock(path) as lock:
        lock.check()
        write_elsewhere(path, restarts=1)
        lock.check()
        monkeypatch.setattr(writer_lock, "CHECK_SECONDS", 0.0)
        with pytest.raises(CheckRefusedError, match=r"taken over by process \d+ on node-17\.example"):
            lock.check()
        assert not lock.is_own()
    assert path.exists()
    path.unlink()
    with pytest.raises(CheckRefusedError, match="was deleted"):
        lock.check()


def test_a_link_that_was_made_and_reported_as_there_already_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What NFS says when the server's first answer was lost.
    real = os.link

    def link(source: Any, target: Any) -> None:
        real(source, target)
        raise FileExistsError(target)

    monkeypatch.setattr(os, "link", link)
    with WriterLock(tmp_path / "0001.lock") as lock:
        assert lock.is_own()


# ------------------------------------------------------------------------------------------------- taking over


def test_files_are_replaced_before_the_lock_changes_its_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "0003.lock", []
    write_elsewhere(path)
    as_task(monkeypatch, 1)

    def detach() -> None:
        seen.append(json.loads(path.read_text())["host"])
        if len(seen) == 1:
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        WriterLock(path, detach=detach).__enter__()
    with WriterLock(path, detach=detach) as lock:
        # The one before did not get to the end, so this one has to do it, too.
        assert lock.from_elsewhere
    assert seen == ["node-17.example"] * 2
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_after_a_process_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "0001.lock"
    write_dead_holder(path)
    with WriterLock(path, detach=lambda: pytest.fail("no process of this machine is cut off")) as lock:
        assert not lock.from_elsewhere


def test_who_was_killed_while_taking_over_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "0001.lock"
    for _ in range(3):
        write_dead_holder(path)
        write_dead_holder(tmp_path / "0001.lock.takeover")
        write_dead_holder(tmp_path / "0001.lock.takeover1")
        with WriterLock(path) as lock:
            assert lock.is_own()
            assert only(path)


def test_a_former_life_elsewhere_that_was_lost_while_taking_over_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "0003.lock"
    write_elsewhere(path, restarts=0)
    write_elsewhere(tmp_path / "0003.lock.takeover", restarts=1)
    as_task(monkeypatch, 2)
    with WriterLock(path):
        assert only(path)


def test_who_is_taking_over_is_named_and_left_alone(tmp_path: Path) -> None:
    path, claim = tmp_path / "0001.lock", tmp_path / "0001.lock.takeover"
    write_dead_holder(path)
    write_holder(claim)
    before = path.read_bytes(), claim.read_bytes()
    with pytest.raises(CheckRefusedError, match=rf"takeover: process {os.getpid()} on .* is taking this shard over"):
        WriterLock(path).__enter__()
    assert (path.read_bytes(), claim.read_bytes()) == before


def test_of_many_that_race_for_a_dead_claim_exactly_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "shards" / "0001.lock"
    write_dead_holder(path)
    write_dead_holder(path.with_name("0001.lock.takeover"))
    one_of_many_wins(path)


@pytest.mark.parametrize(("count", "refused"), [(4, False), (3, True), (None, False)], ids=str)
def test_a_live_holder_of_another_division_is_refused(tmp_path: Path, count: int | None, refused: bool) -> None:
    write_holder(tmp_path / "0002.lock", **({} if count is None else {"count": count}))
    with WriterLock(tmp_path / "0001.lock", count=4) as lock:
        if refused:
            with pytest.raises(
                CheckRefusedError, match=rf"0002\.lock: process {os.getpid()} .* one of 3 shards .* of 4"
            ):
                lock.check_beside()
        else:
            lock.check_beside()


def test_a_dead_holder_of_another_division_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "0002.lock"
    write_dead_holder(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "count": 3}))
    with WriterLock(tmp_path / "0001.lock", count=4) as lock:
        lock.check_beside()

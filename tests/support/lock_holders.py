"""Holders of a writer lock: processes that hold or race for it, and lock files that others are said to have written."""

from __future__ import annotations

import json
import multiprocessing
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from experiments.campaign.lock import WriterLock
from experiments.errors import CheckRefusedError

FORK = multiprocessing.get_context("fork")


def hold(path: Path, ready: Connection) -> None:
    with WriterLock(path):
        ready.send("held")
        ready.recv()


def race(path: Path, ready: Connection) -> None:
    ready.send("ready")
    ready.recv()
    try:
        with WriterLock(path):
            ready.send("won")
            ready.recv()
    except CheckRefusedError:
        ready.send("refused")


def started(target: Callable[[Path, Connection], None], path: Path) -> tuple[BaseProcess, Connection]:
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=target, args=(path, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


@contextmanager
def holder(path: Path) -> Iterator[tuple[BaseProcess, Connection]]:
    process, pipe = started(hold, path)
    try:
        assert pipe.recv() == "held"
        yield process, pipe
    finally:
        process.kill()
        process.join()
        pipe.close()


def write_holder(path: Path, **changes: Any) -> None:
    own = psutil.Process()
    identity = {"pid": own.pid, "host": socket.gethostname(), "started": own.create_time(), **changes}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(identity))


def write_dead_holder(path: Path) -> None:
    process = FORK.Process(target=signal.pause)
    process.start()
    began = psutil.Process(process.pid).create_time()
    process.kill()
    process.join()
    write_holder(path, pid=process.pid, started=began)


def write_elsewhere(path: Path, restarts: int = 0, **changes: Any) -> None:
    write_holder(path, host="node-17.example", **{"job": "812_3", "restarts": restarts, "cluster": "big", **changes})

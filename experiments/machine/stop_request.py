"""A request to stop: SIGTERM or SIGUSR1 is noted, and the current pass may take a limited time to finish.

    with StopRequest() as stop:
        ...
        if stop.requested():            # between two passes
            return

Slurm announces the end of a job. It sends SIGUSR1 before a time limit (``--signal`` sets how long before) and at the
beginning of a preemption's grace time. It sends SIGTERM some seconds (``KillWait``) before SIGKILL. A worker that gets
a signal finishes its current run, or its current pass of many runs, and leaves. If that takes longer than the grace
time, ``GraceOverError`` interrupts the worker; runs whose rows are not on disk by then are done again.
"""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

GRACE_SECONDS = 90.0
"""How long the current pass may take after SIGUSR1, unless ``--grace`` says otherwise."""

TERM_SECONDS = 20.0
"""The same after SIGTERM, which Slurm sends 30 seconds before SIGKILL unless its ``KillWait`` is different."""


class GraceOverError(KeyboardInterrupt):
    """The grace time ended before the current pass did."""


class StopRequest:
    """Takes over SIGTERM and SIGUSR1 of this process, and SIGALRM for the grace time, while it is open.

    The first request counts; later ones can only shorten the grace time.

    Attributes:
        signal: the first signal; None until one comes.
        grace: seconds from SIGUSR1 to ``GraceOverError``.
    """

    def __init__(self, grace: float = GRACE_SECONDS) -> None:
        self.signal: signal.Signals | None = None
        self.grace = grace
        self._terminated = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        handlers = {signal.SIGTERM: self._note, signal.SIGUSR1: self._note, signal.SIGALRM: self._over}
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finished()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Return whether a signal has come, so that nothing new should begin."""
        return self.signal is not None

    def finished(self) -> None:
        """Cancel the alarm: the current pass is done or given up."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def wait_for_the_end(self, seconds: float) -> None:
        """Wait until SIGTERM comes, for ``seconds`` at most."""
        end = time.monotonic() + seconds
        while not self._terminated and time.monotonic() < end:
            time.sleep(0.05)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._terminated = self._terminated or number == signal.SIGTERM
        left = self.grace if number == signal.SIGUSR1 else min(self.grace, TERM_SECONDS)
        if self.signal is None:
            self.signal = signal.Signals(number)
        else:
            left = min(left, signal.getitimer(signal.ITIMER_REAL)[0] or left)
        signal.setitimer(signal.ITIMER_REAL, left)

    def _over(self, number: int, frame: FrameType | None) -> None:
        raise GraceOverError(f"{self.signal.name if self.signal else 'a signal'}: the pass in hand was given up")

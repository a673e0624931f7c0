"""Signals: the first is noted, the grace time ends, and the handlers of others come back."""

from __future__ import annotations

import signal
import time

import pytest

from experiments.machine.stop_request import TERM_SECONDS, GraceOverError, StopRequest


def left() -> float:
    return signal.getitimer(signal.ITIMER_REAL)[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_request(number: signal.Signals) -> None:
    with StopRequest() as stop:
        assert not stop.requested()
        signal.raise_signal(number)
        assert stop.requested()
        assert stop.signal == number
    assert left() == 0


def test_handlers_are_put_back() -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest():
        inside = [signal.getsignal(number) for number in numbers]
    assert not set(inside) & set(before)
    assert [signal.getsignal(number) for number in numbers] == before


def test_the_grace_time_ends_where_the_process_is() -> None:
    with StopRequest(grace=0.05) as stop:
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(GraceOverError, match="SIGUSR1: the pass in hand was given up"):
            time.sleep(10)
        assert stop.requested()
    assert issubclass(GraceOverError, KeyboardInterrupt), "no `except Exception` may swallow it"


def test_sigterm_shortens_the_grace_time_and_sigusr1_does_not_lengthen_it() -> None:
    with StopRequest(grace=1000) as stop:
        signal.raise_signal(signal.SIGUSR1)
        assert 900 < left() <= 1000
        signal.raise_signal(signal.SIGTERM)
        assert left() <= TERM_SECONDS
        signal.raise_signal(signal.SIGUSR1)
        assert left() <= TERM_SECONDS
        assert stop.signal == signal.SIGUSR1
        stop.finished()
        assert left() == 0


def test_waiting_for_the_end_ends_with_sigterm() -> None:
    with StopRequest() as stop:
        stop.wait_for_the_end(0.1)
        signal.raise_signal(signal.SIGTERM)
        stop.wait_for_the_end(1e9)

"""Results in order, few of them at once, and errors in their turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from signround import parallel
from signround.parallel import in_order


@pytest.fixture(autouse=True)
def _three_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "processors", lambda: 3)


def later(value: int, seconds: float) -> int:
    time.sleep(seconds)
    return value


def test_slow_ones_keep_their_place() -> None:
    assert list(in_order(partial(later, value, 0.03 if value % 4 == 0 else 0.0) for value in range(12))) == [*range(12)]
    assert list(in_order([])) == []


def test_jobs_run_side_by_side() -> None:
    together = threading.Barrier(3, timeout=30)  # breaks when fewer than three come
    list(in_order([together.wait] * 6))


def test_no_more_than_one_a_thread_ahead() -> None:
    made: list[int] = []

    def jobs() -> Iterator[Callable[[], None]]:
        for value in range(50):
            yield partial(made.append, value)

    for taken, _ in enumerate(in_order(jobs())):
        time.sleep(0.001)
        assert len(made) <= taken + 1 + 3


def test_an_error_comes_in_its_turn_and_ends_the_work() -> None:
    begun: list[int] = []

    def job(value: int) -> int:
        begun.append(value)
        if value == 2:
            raise ZeroDivisionError
        return value

    results = in_order(partial(job, value) for value in range(100))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert len(begun) <= 6


def test_a_consumer_may_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs is waited for, what waits never begins, and no thread is left."""
    monkeypatch.setattr(parallel, "processors", lambda: 1)
    before = set(threading.enumerate())
    begun: list[int] = []
    runs, may_end = threading.Event(), threading.Event()

    def job(value: int) -> None:
        begun.append(value)
        if value == 1:
            runs.set()
            may_end.wait(30)

    results = in_order(partial(job, value) for value in range(100))
    next(results)
    assert runs.wait(30)
    timer = threading.Timer(0.2, may_end.set)  # long after the others were cancelled
    timer.start()
    results.close()
    timer.join()
    assert begun == [0, 1]
    assert set(threading.enumerate()) <= before

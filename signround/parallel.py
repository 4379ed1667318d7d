"""Work on all processors whose results are wanted one after the other: packing before writing, hashes of many files.

Threads, because what takes time here (numpy, torch, hashlib, files) lets go of the interpreter. A bounded number of
results is in memory: what the consumer has not taken yet is not computed much further.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from signround.measure import processors

MOST_THREADS = 4  # more would hold more results in memory

T = TypeVar("T")


def in_order(jobs: Iterable[Callable[[], T]]) -> Generator[T]:
    """The results of `jobs` in their order, each computed in a thread. Beside the one that the consumer holds there are
    never more than one a thread, and one. An exception of a job is raised in its turn; what was not begun by then never
    is. Consumers that may stop before the end wrap it in `contextlib.closing`."""
    threads = min(processors(), MOST_THREADS)
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

"""Work spread over processes, its results in the order of the work."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

from numina_finetune.process_tree import die_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 3
"""Items a worker that are under way or waiting to be taken: what bounds the memory."""

_work: Callable[[Any], Any] | None = None
"""A worker process's own function."""


def ordered_map(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, progress: Callable[[], None] = lambda: None
) -> Iterator[Result]:
    """``map(work, items)``, in this process where ``workers`` is 1, else in so many others.

    Args:
        work: can be pickled; each process gets it once.
        progress: called as each result is taken.
    """
    results = map(work, items) if workers == 1 else _in_processes(work, items, workers)
    for result in results:
        progress()
        yield result


def _in_processes(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    # a forked child would share the parent's tokenizer threads, and hang on their locks
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(work,))
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(_do, item))
            if len(waiting) >= AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    die_with_parent(signal.SIGKILL, parent.pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of the terminal; the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _work = work


def _do(item: Any) -> Any:
    assert _work is not None
    return _work(item)

"""Work on several threads, none of which a process that ends has to wait for."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], tasks: Iterable[T], *, threads: int, ahead: int) -> Iterator[R]:
    """The results of ``work`` on each task, in the tasks' order; the first error is raised, and no more begun.

    The standard library's pool joins its threads when the interpreter ends, so that a request that hangs would hold a
    process that was told to go.

    Args:
        ahead: tasks that are begun before their results are asked for; it bounds the results that wait in memory.
    """
    todo: queue.SimpleQueue[tuple[Future[R], T] | None] = queue.SimpleQueue()
    begun: deque[Future[R]] = deque()

    def loop() -> None:
        while (job := todo.get()) is not None:
            future, task = job
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work(task))
                except BaseException as error:
                    future.set_exception(error)
            del job, future, task  # a finished task's memory must not wait for the next one

    remaining = iter(tasks)

    def begin() -> bool:
        for task in remaining:
            begun.append(Future())
            todo.put((begun[-1], task))
            return True
        return False

    workers = 0
    try:
        while len(begun) < ahead and begin():
            if workers < threads:
                threading.Thread(target=loop, daemon=True, name="checkpoint-transfer").start()
                workers += 1
        while begun:
            yield begun.popleft().result()
            begin()
    finally:
        for future in begun:
            future.cancel()
        for _ in range(workers):
            todo.put(None)

"""Spread tasks over processes, a bounded number at a time, leaving none behind."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TypeVar

from trainer.corpus.errors import CorpusError

Task = TypeVar("Task")
Done = TypeVar("Done")

TASKS_PER_PROCESS = 2  # one at work and one waiting, so that memory does not grow with the corpus


def default_workers() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_tasks(
    work: Callable[[Task], Done], tasks: Iterable[Task], *, workers: int
) -> Generator[Done, None, None]:
    """Yield each task's result as it comes, in no order; tasks are drawn as processes get free.

    Args:
        work: a module's function; it is called in this process when `workers` is 1.

    Raises:
        CorpusError: a process died. Whatever `work` raises. Tasks not yet begun are dropped.
    """
    if workers == 1:
        for task in tasks:
            yield work(task)
        return
    # Not forked: threads of this process (tokenizers, Ray) may hold locks, which a fork would copy.
    executor = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_process
    )
    running: set[Future[Done]] = set()
    try:
        for task in tasks:
            running.add(executor.submit(work, task))
            if len(running) >= workers * TASKS_PER_PROCESS:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    except BrokenProcessPool as error:
        raise CorpusError(
            "a process of the build died (killed, or out of memory); run the same command again, "
            "with fewer workers if memory is short: finished chunks are kept"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _start_process() -> None:
    """Ctrl-C is the parent's to handle; and when the parent is killed, end too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core already
    parent = multiprocessing.parent_process()
    assert parent is not None, "the pool's initializer runs in a child process"
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)

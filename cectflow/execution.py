"""Where work runs: this process or worker processes, behind one ``concurrent.futures`` interface.

``WorkerProcesses`` is an executor, ``run_all`` maps a function over jobs with progress, and
``single_thread`` holds the numerical libraries to one thread, so that results do not depend on
how many cores a worker happens to see.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "WorkerProcesses",
    "run_all",
    "single_thread",
    "track",
]

Job = TypeVar("Job")
Result = TypeVar("Result")
Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 15.0


class WorkerProcesses(ProcessPoolExecutor):
    """Processes that work beside this one, even if it is only one.

    They leave Ctrl-C to this process and end when it does, however that ends. As a context:
    at its end the jobs in hand are waited for and others dropped; Ctrl-C and SIGTERM wait for
    none.

    Parameters
    ----------
    workers
        How many.

    Raises
    ------
    ValueError
        If ``workers`` is below 1.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            msg = f"workers is {workers}: expected 1 or more"
            raise ValueError(msg)
        # Spawned, not forked: a fork copies the locks of the parent's threads in whatever state.
        context = multiprocessing.get_context("spawn")
        given_up, self._lifeline = context.Pipe(duplex=False)
        super().__init__(
            workers, mp_context=context, initializer=_follow_parent, initargs=(given_up,)
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self._lifeline.close()  # ends the processes in the midst of what they do
        self.shutdown(wait=True, cancel_futures=True)


def _follow_parent(given_up: Connection) -> None:
    """Make a worker process end when its parent does or gives it up, and not before."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        # The queue of jobs does not tell: each worker holds both ends of it.
        wait([parent.sentinel, given_up])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def run_all(
    function: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int, title: str
) -> Iterator[Result]:
    """Results of ``function(job)`` as they are finished, in any order, with progress shown.

    The first failure is raised when the jobs in hand have ended; those not yet begun are dropped.
    With one worker the jobs run lazily, so that what the consumer did with earlier results is
    kept.

    Raises
    ------
    ChildProcessError
        If a process died.
    """
    if workers == 1:
        yield from track((function(job) for job in jobs), total=len(jobs), title=title)
        return
    with WorkerProcesses(workers) as executor:
        futures = [executor.submit(function, job) for job in jobs]
        try:
            finished = (future.result() for future in as_completed(futures))
            yield from track(finished, total=len(jobs), title=title)
        except BrokenProcessPool:
            msg = (
                f"{title}: one of {workers} processes has died, perhaps for want of memory: use "
                f"fewer --workers or smaller pieces of work; the same command goes on from what "
                f"is finished"
            )
            raise ChildProcessError(msg) from None


@contextmanager
def single_thread() -> Iterator[None]:
    """Context in which torch uses one thread; the former number is restored afterwards.

    Sums over several threads are rounded differently; one thread gives the same bytes
    in the main process and in any worker.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@lru_cache(maxsize=1)
def _console() -> Console:
    """The one console: bars within bars share its screen."""
    from rich.console import Console

    return Console(stderr=True)


def track(
    items: Iterable[Item],
    *,
    total: int,
    title: str,
    status: Callable[[], str] | None = None,
) -> Iterator[Item]:
    """The items, with a progress bar on a terminal and plain lines elsewhere (on stderr).

    Parameters
    ----------
    items
        What is worked through.
    total
        How many there will be.
    title
        What the work is, a few words.
    status
        Gives a few words on how it stands, shown beside the title.
    """
    told = status or str
    if sys.stderr.isatty():
        from rich.progress import Progress

        with Progress(console=_console(), transient=True) as progress:
            task = progress.add_task(title, total=total)
            for item in items:
                yield item
                progress.update(task, advance=1, description=f"{title} {told()}".strip())
        return
    start = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last > SECONDS_BETWEEN_LINES and done < total:
            last, remaining = now, (now - start) / done * (total - done)
            line = f"{title}: {done} of {total}, {remaining:.0f} s left {told()}".strip()
            print(line, file=sys.stderr, flush=True)

"""Where work runs: this process or worker processes, behind one ``concurrent.futures`` interface.

``open_executor`` gives an executor, ``run_all`` maps a function over jobs with progress, and
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
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "InProcessExecutor",
    "open_executor",
    "open_processes",
    "run_all",
    "single_thread",
    "track",
]

Job = TypeVar("Job")
Result = TypeVar("Result")
Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 15.0


class InProcessExecutor(Executor):
    """Executor that runs each call at once in the calling thread: no processes, no pickling."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Finished future of the call."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def open_executor(workers: int) -> Executor:
    """Executor for a number of workers: 1 is this process, more are spawned processes.

    Raises
    ------
    ValueError
        If ``workers`` is below 1.
    """
    if workers < 1:
        msg = f"workers is {workers}: expected 1 (this process) or more"
        raise ValueError(msg)
    if workers == 1:
        return InProcessExecutor()
    # Spawned, not forked: a fork copies the locks of the parent's threads in whatever state.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def open_processes(workers: int) -> Executor:
    """Worker processes that work beside this one, even if it is only one.

    They leave Ctrl-C to this process, which shuts the executor down, and end with it if it is
    killed.

    Raises
    ------
    ValueError
        If ``workers`` is below 1.
    """
    if workers < 1:
        msg = f"workers is {workers}: expected 1 or more"
        raise ValueError(msg)
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)


def _follow_parent() -> None:
    """Make a worker process end when its parent does, and not before."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        # The queue of jobs does not tell: each worker holds both ends of it.
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def run_all(
    function: Callable[[Job], Result], jobs: Sequence[Job], *, workers: int, title: str
) -> Iterator[Result]:
    """Results of ``function(job)`` as they are finished, in any order, with progress shown.

    The first failure is raised at once; jobs not yet begun are dropped. With one worker the
    jobs run lazily, so that what the consumer did with earlier results is kept.
    """
    if workers == 1:
        yield from track((function(job) for job in jobs), total=len(jobs), title=title)
        return
    with open_executor(workers) as executor:
        futures = [executor.submit(function, job) for job in jobs]
        try:
            finished = (future.result() for future in as_completed(futures))
            yield from track(finished, total=len(jobs), title=title)
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


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

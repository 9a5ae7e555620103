"""Where work runs: this process or worker processes, behind one ``concurrent.futures`` interface.

``Workplace`` says where, ``run_all`` maps a function over jobs there with progress,
``WorkerProcesses`` is an executor of this machine, and ``single_thread`` holds the numerical
libraries to one thread, so that results do not depend on how many cores a worker happens to see.
Processes that need one another run :mod:`cectflow.together`.
"""

from __future__ import annotations

import atexit
import mmap
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for_futures
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import DupFd
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from cectflow.progress import track

if TYPE_CHECKING:
    from cectflow.cluster_workers import ClusterWorkers

__all__ = [
    "HERE",
    "WorkerProcesses",
    "Workplace",
    "bring",
    "call_brought",
    "count_cores",
    "follow_parent",
    "portable",
    "prefetch",
    "run_all",
    "single_thread",
]

Job = TypeVar("Job")
Result = TypeVar("Result")
Item = TypeVar("Item")

SECONDS_TO_WAIT = 1.0
"""Until the executor is asked again how many jobs should be in hand."""


@dataclass(frozen=True)
class Workplace:
    """Where the jobs of :func:`run_all` run: here, beside this process, or on many machines.

    Attributes
    ----------
    workers
        Processes of this machine; with one, this process does the work itself.
    cluster
        Of many machines: the address of a Dask scheduler (``tcp://host:8786``), or the path of a
        YAML file that says how one is started.

    Raises
    ------
    ValueError
        If ``workers`` is below 1, or given beside a cluster, which has workers of its own; if
        the cluster is neither an address nor a valid file.
    OSError
        If what a cluster needs is not installed.
    """

    workers: int = 1
    cluster: str | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            msg = f"workers is {self.workers}: expected 1 or more"
            raise ValueError(msg)
        if self.cluster is not None and self.workers > 1:
            msg = (
                f"workers is {self.workers} beside the cluster {self.cluster}: those are processes "
                f"of this machine, and a cluster has its own; give one of the two"
            )
            raise ValueError(msg)
        if self.cluster is not None:
            from cectflow.cluster import check_cluster

            check_cluster(self.cluster)


HERE = Workplace()
"""This process."""


def count_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class WorkerProcesses(ProcessPoolExecutor):
    """Processes that work beside this one, even if it is only one.

    Each has its share of the cores for threads. They leave Ctrl-C to this process and end when it
    does, however that ends. As a context: at its end the jobs in hand are waited for and others
    dropped; Ctrl-C and SIGTERM wait for none, nor does a consumer that has stopped.

    Parameters
    ----------
    workers
        How many.
    function
        Brought to each process once, with all that it holds: for :func:`call_brought`.

    Raises
    ------
    ValueError
        If ``workers`` is below 1.
    """

    def __init__(self, workers: int, function: Callable[..., Any] | None = None) -> None:
        if workers < 1:
            msg = f"workers is {workers}: expected 1 or more"
            raise ValueError(msg)
        self._number = workers
        # Spawned, not forked: a fork copies the locks of the parent's threads in whatever state.
        context = multiprocessing.get_context("spawn")
        given_up, self._lifeline = context.Pipe(duplex=False)
        threads = max(1, count_cores() // workers)
        self._brought = _Unnamed(pickle.dumps(function))
        # It arrives as bytes, which are unpickled after the process has its share of the cores:
        # libraries look for that when they are imported.
        arriving: Any = self._brought
        super().__init__(
            workers, mp_context=context, initializer=_begin_worker,
            initargs=(threads, given_up, arriving),
        )  # fmt: skip

    def room(self) -> int:
        """How many jobs should be in hand: all processes' and one that follows for each."""
        return 2 * self._number

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
            self._lifeline.close()  # ends the processes in the midst of what they do
        self.shutdown(wait=True, cancel_futures=True)
        self._brought.close()


class _Unnamed:
    """Bytes for the processes that are started from here: a file without a name, which each reads.

    Among the arguments of a process they would keep this one waiting, with each in turn, until that
    has imported all it needs and reads them.
    """

    def __init__(self, content: bytes) -> None:
        self._file = TemporaryFile()  # noqa: SIM115  # closed with the pool
        self._file.write(content)
        self._file.flush()

    def __reduce__(self) -> tuple[Callable[..., bytes], tuple[Any]]:
        return _read_whole, (DupFd(self._file.fileno()),)

    def close(self) -> None:
        self._file.close()


def _read_whole(descriptor: Any) -> bytes:
    with (
        open(descriptor.detach(), "rb") as file,
        # Not by reading: the processes share their place in the file.
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return content[:]


def _begin_worker(threads: int, given_up: Connection, brought: bytes) -> None:
    """Give a process of a pool its share of the cores, unless it was told to take less.

    With more threads than cores each of many small sums waits for a thread that another process
    keeps from its core: two processes of two threads each were slower on two cores than one.
    """
    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdecimal() and int(told):
        threads = min(threads, int(told))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    atexit.register(_leave)
    follow_parent(given_up)
    bring(brought)


_brought: dict[str, bytes] = {}


def bring(function: bytes) -> None:
    """Give this process the pickled function that :func:`call_brought` calls from now on."""
    _brought["function"] = function


def call_brought(*args: Any) -> Any:
    """Result of the function that was brought to this process: what it holds came once."""
    return _unpickled(_brought["function"])(*args)


@lru_cache(maxsize=1)
def _unpickled(function: bytes) -> Callable[..., Any]:
    unpickled: Callable[..., Any] = pickle.loads(function)
    return unpickled


def _leave() -> None:
    """End a process of a pool at once: Python takes torch down module by module, for a second."""
    with suppress(OSError, ValueError):  # nobody may be listening any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


def follow_parent(*given_up: Connection) -> None:
    """Make a worker process end when its parent does or gives it up, and not before."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        # The queue of jobs does not tell: each worker holds both ends of it.
        wait([parent.sentinel, *given_up])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def run_all(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    where: Workplace,
    title: str,
    paths: Sequence[Path] = (),
    status: Callable[[], str] | None = None,
    alone: Callable[[Sequence[Job]], Iterator[Result]] | None = None,
) -> Iterator[Result]:
    """Results of ``function(job)`` as they are finished, in any order, with progress shown.

    The first failure is raised when the jobs in hand have ended; those not yet begun are dropped.
    With one worker the jobs run lazily, so that what the consumer did with earlier results is
    kept.

    Parameters
    ----------
    function, jobs
        Both are pickled, unless one process does all: the function once for each process, so what
        all jobs need it holds (:func:`functools.partial`). On a cluster paths in a job are
        absolute, and one may be done twice, since the worker that had it may die or be taken for
        dead: what it writes it writes atomically.
    where
        Which processes do the work.
    title
        What the work is, a few words.
    paths
        Files and folders that the jobs read or write; workers elsewhere must see them too.
    status
        As of :func:`track`.
    alone
        Gives the results of all jobs where this process does them, if it knows a better way than
        one after the other.

    Raises
    ------
    ChildProcessError
        If a process died; on a cluster, if several died over one job, or no workers are left.
    OSError
        If a cluster is not reached or its workers are not fit for the work.
    """
    if where.cluster is not None:
        if jobs:
            from cectflow.cluster import open_cluster

            with open_cluster(where.cluster, function, paths=paths, title=title) as elsewhere:
                results: Iterator[Result] = _work_through(elsewhere, jobs)
                yield from track(results, total=len(jobs), title=title, status=status)
        return
    workers = where.workers
    if workers == 1:
        one_by_one = (function(job) for job in jobs)
        results = one_by_one if alone is None else alone(jobs)
        yield from track(results, total=len(jobs), title=title, status=status)
        return
    if not jobs:
        return
    with WorkerProcesses(min(workers, len(jobs)), function) as executor:
        try:
            results = _work_through(executor, jobs)
            yield from track(results, total=len(jobs), title=title, status=status)
        except BrokenProcessPool:
            msg = (
                f"{title}: one of {workers} processes has died, perhaps for want of memory: use "
                f"fewer --workers or smaller pieces of work; the same command goes on from what "
                f"is finished"
            )
            raise ChildProcessError(msg) from None


def prefetch(items: Iterable[Item], *, depth: int = 2) -> Iterator[Item]:
    """The items, made by a thread that is ahead by at most ``depth`` of them.

    What the thread raises is raised here, after the items before it. When the consumer stops, the
    thread does, with the item that it is making.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    given_up = threading.Event()

    def put(kind: str, content: Any) -> None:
        while not given_up.is_set():
            with suppress(queue.Full):
                ready.put((kind, content), timeout=0.1)
                return

    def make() -> None:
        try:
            for item in items:
                put("item", item)
                if given_up.is_set():
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            kind, content = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise content
            yield content
    finally:
        given_up.set()
        thread.join()


def _work_through(executor: WorkerProcesses | ClusterWorkers, jobs: Iterable[Any]) -> Iterator[Any]:
    """Results as they are finished; only as many jobs are in hand as the executor has room for."""
    waiting, in_hand = iter(jobs), set[Future[Any]]()
    while True:
        room = max(0, executor.room() - len(in_hand))
        in_hand.update(executor.submit(call_brought, job) for job in islice(waiting, room))
        if not in_hand:
            return
        done, in_hand = wait_for_futures(in_hand, SECONDS_TO_WAIT, FIRST_COMPLETED)
        # What has failed comes last, so that the results beside it are kept.
        for future in sorted(done, key=lambda each: each.exception() is not None):
            yield future.result()


def portable(error: Exception) -> Exception:
    """The error with its traceback as a note, or one that can be pickled in its place."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    error.add_note("".join(traceback.format_exception(error)))
    return error


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

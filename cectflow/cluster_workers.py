"""Workers of a Dask cluster that do jobs, once they agree with the command that gives them.

A worker must run the same code, have one thread and see the same files, or it refuses the work. How
a cluster is found or started says :mod:`cectflow.cluster`.
"""

from __future__ import annotations

import hashlib
import pickle
import platform
import socket
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from concurrent.futures import wait as wait_for_futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cectflow.execution import bring, portable

if TYPE_CHECKING:
    from distributed import Client, Worker
    from distributed import Future as RemoteFuture

__all__ = ["ClusterWorkers", "Orders", "given_orders"]

SECONDS_BETWEEN_LOOKS = 1.0
BROUGHT_AT_MOST = 2
"""Commands whose common part a worker keeps."""
JOBS_IN_HAND_PER_WORKER = 2
"""One that it does and one that has arrived."""


class ClusterWorkers(Executor):
    """Workers of a Dask cluster; what one that dies had in hand another does.

    As a context: at its end the jobs in hand are waited for and others dropped; Ctrl-C and
    SIGTERM wait for none.

    Parameters
    ----------
    client
        Of the cluster.
    function
        Brought to each worker once, with all that it holds: for
        :func:`~cectflow.execution.call_brought`.
    orders
        What its workers must agree with.
    title
        What the work is, a few words.
    patience
        Seconds that the work waits while there is no worker.

    Raises
    ------
    OSError
        If a worker runs other code or does not see the files.
    ChildProcessError
        If no worker comes.
    """

    def __init__(
        self,
        client: Client,
        function: Callable[..., Any],
        orders: Orders,
        title: str,
        patience: float,
    ) -> None:
        self._client = client
        self._brought = _Brought(orders, pickle.dumps(function))
        self._title, self._patience = title, patience
        self._in_hand: dict[RemoteFuture[Any], Future[Any]] = {}
        self._submitted = 0
        self._workers, self._looked = 0, -float("inf")
        self._last_seen = time.monotonic()
        while not self._look():
            time.sleep(SECONDS_BETWEEN_LOOKS / 10)
        answers = client.run(_take, self._brought, on_error="return")
        for address, answer in answers.items():
            if isinstance(answer, Exception):
                answer = f"it cannot do cectflow's work ({type(answer).__name__}: {answer})"
            if answer is not None:
                raise OSError(_refusal(address, answer))

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The result, some time, of a function called on a worker."""
        self._submitted += 1
        future: Future[Any] = Future()
        key = f"cectflow-{self._brought.orders.run}-{self._submitted}"
        self._send(_Task(function, args, kwargs), future, key)
        return future

    def _send(
        self, task: _Task, future: Future[Any], key: str, brought: _Brought | None = None
    ) -> None:
        """Have a task done: first without what all need, which a worker that came late lacks."""
        run = self._brought.orders.run
        remote = self._client.submit(_do, run, task, brought, key=key, pure=False)
        self._in_hand[remote] = future

        def take_over(finished: RemoteFuture[Any]) -> None:
            try:
                result = finished.result()
                if isinstance(result, _Missing):
                    self._send(task, future, f"{key}-brought", self._brought)
                else:
                    future.set_result(result)
            except BaseException as error:  # of sending again too: whoever waits must hear of it
                future.set_exception(self._translated(error, task))
            del self._in_hand[finished]

        remote.add_done_callback(take_over)

    def room(self) -> int:
        """How many jobs should be in hand now.

        Raises
        ------
        ChildProcessError
            If all workers have been gone for too long.
        """
        return JOBS_IN_HAND_PER_WORKER * max(1, self._look())

    def _look(self) -> int:
        """How many workers there are; asked now and then only."""
        now = time.monotonic()
        if now - self._looked > SECONDS_BETWEEN_LOOKS / 10:
            try:
                self._workers = len(self._client.scheduler_info(n_workers=-1)["workers"])
            except (OSError, TimeoutError) as error:
                raise self._lost() from error
            self._looked = now
        if self._workers:
            self._last_seen = now
        elif now - self._last_seen > self._patience:
            msg = (
                f"{self._title}: the cluster has been without workers for {self._patience:.0f} s: "
                f"see that its jobs run and what they say; the same command goes on from what is "
                f"finished"
            )
            raise ChildProcessError(msg)
        return self._workers

    def _translated(self, error: BaseException, task: _Task) -> BaseException:
        from distributed.client import FutureCancelledError
        from distributed.scheduler import KilledWorker

        if isinstance(error, KilledWorker):
            job = textwrap.shorten(str(task.args[0] if task.args else task.function), 120)
            msg = (
                f"{self._title}: {error.allowed_failures + 1} workers have died over {job}, "
                f"perhaps for want of memory: give workers more of it or use smaller pieces of "
                f"work; the same command goes on from what is finished"
            )
            return ChildProcessError(msg)
        if isinstance(error, FutureCancelledError):
            return self._lost()
        return error.with_traceback(None)  # its note tells where it was raised

    def _lost(self) -> ConnectionError:
        msg = (
            f"{self._title}: the scheduler of the cluster has gone; the same command goes on from "
            f"what is finished"
        )
        return ConnectionError(msg)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the work; see :class:`concurrent.futures.Executor`."""
        with suppress(OSError, TimeoutError):
            if cancel_futures:
                in_hand = list(self._in_hand)
                begun: set[str] = set()
                if wait and in_hand:
                    # Of everything: a key that has ended meanwhile would be an error.
                    stacks = self._client.call_stack()
                    begun = {key for keys in stacks.values() for key in keys}
                dropped = [remote for remote in in_hand if remote.key not in begun]
                if dropped:
                    self._client.cancel(dropped)
            while wait and (waiting := list(self._in_hand.values())):
                wait_for_futures(waiting, timeout=SECONDS_BETWEEN_LOOKS)
                self._look()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        hasty = KeyboardInterrupt | SystemExit | ChildProcessError | ConnectionError
        self.shutdown(wait=not isinstance(error, hasty), cancel_futures=True)


# --- what workers must agree with -----------------------------------------------------------------


@dataclass(frozen=True)
class Orders:
    """What a worker must agree with before it does a job."""

    run: str
    versions: tuple[tuple[str, str], ...]
    sights: tuple[_Sight, ...]


@dataclass(frozen=True)
class _Sight:
    """A path as this machine sees it: the size of a file, a hidden file in a folder."""

    path: Path
    size: int | None
    token: str | None


@dataclass(frozen=True, eq=False, repr=False)
class _Brought:
    """What every job needs: the pickled function is read after the worker was found fit."""

    orders: Orders
    function: bytes


class _Missing:
    """Answer of a worker that came when others had been brought what jobs need."""


@dataclass(frozen=True, eq=False, repr=False)
class _Task:
    """Of a kind that Dask does not look into for tasks and futures."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def given_orders(paths: Sequence[Path]) -> Iterator[Orders]:
    """Context with the orders of a work, at whose end the hidden files are removed.

    Parameters
    ----------
    paths
        Files and folders that workers must see as this machine does.
    """
    run = uuid.uuid4().hex[:12]
    sights, tokens = [], []
    try:
        for path in (path.absolute() for path in paths):
            token = None
            if path.is_dir():
                # Another disk may be mounted under the same path. Where nothing can be put, as
                # into an input that is read only, its being there must do.
                with suppress(OSError):
                    tokens.append(path / f".cectflow.{run}.tmp")
                    tokens[-1].touch(exist_ok=False)
                    token = tokens[-1].name
            size = None if path.is_dir() else path.stat().st_size
            sights.append(_Sight(path, size, token))
        yield Orders(run, _versions(), tuple(sights))
    finally:
        for written in tokens:
            with suppress(OSError):
                written.unlink(missing_ok=True)


@lru_cache(maxsize=1)
def _versions() -> tuple[tuple[str, str], ...]:
    """Versions of what decides about bytes, cectflow's by the content of its files."""
    root = Path(__file__).parent
    content = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return (
        ("Python", ".".join(platform.python_version_tuple()[:2])),
        ("code of cectflow", content.hexdigest()[:12]),
        *((name, version(name)) for name in ("distributed", "numpy", "scipy", "torch")),
    )


_taken: dict[str, _Brought] = {}
"""By run, of the last few."""


def _take(brought: _Brought, dask_worker: Worker) -> str | None:
    """Keep in a worker what jobs need, or what makes it unfit; Dask hands the worker in."""
    objection = _objection(brought.orders, dask_worker.state.nthreads)
    if objection is not None:
        return f"{objection} ({socket.gethostname()})"
    _taken[brought.orders.run] = brought
    while len(_taken) > BROUGHT_AT_MOST:
        del _taken[next(iter(_taken))]
    return None


@lru_cache(maxsize=1)
def _objection(orders: Orders, threads: int) -> str | None:
    if threads != 1:
        # Jobs of two threads would share torch's number of threads, and matplotlib's figures.
        return f"it has {threads} threads: start workers with --nthreads 1 and more --nworkers"
    for (what, here), (_, there) in zip(_versions(), orders.versions, strict=True):
        if here != there:
            return (
                f"it has {what} {here}, the command {there}: start workers from the same virtual "
                f"environment"
            )
    for sight in orders.sights:
        if (
            not sight.path.exists()
            or (sight.token is not None and not (sight.path / sight.token).exists())
            or (sight.size is not None and sight.path.stat().st_size != sight.size)
        ):
            return (
                f"it does not see the {sight.path} that the command sees: inputs and outputs must "
                f"lie on a file system that all machines share under the same path"
            )
    return None


def _refusal(worker: str, objection: str) -> str:
    return f"the worker {worker} is not fit for the work: {objection}"


def _do(run: str, task: _Task, brought: _Brought | None) -> Any:
    """Do a job in a worker, which may have come when the work had begun."""
    from distributed import get_worker

    if brought is not None:
        worker = get_worker()
        objection = _take(brought, worker)
        if objection is not None:
            raise OSError(_refusal(worker.address, objection))
    elif run not in _taken:
        return _Missing()
    if "torch" in sys.modules:  # if it is imported later, OMP_NUM_THREADS of Dask's nanny holds
        sys.modules["torch"].set_num_threads(1)
    bring(_taken[run].function)
    try:
        return task.function(*task.args, **task.kwargs)
    except Exception as error:
        raise portable(error) from None

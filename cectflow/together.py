"""Processes that work at the same time and need one another, as those of one training do."""

from __future__ import annotations

import multiprocessing
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from cectflow.execution import follow_parent, portable

__all__ = ["Parent", "run_together"]

Job = TypeVar("Job")


class Parent:
    """The process that started this one with :func:`run_together`, as this one sees it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def tell(self, news: Any) -> None:
        """Let ``run_together`` yield something."""
        self._say("news", news)

    def ask(self, question: Any) -> Any:
        """What the parent's ``answer`` says."""
        self._say("question", question)
        return pickle.loads(self._connection.recv_bytes())

    def _say(self, kind: str, content: Any) -> None:
        # Pickled by hand: a connection's own pickler would move tensors into shared memory. Only
        # this process and those that it started ever read what passes here.
        self._connection.send_bytes(pickle.dumps((kind, content)))


def run_together(
    function: Callable[[Job, Parent], None],
    jobs: Sequence[Job],
    *,
    answer: Callable[[int, Any], Any],
    title: str,
) -> Iterator[Any]:
    """What processes tell that run at the same time, one for each job, and may need one another.

    They leave Ctrl-C to this process. When one fails, or this iterator is closed, or this process
    ends, however that happens, all of them end in the midst of what they do.

    Parameters
    ----------
    function
        Called in a new process with a job and its parent; jobs are copied, tensors too.
    answer
        Called here with a job's number and what its process asks.
    title
        What the work is, a few words.

    Raises
    ------
    ChildProcessError
        If a process died. What one of them raised is raised here.
    """
    context = multiprocessing.get_context("spawn")
    processes: dict[Connection, SpawnProcess] = {}
    try:
        for _ in jobs:
            here, there = context.Pipe()
            process = context.Process(target=_work_together, args=(function, there), daemon=True)
            process.start()
            there.close()
            processes[here] = process
        # Not as an argument: this process would wait with each until that has imported all it
        # needs, and then reads it.
        for job, connection in zip(jobs, processes, strict=True):
            with suppress(ConnectionError):  # one that has died is heard of next
                connection.send_bytes(pickle.dumps(job))
        yield from _hear(processes, answer, title)
    finally:
        for process in processes.values():
            process.kill()
            process.join()


def _hear(
    processes: dict[Connection, SpawnProcess],
    answer: Callable[[int, Any], Any],
    title: str,
) -> Iterator[Any]:
    """News of all processes until the last has finished; their questions are answered."""
    numbers = {connection: number for number, connection in enumerate(processes)}
    died = (
        f"{title}: one of {len(processes)} processes that work together has died, perhaps for "
        f"want of memory; the same command goes on from what is finished"
    )
    working = set(processes)
    while working:
        for connection in wait(list(working)):
            assert isinstance(connection, Connection)
            try:
                kind, content = pickle.loads(connection.recv_bytes())
            except (EOFError, ConnectionError):
                raise ChildProcessError(died) from None
            if kind == "news":
                yield content
            elif kind == "question":
                reply = pickle.dumps(answer(numbers[connection], content))
                with suppress(ConnectionError):  # one that has died is heard of next
                    connection.send_bytes(reply)
            elif kind == "end":
                working.remove(connection)
            elif kind == "failure":
                # Where one has died the others fail for its sake, and may be heard before.
                if wait([processes[each].sentinel for each in working], timeout=1.0):
                    raise ChildProcessError(died)
                raise content


def _work_together(function: Callable[[Job, Parent], None], connection: Connection) -> None:
    """Do a job of :func:`run_together` in its process."""
    follow_parent()
    parent = Parent(connection)
    try:
        function(pickle.loads(connection.recv_bytes()), parent)
    except Exception as error:
        parent._say("failure", portable(error))
        # It stays until the parent ends all: the others would fail for want of it.
        threading.Event().wait()
    parent._say("end", None)

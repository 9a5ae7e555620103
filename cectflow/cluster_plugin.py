"""What the workers of a Dask cluster are handed once, those too that come when work has begun."""

from __future__ import annotations

import time
from typing import Any

from distributed import Worker, WorkerPlugin

__all__ = ["Handing", "handed"]

SECONDS_UNTIL_HANDED = 30.0
"""A worker may be given a job in the moment before it is handed what the job needs."""

_handed: dict[str, Any] = {}


class Handing(WorkerPlugin):
    """Hands every worker of a cluster something, under a name, for as long as it is registered.

    Not as what jobs depend on: Dask would give them all to the worker that has it already.

    Parameters
    ----------
    name
        Under which :func:`handed` finds it.
    content
        What is handed.
    """

    def __init__(self, name: str, content: Any) -> None:
        self.name, self.content = name, content

    def setup(self, worker: Worker) -> None:
        """Called by Dask in each worker, before or soon after it is given jobs."""
        _handed[self.name] = self.content

    def teardown(self, worker: Worker) -> None:
        """Called by Dask in each worker when the plugin is unregistered."""
        _handed.pop(self.name, None)


def handed(name: str) -> Any:
    """What :class:`Handing` has handed this worker.

    Raises
    ------
    OSError
        If it does not come.
    """
    stop = time.monotonic() + SECONDS_UNTIL_HANDED
    while name not in _handed:
        if time.monotonic() > stop:
            msg = f"what its jobs need has not come within {SECONDS_UNTIL_HANDED:.0f} s"
            raise OSError(msg)
        time.sleep(0.01)
    return _handed[name]

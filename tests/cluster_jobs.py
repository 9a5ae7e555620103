"""Jobs of the tests of clusters, apart: a worker that does them need not import what tests do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path


def wait_until(holds: Callable[[], bool]) -> None:
    """Until something holds; fails if it never does."""
    stop = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < stop, "waited in vain"
        time.sleep(0.01)


class UnportableError(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what} {why}")


def fail(job: str) -> None:
    if job == "portable":
        raise FileNotFoundError(2, "no such cube", "cube.mrc")
    what = "cube"
    raise UnportableError(what, "is torn")


def mark_and_stay(job: tuple[int, Path]) -> int:
    """Leave a mark; the first two jobs keep their workers until they are told to go on."""
    number, folder = job
    (folder / f"{number}.{os.getpid()}").touch()
    if number < 2:
        wait_until((folder / "go").exists)
    return number


def fail_beside_another(job: tuple[int, Path]) -> None:
    """The first job fails while the second is in the midst of its work."""
    number, folder = job
    (folder / f"{number}.begun").touch()
    if number == 0:
        wait_until((folder / "1.begun").exists)
        msg = "this cube is missing"
        raise ValueError(msg)
    time.sleep(0.5)
    (folder / f"{number}.done").touch()


class Heavy:
    """Tells in a file each time when it arrives in a process."""

    def __init__(self, arrivals: Path) -> None:
        self.arrivals = arrivals

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__dict__ = state
        with self.arrivals.open("a") as file:
            file.write(f"{os.getpid()}\n")


def work_with(heavy: Heavy, number: int) -> tuple[int, int]:
    time.sleep(0.05)  # so that no worker does all
    assert heavy.arrivals.is_file()
    return os.getpid(), 10 * number


def wait_for_a_third(heavy: Heavy, _: int) -> int:
    wait_until(lambda: len(heavy.arrivals.read_text().split()) == 3)
    return os.getpid()


def die(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def pid_of(_: int) -> int:
    time.sleep(0.5)  # so that no worker does all
    return os.getpid()

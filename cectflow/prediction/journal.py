"""Journal: what a prediction has finished, beside its output, so that a rerun goes on from it.

A folder ``.OUT.journal`` holds ``plan.json``, which says of what work it is, and a file for each
finished block. A kill loses the blocks in hand and nothing else. It is removed when the output is
there.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Float
from numpy.typing import NDArray

from cectflow.files import remove_leftovers, replacing

__all__ = ["Answers", "Journal", "journal_folder", "open_journal"]

PLAN_FILE = "plan.json"
LOCK_FILE = "lock"


@dataclass(frozen=True, eq=False)
class Answers:
    """What a network said of a block.

    Attributes
    ----------
    logits
        Of each particle; not a number where it could not be predicted.
    lightness
        By how much the middle of each cube, as the network saw it, is lighter than its
        surroundings, in deviations of the cube.
    faults
        Place in the block → why that particle could not be predicted.
    """

    logits: Float[NDArray[np.float32], "n class"]
    lightness: Float[NDArray[np.float32], " n"]
    faults: dict[int, str]


class Journal:
    """Finished blocks of one prediction."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def finished(self) -> frozenset[int]:
        """Numbers of the blocks that are there."""
        return frozenset(int(path.stem) for path in self.folder.glob("[0-9]*.npz"))

    def record(self, number: int, answers: Answers) -> None:
        """Keep the answers of a block."""
        faults = json.dumps({str(place): why for place, why in answers.faults.items()})
        with (
            replacing(self._path(number), overwrite=True) as temporary,
            temporary.open("wb") as file,
        ):
            np.savez(
                file, logits=answers.logits, lightness=answers.lightness,
                faults=np.frombuffer(faults.encode(), np.uint8),
            )  # fmt: skip

    def read(self, number: int, count: int) -> Answers | None:
        """Answers of a block of so many particles; None if its file is damaged."""
        try:
            with np.load(self._path(number), allow_pickle=False) as file:
                faults = json.loads(file["faults"].tobytes())
                answers = Answers(
                    file["logits"], file["lightness"], {int(at): why for at, why in faults.items()}
                )
        except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return answers if len(answers.logits) == len(answers.lightness) == count else None

    def forget(self, number: int) -> None:
        """Drop a block whose file is damaged."""
        self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:07d}.npz"


def journal_folder(out: Path) -> Path:
    """Where the journal of an output is kept while the work is going on."""
    return out.with_name(f".{out.name}.journal")


@contextmanager
def open_journal(out: Path, plan: dict[str, object], *, anew: bool) -> Iterator[Journal]:
    """Journal of an output, new or gone on with; removed at a clean exit, kept at any other.

    Parameters
    ----------
    out
        The output.
    plan
        What the answers depend on. It is compared with that of the journal that is there.
    anew
        Drop what an earlier run has finished.

    Raises
    ------
    ValueError
        If a journal is there that was begun with something else; the message names it.
    BlockingIOError
        If another process is at work on this output.
    """
    folder = journal_folder(out)
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder.with_name(f"{folder.name}.{LOCK_FILE}"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        msg = f"another process is at work on {out}: wait for it, or give another --out"
        raise BlockingIOError(msg) from None
    try:
        if anew:
            shutil.rmtree(folder)
            folder.mkdir(exist_ok=True)
        remove_leftovers(folder)
        _agree(folder / PLAN_FILE, plan, out)
        yield Journal(folder)
        shutil.rmtree(folder)
    finally:
        if folder.is_dir() and not any(folder.glob("*.npz")):
            shutil.rmtree(folder)  # nothing was finished
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _agree(path: Path, plan: dict[str, object], out: Path) -> None:
    """Write the plan, or refuse to go on with another one."""
    if not path.is_file():
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    given = json.loads(json.dumps(plan))
    changed = sorted(key for key in begun.keys() | given.keys() if begun.get(key) != given.get(key))
    if changed:
        msg = (
            f"{out} was begun with another {', '.join(changed)} ({changed[0]} "
            f"{_short(begun.get(changed[0]))}, now {_short(given.get(changed[0]))}): give the same "
            "command to go on, --overwrite to start anew, or another --out"
        )
        raise ValueError(msg)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"

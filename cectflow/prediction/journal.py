"""Journal: what a prediction has finished, beside its output, so that a rerun goes on from it.

A folder ``.OUT.journal`` holds ``plan.json``, which says of what work it is, and a file for each
finished block. A kill loses the blocks in hand and nothing else. It is removed when the output is
there.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from cectflow.files import remove_leftovers, replacing

__all__ = ["Journal", "begun_outputs", "journal_folder", "open_journal", "peek_journal", "stamp_of"]

PLAN_FILE = "plan.json"
LOCK_FILE = "lock"
BLOCK_FILE = re.compile(r"([0-9]{7,})\.npz")
DIGEST = re.compile(r"[0-9a-f]{64}")

Content = TypeVar("Content")


class Journal:
    """Finished blocks of one prediction.

    Attributes
    ----------
    folder
        Where it is.
    is_kept
        Keep it at a clean exit, too: something has failed that the same command may do later.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_kept = False

    def finished(self) -> frozenset[int]:
        """Numbers of the blocks that are there."""
        names = (BLOCK_FILE.fullmatch(path.name) for path in self.folder.iterdir())
        return frozenset(int(name[1]) for name in names if name)

    def record(self, number: int, content: Mapping[str, NDArray[Any]]) -> None:
        """Keep what was found of a block."""
        with (
            replacing(self._path(number), overwrite=True) as temporary,
            temporary.open("wb") as file,
        ):
            np.savez(file, allow_pickle=False, **content)

    def read(
        self, number: int, understand: Callable[[Mapping[str, NDArray[Any]]], Content]
    ) -> Content | None:
        """What was found of a block.

        Parameters
        ----------
        number
            Of the block.
        understand
            Makes of the arrays what they stand for; raises ValueError or KeyError if it cannot.

        Returns
        -------
        Content | None
            None if the block's file is damaged.
        """
        try:
            with (
                # Opened here: numpy leaves a file open that is no archive.
                self._path(number).open("rb") as stream,
                np.load(stream, allow_pickle=False) as file,
            ):
                return understand(file)
        except (
            # RuntimeError: damage can look like a zip file that is encrypted or packed otherwise.
            ValueError, OSError, KeyError, EOFError, RuntimeError, AttributeError, TypeError,
            zipfile.BadZipFile, zlib.error,
        ):  # fmt: skip
            return None

    def forget(self, number: int) -> None:
        """Drop a block whose file is damaged."""
        self._path(number).unlink(missing_ok=True)

    def note(self, name: str, content: object) -> None:
        """Keep what is found once, before all blocks, as JSON."""
        with replacing(self.folder / f"{name}.json", overwrite=True) as temporary:
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")

    def noted(self, name: str) -> object:
        """What :meth:`note` has kept; None where there is nothing, or it is damaged."""
        try:
            return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:07d}.npz"


def stamp_of(path: Path) -> tuple[int, int]:
    """Size and time of a file, by which a change of it is noticed."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def journal_folder(out: Path) -> Path:
    """Where the journal of an output is kept while the work is going on."""
    return out.with_name(f".{out.name}.journal")


def begun_outputs(out: Path) -> frozenset[Path]:
    """Files that an unfinished run with this output was allowed to write; none without one."""
    try:
        return frozenset(map(Path, _read_plan(journal_folder(out) / PLAN_FILE, out)["outputs"]))
    except (OSError, ValueError):
        return frozenset()


def peek_journal(out: Path, plan: dict[str, object]) -> Journal | None:
    """Journal that a call with this plan would go on with; None without one. Nothing is written.

    Raises
    ------
    ValueError
        If a journal is there that was begun with something else; the message names it.
    """
    folder = journal_folder(out)
    path = folder / PLAN_FILE
    if not path.is_file():
        return None
    _refuse_change(_read_plan(path, out)["plan"], json.loads(json.dumps(plan)), out)
    return Journal(folder)


@contextmanager
def open_journal(
    out: Path, plan: dict[str, object], *, anew: bool, outputs: Iterable[Path] = ()
) -> Iterator[Journal]:
    """Journal of an output, new or gone on with; removed at a clean exit, kept at any other.

    Parameters
    ----------
    out
        The output.
    plan
        What the answers depend on. It is compared with that of the journal that is there.
    anew
        Drop what an earlier run has finished.
    outputs
        All files that the run writes (:func:`begun_outputs`).

    Raises
    ------
    ValueError
        If a journal is there that was begun with something else; the message names it.
    BlockingIOError
        If another process is at work on this output.
    """
    folder = journal_folder(out)
    lock = FileLock(folder.with_name(f"{folder.name}.{LOCK_FILE}"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        msg = f"another process is at work on {out}: wait for it, or give another --out"
        raise BlockingIOError(msg) from None
    except OSError as error:
        msg = f"nothing can be written into {out.parent} ({error.strerror}): give another --out"
        raise type(error)(msg) from None
    try:
        if anew and folder.is_dir():
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        remove_leftovers(folder)
        _agree(folder / PLAN_FILE, plan, out, {str(path.resolve()) for path in outputs})
        journal = Journal(folder)
        yield journal
        if not journal.is_kept:
            shutil.rmtree(folder)
    finally:
        if folder.is_dir() and not _is_needed(folder, out):
            shutil.rmtree(folder)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _is_needed(folder: Path, out: Path) -> bool:
    """Whether a rerun can go on from it: something is finished, or outputs are there already."""
    return bool(Journal(folder).finished()) or any(path.exists() for path in begun_outputs(out))


def _agree(path: Path, plan: dict[str, object], out: Path, outputs: set[str]) -> None:
    """Write the plan, or refuse to go on with another one."""
    given = json.loads(json.dumps(plan))
    if path.is_file():
        begun = _read_plan(path, out)
        _refuse_change(begun["plan"], given, out)
        outputs = outputs | {*begun["outputs"]}
    content = {"plan": given, "outputs": sorted(outputs)}
    with replacing(path, overwrite=True) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_plan(path: Path, out: Path) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content["plan"], dict) and isinstance(content["outputs"], list):
            return content
    except (ValueError, KeyError, TypeError):
        pass
    msg = f"{path}, which says how {out} was begun, is damaged: start anew with --overwrite"
    raise ValueError(msg)


def _refuse_change(begun: dict[str, object], given: dict[str, object], out: Path) -> None:
    changed = sorted(key for key in begun.keys() | given.keys() if begun.get(key) != given.get(key))
    if changed:
        named = ", ".join(_change(key, begun.get(key), given.get(key)) for key in changed)
        msg = (
            f"{out} was begun with another {named}: give the same command to go on, --overwrite "
            "to start anew, or another --out"
        )
        raise ValueError(msg)


def _change(key: str, begun: object, given: object) -> str:
    if DIGEST.fullmatch(str(begun)) or DIGEST.fullmatch(str(given)):
        return key
    return f"{key} ({begun}, now {given})"

"""Files and folders that appear under their names when they are complete, or not at all."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "appearing",
    "refuse_existing",
    "refuse_existing_folder",
    "remove_leftovers",
    "remove_leftovers_of",
    "replacing",
    "sha256_of",
]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What an error says when a disk is full, a quota or a file's largest size is met."""


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Temporary path beside the given one that takes its place at a clean exit.

    On an error the temporary file is removed and the given path stays as it was, so no reader ever
    sees half a file.

    Raises
    ------
    OSError
        If the disk is full, or a limit on the size of files is met; with the space there is.
    FileExistsError
        If the path exists and is not to be overwritten; the message names ``--overwrite``.
    FileNotFoundError
        If the folder does not exist.
    """
    if path.exists() and not overwrite:
        msg = f"{path} exists: choose another name, or replace it with --overwrite"
        raise FileExistsError(msg)
    if not path.parent.is_dir():
        msg = f"{path} cannot be written: there is no folder {path.parent}"
        raise FileNotFoundError(msg)
    temporary = _beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        size = temporary.stat().st_size if temporary.exists() else 0
        temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        msg = (
            f"{path} could not be written, {error.strerror}: it needs at least {size / 1e6:.3f} "
            f"MB, {free / 1e6:.3f} MB are free; make room, then give the same command again"
        )
        raise OSError(msg) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Temporary folder that takes the place of an absent or empty one at a clean exit.

    On an error it is removed with all that was written into it.

    Raises
    ------
    FileExistsError
        If the folder exists and is not empty.
    """
    refuse_existing_folder(folder)
    target = folder.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    temporary.mkdir()
    try:
        yield temporary
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_existing(
    paths: Iterable[Path | None],
    *,
    overwrite: bool,
    inputs: Iterable[Path] = (),
    begun: frozenset[Path] = frozenset(),
) -> None:
    """Refuse output paths that exist or whose folder is missing, before any work is done.

    Parameters
    ----------
    paths
        Of the outputs; None: not written.
    overwrite
        Replace files that exist.
    inputs
        Files that are read, which no output may replace.
    begun
        Outputs that an unfinished run may have left, which may be replaced.

    Raises
    ------
    FileExistsError
        If a file exists and may not be replaced.
    FileNotFoundError
        If a parent folder does not exist.
    ValueError
        If an output is an input, or two outputs are one file.
    IsADirectoryError
        If an output is a folder.
    """
    given = [path for path in paths if path is not None]
    taken: dict[Path, str] = {}
    if any(path.exists() for path in given):  # what is absent is no input, of which there are many
        taken = {path.resolve(): "is the input" for path in inputs}
    for path in given:
        resolved = path.resolve()
        if resolved in taken:
            msg = f"{path} {taken[resolved]}: give the output another name"
            raise ValueError(msg)
        taken[resolved] = "is given for two outputs"
        if path.is_dir():
            msg = f"{path} is a folder: expected the name of a file to write"
            raise IsADirectoryError(msg)
        if path.exists() and not overwrite and resolved not in begun:
            msg = f"{path} exists: give another --out, or --overwrite to replace it"
            raise FileExistsError(msg)
        if not path.parent.is_dir():
            msg = f"folder {path.parent} of the output {path.name} does not exist: create it first"
            raise FileNotFoundError(msg)


def refuse_existing_folder(folder: Path) -> None:
    """Refuse an output folder that holds something, before any work is done.

    Raises
    ------
    FileExistsError
        If it exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        msg = f"{folder} exists and is not empty: give another folder, or remove it first"
        raise FileExistsError(msg)


def remove_leftovers(folder: Path) -> None:
    """Remove from a folder what a killed process left there under a temporary name.

    No other process may be writing into it.
    """
    _remove(folder.glob(".*.tmp"))


def remove_leftovers_of(path: Path) -> None:
    """Remove what a process that was killed in the midst of writing a file left beside it.

    No other process may be writing it.
    """
    _remove(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """Hidden name on the same file system, which no other process chooses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")

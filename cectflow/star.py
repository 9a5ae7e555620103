"""STAR files: blocks in, blocks out, with every name and digit as it was.

Files of a million rows pass through in pieces: neither their text nor their rows as Python objects
are ever in memory as a whole. That is why starfile does not read them: of 262 MB, 24 columns, it
makes a process of 2.3 GB, this one of 0.8 GB.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd
import starfile

__all__ = ["Blocks", "format_star", "read_star", "refuse_unwritable", "star_pieces"]

Blocks = dict[str, pd.DataFrame | dict[str, Any]]
"""Of a STAR file, by name, in its order: a table for each loop, a dict for key-value pairs."""

PIECE_ROWS = 20_000
"""Rows of a table that are formatted at a time."""

_starfile: Any = starfile  # whose annotations are older than its behaviour
# Names and paths that look like numbers ("001", the PDB entry 1e10) stay as they are.
_TEXT_COLUMN = re.compile(r"\w*(?:Name|File|Hash)")
_VALUE = re.compile(r'"[^"]*"?|\S+')
_QUOTED = re.compile("[#\"']")
_BLOCK = re.compile(r"[ \t]*data_(.*)")
_NOT_A_NUMBER = ["nan", "NaN", "<NA>"]


def read_star(path: Path) -> Blocks:
    """Blocks of a STAR file, as starfile reads them; one without a name is called ``""``.

    Columns and values whose names end in ``Name``, ``File`` or ``Hash`` are text.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no STAR file, has a block or a column twice, or a row is cut off.
    """
    if not path.is_file():
        msg = f"there is no file {path}"
        raise FileNotFoundError(msg)
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = _Lines(file)
            blocks = _parse(lines)
    except (ValueError, TypeError, KeyError, pd.errors.ParserError) as error:
        msg = f"{path} is not a STAR file: {error}"
        raise ValueError(msg) from None
    if not blocks:
        msg = f"{path} is not a STAR file: it has no line that begins with data_"
        raise ValueError(msg)
    _refuse_twice(path, "block", lines.blocks)
    for name, block in blocks.items():
        if isinstance(block, pd.DataFrame):
            _refuse_twice(path, "column", list(map(str, block)))
            _refuse_cut_off(path, name, block)
    return blocks


def format_star(blocks: Blocks) -> str:
    """Text of a STAR file; numbers have every digit they hold, and no time of day is in it."""
    return "".join(star_pieces(blocks))


def star_pieces(blocks: Blocks) -> Iterator[str]:
    """The text of :func:`format_star`, some thousand rows at a time."""
    yield "# Written by cectflow\n\n\n"  # in place of starfile's line, which holds the time
    for name, block in blocks.items():
        if isinstance(block, dict):
            yield _format_block(name, block)
            continue
        head = _format_block(name, block.iloc[:0])[:-2]
        yield head
        for start in range(0, len(block), PIECE_ROWS):
            text = _format_block(name, block.iloc[start : start + PIECE_ROWS])
            yield text[len(head) : -2]
        yield "\n\n"


def _format_block(name: str, block: pd.DataFrame | dict[str, Any]) -> str:
    text: str = _starfile.to_string({name: block}, float_format=None)
    return text.split("\n", 3)[3]


def refuse_unwritable(blocks: Blocks) -> None:
    """Refuse names and texts that a STAR file would not give back as they were.

    Raises
    ------
    ValueError
        With the block and column of the first.
    """
    for name, block in blocks.items():
        rows = pd.DataFrame([block]) if isinstance(block, dict) else block
        for number, column in enumerate(map(str, rows)):
            where = f"column {column!r} of block {name!r}"
            if not column or any(not c.isprintable() or c in " #\"'" for c in column):
                msg = f"{where}: a STAR file's columns have names without spaces, quotes and #"
                raise ValueError(msg)
            if pd.api.types.is_numeric_dtype(rows.iloc[:, number]):
                continue
            for row, value in enumerate(rows.iloc[:, number]):
                text = str(value)
                begins_block = number == 0 and text.startswith(("data_", "loop_", "_"))
                if begins_block or not text.isprintable() or _QUOTED.search(text):
                    fault = "begins like a block" if begins_block else "holds quotes, # or breaks"
                    msg = f"{where}, row {row}: {text!r} {fault}, a STAR file would not keep it"
                    raise ValueError(msg)


def _refuse_twice(path: Path, what: str, names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        msg = f"{path} has the {what} {twice[0]!r} more than once: remove or rename the others"
        raise ValueError(msg)


def _refuse_cut_off(path: Path, name: str, rows: pd.DataFrame) -> None:
    """Refuse a row of fewer values than columns, which pandas fills up with NaN or nothing."""
    last = rows.iloc[:, -1] if len(rows.columns) else pd.Series(dtype=float)
    if not (last.isna() | (last.astype(object) == "")).any():
        return
    row = -1
    for line in _lines_of(path, name):
        filled = line.split("#")[0].strip()
        if not filled or filled.startswith(("_", "loop_")):
            continue
        row += 1
        count = len(_VALUE.findall(filled.replace("'", '"')))
        if count < len(rows.columns):
            msg = (
                f"{path}: row {row} of block {name!r} has {count} values for "
                f"{len(rows.columns)} columns: the file may be cut off, copy it again"
            )
            raise ValueError(msg)


def _lines_of(path: Path, name: str) -> Iterator[str]:
    """Lines of the first block of this name."""
    inside = False
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            begun = _BLOCK.match(line)
            if begun is None:
                if inside:
                    yield line
            elif inside:
                return
            else:
                inside = begun[1].strip() == name.strip()


class _Lines:
    """Lines of a file without the space around them, one after the other.

    Attributes
    ----------
    current
        The line at hand; None at the end.
    blocks
        Names of all blocks that began so far.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.current: str | None = None
        self.blocks: list[str] = []
        self.advance()

    def advance(self) -> None:
        """Go to the next line."""
        line = self._file.readline()
        self.current = line.strip() if line else None
        if self.in_new_block:
            self.blocks.append(line.strip()[5:].strip())

    @property
    def in_new_block(self) -> bool:
        """Whether a block begins here."""
        return self.current is not None and self.current.startswith("data_")


class _Body:
    """The rows of a table as a file that pandas reads piece by piece."""

    def __init__(self, lines: _Lines) -> None:
        self._lines = lines
        self._rest = ""

    def read(self, size: int = -1) -> str:
        """So many characters, or all that are left."""
        parts, count, lines = [self._rest], len(self._rest), self._lines
        while lines.current is not None and not lines.in_new_block and not 0 <= size <= count:
            parts.append(lines.current.replace("'", '"') + "\n")
            count += len(parts[-1])
            lines.advance()
        text = "".join(parts)
        end = len(text) if size < 0 else size
        self._rest = text[end:]
        return text[:end]

    def __iter__(self) -> Iterator[str]:
        yield from self.read().splitlines(keepends=True)


def _parse(lines: _Lines) -> Blocks:
    """Blocks of a file, by starfile's rules."""
    blocks: Blocks = {}
    while lines.current is not None:
        if not lines.in_new_block:
            lines.advance()
            continue
        name = lines.current[5:]
        while lines.current is not None and not lines.current.startswith(("loop_", "_")):
            lines.advance()
        if lines.current is None:
            msg = f"block {name!r} is empty"
            raise ValueError(msg)
        is_table = lines.current.startswith("loop_")
        blocks[name] = _parse_table(lines) if is_table else _parse_pairs(lines)
    return blocks


def _parse_pairs(lines: _Lines) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    while lines.current is not None and not lines.current.startswith("data"):
        if lines.current.startswith("_"):
            key, value = shlex.split(lines.current)
            pairs[key[1:]] = value if _TEXT_COLUMN.fullmatch(key[1:]) else _as_number(value)
        lines.advance()
    return pairs


def _parse_table(lines: _Lines) -> pd.DataFrame:
    lines.advance()
    names: list[str] = []
    while lines.current is not None and lines.current.startswith("_"):
        names.append(lines.current.split()[0][1:])
        lines.advance()
    while lines.current == "":
        lines.advance()
    if lines.current is None or lines.in_new_block:
        return pd.DataFrame(np.zeros((0, len(names))), columns=names)
    of_text = {at: str for at, name in enumerate(names) if _TEXT_COLUMN.fullmatch(name)}
    body: Any = _Body(lines)
    rows = pd.read_csv(
        body, sep=r"\s+", header=None, comment="#", dtype=of_text, keep_default_na=False,
        na_values=_NOT_A_NUMBER, engine="c",
    )  # fmt: skip
    for at in range(len(rows.columns)):
        if at in of_text or pd.api.types.is_numeric_dtype(rows[at]):
            continue
        try:
            numbers = pd.to_numeric(rows[at])
        except ValueError:
            continue
        if not numbers.isna().all():
            rows[at] = numbers
    rows.columns = pd.Index(names)
    return rows


def _as_number(value: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value

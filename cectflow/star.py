"""STAR files: blocks in, blocks out, with every name and digit as it was."""

from __future__ import annotations

import linecache
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import starfile

__all__ = ["Blocks", "format_star", "read_star", "refuse_unwritable"]

Blocks = dict[str, pd.DataFrame | dict[str, Any]]
"""Of a STAR file, by name, in its order: a table for each loop, a dict for key-value pairs."""

_starfile: Any = starfile  # whose annotations are older than its behaviour
# Names and paths that look like numbers ("001", the PDB entry 1e10) stay as they are.
_TEXT_COLUMN = re.compile(r"^\s*_(\w*(?:Name|File|Hash))\b", re.MULTILINE)
_VALUE = re.compile(r'"[^"]*"?|\S+')
_QUOTED = re.compile("[#\"']")
_BLOCK = re.compile(r"^[ \t]*data_(.*)$", re.MULTILINE)


def read_star(path: Path) -> Blocks:
    """Blocks of a STAR file; one without a name is called ``""``.

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
    linecache.checkcache(str(path))  # through which starfile reads, without looking for changes
    try:
        text = path.read_text(encoding="utf-8")
        text_columns = sorted(set(_TEXT_COLUMN.findall(text)))
        blocks = _starfile.read(path, always_dict=True, parse_as_string=text_columns)
    except (ValueError, TypeError, KeyError, pd.errors.ParserError) as error:
        linecache.clearcache()
        msg = f"{path} is not a STAR file: {error}"
        raise ValueError(msg) from None
    if not blocks:
        msg = f"{path} is not a STAR file: it has no line that begins with data_"
        raise ValueError(msg)
    _refuse_twice(path, "block", [name.strip() for name in _BLOCK.findall(text)])
    for name, block in blocks.items():
        if isinstance(block, pd.DataFrame):
            _refuse_twice(path, "column", list(map(str, block)))
            _refuse_cut_off(path, name, block, text)
    return dict(blocks)


def format_star(blocks: Blocks) -> str:
    """Text of a STAR file; numbers have every digit they hold, and no time of day is in it."""
    text: str = _starfile.to_string(blocks, float_format=None)
    return "# Written by cectflow" + text[text.index("\n") :]  # in place of the time


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


def _refuse_cut_off(path: Path, name: str, rows: pd.DataFrame, text: str) -> None:
    """Refuse a row of fewer values than columns, which pandas fills up with NaN or nothing."""
    last = rows.iloc[:, -1] if len(rows.columns) else pd.Series(dtype=float)
    if not (last.isna() | (last.astype(object) == "")).any():
        return
    body = text[next(m.end() for m in _BLOCK.finditer(text) if m[1].strip() == name.strip()) :]
    lines = [line.split("#")[0].strip() for line in re.split(_BLOCK, body)[0].splitlines()]
    filled = [line for line in lines if line and not line.startswith(("_", "loop_"))]
    for row, line in enumerate(filled):
        count = len(_VALUE.findall(line.replace("'", '"')))
        if count < len(rows.columns):
            msg = (
                f"{path}: row {row} of block {name!r} has {count} values for "
                f"{len(rows.columns)} columns: the file may be cut off, copy it again"
            )
            raise ValueError(msg)

"""STAR files in pieces: the same blocks and the same text as by starfile at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import starfile
from hypothesis import given, settings
from hypothesis import strategies as st

import cectflow.star
from cectflow.star import format_star, read_star

REAL = sorted((Path(__file__).resolve().parents[2] / "shared" / "data" / "star").glob("*.star"))
_starfile: Any = starfile

WORDS = st.sampled_from(
    ["TS_01", "001", "1e10", "nan", "<NA>", "a/b.mrcs", "3@x.mrcs", '"two words"', "'x y'", '""',
     "NA", "True", "-1", "2.50", "1e-3", "0x1f", "inf", "x_", "é", "1_000"],
)  # fmt: skip
NAMES = st.sampled_from(
    ["rlnTomoName", "rlnImageName", "rlnCoordinateX", "rlnClassNumber", "rlnBeamFile", "wrpHash",
     "rlnFileType"],
)  # fmt: skip
SPACES = st.sampled_from([" ", "\t", "   "])
ENDS = st.sampled_from(["\n", " \n", "\n\n", " # remark\n"])


@st.composite
def tables(draw: st.DrawFn) -> str:
    """A block as some program might write it."""
    names = draw(st.lists(NAMES, min_size=1, max_size=5, unique=True))
    rows = draw(st.lists(st.lists(WORDS, min_size=len(names), max_size=len(names)), max_size=8))
    gap, end = draw(SPACES), draw(ENDS)
    head = "".join(f"_{name} #{number}\n" for number, name in enumerate(names, 1))
    return f"loop_\n{head}" + "".join(gap.join(row) + end for row in rows) + draw(ENDS)


@st.composite
def pairs(draw: st.DrawFn) -> str:
    """A block of keys and values."""
    content = draw(st.dictionaries(NAMES, WORDS, min_size=1, max_size=4))
    return "".join(f"_{name}   {value}\n" for name, value in content.items())


FILES = st.lists(tables() | pairs(), min_size=1, max_size=3).map(
    lambda blocks: "".join(f"\ndata_b{at}\n\n{block}" for at, block in enumerate(blocks))
)


def by_starfile(path: Path) -> dict[str, Any]:
    """What starfile makes of a file, with the columns as text that cectflow keeps as text."""
    known = re.findall(r"^\s*_(\w*(?:Name|File|Hash))\b", path.read_text("utf-8"), re.MULTILINE)
    blocks: dict[str, Any] = _starfile.read(path, always_dict=True, parse_as_string=known)
    return blocks


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, block in expected.items():
        if isinstance(block, dict):
            assert repr(found[name]) == repr(block)
        else:
            pd.testing.assert_frame_equal(found[name], block)


def has_cut_off_row(block: Any) -> bool:
    """Whether a row may have had no last value."""
    return isinstance(block, pd.DataFrame) and bool(
        (block.iloc[:, -1].isna() | (block.iloc[:, -1].astype(object) == "")).any()
    )


@given(text=FILES)
@settings(max_examples=300, deadline=None)
def test_blocks_are_those_that_starfile_reads(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("star") / "x.star"
    path.write_text(text, encoding="utf-8")
    try:
        expected = by_starfile(path)
    except (ValueError, TypeError, KeyError):
        with pytest.raises(ValueError, match="is not a STAR file"):
            read_star(path)
        return
    if any(has_cut_off_row(block) for block in expected.values()):
        return  # what starfile fills up is refused, see test_particles.py
    assert_same(read_star(path), expected)


@given(text=FILES, rows=st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_text_in_pieces_is_that_of_starfile(
    text: str, rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("star") / "x.star"
    path.write_text(text, encoding="utf-8")
    try:
        blocks = read_star(path)
    except ValueError:
        return
    whole: str = _starfile.to_string(blocks, float_format=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cectflow.star, "PIECE_ROWS", rows)
        assert format_star(blocks) == "# Written by cectflow" + whole[whole.index("\n") :]


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_files_are_read_and_written_as_by_starfile(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = read_star(path)
    assert_same(blocks, by_starfile(path))
    whole: str = _starfile.to_string(blocks, float_format=None)
    monkeypatch.setattr(cectflow.star, "PIECE_ROWS", 7)
    assert format_star(blocks) == "# Written by cectflow" + whole[whole.index("\n") :]


def test_a_long_table_keeps_every_row_and_digit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    count = 50_001
    rows = pd.DataFrame(
        {
            "rlnTomoName": [f"TS_{each % 7:02d}" for each in range(count)],
            "rlnCoordinateX": generator.normal(size=count),
            "rlnClassNumber": np.arange(count),
            "rlnRemark": ["two words" if each % 3 else "" for each in range(count)],
        }
    )
    path = tmp_path / "long.star"
    path.write_text(format_star({"particles": rows}), encoding="utf-8")
    found = read_star(path)["particles"]
    assert isinstance(found, pd.DataFrame)
    pd.testing.assert_frame_equal(found, rows)


def test_columns_of_one_repeated_text_are_written_like_any_other() -> None:
    plain = pd.DataFrame({"a": [1, 2, 3], "m": ["a model"] * 3, "d": ["sha256:0"] * 3})
    repeated = plain.assign(m=pd.Categorical(plain["m"]), d=pd.Categorical(plain["d"]))
    assert format_star({"x": repeated}) == format_star({"x": plain})

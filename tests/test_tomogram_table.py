"""Tables of tomograms say size, pixel size and binning, or are refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cectflow.tomogram_table import TomogramInfo, find_tomogram, read_tomograms

COLUMNS = (
    "rlnTomoName",
    "rlnTomoSizeX",
    "rlnTomoSizeY",
    "rlnTomoSizeZ",
    "rlnTomoTiltSeriesPixelSize",
)


def write(
    path: Path, *rows: tuple[Any, ...], columns: tuple[str, ...] = COLUMNS, block: str = "global"
) -> Path:
    header = "".join(f"_{name} #{number}\n" for number, name in enumerate(columns, start=1))
    lines = "".join(" ".join(map(str, row)) + "\n" for row in rows)
    path.write_text(f"data_{block}\n\nloop_\n{header}{lines}\n", encoding="utf-8")
    return path


def test_the_real_table_says_what_warptools_wrote(shared_data: Path) -> None:
    found = read_tomograms(shared_data / "star" / "relion5_tomograms.star")
    assert list(found) == [f"Unt_{number}.tomostar" for number in ("083", "050", "076", "088")]
    for info in found.values():
        assert info == TomogramInfo((4400, 6000, 1400), 1.667, None)
        assert info.voxel_size is None
        assert info.shape is None


def test_names_sizes_and_binning_are_read(tmp_path: Path) -> None:
    rows = (("001", 4401, 6000, 1400, 1.5, 4), ("TS_2", 100, 200, 300, 1.5, 7.5))
    path = write(tmp_path / "t.star", *rows, columns=(*COLUMNS, "rlnTomoTomogramBinning"))
    found = read_tomograms(path)
    assert found == {
        "001": TomogramInfo((4401, 6000, 1400), 1.5, 4.0),
        "TS_2": TomogramInfo((100, 200, 300), 1.5, 7.5),
    }
    assert found["001"].voxel_size == 6.0
    assert found["001"].shape == (350, 1500, 1100)
    assert found["001"].extent_xyz == (6601.5, 9000.0, 2100.0)
    assert read_tomograms(write(tmp_path / "u.star", rows[1][:5], block="tomograms"))


def test_a_block_without_a_loop_is_one_tomogram(tmp_path: Path) -> None:
    lines = "".join(
        f"_{name} {value}\n" for name, value in zip(COLUMNS, ("a", 4, 5, 6, 2), strict=True)
    )
    (tmp_path / "t.star").write_text(f"data_global\n\n{lines}")
    assert read_tomograms(tmp_path / "t.star") == {"a": TomogramInfo((4, 5, 6), 2.0)}


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (("a", 4.5, 5, 6, 2), "row 1: a size in pixels is a whole number, given 4.5"),
        (("a", 0, 5, 6, 2), "0 x 5 x 6 pixels .* whole numbers from 1"),
        (("a", 2**31, 5, 6, 2), "2147483648 x 5 x 6 pixels"),
        (("a", "nan", 5, 6, 2), "tomogram 'a' in row 1"),
        (("a", "inf", 5, 6, 2), "tomogram 'a' in row 1"),
        (("a", 4, 5, 6, 0), "positive number of angstrom, given 0"),
        (("a", 4, 5, 6, "nan"), "positive number of angstrom, given nan"),
        (("a", 4, 5, 6, "wide"), "'wide'"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    tmp_path: Path, row: tuple[Any, ...], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        read_tomograms(write(tmp_path / "t.star", row))


def test_other_tables_are_refused_with_what_they_lack(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_tomograms(tmp_path / "absent.star")
    row = ("a", 4, 5, 6, 2)
    with pytest.raises(ValueError, match="describes tomogram 'a' twice, again in row 2"):
        read_tomograms(write(tmp_path / "t.star", row, row))
    with pytest.raises(ValueError, match="lacks rlnTomoTiltSeriesPixelSize: expected RELION's"):
        read_tomograms(write(tmp_path / "t.star", row[:4], columns=COLUMNS[:4]))
    with pytest.raises(ValueError, match=r"0 tables with rlnTomoSizeX among its blocks \['x'\]"):
        read_tomograms(write(tmp_path / "t.star", row[:1], columns=COLUMNS[:1], block="x"))
    with pytest.raises(ValueError, match=r"a binning is a number from 1 on, given 0.5"):
        TomogramInfo((4, 5, 6), 2.0, 0.5)


def test_tomograms_are_found_with_and_without_the_ending_of_warp() -> None:
    tomograms = dict.fromkeys(("a", "b.tomostar"), TomogramInfo((4, 5, 6), 2.0))
    assert [find_tomogram(tomograms, name) for name in ("a", "a.tomostar", "b", "b.tomostar")] == [
        "a", "a", "b.tomostar", "b.tomostar",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"does not describe 'c': it has a, b.tomostar"):
        find_tomogram(tomograms, "c")

"""Whatever the files of a classification hold, it ends with an exit code of its own.

Damaged tables, volumes and lists, the same ones in every run, through the command line: no
traceback, nothing but whole outputs, and the inputs as they were. ``make fuzz`` tries ten times as
many.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from hostile import FIELDS, overwritten
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cectflow.cli import app, main
from cectflow.particles import read_particles
from cectflow.volume import Volume
from cectflow.volume_writer import write_stack, write_volume

VOXEL_SIZE = 12.0
CODES = {0, 2, 4}
"""Done, refused, done but for some particles."""

PICKS = """
data_optics

loop_
_rlnOpticsGroup #1
_rlnTomoTiltSeriesPixelSize #2
1 12.0

data_particles

loop_
_rlnTomoName #1
_rlnOpticsGroup #2
_rlnCoordinateX #3
_rlnCoordinateY #4
_rlnCoordinateZ #5
_rlnOriginXAngst #6
TS_1 1 10.0 11.0 12.0 0.0
TS_2 1 14.0 12.0 10.0 1.5
TS_1 1 12.0 14.0 11.0 0.0
"""
LISTED = """
data_particles

loop_
_rlnImageName #1
_rlnOpticsGroup #2
000001@cubes.mrcs 1
000003@cubes.mrcs 1
single.mrc 1
"""
TOMOGRAMS = """
data_global

loop_
_rlnTomoName #1
_rlnTomoReconstructedTomogram #2
_rlnTomoSizeX #3
_rlnTomoSizeY #4
_rlnTomoSizeZ #5
_rlnTomoTiltSeriesPixelSize #6
TS_1 TS_1.mrc 24 24 24 12.0
TS_2 TS_2.mrc 24 24 24 12.0
"""
PATHS = "TS_1.mrc\nTS_2.mrc\n"
CSV = "x,y,z,rlnTomoName\n10,11,12,TS_1\n14,12,10,TS_2\n"
TOKENS = st.one_of(
    st.sampled_from([
        "nan", "inf", "-inf", "1e999", "1e308", "-1", "0", "99999999999999999999", "True", "<NA>",
        '""', '"a b"', "'x", '"open', "#", "data_", "data_particles", "loop_", "_rlnImageName",
        "_rlnTomoName", "\t", "\0", "\x1c", "\u2028", "é", "\n", "../x", "/etc/passwd", "..", "/",
        "9@cubes.mrcs", "0@cubes.mrcs", "-1@cubes.mrcs", "²@cubes.mrcs", "x@cubes.mrcs", "@", "1@",
        "TS_1", "TS_3", "TS_1.tomostar", ".tomostar", "{name}", "*", "[", "TS_1.mrc", "cubes.mrcs",
        "single.mrc", "a" * 300, ".", "broken.mrc", "out.star",
    ]),
    st.text(max_size=6),
)  # fmt: skip


def settle(examples: int) -> settings:
    cases = max(1, examples * int(os.environ.get("CECTFLOW_FUZZ_PERCENT", "40")) // 100)
    return settings(
        max_examples=cases, derandomize=True, database=None, deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


@st.composite
def edits(draw: st.DrawFn) -> Callable[[str], str]:
    """An edit of a text: tokens replaced, a line doubled, one left out, its end cut off."""
    tokens = draw(st.lists(st.tuples(st.integers(0, 120), TOKENS), max_size=2))
    doubled = draw(st.none() | st.integers(0, 30))
    without = draw(st.none() | st.integers(0, 30))
    cut = draw(st.one_of(st.none(), st.none(), st.none(), st.integers(0, 400)))

    def apply(text: str) -> str:
        parts = re.split(r"([ ,\n@]+)", text)
        for place, token in tokens:
            parts[place % len(parts)] = token
        lines = "".join(parts).split("\n")
        if doubled is not None:
            lines.insert(doubled % len(lines), lines[doubled % len(lines)])
        if without is not None:
            del lines[without % len(lines)]
        return "\n".join(lines)[:cut]

    return apply


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Header fields of an MRC file replaced, values of its data too, its end cut off."""
    patches = draw(st.lists(st.tuples(st.integers(0, 270), FIELDS), max_size=4))
    cut = draw(st.one_of(st.none(), st.none(), st.integers(0, 20000)))

    def apply(content: bytes) -> bytes:
        return overwritten(content, patches, cut)

    return apply


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    generator = np.random.default_rng(0)
    for name in ("TS_1", "TS_2"):
        data = generator.normal(size=(24, 24, 24)).astype(np.float32)
        write_volume(folder / f"{name}.mrc", Volume(data, VOXEL_SIZE))
    cubes = generator.normal(size=(4, 16, 16, 16)).astype(np.float32)
    write_stack(folder / "cubes.mrcs", cubes, VOXEL_SIZE)
    write_stack(folder / "single.mrc", cubes[:1], VOXEL_SIZE)
    (folder / "broken.mrc").write_bytes((folder / "TS_1.mrc").read_bytes()[:5000])
    (folder / "picks.star").write_text(PICKS)
    return folder


@pytest.fixture(scope="module", autouse=True)
def built_once() -> Iterator[None]:
    """The command line, whose commands take half the time to be put together anew for each case."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cectflow.cli.app", typer.main.get_command(app))
        yield


def check(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str]:
    """Classify; exit code and what was said. The files that are read are as they were."""
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        with pytest.raises(SystemExit) as stop:
            main(
                ["predict", "classify", "--model", str(model), *arguments, "--out", "out.star",
                 "--runtime", "onnxruntime"]
            )  # fmt: skip
        code, said = int(stop.value.code or 0), capsys.readouterr()
        assert code in CODES
        written = {path.name for path in folder.iterdir()} - {path.name for path in before}
        for path, content in before.items():
            assert path.read_bytes() == content
        if code == 2:
            assert len(said.err.strip()) > 20
            assert written == set()
            return code, said.err
        assert written == ({"out.star"} if code == 0 else {"out.star", "out_failures.csv"})
        rows = read_particles(folder / "out.star").rows
        assert len(rows) > 0
        failed = rows["cectflowClassName"] == "none"
        assert failed.any() == (code == 4)
        assert np.isfinite(rows[["cectflowProbability", "cectflowEntropy"]]).all(axis=None)
        for name in written:
            (folder / name).unlink()
        return code, said.out


def write_text(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("tomogram", ["{name}.mrc", "TS_*.mrc", "tomograms.star"])
@settle(55)
@given(edit=edits())
def test_damaged_picks(
    classifier: Path, folder: Path, capsys: Any, tomogram: str, edit: Callable[[str], str]
) -> None:
    write_text(folder / "tomograms.star", TOMOGRAMS)
    write_text(folder / "given.star", edit(PICKS))
    check(classifier, folder, capsys, "--tomogram", tomogram, "--particles", "given.star")


@settle(90)
@given(edit=edits())
def test_damaged_lists_of_subtomograms(
    classifier: Path, folder: Path, capsys: Any, edit: Callable[[str], str]
) -> None:
    write_text(folder / "given.star", edit(LISTED))
    check(classifier, folder, capsys, "--subtomograms", "given.star")


@settle(65)
@given(edit=edits())
def test_damaged_tables_of_tomograms(
    classifier: Path, folder: Path, capsys: Any, edit: Callable[[str], str]
) -> None:
    write_text(folder / "given.star", edit(TOMOGRAMS))
    check(classifier, folder, capsys, "--tomogram", "given.star", "--particles", "picks.star")


@settle(40)
@given(edit=edits())
def test_damaged_lists_of_tomograms(
    classifier: Path, folder: Path, capsys: Any, edit: Callable[[str], str]
) -> None:
    write_text(folder / "given.txt", edit(PATHS))
    check(classifier, folder, capsys, "--tomogram", "given.txt", "--particles", "picks.star")


@settle(45)
@given(edit=edits())
def test_damaged_csv(
    classifier: Path, folder: Path, capsys: Any, edit: Callable[[str], str]
) -> None:
    write_text(folder / "given.csv", edit(CSV))
    check(classifier, folder, capsys, "--tomogram", "{name}.mrc", "--particles", "given.csv")


@pytest.mark.parametrize("name", ["cubes.mrcs", "single.mrc"])
@settle(40)
@given(damage=damages())
def test_damaged_stacks(
    classifier: Path, folder: Path, capsys: Any, name: str, damage: Callable[[bytes], bytes]
) -> None:
    (folder / "given.mrcs").write_bytes(damage((folder / name).read_bytes()))
    check(classifier, folder, capsys, "--subtomograms", "given.mrcs", "--voxel-size", "12")


@settle(55)
@given(damage=damages())
def test_damaged_tomograms(
    classifier: Path, folder: Path, capsys: Any, damage: Callable[[bytes], bytes]
) -> None:
    (folder / "given.mrc").write_bytes(damage((folder / "TS_1.mrc").read_bytes()))
    write_text(folder / "one.star", PICKS.replace("TS_2", "TS_1"))
    check(
        classifier, folder, capsys, "--tomogram", "given.mrc", "--particles", "one.star",
        "--rescale",
    )  # fmt: skip

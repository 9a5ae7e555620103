"""Whatever a file holds, its reader gives an answer or a clear error: ValueError or OSError.

Thousands of damaged and invented files, the same ones in every run.
"""

from __future__ import annotations

import bz2
import gzip
import re
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hostile import FIELDS, INTEGERS, overwritten
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cectflow.conversion import convert_particles, find_frames
from cectflow.coordinates import CoordinateConvention
from cectflow.particles import ParticleTable, read_particles
from cectflow.placement import coordinates_zyx
from cectflow.star import refuse_unwritable
from cectflow.tomogram_table import read_tomograms
from cectflow.volume import Volume, read_header, read_stack, read_volume
from cectflow.volume_writer import write_volume

MOST_MEMORY = 60e6
"""Bytes, for files of a few kB."""

many = settings(
    max_examples=150, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def attempt(read: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a reader gives; None where it refuses with a message of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", UserWarning)  # what it read past
        try:
            return read(*arguments, **options)
        except (ValueError, OSError) as error:
            said = str(error)
    assert len(said) > 20
    return None


few = settings(many, max_examples=100)


# Volumes

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": lambda content: gzip.compress(content, 1, mtime=0), ".bz2": bz2.compress,
}  # fmt: skip


def em_content() -> bytes:
    header = struct.pack("BBBB3i", 6, 0, 0, 5, 4, 3, 2)
    return header.ljust(512, b"\0") + np.arange(24, dtype="<f4").tobytes()


@pytest.fixture(scope="module")
def mrc_content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "a.mrc"
    write_volume(path, Volume(np.arange(24, dtype=np.float32).reshape(2, 3, 4), 10.5))
    return path.read_bytes()


@st.composite
def damages(draw: st.DrawFn, header: int) -> Callable[[bytes], bytes]:
    """A damage to a file: fields overwritten, most of them of the header, and its end cut off."""
    patches = draw(
        st.lists(st.tuples(st.integers(0, header // 4 - 1), FIELDS), min_size=0, max_size=6)
    )
    sizes = draw(st.none() | st.tuples(INTEGERS, INTEGERS, INTEGERS))
    cut = draw(st.none() | st.integers(0, header + 96))

    def apply(content: bytes) -> bytes:
        first = 1 if header == 512 else 0
        edges = [(first + axis, struct.pack("<i", edge)) for axis, edge in enumerate(sizes or ())]
        return overwritten(content, [*patches, *edges], cut)

    return apply


def check_volume(path: Path, content: bytes) -> None:
    """Read as volume and as stack, with and without a voxel size; what is read is of the file."""
    path.write_bytes(content)
    for options in ({}, {"voxel_size": 10.0}, {"voxel_size": 10.0, "mmap": False}):
        volume = attempt(read_volume, path, **options)
        header = attempt(read_header, path, voxel_size=options.get("voxel_size"))
        if volume is not None:
            assert header == (volume.shape, volume.voxel_size)
            assert volume.voxel_size > 0
            assert min(volume.shape) > 0
            assert volume.data.size == np.asarray(volume.data).reshape(-1).size
        stack = attempt(read_stack, path, **options)
        if stack is not None:
            assert stack[0].ndim == 4
            assert stack[0].nbytes <= 2000
    assert path.read_bytes() == content


@pytest.mark.parametrize("packed", PACKERS)
@many
@given(damage=damages(1024))
def test_damaged_mrc_files(
    tmp_path: Path, mrc_content: bytes, packed: str, damage: Callable[[bytes], bytes]
) -> None:
    check_volume(tmp_path / f"a.mrc{packed}", PACKERS[packed](damage(mrc_content)))


@pytest.mark.parametrize("packed", PACKERS)
@many
@given(damage=damages(512))
def test_damaged_em_files(tmp_path: Path, packed: str, damage: Callable[[bytes], bytes]) -> None:
    check_volume(tmp_path / f"a.em{packed}", PACKERS[packed](damage(em_content())))


@many
@given(
    name=st.sampled_from(["a.mrc", "a.mrcs", "a.em", "a.rec.gz", "a.em.gz"]),
    start=st.sampled_from([b"", b"\x1f\x8b", b"\x1f\x8b\x08\0", b"BZh9", b"\x06\0\0\x05"]),
    content=st.binary(max_size=64) | st.binary(min_size=1024, max_size=1200),
)
def test_volumes_of_random_bytes(tmp_path: Path, name: str, start: bytes, content: bytes) -> None:
    check_volume(tmp_path / name, start + content)


@many
@given(cut=st.integers(0, 400), flip=st.integers(0, 400), value=st.integers(0, 255))
@pytest.mark.parametrize("packed", [".gz", ".bz2"])
def test_packed_files_with_a_broken_stream(
    tmp_path: Path, mrc_content: bytes, packed: str, cut: int, flip: int, value: int
) -> None:
    content = bytearray(PACKERS[packed](mrc_content))
    content[flip % len(content)] = value
    check_volume(tmp_path / f"a.mrc{packed}", bytes(content[: len(content) - cut % len(content)]))


def test_hostile_headers_take_no_memory(tmp_path: Path, mrc_content: bytes) -> None:
    tracemalloc.start()
    try:
        for edge in (2**10, 2**16, 2**21, 2**31 - 1):
            for header, content in ((0, mrc_content), (4, em_content())):
                changed = bytearray(content)
                struct.pack_into("<3i", changed, header, edge, edge, edge)
                for packed, pack in PACKERS.items():
                    path = tmp_path / f"a.{'em' if header else 'mrc'}{packed}"
                    path.write_bytes(pack(bytes(changed)))
                    with pytest.raises(ValueError, match="truncated"):
                        read_volume(path, voxel_size=2.0)
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


# Tables

STAR = """
data_general

_rlnTomoSubTomosAre2DStacks   1

data_optics

loop_
_rlnOpticsGroup #1
_rlnTomoTiltSeriesPixelSize #2
_rlnImagePixelSize #3
1 1.5 6.0
2 1.5 6.0

data_particles

loop_
_rlnTomoName #1
_rlnOpticsGroup #2
_rlnCoordinateX #3
_rlnCoordinateY #4
_rlnCoordinateZ #5
_rlnOriginXAngst #6
_rlnOriginYAngst #7
_rlnOriginZAngst #8
_rlnAngleRot #9
_rlnTomoSubtomogramRot #10
_rlnTomoSubtomogramTilt #11
_rlnTomoSubtomogramPsi #12
TS_1 1 10.0 11.0 12.0 0.0 0.5 0.0 90 0 0 0
TS_1 2 20.0 21.0 22.0 1.0 0.0 0.0 80 10 20 30
TS_2 1 30.5 31.0 32.0 0.0 0.0 2.0 70 0 0 0
"""
TOMOGRAMS = """
data_global

loop_
_rlnTomoName #1
_rlnTomoSizeX #2
_rlnTomoSizeY #3
_rlnTomoSizeZ #4
_rlnTomoTiltSeriesPixelSize #5
_rlnTomoTomogramBinning #6
TS_1 401 300 200 1.5 4
TS_2 400 300 201 1.5 6

data_TS_1

loop_
_rlnTomoProjX #1
_rlnDefocusU #2
[1,0,0,0] 33350.7
"""
CSV = "x,y,z,class,rlnTomoName\n1,2,3,a,TS_1\n4,5,6,b,TS_1\n7.5,8,9,c,TS_2\n"
TOKENS = st.one_of(
    st.sampled_from([
        "nan", "NaN", "inf", "-inf", "1e999", "1e308", "-1e308", "1e-320", "0", "-1", "2147483648",
        "99999999999999999999999", "0x10", "1_000", "True", "None", "<NA>", '""', "''", '"a b"',
        "'x", '"open', "#", ";", "data_", "data_particles", "loop_", "_rlnCoordinateX", "_", ",",
        "_rlnTomoName", "\t", "\0", "\x1c", "\u2028", "é", "[1,2", "1,5", "1.5.5", "stop_", "\n",
    ]),
    st.text(max_size=6),
)  # fmt: skip


@st.composite
def edits(draw: st.DrawFn) -> Callable[[str], str]:
    """An edit of a text: tokens replaced, lines doubled and left out, its end cut off."""
    tokens = draw(st.lists(st.tuples(st.integers(0, 200), TOKENS), max_size=2))
    doubled = draw(st.lists(st.integers(0, 60), max_size=1))
    without = draw(st.lists(st.integers(0, 60), max_size=1))
    # Most texts stay whole, so that what comes after the reading is reached too.
    cut = draw(st.one_of(st.none(), st.none(), st.none(), st.integers(0, 900)))

    def apply(text: str) -> str:
        parts = re.split(r"([ ,\n]+)", text)
        for place, token in tokens:
            parts[place % len(parts)] = token
        lines = "".join(parts).split("\n")
        for place in doubled:
            lines.insert(place % len(lines), lines[place % len(lines)])
        for place in without:
            del lines[place % len(lines)]
            lines = lines or [""]
        return "\n".join(lines)[:cut]

    return apply


def write_text(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return path


def check_particles(path: Path) -> None:
    """Read, locate, convert and write again, as far as the table goes."""
    content = path.read_bytes()
    table = attempt(read_particles, path)
    if table is not None:
        check_table(path, table)
    assert path.read_bytes() == content


def check_table(path: Path, table: ParticleTable) -> None:
    assert len(table) == len(table.rows)
    frame: dict[str, Any] = {"voxel_size": 6.0, "shape": (50, 75, 100)}
    found = attempt(coordinates_zyx, table, **frame)
    if found is not None:
        assert found.shape == (len(table), 3)
        assert np.isfinite(found).all()
    frames = attempt(find_frames, table, voxel_size=6.0, size_xyz=(400, 300, 200), pixel_size=1.5)
    out = path.with_name("out.star")
    for convention in get_args(CoordinateConvention) if frames is not None else ():
        converted = attempt(convert_particles, table, convention, frames)
        if converted is None:
            continue
        assert len(converted) == len(table)
        end = out.with_suffix(".csv") if convention == "csv" else out
        if convention == "csv" or attempt(lambda one: [refuse_unwritable(one)], converted.blocks):
            converted.write(end, overwrite=True)
            again = read_particles(end)
            assert len(again) == len(table)
            assert list(again.rows) == [str(name) for name in converted.rows]


@pytest.mark.parametrize("name", ["relion4", "relion5", "warp"])
@few
@given(edit=edits())
def test_edited_star_files(tmp_path: Path, name: str, edit: Callable[[str], str]) -> None:
    text = STAR
    if name == "relion5":
        text = re.sub(r"rlnCoordinate([XYZ])", r"rlnCenteredCoordinate\1Angst", STAR)
    elif name == "warp":
        text = STAR.replace("TS_1 ", "TS_1.tomostar ").replace("TS_2 ", "TS_2.tomostar ")
    check_particles(write_text(tmp_path / "a.star", edit(text)))


@few
@given(edit=edits())
def test_edited_csv_files(tmp_path: Path, edit: Callable[[str], str]) -> None:
    check_particles(write_text(tmp_path / "a.csv", edit(CSV)))


@many
@given(edit=edits())
def test_edited_tables_of_tomograms(tmp_path: Path, edit: Callable[[str], str]) -> None:
    found = attempt(read_tomograms, write_text(tmp_path / "a.star", edit(TOMOGRAMS)))
    for info in (found or {}).values():
        assert min(info.size_xyz) > 0
        assert np.isfinite(info.extent_xyz).all()
        assert info.shape is None or min(info.shape) > 0


@pytest.mark.parametrize("name", ["a.star", "a.csv"])
@many
@given(
    text=st.one_of(
        st.text(max_size=200),
        st.lists(TOKENS, max_size=40).map(" ".join),
        st.lists(TOKENS, max_size=40).map("\n".join),
    ),
    head=st.sampled_from(["", "data_\n", "data_particles\nloop_\n", "x,y,z\n", "data_a\n_b 1\n"]),
)
def test_tables_of_random_text(tmp_path: Path, name: str, head: str, text: str) -> None:
    check_particles(write_text(tmp_path / name, head + text))
    attempt(read_tomograms, tmp_path / name)


@pytest.mark.parametrize("name", ["a.star", "a.csv"])
@many
@given(content=st.binary(max_size=300))
def test_tables_of_random_bytes(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    check_particles(tmp_path / name)


@pytest.mark.parametrize("name", ["relion5_particles.star", "relion5_tomograms.star"])
@few
@given(share=st.floats(0, 1))
def test_real_tables_cut_off(shared_data: Path, tmp_path: Path, name: str, share: float) -> None:
    content = (shared_data / "star" / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: int(share * len(content))])
    check_particles(path)
    attempt(read_tomograms, path)

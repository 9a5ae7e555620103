"""Volumes keep their numbers through files, and broken files are refused with the reason."""

from __future__ import annotations

import bz2
import errno
import gzip
import os
import struct
import tracemalloc
import warnings
from pathlib import Path

import mrcfile
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cectflow.files import replacing
from cectflow.volume import Volume, all_finite, find_stacks, read_stack, read_volume
from cectflow.volume_writer import (
    create_scratch,
    create_volume,
    write_images,
    write_stack,
    write_volume,
)

KEPT_DTYPES = ["int8", "int16", "uint16", "float16", "float32"]
# Byte offsets of header fields (MRC2014).
MODE, MX, CELLA, MAPC, DMIN, ISPG, EXTRA2, MAP = 12, 28, 40, 64, 76, 88, 112, 208


def counting(shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    return (np.arange(np.prod(shape)) % 120).reshape(shape).astype(dtype)


@pytest.fixture
def mrc(tmp_path: Path) -> Path:
    path = tmp_path / "volume.mrc"
    write_volume(path, Volume(counting((2, 3, 4)), 10.5))
    return path


def patch(path: Path, offset: int, code: str, *values: float | bytes) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into(code, content, offset, *values)
    path.write_bytes(content)


def test_a_volume_refuses_other_dimensions_and_voxel_sizes() -> None:
    with pytest.raises(ValueError, match=r"3 dimensions.*\(2, 2\)"):
        Volume(np.zeros((2, 2)), 1.0)
    for size in (0.0, -3.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive number of angstrom"):
            Volume(np.zeros((2, 2, 2)), size)


@pytest.mark.parametrize("suffix", [".mrc", ".rec", ".mrc.gz", ".mrc.bz2"])
@pytest.mark.parametrize("dtype", KEPT_DTYPES)
def test_a_volume_comes_back_as_written(tmp_path: Path, dtype: str, suffix: str) -> None:
    path = tmp_path / f"volume{suffix}"
    write_volume(path, Volume(counting((3, 4, 5), dtype), 13.48))
    volume = read_volume(path)
    assert volume.shape == (3, 4, 5)
    assert volume.data.dtype == dtype
    assert volume.voxel_size == 13.48
    np.testing.assert_array_equal(volume.data, counting((3, 4, 5), dtype))


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    data=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=4, max_dims=4, max_side=4),
        elements=st.floats(
            width=32, allow_nan=False, allow_infinity=False, max_value=2.0**60, min_value=-(2.0**60)
        ),
    ),
    voxel_size=st.floats(1.01, 100).map(lambda size: float(f"{size:.6g}")),
)
def test_any_stack_comes_back_as_written(
    tmp_path: Path, data: np.ndarray, voxel_size: float
) -> None:
    path = tmp_path / "stack.mrcs"
    write_stack(path, data, voxel_size, overwrite=True)
    cubes, size = read_stack(path)
    np.testing.assert_array_equal(cubes, data)
    assert size == voxel_size


def test_arrays_stay_on_disk_and_are_read_only(mrc: Path) -> None:
    data = read_volume(mrc).data
    assert isinstance(data, np.memmap)
    assert not data.flags.writeable
    assert not isinstance(read_volume(mrc, mmap=False).data, np.memmap)


def test_written_files_satisfy_the_standard(tmp_path: Path, mrc: Path) -> None:
    stack = tmp_path / "stack.mrcs"
    write_stack(stack, counting((2, 3, 3, 3), "float16"), 10.0)
    with create_volume(tmp_path / "big.mrc", (2, 3, 4), 10.0, "int8") as data:
        data[:] = 1
    for path in (mrc, stack, tmp_path / "big.mrc"):
        assert mrcfile.validate(str(path))
    with mrcfile.open(stack) as file:
        assert file.is_volume_stack()
        assert file.header.ispg == 401


def test_equal_content_makes_equal_files(tmp_path: Path, mrc: Path) -> None:
    again = tmp_path / "again.mrc"
    write_volume(again, Volume(counting((2, 3, 4)), 10.5))
    assert again.read_bytes() == mrc.read_bytes()


def test_bool_becomes_int8_and_bytes_become_uint16(tmp_path: Path) -> None:
    for given_type, kept_type in (("bool", "int8"), ("uint8", "uint16")):
        data = counting((2, 2, 2)).astype(given_type)
        write_volume(tmp_path / f"{given_type}.mrc", Volume(data, 2.0))
        assert read_volume(tmp_path / f"{given_type}.mrc").data.dtype == kept_type


@pytest.mark.parametrize(
    ("dtype", "remedy"), [("float64", "float32"), ("int64", "int16"), ("complex64", "int16")]
)
def test_types_that_mrc_lacks_are_refused(tmp_path: Path, dtype: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"cannot hold {dtype}.*{remedy}"):
        write_volume(tmp_path / "a.mrc", Volume(counting((2, 2, 2), dtype), 2.0))
    assert not list(tmp_path.iterdir())


@given(
    values=hnp.arrays(np.float16, (2, 3), elements=st.floats(width=16))
    | hnp.arrays(np.float32, (2, 3), elements=st.floats(width=32))
)
def test_what_is_finite_is_known_by_any_of_its_bits(values: np.ndarray) -> None:
    assert all_finite(values) == np.isfinite(values).all()
    assert all_finite(values[:0])


def test_a_stack_may_be_written_without_statistics(tmp_path: Path) -> None:
    cubes = counting((3, 2, 2, 2), "float16")
    for statistics in (True, False):
        write_stack(tmp_path / f"{statistics}.mrcs", cubes, 10.0, statistics=statistics)
    with mrcfile.open(tmp_path / "False.mrcs") as mrc:
        assert (mrc.header.dmax < mrc.header.dmin, mrc.header.rms) == (True, -1)
        assert mrc.is_volume_stack()
        np.testing.assert_array_equal(mrc.data, cubes)
    with_them, without = ((tmp_path / f"{name}.mrcs").read_bytes() for name in (True, False))
    assert with_them[:DMIN] == without[:DMIN]
    assert with_them[DMIN + 12 : 216] == without[DMIN + 12 : 216]
    with pytest.raises(ValueError, match="not compressed"):
        write_stack(tmp_path / "a.mrcs.gz", cubes, 10.0, statistics=False)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    data = counting((2, 2, 2))
    data[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="1 of 8 values are not finite"):
        write_volume(tmp_path / "a.mrc", Volume(data, 2.0))
    with pytest.raises(ValueError, match="nothing to write"):
        write_volume(tmp_path / "a.mrc", Volume(data[:0], 2.0))


def test_labels_travel_in_the_header(tmp_path: Path) -> None:
    path = tmp_path / "a.mrc.gz"
    write_volume(path, Volume(counting((2, 2, 2)), 2.0), labels=["student/3", "sha256 abc"])
    with mrcfile.open(path, header_only=True) as file:
        assert file.get_labels() == ["Written by cectflow", "student/3", "sha256 abc"]


@pytest.mark.parametrize("labels", [["x" * 81], ["Å"], ["a\nb"], ["x"] * 10])
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, labels: list[str]) -> None:
    with pytest.raises(ValueError, match="label"):
        write_volume(tmp_path / "a.mrc", Volume(counting((2, 2, 2)), 2.0), labels=labels)


def test_nothing_is_overwritten_unasked(mrc: Path) -> None:
    before = mrc.read_bytes()
    other = Volume(counting((2, 2, 2)), 3.0)
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_volume(mrc, other)
    with (
        pytest.raises(FileExistsError, match="--overwrite"),
        create_volume(mrc, (1, 1, 1), 2.0, "i1"),
    ):
        pass
    assert mrc.read_bytes() == before
    write_volume(mrc, other, overwrite=True)
    assert read_volume(mrc).voxel_size == 3.0


def test_a_volume_can_be_rewritten_while_it_is_mapped(mrc: Path) -> None:
    volume = read_volume(mrc)
    write_volume(mrc, volume, overwrite=True)
    np.testing.assert_array_equal(read_volume(mrc).data, counting((2, 3, 4)))


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.mrc"
    with pytest.raises(RuntimeError), create_volume(path, (2, 2, 2), 2.0, "f4"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="no folder"), replacing(tmp_path / "b" / "c.txt"):
        pass


def test_a_created_volume_appears_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.mrc"
    with create_volume(path, (2, 3, 4), 7.5, np.float32, labels=["model/1"]) as data:
        assert not path.exists()
        assert not data.any()
        data[1] = 5
    volume = read_volume(path)
    assert volume.voxel_size == 7.5
    assert volume.data.sum() == 60
    with mrcfile.open(path, header_only=True) as file:
        assert file.get_labels()[1] == "model/1"
    with create_volume(tmp_path / "stack.mrcs", (5, 2, 2, 2), 7.5, "f2"):
        pass
    assert read_stack(tmp_path / "stack.mrcs")[0].shape == (5, 2, 2, 2)


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [("a.mrc", (2, 2), "each at least 1"), ("a.mrc.gz", (2, 2, 2), "leave out .gz")],
)
def test_a_created_volume_refuses_what_it_cannot_map(
    tmp_path: Path, name: str, shape: tuple[int, ...], match: str
) -> None:
    with pytest.raises(ValueError, match=match), create_volume(tmp_path / name, shape, 2.0, "f4"):
        pass


def test_a_plain_volume_is_a_stack_of_one(mrc: Path) -> None:
    cubes, size = read_stack(mrc)
    assert cubes.shape == (1, 2, 3, 4)
    assert size == 10.5


def test_a_stack_without_its_space_group_is_told_by_its_sampling(tmp_path: Path) -> None:
    path = tmp_path / "stack.mrcs"
    write_stack(path, counting((3, 4, 4, 4)), 2.0)
    patch(path, ISPG, "<i", 1)
    assert read_stack(path)[0].shape == (3, 4, 4, 4)
    assert read_volume(path).shape == (12, 4, 4)
    patch(path, MX, "<iii", 4, 4, 12)
    patch(path, CELLA, "<fff", 8, 8, 24)
    assert read_stack(path)[0].shape == (1, 12, 4, 4)


def test_a_stack_is_no_volume_unless_it_holds_one(tmp_path: Path) -> None:
    write_stack(tmp_path / "two.mrcs", counting((2, 3, 3, 3)), 2.0)
    write_stack(tmp_path / "one.mrcs", counting((1, 3, 3, 3)), 2.0)
    with pytest.raises(ValueError, match="stack of 2 volumes"):
        read_volume(tmp_path / "two.mrcs")
    assert read_volume(tmp_path / "one.mrcs").shape == (3, 3, 3)
    with pytest.raises(ValueError, match=r"4 dimensions"):
        write_stack(tmp_path / "three.mrcs", counting((3, 3, 3)), 2.0)
    patch(tmp_path / "two.mrcs", MX, "<iii", 3, 3, 4)
    with pytest.raises(ValueError, match="6 sections with 4"):
        read_stack(tmp_path / "two.mrcs")


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ((0, 0, 0), "0 x 0 x 0 angstrom.*none"),
        ((10, 10, -10), "none"),
        ((1, 1, 1), "1 x 1 x 1 angstrom.*do not know"),
        ((10, 10, 10.2), r"10 x 10 x 10.2.*1 %"),
        ((0.01348, 0.01348, 0.01348), "0.01348.*nm or micrometres"),
        ((float("nan"), 10, 10), "none"),
    ],
)
def test_a_doubtful_voxel_size_is_refused_and_overridden(
    mrc: Path, sizes: tuple[float, float, float], match: str
) -> None:
    patch(mrc, CELLA, "<fff", sizes[0] * 4, sizes[1] * 3, sizes[2] * 2)
    with pytest.raises(ValueError, match=f"{match}.*--voxel-size"):
        read_volume(mrc)
    assert read_volume(mrc, voxel_size=9.9).voxel_size == 9.9
    with pytest.raises(ValueError, match="positive"):
        read_volume(mrc, voxel_size=0.0)


def test_a_header_without_sampling_has_no_voxel_size(mrc: Path) -> None:
    patch(mrc, MX, "<iii", 0, 0, 0)
    with pytest.raises(ValueError, match="--voxel-size"):
        read_volume(mrc)


def test_a_truncated_file_is_refused_with_its_bytes(mrc: Path) -> None:
    content = mrc.read_bytes()
    mrc.write_bytes(content[:-7])
    with pytest.raises(ValueError, match="truncated: its header calls for 1120 bytes, it has 1113"):
        read_volume(mrc)
    zipped = mrc.with_suffix(".gz")
    zipped.write_bytes(gzip.compress(content)[:-20])
    with pytest.raises(ValueError, match="may be truncated"):
        read_volume(zipped)
    zipped.write_bytes(gzip.compress(content[:-7]))
    with pytest.raises(ValueError, match="it has 1113"):
        read_volume(zipped)


@pytest.mark.parametrize("content", [b"", b"x,y,z\n1,2,3\n", b"particles " * 300, bytes(2000)])
def test_what_is_not_mrc_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mrc").write_bytes(content)
    with pytest.raises(ValueError, match="not an MRC file"):
        read_volume(tmp_path / "a.mrc")


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_volume(tmp_path / "a.mrc")


@pytest.mark.parametrize(("mode", "match"), [(4, "complex"), (16, "RGB"), (3, "complex")])
def test_values_that_are_not_real_are_refused(mrc: Path, mode: int, match: str) -> None:
    patch(mrc, MODE, "<i", mode)
    with pytest.raises(ValueError, match=match):
        read_volume(mrc)


def test_trailing_bytes_are_read_past_with_one_warning(mrc: Path) -> None:
    mrc.write_bytes(mrc.read_bytes() + b"12345")
    patch(mrc, MAP, "<4s4s", b"\0\0\0\0", b"\0\0\0\0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        volume = read_volume(mrc)
    assert [warning.category for warning in caught] == [UserWarning]
    assert all(word in str(caught[0].message) for word in ("map string", "stamp", "5 bytes"))
    np.testing.assert_array_equal(volume.data, counting((2, 3, 4)))


def test_big_endian_files_are_read_as_native_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.mrc"
    with mrcfile.new(path, counting((2, 3, 4)).astype(">f4")) as file:
        file.voxel_size = 12.5
    volume = read_volume(path)
    assert volume.data.dtype.isnative
    assert volume.voxel_size == 12.5
    np.testing.assert_array_equal(volume.data, counting((2, 3, 4)))
    patch(path, MAP + 4, "4s", b"DD\0\0")
    with pytest.warns(UserWarning, match="other byte order"):
        np.testing.assert_array_equal(read_volume(path).data, counting((2, 3, 4)))


def test_axes_in_another_order_are_brought_to_zyx(mrc: Path) -> None:
    expected = counting((2, 3, 4))
    patch(mrc, MAPC, "<iii", 3, 2, 1)  # columns along z, sections along x
    np.testing.assert_array_equal(read_volume(mrc).data, expected.transpose(2, 1, 0))
    patch(mrc, MAPC, "<iii", 0, 0, 0)
    np.testing.assert_array_equal(read_volume(mrc).data, expected)


@pytest.mark.parametrize(("flags", "dtype"), [(0, "uint8"), (1, "int8")])
def test_imod_says_whether_its_bytes_are_signed(tmp_path: Path, flags: int, dtype: str) -> None:
    path = tmp_path / "a.mrc"
    write_volume(path, Volume(np.full((2, 2, 2), -56, np.int8), 2.0))
    patch(path, EXTRA2 + 40, "<ii", 1146047817, flags)
    data = read_volume(path).data
    assert data.dtype == dtype
    assert data[0, 0, 0] == (200 if dtype == "uint8" else -56)


def test_a_real_tomogram_with_a_broken_header_is_read(shared_data: Path) -> None:
    path = shared_data / "real" / "rec3D.rec"
    with pytest.warns(UserWarning, match=r"map string, .*stamp, .*unsigned") as caught:
        volume = read_volume(path)
    assert len(caught) == 1
    assert volume.shape == (78, 64, 32)
    assert volume.voxel_size == pytest.approx(23.2, rel=1e-5)
    # As the header's own statistics say: 141 to 163, mean 152.5; signed bytes would be negative.
    assert volume.data.min() >= 135
    assert volume.data.mean() == pytest.approx(152.5, abs=1)


def test_real_stacks_and_maps_are_read_without_a_warning(shared_data: Path) -> None:
    cubes, size = read_stack(shared_data / "real" / "ribosome_70s" / "ribosome_70s.mrcs")
    assert (cubes.shape, size) == ((20, 32, 32, 32), 12.0)
    volume = read_volume(shared_data / "maps" / "EMD-3197.map.gz")
    assert (volume.shape, volume.voxel_size) == ((20, 20, 20), 11.4)


def test_an_image_stack_says_that_it_is_one(tmp_path: Path) -> None:
    images = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    write_images(tmp_path / "series.mrc", images, 2.5, labels=("tilt series",))
    with mrcfile.open(tmp_path / "series.mrc") as stack:
        assert stack.is_image_stack()
        np.testing.assert_array_equal(stack.data, images)
        assert stack.voxel_size.x == stack.voxel_size.y == 2.5
    with pytest.raises(FileExistsError, match="--overwrite"):
        write_images(tmp_path / "series.mrc", images, 2.5)
    with pytest.raises(ValueError, match="3 dimensions"):
        write_images(tmp_path / "one.mrc", images[0], 2.5)


def test_ground_truth_beside_stacks_is_not_taken_for_subtomograms(tmp_path: Path) -> None:
    names = ("00000.mrcs", "00000_labels.mrcs", "00000_instances.mrcs", "my_labels.mrcs")
    for name in names:
        write_stack(tmp_path / name, counting((1, 2, 2, 2)), 10.0)
    expected = (tmp_path / "00000.mrcs", tmp_path / "my_labels.mrcs")  # beside no my.mrcs
    assert find_stacks(str(tmp_path)) == expected
    assert find_stacks(f"{tmp_path}/*.mrcs") == expected
    alone = tmp_path / "00000_labels.mrcs"
    assert find_stacks(str(alone)) == (alone,)


EM_TYPES = {"int8": 1, "int16": 2, "int32": 4, "float32": 5, "float64": 9}


def em_bytes(data: np.ndarray, machine: int = 6, code: int | None = None) -> bytes:
    """An EM file from its documentation: machine, type, sizes x y z, 512 bytes of header."""
    order = "<" if machine == 6 else ">"
    code = EM_TYPES[data.dtype.name] if code is None else code
    header = struct.pack("BBBB", machine, 0, 0, code) + struct.pack(f"{order}3i", *data.shape[::-1])
    return header.ljust(512, b"\0") + data.astype(data.dtype.newbyteorder(order)).tobytes()


@pytest.mark.parametrize("name", ["a.em", "a.EM", "a.em.gz", "a.em.bz2"])
@pytest.mark.parametrize("dtype", EM_TYPES)
@pytest.mark.parametrize("machine", [6, 5, 3])
def test_em_files_are_read_in_zyx_order(
    tmp_path: Path, dtype: str, name: str, machine: int
) -> None:
    content = em_bytes(counting((2, 3, 4), dtype), machine)
    pack = {".gz": gzip.compress, ".bz2": bz2.compress}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(content))
    volume = read_volume(tmp_path / name, voxel_size=13.2)
    assert (volume.shape, volume.data.dtype, volume.voxel_size) == ((2, 3, 4), dtype, 13.2)
    assert volume.data[0, 0, 1] == 1  # x is the fastest
    np.testing.assert_array_equal(volume.data, counting((2, 3, 4), dtype))
    cubes, size = read_stack(tmp_path / name, voxel_size=13.2)
    assert (cubes.shape, size) == ((1, 2, 3, 4), 13.2)


def test_plain_em_files_stay_on_disk(tmp_path: Path) -> None:
    (tmp_path / "a.em").write_bytes(em_bytes(counting((2, 3, 4))))
    assert isinstance(read_volume(tmp_path / "a.em", voxel_size=2.0).data, np.memmap)


def test_em_files_have_no_voxel_size(tmp_path: Path) -> None:
    (tmp_path / "a.em").write_bytes(em_bytes(counting((2, 3, 4))))
    with pytest.raises(ValueError, match=r"EM files hold no voxel size: .*--voxel-size"):
        read_volume(tmp_path / "a.em")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "0 bytes, the header alone takes 512"),
        (em_bytes(counting((2, 3, 4)), machine=1), "machine byte is 1, expected 6"),
        (em_bytes(counting((2, 3, 4)), code=8), "holds complex numbers"),
        (em_bytes(counting((2, 3, 4)), code=7), "unknown type 7: expected .* 5 .float32"),
        (em_bytes(counting((0, 3, 4))), "size is 4 x 3 x 0"),
        (em_bytes(counting((2, 3, 4)))[:-1], "truncated: .* calls for 608 bytes, it has 607"),
        (b"\6\0\0\5" + struct.pack("<3i", *[2**31 - 1] * 3) + bytes(600), "truncated"),
    ],
)
def test_what_is_not_em_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "a.em").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        read_volume(tmp_path / "a.em", voxel_size=2.0)


def test_em_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would be an MRC file: give it another ending"):
        write_volume(tmp_path / "a.em", Volume(counting((2, 2, 2)), 2.0))
    with (
        pytest.raises(ValueError, match="another ending"),
        create_volume(tmp_path / "a.em", (1, 1, 1), 2.0, "i1"),
    ):
        pass


def test_stacks_are_found_under_every_ending_that_is_read(tmp_path: Path) -> None:
    plain = [f"a{suffix}" for suffix in (".mrc", ".mrcs", ".rec", ".map", ".em", ".MRC")]
    names = [*plain, *(f"{name}{packed}" for name in plain for packed in (".gz", ".bz2"))]
    for name in [*names, "a.star", "a.gz", "a.txt"]:
        (tmp_path / name).touch()
    assert {path.name for path in find_stacks(str(tmp_path))} == set(names)


@pytest.mark.parametrize("suffix", [".mrc", ".em"])
@pytest.mark.parametrize("packed", ["", ".gz", ".bz2"])
def test_hostile_sizes_are_refused_before_memory_is_taken(
    tmp_path: Path, mrc: Path, suffix: str, packed: str
) -> None:
    # Their product, 2^93 and more, would wrap around in fixed-width integers.
    sizes = struct.pack("<3i", *[2**31 - 1] * 3)
    content = mrc.read_bytes() if suffix == ".mrc" else em_bytes(counting((2, 3, 4)))
    content = sizes + content[12:] if suffix == ".mrc" else content[:4] + sizes + content[16:]
    path = tmp_path / f"hostile{suffix}{packed}"
    path.write_bytes({".gz": gzip.compress, ".bz2": bz2.compress}.get(packed, bytes)(content))
    tracemalloc.start()
    try:
        for read in (read_volume, read_stack):
            with pytest.raises(ValueError, match=r"truncated: its header calls for \d{28,} bytes"):
                read(path, voxel_size=2.0)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


def test_bytes_after_packed_data_are_read_past_with_a_warning(mrc: Path) -> None:
    packed = mrc.with_suffix(".mrc.gz")
    packed.write_bytes(gzip.compress(mrc.read_bytes() + bytes(10)))
    with pytest.warns(UserWarning, match="bytes follow its data"):
        np.testing.assert_array_equal(read_volume(packed).data, counting((2, 3, 4)))


def test_scratch_claims_its_space_or_says_how_much_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = create_scratch(tmp_path / "a.raw", (3, 4, 5), np.int16)
    assert array.shape == (3, 4, 5)
    assert not array.any()
    assert (tmp_path / "a.raw").stat().st_blocks > 0  # not sparse

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for module, name in ((os, "posix_fallocate"), (np, "memmap")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, full)
            with pytest.raises(OSError, match=r"needs 4.000 MB in .* MB are free .No space left"):
                create_scratch(tmp_path / "b.raw", (1000, 1000), np.float32)

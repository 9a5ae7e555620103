"""Volumes: 3D arrays with a voxel size, their files, and stacks of them.

Reads and writes volumes (:func:`read_volume`, :func:`write_volume`) and volume stacks
(:func:`find_stacks`, :func:`read_stack`, :func:`write_stack`), and writes outputs larger than
memory piece by piece (:func:`create_volume`). Voxel sizes are in angstrom, arrays are
``(z, y, x)``. Whatever is written appears under its name only when it is complete
(:func:`cectflow.files.replacing`).
"""

from __future__ import annotations

import bz2
import glob
import gzip
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import mrcfile
import numpy as np
from numpy.typing import DTypeLike, NDArray

from cectflow.files import replacing
from cectflow.volume_header import (
    HEADER_BYTES,
    MRC_TYPES,
    Layout,
    is_em,
    judge_voxel_size,
    read_em_header,
    read_mrc_header,
)
from cectflow.zarr_volume import ZARR_SUFFIX, is_zarr, read_zarr, read_zarr_header

__all__ = [
    "STACK_SUFFIXES",
    "TRUTH_ENDINGS",
    "Volume",
    "all_finite",
    "create_scratch",
    "create_volume",
    "find_stacks",
    "is_volume",
    "read_header",
    "read_stack",
    "read_volume",
    "write_images",
    "write_stack",
    "write_volume",
]

STACK_SUFFIXES = (".mrc", ".mrcs", ".rec", ".map")
"""Of MRC files, read and written."""
READ_SUFFIXES = (*STACK_SUFFIXES, ".em", ZARR_SUFFIX)
TRUTH_ENDINGS = ("_labels", "_instances")
"""Of the stacks beside one of a dataset folder: class and particle of every voxel."""

READ_BYTES = 1 << 24
"""Of a compressed file at a time."""
LARGEST_DEFLATION = 1040
"""Times that gzip's content is larger than the file, at the very most (zlib's manual: 1032)."""

_mrcfile: Any = mrcfile  # which has no type annotations
_OPENERS: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open}
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2"}
# What MRC lacks but can hold without loss.
_WIDENED: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(bool): np.dtype(np.int8),
    np.dtype(np.uint8): np.dtype(np.uint16),
}


@dataclass(frozen=True, eq=False)
class Volume:
    """A 3D array and the edge of its voxels.

    Parameters
    ----------
    data
        ``(z, y, x)``, of any real type; may be memory-mapped and then read-only.
    voxel_size
        In angstrom.

    Raises
    ------
    ValueError
        If the array is not three-dimensional or the voxel size is not a positive number.
    """

    data: NDArray[Any]
    voxel_size: float

    def __post_init__(self) -> None:
        if self.data.ndim != 3:
            msg = f"a volume has 3 dimensions (z, y, x), this array has shape {self.data.shape}"
            raise ValueError(msg)
        _check_given_voxel_size(self.voxel_size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along z, y and x."""
        num_z, num_y, num_x = self.data.shape
        return num_z, num_y, num_x


def read_volume(path: Path, *, voxel_size: float | None = None, mmap: bool = True) -> Volume:
    """Volume of an MRC file (.mrc, .rec, .map), an EM file (.em) or a Zarr folder (.zarr).

    Parameters
    ----------
    path
        The file, which may be compressed. EM and Zarr are told by the name, gzip and bzip2 by
        content.
    voxel_size
        In angstrom; holds instead of the header's, which is then not looked at. EM files have none.
    mmap
        Leave the array on disk, read-only. Compressed and byte-swapped files and Zarr are loaded:
        they cannot be mapped, so their whole content takes memory, and more than once while they
        are read.

    Returns
    -------
    Volume
        ``(z, y, x)`` whatever the header's axis order. Bytes are unsigned where IMOD's flag or the
        header's largest value says so, against the letter of MRC2014.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is no MRC or EM file, is shorter than its header says, holds complex, RGB or
        4-bit values or a stack of several volumes, or if its voxel size is missing, 0, exactly 1,
        different along the axes by more than 1 % or below 0.3 angstrom.

    Warns
    -----
    UserWarning
        Once, if the file could be read although its header breaks the standard.
    """
    cubes, voxel_size = _read(path, voxel_size, mmap=mmap, guess_stack=False)
    _refuse_several(path, len(cubes))
    return Volume(cubes[0], voxel_size)


def read_header(
    path: Path, *, voxel_size: float | None = None
) -> tuple[tuple[int, int, int], float]:
    """Shape ``(z, y, x)`` and voxel size in angstrom of :func:`read_volume`; no voxel is read.

    Of a compressed file only the beginning is: whether it is as long as its header says shows when
    it is read.

    Parameters
    ----------
    path, voxel_size
        As of :func:`read_volume`.

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`read_volume`.
    """
    if is_zarr(path):
        shape, size = read_zarr_header(path, voxel_size)
    else:
        opener = _opener(path)
        layout = _read_layout(path, opener, guess_stack=False)
        if opener is None and path.stat().st_size < layout.end:
            _refuse_truncated(path, layout.end, str(path.stat().st_size))
        number, *rest = (layout.shape[axis] for axis in layout.axes)
        _refuse_several(path, number)
        depth, height, width = rest
        shape = depth, height, width
        size = judge_voxel_size(path, layout.sampling_xyz) if voxel_size is None else voxel_size
    _check_given_voxel_size(size)
    return shape, size


def is_volume(path: Path) -> bool:
    """Whether there is something that may be a volume: a file, or a folder in Zarr."""
    return path.is_file() or is_zarr(path)


def read_stack(
    path: Path, *, voxel_size: float | None = None, mmap: bool = True
) -> tuple[NDArray[Any], float]:
    """Volumes of an MRC volume stack, ``(n, z, y, x)``, and their voxel size in angstrom.

    A volume stack has the space group 401 (MRC2014). A plain volume, MRC or EM, is a stack of one,
    except
    where its sections are a multiple of the sampling ``mz`` and a cube comes out of that: such
    stacks are written by programs that forget the space group.

    Parameters
    ----------
    path, voxel_size, mmap
        As of :func:`read_volume`, and so are the errors and the warning.

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`read_volume`.
    """
    return _read(path, voxel_size, mmap=mmap, guess_stack=True)


def find_stacks(pattern: str) -> tuple[Path, ...]:
    """Files of a stack, a folder or a glob, sorted.

    In a folder or a glob, ``X_labels`` and ``X_instances`` beside ``X`` are its ground truth and no
    subtomograms: they are left out.

    Raises
    ------
    FileNotFoundError
        If there are none.
    """
    path = Path(pattern)
    if is_volume(path):
        found = [path]
    elif path.is_dir():
        # Hidden ones are no data: macOS leaves ._X beside X.
        found = sorted(p for p in path.iterdir() if _is_stack(p) and not p.name.startswith("."))
    else:
        found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    truth = {
        path.with_name(path.name.replace(".", f"{ending}.", 1))
        for path in found
        for ending in TRUTH_ENDINGS
    }
    found = [path for path in found if path not in truth]
    if not found:
        msg = (
            f"no subtomograms at {pattern!r}: expected a file, a folder or a glob of "
            f"{', '.join(READ_SUFFIXES)} (also .gz, .bz2)"
        )
        raise FileNotFoundError(msg)
    return tuple(found)


def write_volume(
    path: Path, volume: Volume, *, overwrite: bool = False, labels: Sequence[str] = ()
) -> None:
    """Write a volume as an MRC file; gzipped or bzip2-compressed where the name ends so.

    Parameters
    ----------
    path
        The file; it appears when it is complete.
    volume
        int8, int16, uint16, float16 and float32 are kept; bool becomes int8, uint8 uint16.
    overwrite
        Replace an existing file.
    labels
        Up to nine texts of 80 ASCII characters for the header, such as model version and digest.

    Raises
    ------
    FileExistsError
        If the file exists and is not to be overwritten.
    ValueError
        If MRC has no such type, a value is not finite, a label does not fit, or the name says EM.
    """
    _write(path, volume.data, volume.voxel_size, overwrite=overwrite, labels=labels)


def write_stack(
    path: Path,
    cubes: NDArray[Any],
    voxel_size: float,
    *,
    overwrite: bool = False,
    labels: Sequence[str] = (),
    statistics: bool = True,
) -> None:
    """Write an MRC volume stack (space group 401) from cubes ``(n, z, y, x)``.

    Parameters
    ----------
    path, overwrite, labels
        As of :func:`write_volume`, and so are the types that are kept.
    cubes
        ``(n, z, y, x)``.
    voxel_size
        In angstrom.
    statistics
        Compute those of the header; otherwise they are marked as undetermined, since they take
        longer than all else.

    Raises
    ------
    FileExistsError, ValueError
        As :func:`write_volume`; also if the array is not four-dimensional.
    """
    if cubes.ndim != 4:
        msg = f"a volume stack has 4 dimensions (n, z, y, x), this array has shape {cubes.shape}"
        raise ValueError(msg)
    _write(path, cubes, voxel_size, overwrite=overwrite, labels=labels, statistics=statistics)


def write_images(
    path: Path,
    images: NDArray[Any],
    pixel_size: float,
    *,
    overwrite: bool = False,
    labels: Sequence[str] = (),
) -> None:
    """Write an MRC image stack (space group 0), such as the projections of a tilt series.

    Parameters
    ----------
    path, overwrite, labels
        As of :func:`write_volume`, and so are the types that are kept.
    images
        ``(n, y, x)``.
    pixel_size
        In angstrom.

    Raises
    ------
    FileExistsError, ValueError
        As :func:`write_volume`; also if the array is not three-dimensional.
    """
    if images.ndim != 3:
        msg = f"an image stack has 3 dimensions (n, y, x), this array has shape {images.shape}"
        raise ValueError(msg)
    _write(path, images, pixel_size, overwrite=overwrite, labels=labels, are_images=True)


@contextmanager
def create_volume(
    path: Path,
    shape: tuple[int, ...],
    voxel_size: float,
    dtype: DTypeLike,
    *,
    overwrite: bool = False,
    labels: Sequence[str] = (),
) -> Iterator[NDArray[Any]]:
    """Writable memory-mapped array, of zeros at first, that becomes an MRC file at a clean exit.

    On an error nothing is left behind. The header's statistics are marked as undetermined. The
    file takes its space on the disk at once.

    Parameters
    ----------
    path, overwrite, labels
        As of :func:`write_volume`; compression is not possible here.
    shape
        ``(z, y, x)`` of a volume, or ``(n, z, y, x)`` of a volume stack.
    voxel_size
        In angstrom.
    dtype
        int8, int16, uint16, float16 or float32; bool and uint8 widen as in :func:`write_volume`.

    Raises
    ------
    FileExistsError, ValueError
        As :func:`write_volume`; also if the shape has other than 3 or 4 dimensions.
    """
    _check_given_voxel_size(voxel_size)
    _check_labels(labels)
    _refuse_em(path)
    if len(shape) not in (3, 4) or min(shape) < 1:
        msg = f"a volume is (z, y, x) and a stack (n, z, y, x), each at least 1: given {shape}"
        raise ValueError(msg)
    if path.suffix in _COMPRESSIONS:
        msg = f"{path}: a memory-mapped output cannot be compressed: leave out {path.suffix}"
        raise ValueError(msg)
    storable = _storable(np.dtype(dtype))
    mode = next(mode for mode, code in MRC_TYPES.items() if np.dtype(code) == storable)
    with (
        replacing(path, overwrite=overwrite) as temporary,
        _mrcfile.new_mmap(temporary, shape, mrc_mode=mode) as mrc,
    ):
        _reserve(temporary)
        _describe(mrc, voxel_size, labels)
        yield mrc.data


def create_scratch(path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Writable memory-mapped array of zeros, for what lies between input and output.

    Parameters
    ----------
    path
        A file of numbers alone; whoever makes it removes it.
    shape, dtype
        Any.

    Raises
    ------
    OSError
        If the disk has no room, with what is needed and what is free.
    """
    array = np.memmap(path, np.dtype(dtype), "w+", shape=shape)
    try:
        _reserve(path)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        msg = (
            f"what lies between input and output needs {array.nbytes / 1e6:.3f} MB in "
            f"{path.parent}, {free / 1e6:.3f} MB are free ({error.strerror}): make room, then give "
            "the same command again"
        )
        raise OSError(msg) from None
    return array


def _reserve(path: Path) -> None:
    """Claim the disk space of a sparse file, whose content stays.

    Without it a full disk kills the process (SIGBUS) when it writes to the mapped array.
    """
    with path.open("r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _read(
    path: Path, voxel_size: float | None, *, mmap: bool, guess_stack: bool
) -> tuple[NDArray[Any], float]:
    if is_zarr(path):
        voxels, size = read_zarr(path, voxel_size)
        _check_given_voxel_size(size)
        return voxels[None], size
    opener = _opener(path)
    layout = _read_layout(path, opener, guess_stack=guess_stack)
    content = None if opener is None else _decompress(path, opener, layout.end)
    given = path.stat().st_size if content is None else len(content)
    if given < layout.end:
        _refuse_truncated(path, layout.end, str(given))
    faults = list(layout.faults)
    if given > layout.end:
        what = "bytes follow" if content is not None else f"{given - layout.end} bytes follow"
        faults.append(f"{what} its data")
    if voxel_size is None:
        voxel_size = judge_voxel_size(path, layout.sampling_xyz)
    _check_given_voxel_size(voxel_size)
    if faults:
        warnings.warn(f"{path} was read although {', '.join(faults)}", stacklevel=3)
    if content is None:
        data: NDArray[Any] = np.memmap(
            path, layout.dtype, mode="r", offset=layout.offset, shape=layout.shape
        )
    else:
        data = np.frombuffer(content, layout.dtype, count=layout.count, offset=layout.offset)
    data = data.reshape(layout.shape).transpose(layout.axes)
    if not layout.dtype.isnative or (content is None and not mmap):
        data = np.array(data, layout.dtype.newbyteorder("="))
    return data, voxel_size


def _read_layout(path: Path, opener: Callable[[Path], Any] | None, *, guess_stack: bool) -> Layout:
    start = _read_bytes(path, opener, HEADER_BYTES)
    if is_em(path):
        return read_em_header(path, start)
    return read_mrc_header(path, start, guess_stack=guess_stack)


def _is_stack(path: Path) -> bool:
    name = path.name.lower()
    return name.removesuffix(".gz").removesuffix(".bz2").endswith(READ_SUFFIXES)


def _opener(path: Path) -> Callable[[Path], Any] | None:
    if not path.is_file():
        msg = f"there is no file {path}"
        raise FileNotFoundError(msg)
    with path.open("rb") as stream:
        start = stream.read(212)
    # A plain map may by chance begin (nx) like a compressed file.
    return None if start[208:212] == b"MAP " else _OPENERS.get(start[:2])


def _decompress(path: Path, opener: Callable[[Path], Any], end: int) -> bytes:
    """Content up to one byte after the end of the data, which tells whether more follow."""
    largest = LARGEST_DEFLATION * path.stat().st_size
    if opener is gzip.open and end > largest:
        _refuse_truncated(path, end, f"{largest} at most")
    return _read_bytes(path, opener, end + 1)


def _read_bytes(path: Path, opener: Callable[[Path], Any] | None, num_bytes: int) -> bytes:
    parts = []
    try:
        with path.open("rb") if opener is None else opener(path) as stream:
            # In pieces: a single read would allocate what a header asks for, however much.
            while num_bytes > 0 and (part := stream.read(min(num_bytes, READ_BYTES))):
                parts.append(part)
                num_bytes -= len(part)
    except (EOFError, OSError, zlib.error) as error:
        msg = f"{path} cannot be read, it may be truncated: {error}"
        raise ValueError(msg) from None
    return b"".join(parts)


def _refuse_several(path: Path, number: int) -> None:
    if number != 1:
        msg = f"{path} holds a stack of {number} volumes: expected a single volume"
        raise ValueError(msg)


def _refuse_truncated(path: Path, expected: int, given: str) -> NoReturn:
    msg = (
        f"{path} is truncated: its header calls for {expected} bytes, it has {given}: "
        "copy or reconstruct it again"
    )
    raise ValueError(msg)


def _check_given_voxel_size(voxel_size: float) -> None:
    if not (np.isfinite(voxel_size) and voxel_size > 0):
        msg = f"a voxel size is a positive number of angstrom, given {voxel_size}"
        raise ValueError(msg)


def all_finite(values: NDArray[Any]) -> bool:
    """Whether all of an array's values are finite."""
    if values.dtype == np.float16:
        # By the exponent, since numpy asks half precision value by value: eight times as fast.
        return bool((values.view(np.uint16) & 0x7FFF).max(initial=0) < 0x7C00)
    return bool(np.isfinite(values).all())


class _NewFile(_mrcfile.mrcfile.MrcFile):  # type: ignore[misc]
    """MRC file to be written, on request with its statistics marked as undetermined."""

    def __init__(self, path: Path, *, statistics: bool) -> None:
        self._statistics = statistics
        super().__init__(path, mode="w+")

    def update_header_stats(self) -> None:
        if self._statistics:
            super().update_header_stats()
        else:
            self.reset_header_stats()

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._close_file()  # mrcfile leaves it open when the disk is full


def _storable(dtype: np.dtype[Any]) -> np.dtype[Any]:
    dtype = dtype.newbyteorder("=")
    dtype = _WIDENED.get(dtype, dtype)
    if dtype not in [np.dtype(code) for code in MRC_TYPES.values()]:
        remedy = "float32" if dtype.kind == "f" else "int16 or float32"
        msg = (
            f"MRC cannot hold {dtype.name}, only int8, int16, uint16, float16 and float32: convert "
            f"to {remedy} first"
        )
        raise ValueError(msg)
    return dtype


def _refuse_em(path: Path) -> None:
    if is_em(path):
        msg = f"{path} would be an MRC file: give it another ending, such as .mrc"
        raise ValueError(msg)


def _check_labels(labels: Sequence[str]) -> None:
    if len(labels) > 9:
        msg = f"an MRC header holds 9 labels beside that of cectflow, given {len(labels)}"
        raise ValueError(msg)
    for label in labels:
        if len(label) > 80 or not (label.isascii() and label.isprintable()):
            msg = (
                f"an MRC label is 80 printable ASCII characters, given {len(label)} characters: "
                f"{label!r}"
            )
            raise ValueError(msg)


def _describe(mrc: Any, voxel_size: float, labels: Sequence[str]) -> None:
    mrc.voxel_size = voxel_size
    # In place of mrcfile's label, which holds the time: equal content makes equal files.
    mrc.header.label[:] = b""
    mrc.header.nlabl = 0
    for label in ("Written by cectflow", *labels):
        mrc.add_label(label)


def _write(
    path: Path,
    data: NDArray[Any],
    voxel_size: float,
    *,
    overwrite: bool,
    labels: Sequence[str],
    are_images: bool = False,
    statistics: bool = True,
) -> None:
    _check_given_voxel_size(voxel_size)
    _check_labels(labels)
    _refuse_em(path)
    dtype = _storable(data.dtype)
    if data.size == 0:
        msg = f"{path}: nothing to write, the array has shape {data.shape}"
        raise ValueError(msg)
    if not all(map(all_finite, data)):
        num_bad = sum(int(np.count_nonzero(~np.isfinite(part))) for part in data)
        msg = f"{path}: {num_bad} of {data.size} values are not finite: replace them before writing"
        raise ValueError(msg)
    compression = _COMPRESSIONS.get(path.suffix)
    if not statistics and compression is not None:
        msg = f"{path}: only a file that is not compressed is written without its statistics"
        raise ValueError(msg)
    with (
        replacing(path, overwrite=overwrite) as temporary,
        _NewFile(temporary, statistics=statistics)
        if compression is None
        else _mrcfile.new(temporary, compression=compression) as mrc,
    ):
        mrc.set_data(np.asarray(data, dtype))
        if are_images:
            mrc.set_image_stack()
        _describe(mrc, voxel_size, labels)

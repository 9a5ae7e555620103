"""Volumes: 3D arrays with a voxel size, read from their files, and stacks of them.

Reads volumes (:func:`read_volume`) and volume stacks (:func:`find_stacks`, :func:`read_stack`);
:mod:`cectflow.volume_writer` writes them. Voxel sizes are in angstrom, arrays are ``(z, y, x)``.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from cectflow.volume_header import (
    HEADER_BYTES,
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
    "check_voxel_size",
    "find_stacks",
    "is_volume",
    "read_header",
    "read_stack",
    "read_volume",
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

_OPENERS: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open}


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
        check_voxel_size(self.voxel_size)

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
    check_voxel_size(size)
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


def _read(
    path: Path, voxel_size: float | None, *, mmap: bool, guess_stack: bool
) -> tuple[NDArray[Any], float]:
    if is_zarr(path):
        voxels, size = read_zarr(path, voxel_size)
        check_voxel_size(size)
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
    check_voxel_size(voxel_size)
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


def check_voxel_size(voxel_size: float) -> None:
    """Refuse what is no voxel size, with ValueError."""
    if not (np.isfinite(voxel_size) and voxel_size > 0):
        msg = f"a voxel size is a positive number of angstrom, given {voxel_size}"
        raise ValueError(msg)


def all_finite(values: NDArray[Any]) -> bool:
    """Whether all of an array's values are finite."""
    if values.dtype == np.float16:
        # By the exponent, since numpy asks half precision value by value: eight times as fast.
        return bool((values.view(np.uint16) & 0x7FFF).max(initial=0) < 0x7C00)
    return bool(np.isfinite(values).all())

"""Volumes and stacks of them written as MRC files, whole or piece by piece.

Whatever is written appears under its name only when it is complete
(:func:`cectflow.files.replacing`). Voxel sizes are in angstrom, arrays are ``(z, y, x)``.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
from numpy.typing import DTypeLike, NDArray

from cectflow.files import replacing
from cectflow.volume import Volume, all_finite, check_voxel_size
from cectflow.volume_header import MRC_TYPES, is_em

__all__ = ["create_scratch", "create_volume", "write_images", "write_stack", "write_volume"]

_mrcfile: Any = mrcfile  # which has no type annotations
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2"}
# What MRC lacks but can hold without loss.
_WIDENED: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(bool): np.dtype(np.int8),
    np.dtype(np.uint8): np.dtype(np.uint16),
}


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
    check_voxel_size(voxel_size)
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
    try:
        array = np.memmap(path, np.dtype(dtype), "w+", shape=shape)
        _reserve(path)
    except OSError as error:
        needed = math.prod(shape) * np.dtype(dtype).itemsize
        free = shutil.disk_usage(path.parent).free
        msg = (
            f"what lies between input and output needs {needed / 1e6:.3f} MB in "
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
    check_voxel_size(voxel_size)
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

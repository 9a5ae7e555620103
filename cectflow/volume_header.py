"""Headers of volume files, MRC and EM: what lies where in the file, and what is wrong with it.

mrcfile's own reader warns through process-wide filters and allocates whatever a broken header asks
for. Therefore headers are judged here, from their bytes alone, before any data is touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mrcfile.dtypes import HEADER_DTYPE

__all__ = [
    "HEADER_BYTES",
    "MRC_TYPES",
    "Layout",
    "is_em",
    "judge_voxel_size",
    "read_em_header",
    "read_mrc_header",
]

HEADER_BYTES = HEADER_DTYPE.itemsize
"""Of an MRC file, 1024; that of an EM file is shorter."""
# Finer than any cryo-EM voxel: the header is then in nm or micrometres.
SMALLEST_VOXEL_SIZE = 0.3  # angstrom
LARGEST_ANISOTROPY = 0.01
MRC_TYPES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
"""Type of the values in each mode of MRC that holds real numbers."""

_REFUSED_MODES = {3: "complex integers", 4: "complex numbers", 16: "RGB", 101: "4-bit integers"}
# https://www.biochem.mpg.de/tom: machine, -, -, type, then nx, ny, nz; 512 bytes in all.
_EM_HEADER = np.dtype(
    [("machine", "u1"), ("unused", "u1", 2), ("type", "u1"), ("size", "i4", 3), ("rest", "V496")]
)
_EM_ORDERS: dict[int, Literal["<", ">"]] = {6: "<", 5: ">", 3: ">", 0: ">"}
_EM_MACHINES = "6 (PC), 5 (Mac), 3 (SGI) or 0 (OS-9)"
_EM_TYPES = {1: "i1", 2: "i2", 4: "i4", 5: "f4", 9: "f8"}


@dataclass(frozen=True)
class Layout:
    """Where the values of a file are.

    Attributes
    ----------
    dtype
        Of the values, in the file's byte order.
    shape
        ``(n, slowest, middle, fastest)`` as they lie in the file.
    axes
        What to transpose that to for ``(n, z, y, x)``.
    offset
        Bytes before the values.
    sampling_xyz
        Voxel size of the header in angstrom; None where the format has none.
    faults
        What breaks the standard and did not hinder.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, int, int, int]
    axes: tuple[int, int, int, int]
    offset: int
    sampling_xyz: tuple[float, float, float] | None
    faults: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many values; without the overflow of fixed-width integers."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """Bytes that the file has to have."""
        return self.offset + self.dtype.itemsize * self.count


def is_em(path: Path) -> bool:
    """Whether a file is of the EM format, by its name: it has no magic number."""
    name = path.name.lower()
    return name.removesuffix(".gz").removesuffix(".bz2").endswith(".em")


def read_em_header(path: Path, content: bytes) -> Layout:
    """Layout of an EM file (TOM, Artiatomi, PyTom) from its first bytes.

    Raises
    ------
    ValueError
        If it is no EM file, or holds complex numbers.
    """
    if len(content) < _EM_HEADER.itemsize:
        msg = f"{path} is not an EM file: it has {len(content)} bytes, the header alone takes 512"
        raise ValueError(msg)
    machine, code = content[0], content[3]
    if machine not in _EM_ORDERS:
        msg = f"{path} is not an EM file: its machine byte is {machine}, expected {_EM_MACHINES}"
        raise ValueError(msg)
    if code not in _EM_TYPES:
        known = ", ".join(f"{number} ({np.dtype(name).name})" for number, name in _EM_TYPES.items())
        what = "complex numbers" if code == 8 else f"values of the unknown type {code}"
        msg = f"{path} holds {what}: expected the type byte of an EM file, {known}"
        raise ValueError(msg)
    order = _EM_ORDERS[machine]
    header = np.frombuffer(content, _EM_HEADER.newbyteorder(order), count=1)[0]
    x, y, z = (int(edge) for edge in header["size"])
    if min(x, y, z) < 1:
        msg = f"{path} is not an EM file: its size is {x} x {y} x {z}, expected 1 and more"
        raise ValueError(msg)
    dtype: np.dtype[Any] = np.dtype(order + _EM_TYPES[code])
    return Layout(dtype, (1, z, y, x), (0, 1, 2, 3), _EM_HEADER.itemsize, None)


def read_mrc_header(path: Path, content: bytes, *, guess_stack: bool) -> Layout:
    """Layout of an MRC file from its first 1024 bytes.

    Parameters
    ----------
    path
        For messages.
    content
        The bytes.
    guess_stack
        Take a file whose sections are a multiple of the sampling ``mz`` for a stack of cubes.

    Raises
    ------
    ValueError
        If it is no MRC file, or holds complex, RGB or 4-bit values.
    """
    header, faults = _parse_header(path, content)
    return Layout(
        dtype=_data_dtype(path, header, faults),
        shape=_data_shape(path, header, guess_stack),
        axes=_zyx_axes(header),
        offset=HEADER_BYTES + int(header.nsymbt),
        sampling_xyz=_sampling(header),
        faults=tuple(faults),
    )


def judge_voxel_size(path: Path, sampling_xyz: tuple[float, float, float] | None) -> float:
    """Voxel size in angstrom that a header says, if it can be believed.

    Raises
    ------
    ValueError
        If there is none, or it is 0, exactly 1, different along the axes by more than 1 % or below
        0.3 angstrom; the message names ``--voxel-size``.
    """
    if sampling_xyz is None:
        msg = f"{path}: EM files hold no voxel size: give it in angstrom with --voxel-size"
        raise ValueError(msg)
    mean = sum(sampling_xyz) / 3
    if not np.isfinite(sampling_xyz).all() or min(sampling_xyz) <= 0:
        fault = "which is none"
    elif max(sampling_xyz) - min(sampling_xyz) > LARGEST_ANISOTROPY * mean:
        fault = "which differs along the axes by more than 1 %"
    elif abs(mean - 1) < 1e-6:
        fault = "which is what programs write that do not know it"
    elif mean < SMALLEST_VOXEL_SIZE:
        fault = "which looks like nm or micrometres"
    else:
        return float(f"{mean:.7g}")  # float32 holds no more digits
    numbers = " x ".join(f"{size:g}" for size in sampling_xyz)
    msg = (
        f"{path}: its header says a voxel size of {numbers} angstrom (x, y, z), {fault}: give the "
        "right one in angstrom with --voxel-size"
    )
    raise ValueError(msg)


def _parse_header(path: Path, content: bytes) -> tuple[Any, list[str]]:
    """Header in the byte order that makes sense of it, and what is wrong with it."""
    if len(content) < HEADER_DTYPE.itemsize:
        msg = f"{path} is not an MRC file: it has {len(content)} bytes, the header alone takes 1024"
        raise ValueError(msg)
    raw = np.frombuffer(content, HEADER_DTYPE, count=1)[0]
    faults = []
    if bytes(raw["map"])[:3] != b"MAP":
        faults.append("its header lacks the map string")
    stamp = bytes(raw["machst"])[:2]
    if stamp not in (b"DD", b"DA", b"\x11\x11"):
        faults.append("its header lacks a machine stamp")
    little = HEADER_DTYPE.newbyteorder("<")
    big = HEADER_DTYPE.newbyteorder(">")
    likely, other = (big, little) if stamp == b"\x11\x11" else (little, big)
    for dtype in (likely, other):
        header: Any = np.frombuffer(content, dtype, count=1).reshape(()).view(np.recarray)
        if _is_plausible(header):
            if dtype is other and stamp in (b"DD", b"DA", b"\x11\x11"):
                faults.append("its machine stamp is that of the other byte order")
            return header, faults
    msg = (
        f"{path} is not an MRC file: in neither byte order does it begin with a size and a mode, "
        f"but with {int(raw['nx'])} x {int(raw['ny'])} x {int(raw['nz'])}, mode {int(raw['mode'])}"
    )
    raise ValueError(msg)


def _is_plausible(header: Any) -> bool:
    sizes = (int(header.nx), int(header.ny), int(header.nz))
    known = int(header.mode) in {*MRC_TYPES, *_REFUSED_MODES}
    return min(sizes) > 0 and known and int(header.nsymbt) >= 0


def _data_dtype(path: Path, header: Any, faults: list[str]) -> np.dtype[Any]:
    mode = int(header.mode)
    if mode in _REFUSED_MODES:
        msg = (
            f"{path} holds {_REFUSED_MODES[mode]} (mode {mode}): expected real numbers "
            "(mode 0, 1, 2, 6 or 12)"
        )
        raise ValueError(msg)
    dtype: np.dtype[Any] = np.dtype(header.mode.dtype.byteorder + MRC_TYPES[mode])
    if mode != 0:
        return dtype
    # https://bio3d.colorado.edu/imod/doc/mrc_format.txt: bit 0 of imodFlags marks signed bytes.
    stamp, flags = np.frombuffer(header.extra2.tobytes(), f"{header.nx.dtype.byteorder}i4")[10:12]
    if stamp == 1146047817:
        return np.dtype(np.int8 if flags & 1 else np.uint8)
    if header.dmin >= 0 and 127 < header.dmax <= 255:
        faults.append(f"its bytes are unsigned (largest value {float(header.dmax):g})")
        return np.dtype(np.uint8)
    return dtype


def _data_shape(path: Path, header: Any, guess_stack: bool) -> tuple[int, int, int, int]:
    num_x, num_y, num_z = int(header.nx), int(header.ny), int(header.nz)
    sampling = int(header.mz)
    if 401 <= int(header.ispg) <= 630:
        if sampling < 1 or num_z % sampling:
            msg = (
                f"{path} is a volume stack of {num_z} sections with {sampling} in each volume: "
                "expected a multiple"
            )
            raise ValueError(msg)
        return num_z // sampling, sampling, num_y, num_x
    if guess_stack and num_x == num_y == sampling and num_z % sampling == 0:
        return num_z // sampling, sampling, num_y, num_x
    return 1, num_z, num_y, num_x


def _zyx_axes(header: Any) -> tuple[int, int, int, int]:
    axes = (int(header.maps), int(header.mapr), int(header.mapc))
    if sorted(axes) != [1, 2, 3]:  # left at 0 by careless writers
        return 0, 1, 2, 3
    return 0, 1 + axes.index(3), 1 + axes.index(2), 1 + axes.index(1)


def _sampling(header: Any) -> tuple[float, float, float]:
    cell = (float(header.cella.x), float(header.cella.y), float(header.cella.z))
    counts = (int(header.mx), int(header.my), int(header.mz))
    x, y, z = (a / m if m > 0 else 0.0 for a, m in zip(cell, counts, strict=True))
    return x, y, z

"""Tables of tomograms: the sizes and pixel sizes that RELION keeps beside its particles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cectflow.star import read_star

__all__ = ["WARP_SUFFIX", "TomogramInfo", "find_tomogram", "read_tomograms"]

WARP_SUFFIX = ".tomostar"
"""Ends the names of tomograms in WarpTools."""
_SIZES = ("rlnTomoSizeX", "rlnTomoSizeY", "rlnTomoSizeZ")
_PIXEL_SIZE = "rlnTomoTiltSeriesPixelSize"
_BINNING = "rlnTomoTomogramBinning"
_LARGEST_SIZE = 2**31 - 1
"""Of an edge in pixels: as much as an MRC header can say."""


@dataclass(frozen=True)
class TomogramInfo:
    """Size and sampling of a tomogram, as a table of tomograms says.

    Parameters
    ----------
    size_xyz
        Of the unbinned tomogram in pixels, ``(x, y, z)``: RELION documents ``rlnTomoSizeX`` as the
        width of a bin-1 tomogram. It need be no multiple of the binning.
    pixel_size
        Of the unbinned tilt images, in angstrom.
    binning
        Voxels of the reconstructed tomogram are that many times larger, 1 or more; None: not said.

    Raises
    ------
    ValueError
        If a size or the binning is below 1, or the pixel size is no positive number.
    """

    size_xyz: tuple[int, int, int]
    pixel_size: float
    binning: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= min(self.size_xyz) <= max(self.size_xyz) <= _LARGEST_SIZE:
            msg = (
                f"a tomogram measures {' x '.join(map(str, self.size_xyz))} pixels (x, y, z): "
                f"expected whole numbers from 1 to {_LARGEST_SIZE}"
            )
            raise ValueError(msg)
        if not (np.isfinite(self.pixel_size) and self.pixel_size > 0):
            msg = f"a pixel size is a positive number of angstrom, given {self.pixel_size}"
            raise ValueError(msg)
        if self.binning is not None and not (np.isfinite(self.binning) and self.binning >= 1):
            msg = f"a binning is a number from 1 on, given {self.binning}"
            raise ValueError(msg)

    @property
    def extent_xyz(self) -> tuple[float, float, float]:
        """Edges in angstrom; half of them is the centre that RELION 5 counts from.

        They are those of the unbinned tomogram: the binned one may be up to half a voxel shorter
        or longer, and its own middle is then another place.
        """
        x, y, z = (size * self.pixel_size for size in self.size_xyz)
        return x, y, z

    @property
    def voxel_size(self) -> float | None:
        """Of the reconstructed tomogram in angstrom; None where the binning is not said."""
        return None if self.binning is None else self.pixel_size * self.binning

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """Voxels ``(z, y, x)`` of the reconstructed tomogram, rounded."""
        if self.binning is None:
            return None
        z, y, x = (max(1, int(size / self.binning + 0.5)) for size in self.size_xyz[::-1])
        return z, y, x


def read_tomograms(path: Path) -> dict[str, TomogramInfo]:
    """Tomograms of a RELION 4 or 5 tomogram table (``tomograms.star``), by name.

    Read are ``rlnTomoName``, ``rlnTomoSizeX/Y/Z``, ``rlnTomoTiltSeriesPixelSize`` and, where there
    is one, ``rlnTomoTomogramBinning``, of the block ``global`` or else the only one with sizes.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no STAR file, has no such table, lacks a column, names a tomogram twice, or a
        number makes no sense.
    """
    rows = _table_of(path)
    missing = [name for name in ("rlnTomoName", *_SIZES, _PIXEL_SIZE) if name not in rows]
    if missing:
        msg = f"{path} lacks {', '.join(missing)}: expected RELION's tomograms.star"
        raise ValueError(msg)
    tomograms: dict[str, TomogramInfo] = {}
    for number, (_, row) in enumerate(rows.iterrows(), start=1):
        name = str(row["rlnTomoName"])
        if name in tomograms:
            msg = f"{path} describes tomogram {name!r} twice, again in row {number}: expected once"
            raise ValueError(msg)
        try:
            sizes = [_as_whole(row[column]) for column in _SIZES]
            binning = None if _BINNING not in row.index else float(row[_BINNING])
            tomograms[name] = TomogramInfo(
                (sizes[0], sizes[1], sizes[2]), float(row[_PIXEL_SIZE]), binning
            )
        except (ValueError, TypeError, OverflowError) as error:
            msg = f"{path}, tomogram {name!r} in row {number}: {error}"
            raise ValueError(msg) from None
    return tomograms


def find_tomogram(tomograms: Mapping[str, TomogramInfo], name: str) -> str:
    """Name under which a tomogram is known: the same, or with or without Warp's ``.tomostar``.

    Raises
    ------
    ValueError
        If it is not; the message shows the names that are.
    """
    for known in (name, name.removesuffix(WARP_SUFFIX), name + WARP_SUFFIX):
        if known in tomograms:
            return known
    shown = ", ".join(list(tomograms)[:5]) + (" …" if len(tomograms) > 5 else "")
    msg = f"the table of tomograms does not describe {name!r}: it has {shown or 'none'}"
    raise ValueError(msg)


def _table_of(path: Path) -> pd.DataFrame:
    blocks = read_star(path)
    tables = {
        name: pd.DataFrame([block]) if isinstance(block, dict) else block
        for name, block in blocks.items()
    }
    if "global" in tables:
        return tables["global"]
    found = [table for table in tables.values() if _SIZES[0] in table]
    if len(found) != 1:
        msg = (
            f"{path} has {len(found)} tables with {_SIZES[0]} among its blocks {list(blocks)}: "
            "expected a block 'global', or one such table, as in RELION's tomograms.star"
        )
        raise ValueError(msg)
    return found[0]


def _as_whole(value: object) -> int:
    number = float(str(value))
    if not number.is_integer():
        msg = f"a size in pixels is a whole number, given {value}"
        raise ValueError(msg)
    return int(number)

"""Conventions of coordinates: which columns say where particles are, in what unit, from where.

What all share are positions in angstrom from the centre of voxel 0, in which tables over several
tomograms can be converted (:mod:`cectflow.conversion`): :func:`read_positions` gives them,
:func:`write_positions` takes them. In voxels of one tomogram :mod:`cectflow.placement` has them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from cectflow.particles import CENTRED, CORNER, M_SPECIES, PLAIN, ParticleTable
from cectflow.tomogram_table import WARP_SUFFIX

__all__ = [
    "ORIGIN",
    "ORIGIN_PIXELS",
    "PIXEL_SIZES",
    "PLACEMENT_COLUMNS",
    "SUBTOMOGRAM_ANGLES",
    "CoordinateConvention",
    "Frames",
    "columns_of",
    "lack_numbers",
    "look_up",
    "read_positions",
    "stated_extents",
    "stated_unit",
    "write_positions",
]

CoordinateConvention = Literal["relion3", "relion4", "relion5", "warp", "csv"]

ORIGIN = tuple(f"rlnOrigin{axis}Angst" for axis in "XYZ")
ORIGIN_PIXELS = tuple(f"rlnOrigin{axis}" for axis in "XYZ")
"""Columns of offsets, to be subtracted from the coordinates."""
SUBTOMOGRAM_ANGLES = ("rlnTomoSubtomogramRot", "rlnTomoSubtomogramTilt", "rlnTomoSubtomogramPsi")
PIXEL_SIZES = ("rlnTomoTiltSeriesPixelSize", "rlnPixelSize", "rlnImagePixelSize")
"""Columns that say what coordinates are counted in."""
PLACEMENT_COLUMNS = re.compile(
    r"rln(Centered)?Coordinate[XYZ](Angst)?|rlnOrigin[XYZ](Angst)?|wrpCoordinate[XYZ]1|"
    r"rln(Angle|TomoSubtomogram)(Rot|Tilt|Psi)|" + "|".join(PIXEL_SIZES)
)
"""Columns of position and orientation, and of the units of positions."""


@dataclass(frozen=True, eq=False)
class Frames:
    """Sampling and size of each particle's tomogram, in angstrom; NaN where they are not known.

    Parameters
    ----------
    voxel_size
        ``(n,)``, of the tomogram that coordinates in voxels are counted in.
    pixel_size
        ``(n,)``, of the unbinned tilt images.
    extent_xyz
        ``(n, 3)``, edges of the unbinned tomogram.
    """

    voxel_size: Float[NDArray[np.float64], " n"]
    pixel_size: Float[NDArray[np.float64], " n"]
    extent_xyz: Float[NDArray[np.float64], "n 3"]


def columns_of(rows: pd.DataFrame) -> tuple[str, ...]:
    """Columns of position that count in a table, the first kind of those that it has.

    Raises
    ------
    ValueError
        If it has none.
    """
    known = (CENTRED, M_SPECIES, CORNER, PLAIN)
    for columns in known:
        if {*columns} <= {*rows.columns}:
            return columns
    msg = (
        f"the particles have no coordinates: looked for {'; '.join(', '.join(c) for c in known)}; "
        f"found {', '.join(map(str, rows.columns))}"
    )
    raise ValueError(msg)


def stated_unit(
    table: ParticleTable, coords_voxel_size: float | None = None
) -> Float[NDArray[np.float64], " n"] | None:
    """Angstrom per unit of each particle's coordinates, as convention and table say.

    Parameters
    ----------
    table
        Particles, of any number of tomograms.
    coords_voxel_size
        In angstrom; takes the place of what the table says.

    Returns
    -------
    array or None
        ``(n,)``; ones for angstrom; None where coordinates are counted in voxels of the tomogram,
        of whatever size those are.

    Raises
    ------
    ValueError
        If there are no coordinates, ``coords_voxel_size`` is given for coordinates in angstrom or
        is not positive, a pixel size is no positive number, or the coordinates are fractions of
        the tomogram's size.
    """
    columns = columns_of(table.rows)
    in_angstrom = columns in (CENTRED, M_SPECIES)
    if coords_voxel_size is not None:
        if in_angstrom:
            msg = (
                f"--coords-voxel-size {coords_voxel_size:g} cannot be applied: {columns[0]} is in "
                "angstrom already"
            )
            raise ValueError(msg)
        if not (np.isfinite(coords_voxel_size) and coords_voxel_size > 0):
            msg = f"--coords-voxel-size is a positive number of angstrom, given {coords_voxel_size}"
            raise ValueError(msg)
        return np.full(len(table), coords_voxel_size)
    if in_angstrom:
        return np.ones(len(table))
    if columns == PLAIN:
        return None
    sources: tuple[str, ...] = ("rlnTomoTiltSeriesPixelSize",)
    if _is_from_warp(table):
        # positions / BinnedPixelSizeMean in WarpLib's TiltSeries.ReconstructParticleSeries.cs
        sources = ("rlnPixelSize", "rlnImagePixelSize", *sources)
    for source in sources:
        unit = look_up(table, source)
        if unit is not None:
            if len(unit) and unit.min() <= 0:
                msg = f"{source} is a positive number of angstrom, the table says {unit.min():g}"
                raise ValueError(msg)
            return unit
    _refuse_fractions(table)
    return None


def read_positions(
    table: ParticleTable,
    unit: Float[NDArray[np.float64], " n"],
    extent_xyz: Float[NDArray[np.float64], "n 3"],
) -> Float[NDArray[np.float64], "n 3"]:
    """Positions ``(x, y, z)`` in angstrom from the centre of voxel 0, offsets subtracted.

    Parameters
    ----------
    table
        Particles, of any number of tomograms.
    unit
        ``(n,)``, angstrom per unit of the coordinates (:func:`stated_unit`).
    extent_xyz
        ``(n, 3)``, edges of each particle's unbinned tomogram in angstrom; only RELION 5 needs
        them.

    Raises
    ------
    ValueError
        If a coordinate or an offset is no number, or a centre is not known.
    """
    columns = columns_of(table.rows)
    positions = _numbers(table.rows, columns) * unit[:, None]
    if columns == CENTRED:
        positions += _centres(extent_xyz)
    return positions - _offsets(table.rows, unit)


def write_positions(
    positions_xyz: Float[NDArray[np.float64], "n 3"],
    convention: CoordinateConvention,
    frames: Frames,
) -> dict[str, NDArray[np.float64]]:
    """Columns of positions that :func:`read_positions` reads back.

    Parameters
    ----------
    positions_xyz
        In angstrom from the centre of voxel 0.
    convention
        ``relion3``: voxels of the tomogram; ``warp``: those too, with their size beside them, and
        the names of the tomograms must end in ``.tomostar``; ``relion4``: unbinned pixels, with
        their size beside them; ``relion5``: angstrom from the centre; ``csv``: voxels as ``x``,
        ``y``, ``z``.
    frames
        Of the particles.

    Raises
    ------
    ValueError
        If the convention needs a number of the tomograms that is not known.
    """
    stated: dict[str, NDArray[np.float64]] = {}
    if convention in ("relion4", "relion5") and np.isfinite(frames.pixel_size).all():
        stated["rlnTomoTiltSeriesPixelSize"] = frames.pixel_size
    if convention == "relion5":
        centred = positions_xyz - _centres(frames.extent_xyz)
        return dict(zip(CENTRED, centred.T, strict=True)) | stated
    if convention == "relion4":
        if not np.isfinite(frames.pixel_size).all():
            msg = (
                "RELION 4 counts in unbinned pixels: their size in angstrom is needed, give "
                "--pixel-size, or --tomograms tomograms.star"
            )
            raise ValueError(msg)
        pixels = positions_xyz.T / frames.pixel_size
        return dict(zip(CORNER, pixels, strict=True)) | stated
    if not np.isfinite(frames.voxel_size).all():
        msg = (
            f"{convention} counts in voxels of the tomogram: their size in angstrom is needed, "
            "give --voxel-size, or --tomograms tomograms.star with its binning"
        )
        raise ValueError(msg)
    if convention == "warp":
        stated["rlnPixelSize"] = frames.voxel_size
    columns = PLAIN if convention == "csv" else CORNER
    return dict(zip(columns, positions_xyz.T / frames.voxel_size, strict=True)) | stated


def stated_extents(table: ParticleTable) -> Float[NDArray[np.float64], "n 3"]:
    """Edges ``(x, y, z)`` of each particle's unbinned tomogram in angstrom, as the table says.

    NaN where it says nothing (``rlnTomoSizeX/Y/Z`` and ``rlnTomoTiltSeriesPixelSize``, beside the
    particles or in another block).
    """
    pixel_size = look_up(table, "rlnTomoTiltSeriesPixelSize")
    found = [look_up(table, f"rlnTomoSize{axis}") for axis in "XYZ"]
    sizes = [size for size in found if size is not None]
    if pixel_size is None or len(sizes) < 3:
        return np.full((len(table), 3), np.nan)
    return np.stack(sizes, axis=1) * pixel_size[:, None]


def look_up(table: ParticleTable, column: str) -> Float[NDArray[np.float64], " n"] | None:
    """Number for each particle, from its row or from the block that describes its group.

    None where neither has the column.

    Raises
    ------
    ValueError
        If a particle has no number there.
    """
    if column in table.rows:
        return _numbers(table.rows, (column,))[:, 0]
    for block in table.blocks.values():
        values = pd.DataFrame([block]) if isinstance(block, dict) else block
        if column not in values:
            continue
        for key in ("rlnOpticsGroup", "rlnTomoName"):
            if key in values and key in table.rows:
                by_key = values.drop_duplicates(key).set_index(key)[column]
                frame = pd.DataFrame({column: table.rows[key].map(by_key)})
                return _numbers(frame, (column,))[:, 0]
        if len(values) == 1:
            return np.repeat(_numbers(values, (column,))[:, 0], len(table))
    return None


def lack_numbers(rows: pd.DataFrame) -> Bool[NDArray[np.bool_], " n"]:
    """Whether a position or an offset of each row is no number.

    Raises
    ------
    ValueError
        If there are no coordinates.
    """
    offsets = (*ORIGIN, *ORIGIN_PIXELS, *SUBTOMOGRAM_ANGLES)
    columns = (*columns_of(rows), *(column for column in offsets if column in rows))
    return np.asarray(~np.isfinite(_as_numbers(rows, columns)).all(axis=1))


def _numbers(rows: pd.DataFrame, columns: tuple[str, ...]) -> NDArray[np.float64]:
    values = _as_numbers(rows, columns)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        msg = (
            f"{len(bad)} particles lack a number in {', '.join(columns)}, the first is the "
            f"{bad[0] + 1}. of {len(rows)}"
        )
        raise ValueError(msg)
    return values


def _as_numbers(rows: pd.DataFrame, columns: tuple[str, ...]) -> NDArray[np.float64]:
    numbers = [pd.to_numeric(rows[column], errors="coerce") for column in columns]
    return np.stack([np.asarray(column, np.float64) for column in numbers], axis=1)


def _is_from_warp(table: ParticleTable) -> bool:
    return bool(table.tomograms) and all(name.endswith(WARP_SUFFIX) for name in table.tomograms)


def _refuse_fractions(table: ParticleTable) -> None:
    values = _numbers(table.rows, CORNER)
    if _is_from_warp(table) and len(values) and values.min() >= 0 and values.max() <= 1:
        msg = (
            "the coordinates lie between 0 and 1, as Warp's template matching writes them: "
            "multiply them by the tomogram's size in voxels first"
        )
        raise ValueError(msg)


def _centres(extent_xyz: NDArray[np.float64]) -> NDArray[np.float64]:
    unknown = int(np.count_nonzero(~np.isfinite(extent_xyz).all(axis=1)))
    if unknown:
        msg = (
            f"RELION 5 counts from the tomogram's centre, and the size is not known for {unknown} "
            f"of {len(extent_xyz)} particles: give --tomograms tomograms.star, --tomogram or "
            "--tomogram-size"
        )
        raise ValueError(msg)
    return extent_xyz / 2


def _offsets(rows: pd.DataFrame, unit: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each particle lies from its coordinates, (x, y, z) in angstrom, to be subtracted."""
    columns = next((c for c in (ORIGIN, ORIGIN_PIXELS) if {*c} & {*rows.columns}), ())
    offsets = np.zeros((len(rows), 3))
    for axis, column in enumerate(columns):
        if column in rows:  # one that is missing is 0, as in RELION
            offsets[:, axis] = _numbers(rows, (column,))[:, 0]
    if columns == ORIGIN_PIXELS:
        offsets *= unit[:, None]
    if columns and {*SUBTOMOGRAM_ANGLES} <= {*rows.columns} and len(rows):
        angles = _numbers(rows, SUBTOMOGRAM_ANGLES)
        # RELION's matrix is the inverse of the intrinsic rotation Z Y Z by rot, tilt, psi.
        from scipy.spatial.transform import Rotation  # 0.2 s to import, for few tables

        rotations = Rotation.from_euler("ZYZ", angles, degrees=True).inv()
        offsets = np.asarray(rotations.apply(offsets))
    return offsets

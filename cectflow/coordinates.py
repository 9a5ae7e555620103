"""Conventions of coordinates: where the particles of a table are, and how to write it.

:func:`coordinates_zyx` reads RELION 3, 4 and 5, Warp, M and plain coordinates into voxels of one
tomogram, :func:`coordinate_columns` writes them. What both share goes through angstrom from the
centre of voxel 0, in which tables over several tomograms can be converted
(:mod:`cectflow.conversion`): :func:`read_positions` and :func:`write_positions`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Num
from numpy.typing import NDArray

from cectflow.particles import CENTRED, CORNER, M_SPECIES, PLAIN, ParticleTable
from cectflow.tomogram_table import WARP_SUFFIX, TomogramInfo

__all__ = [
    "ORIGIN",
    "ORIGIN_PIXELS",
    "PIXEL_SIZES",
    "PLACEMENT_COLUMNS",
    "SUBTOMOGRAM_ANGLES",
    "CoordinateConvention",
    "Frames",
    "columns_of",
    "coordinate_columns",
    "coordinates_zyx",
    "look_up",
    "place_particles",
    "read_positions",
    "refuse_outside",
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
LARGEST_SHARE_OUTSIDE = 0.05
"""Of a tomogram's particles: where more lie outside of it, they are counted in something else."""
LARGEST_MISFIT = (2.0, 0.01)
"""Voxels and share by which the edge of a tomogram may differ from what its table says."""


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


def coordinates_zyx(
    table: ParticleTable,
    *,
    voxel_size: float,
    shape: tuple[int, int, int],
    coords_voxel_size: float | None = None,
    info: TomogramInfo | None = None,
) -> Float[NDArray[np.float64], "n 3"]:
    """Positions of all particles in a tomogram, in its voxels, 0-based, voxel centres at integers.

    The first of these that the table has is read:

    - ``rlnCenteredCoordinateX/Y/ZAngst`` (RELION 5): angstrom from the centre, which lies at half
      the unbinned size, odd or even, as in ``getParticleCoordDecenteredPixel`` of RELION's
      particle_set.cpp and in its reconstruction (voxel 0 at pixel 0 since 4.1). The size is that of
      ``info``, else ``rlnTomoSizeX/Y/Z`` where the table has it, else that of the tomogram.
      RELION's napari picker subtracts half the size minus one pixel (3dem/relion#1137); its picks
      lie one unbinned pixel off.
    - ``wrpCoordinateX1/Y1/Z1`` (M): angstrom from the corner.
    - ``rlnCoordinateX/Y/Z``, counted from the corner in units of ``coords_voxel_size`` if given;
      in an export of WarpTools (names end in ``.tomostar``) of the exported pixel size
      ``rlnPixelSize`` or ``rlnImagePixelSize``; in RELION 4 of ``rlnTomoTiltSeriesPixelSize``;
      in RELION 3 and all else of the tomogram's voxels.
    - ``x``, ``y``, ``z``: in units of ``coords_voxel_size``, or of the tomogram's voxels.

    ``rlnOriginX/Y/ZAngst`` are subtracted, turned by the subtomogram's own angles
    (``rlnTomoSubtomogramRot/Tilt/Psi``) where there are any, as in RELION's
    ``ParticleSet::getPosition``; ``rlnOriginX/Y/Z`` are subtracted in units of the coordinates.

    Parameters
    ----------
    table
        Particles of one tomogram.
    voxel_size
        Of the tomogram, in angstrom.
    shape
        Of the tomogram, ``(z, y, x)`` in voxels.
    coords_voxel_size
        In angstrom; only for coordinates that are counted in voxels.
    info
        The tomogram's row in a table of tomograms (:func:`cectflow.tomogram_table.read_tomograms`).

    Raises
    ------
    ValueError
        If the particles are in several tomograms, there are no coordinates, one is no number or
        lies more than a voxel outside the tomogram, ``coords_voxel_size`` is given for
        coordinates in angstrom, or the tomogram is not of the size that ``info`` says.
    """
    positions, extent = _locate(table, voxel_size, shape, coords_voxel_size, info)
    count = len(table)
    refuse_outside(positions, np.full(count, voxel_size), np.tile(extent, (count, 1)), table)
    return np.ascontiguousarray(positions[:, ::-1] / voxel_size)


def place_particles(
    table: ParticleTable,
    *,
    voxel_size: float,
    shape: tuple[int, int, int],
    coords_voxel_size: float | None = None,
    info: TomogramInfo | None = None,
) -> tuple[Float[NDArray[np.float64], "n 3"], dict[int, str]]:
    """Positions as of :func:`coordinates_zyx`, where single particles may have none.

    Returns
    -------
    positions
        ``(n, 3)``, NaN for particles without.
    faults
        Row, counted from 0 → why that particle has none: its coordinates are no numbers, or lie
        outside the tomogram, as do at most one or 5 % of the particles.

    Raises
    ------
    ValueError
        As :func:`coordinates_zyx`, if more particles lie outside or all have a fault: the
        coordinates are then counted in something else, and those inside are elsewhere, too.
    """
    lost = _lack_numbers(table.rows)
    if lost.all():
        lost[:] = False  # what is wrong with all of them is refused as such
    faults = dict.fromkeys(
        np.flatnonzero(lost).tolist(), "a coordinate or an offset is not a number: correct it"
    )
    rows = np.flatnonzero(~lost)
    sound = table.take(rows)
    positions, extent = _locate(sound, voxel_size, shape, coords_voxel_size, info)
    voxels, extents = np.full(len(rows), voxel_size), np.tile(extent, (len(rows), 1))
    outside = _outside(positions, voxels, extents)
    if outside.all() or outside.sum() > max(1, LARGEST_SHARE_OUTSIDE * len(rows)):
        refuse_outside(positions, voxels, extents, sound)
    for place in np.flatnonzero(outside).tolist():
        given, size = _in_voxels(positions[place], voxel_size), _in_voxels(extent, voxel_size)
        faults[int(rows[place])] = (
            f"lies at voxel {given}, outside the tomogram of {size} (x, y, z)"
        )
    found = np.full((len(table), 3), np.nan)
    found[rows[~outside]] = positions[~outside, ::-1] / voxel_size
    return found, faults


def _locate(
    table: ParticleTable,
    voxel_size: float,
    shape: tuple[int, int, int],
    coords_voxel_size: float | None,
    info: TomogramInfo | None,
) -> tuple[Float[NDArray[np.float64], "n 3"], Float[NDArray[np.float64], " 3"]]:
    """Positions in a tomogram and its own edges, (x, y, z) in angstrom."""
    columns_of(table.rows)
    if len(table.tomograms) > 1:
        msg = (
            f"the particles are in {len(table.tomograms)} tomograms, {table.tomograms[0]}, "
            f"{table.tomograms[1]} and so on: expected those of one"
        )
        raise ValueError(msg)
    own_extent = np.array(shape[::-1]) * voxel_size
    if info is None:
        extents = stated_extents(table)
        extents = np.where(np.isfinite(extents), extents, own_extent)
    else:
        _refuse_misfit(info, voxel_size, shape)
        extents = np.tile(info.extent_xyz, (len(table), 1))
    unit = stated_unit(table, coords_voxel_size)
    if unit is None:
        unit = np.full(len(table), voxel_size)
    return read_positions(table, unit, extents), own_extent


def coordinate_columns(
    positions_zyx: Num[NDArray[Any], "n 3"],
    convention: CoordinateConvention,
    *,
    voxel_size: float,
    shape: tuple[int, int, int],
    tilt_series_pixel_size: float | None = None,
    info: TomogramInfo | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Coordinate columns that :func:`coordinates_zyx` reads back to the same positions.

    Parameters
    ----------
    positions_zyx
        In voxels of the tomogram, 0-based.
    convention
        ``relion3``: voxels of the tomogram; ``warp``: those too, with their size beside them, and
        the names of the tomograms must end in ``.tomostar``; ``relion4``: unbinned pixels, with
        their size beside them; ``relion5``: angstrom from the centre; ``csv``: voxels as ``x``,
        ``y``, ``z``.
    voxel_size, shape
        Of the tomogram, in angstrom and in voxels ``(z, y, x)``.
    tilt_series_pixel_size
        Of the unbinned tilt images in angstrom; needed for ``relion4``, written for ``relion5``.
    info
        The tomogram's row in a table of tomograms: says pixel size and unbinned size.

    Raises
    ------
    ValueError
        If the convention is ``relion4`` and the pixel size is missing, or the tomogram is not of
        the size that ``info`` says.
    """
    extent = np.array(shape[::-1], np.float64) * voxel_size
    if info is not None:
        _refuse_misfit(info, voxel_size, shape)
        extent = np.array(info.extent_xyz)
        tilt_series_pixel_size = info.pixel_size
    num = len(positions_zyx)
    pixel_size = np.nan if tilt_series_pixel_size is None else tilt_series_pixel_size
    frames = Frames(
        np.full(num, voxel_size), np.full(num, pixel_size, np.float64), np.tile(extent, (num, 1))
    )
    positions = np.asarray(positions_zyx, np.float64)[:, ::-1] * voxel_size
    return write_positions(positions, convention, frames)


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
        As in :func:`coordinate_columns`.
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


def refuse_outside(
    positions_xyz: Float[NDArray[np.float64], "n 3"],
    voxel_size: Float[NDArray[np.float64], " n"],
    extent_xyz: Float[NDArray[np.float64], "n 3"],
    table: ParticleTable,
) -> None:
    """Refuse particles that lie outside their tomogram by more than a voxel.

    Parameters
    ----------
    positions_xyz, extent_xyz
        ``(n, 3)`` in angstrom; where an extent is NaN nothing is refused.
    voxel_size
        ``(n,)`` in angstrom.
    table
        That they are of.

    Raises
    ------
    ValueError
        With the first of them, and what may be the cause.
    """
    outside = np.flatnonzero(_outside(positions_xyz, voxel_size, extent_xyz))
    if not len(outside):
        return
    row = int(outside[0])
    given = _in_voxels(positions_xyz[row], voxel_size[row])
    expected = _in_voxels(extent_xyz[row], voxel_size[row])
    names = table.tomogram_names
    where = f", {names[row]}" if names else ""
    remedy = (
        "is it the tomogram they were picked in, uncropped?"
        if columns_of(table.rows) in (CENTRED, M_SPECIES)
        else "if they are counted in other voxels, give their size with --coords-voxel-size"
    )
    msg = (
        f"{len(outside)} of {len(positions_xyz)} particles lie outside the tomogram, one of them "
        f"at voxel {given} of {expected} (x, y, z; {voxel_size[row]:g} angstrom{where}): {remedy}"
    )
    raise ValueError(msg)


def _outside(
    positions_xyz: NDArray[np.float64],
    voxel_size: NDArray[np.float64],
    extent_xyz: NDArray[np.float64],
) -> NDArray[np.bool_]:
    # One voxel of grace: programs count from 0 or from 1.
    edge = voxel_size[:, None]
    known = np.isfinite(extent_xyz) & np.isfinite(edge)
    inside = (positions_xyz >= -edge) & (positions_xyz <= extent_xyz)
    return np.asarray(~(inside | ~known).all(axis=1))


def _in_voxels(angstrom_xyz: NDArray[np.float64], voxel_size: float) -> str:
    return " x ".join(f"{value:.7g}" for value in (angstrom_xyz / voxel_size).round(1))


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


def _lack_numbers(rows: pd.DataFrame) -> NDArray[np.bool_]:
    """Whether a position or an offset of each row is no number."""
    offsets = (*ORIGIN, *ORIGIN_PIXELS, *SUBTOMOGRAM_ANGLES)
    columns = (*columns_of(rows), *(column for column in offsets if column in rows))
    return np.asarray(~np.isfinite(_as_numbers(rows, columns)).all(axis=1))


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


def _refuse_misfit(info: TomogramInfo, voxel_size: float, shape: tuple[int, int, int]) -> None:
    """Refuse a tomogram that is not the one described: its centre is another place."""
    given = np.array(shape[::-1]) * voxel_size
    expected = np.array(info.extent_xyz)
    voxels, share = LARGEST_MISFIT
    if (np.abs(given - expected) > voxels * voxel_size + share * expected).any():
        edges = [" x ".join(f"{edge:.0f}" for edge in extent) for extent in (given, expected)]
        msg = (
            f"the tomogram measures {edges[0]} angstrom (x, y, z), {voxel_size:g} a voxel, the "
            f"table of tomograms says {edges[1]}: give the whole tomogram, or the right "
            "--voxel-size"
        )
        raise ValueError(msg)

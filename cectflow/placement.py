"""Placement: where the particles of a table lie in a tomogram, in its voxels, and back.

:func:`coordinates_zyx` reads RELION 3, 4 and 5, Warp, M and plain coordinates into voxels of one
tomogram, :func:`coordinate_columns` writes them; :func:`place_particles` lets single particles have
no place. The columns and their units are those of :mod:`cectflow.coordinates`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Num
from numpy.typing import NDArray

from cectflow.coordinates import (
    CoordinateConvention,
    Frames,
    columns_of,
    lack_numbers,
    read_positions,
    stated_extents,
    stated_unit,
    write_positions,
)
from cectflow.particles import CENTRED, M_SPECIES, ParticleTable
from cectflow.tomogram_table import TomogramInfo

__all__ = ["coordinate_columns", "coordinates_zyx", "place_particles", "refuse_outside"]

LARGEST_SHARE_OUTSIDE = 0.05
"""Of a tomogram's particles: where more lie outside of it, they are counted in something else."""
LARGEST_MISFIT = (2.0, 0.01)
"""Voxels and share by which the edge of a tomogram may differ from what its table says."""


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
    lost = lack_numbers(table.rows)
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
        As in :func:`~cectflow.coordinates.write_positions`.
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

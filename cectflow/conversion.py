"""Particle tables from one convention of coordinates to another, over any number of tomograms.

Positions go through angstrom from the centre of voxel 0; what is not of the placement stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray

from cectflow.coordinates import (
    ORIGIN,
    ORIGIN_PIXELS,
    CoordinateConvention,
    Frames,
    columns_of,
    look_up,
    read_positions,
    stated_extents,
    stated_unit,
    write_positions,
)
from cectflow.particles import CENTRED, CORNER, M_SPECIES, PLAIN, TOMOGRAM_NAMES, ParticleTable
from cectflow.placement import refuse_outside
from cectflow.star import Blocks
from cectflow.tomogram_table import WARP_SUFFIX, TomogramInfo, find_tomogram

__all__ = ["convert_particles", "find_frames", "locate_particles", "name_tomogram"]

AGREEMENT = 1e-3
"""Share by which two statements of one pixel size may differ."""
VOXEL_AGREEMENT = 1e-2
"""The same for voxel sizes: headers round, and scales are calibrated."""
DECIMALS = 6
"""Of written coordinates: what lies beyond is rounding error."""
TILT_PIXEL_SIZE = "rlnTomoTiltSeriesPixelSize"
ORIGINAL_PIXEL_SIZE = "rlnMicrographOriginalPixelSize"
"""RELION 3 has no tilt series: its name for the pixel size before binning."""
M_ANGLES = {f"wrpAngle{name}1": f"rlnAngle{name}" for name in ("Rot", "Tilt", "Psi")}


def find_frames(
    table: ParticleTable,
    *,
    tomograms: Mapping[str, TomogramInfo] | None = None,
    extent_xyz: Float[NDArray[np.float64], " 3"] | None = None,
    size_xyz: tuple[int, int, int] | None = None,
    voxel_size: float | None = None,
    pixel_size: float | None = None,
) -> Frames:
    """Sampling and size of each particle's tomogram, from what is given and what the table says.

    Parameters
    ----------
    table
        Particles.
    tomograms
        By name, as in a table of tomograms; they hold for each particle's own one.
    extent_xyz
        Edges in angstrom of the one tomogram that there is a volume of; or
    size_xyz
        unbinned pixels ``(x, y, z)`` of all tomograms.
    voxel_size
        Of the tomograms in angstrom; takes the place of what their binning says.
    pixel_size
        Of the unbinned tilt images in angstrom.

    Raises
    ------
    ValueError
        If a tomogram is not described, two statements of one pixel size differ, a size is no
        positive number, or ``size_xyz`` is given and no pixel size is known.
    """
    num = len(table)
    for name, size in (("--voxel-size", voxel_size), ("--pixel-size", pixel_size)):
        if size is not None and not (np.isfinite(size) and size > 0):
            msg = f"{name} is a positive number of angstrom, given {size}"
            raise ValueError(msg)
    infos = None if tomograms is None else _infos(table, tomograms)
    stated: dict[str, NDArray[np.float64] | None] = {
        "the particle table": look_up(table, TILT_PIXEL_SIZE),
        "the table of tomograms": (
            None if infos is None else np.array([info.pixel_size for info in infos], np.float64)
        ),
        "--pixel-size": None if pixel_size is None else np.full(num, pixel_size),
    }
    pixel_sizes = _agreed(stated, num)
    voxel_sizes = np.full(num, np.nan)
    extents = stated_extents(table)
    if infos is not None:
        voxel_sizes = np.array([info.voxel_size or np.nan for info in infos], np.float64)
        extents = np.array([info.extent_xyz for info in infos], np.float64).reshape(num, 3)
    elif extent_xyz is not None:
        extents = np.tile(extent_xyz, (num, 1))
    elif size_xyz is not None:
        if not np.isfinite(pixel_sizes).all():
            msg = (
                "--tomogram-size counts unbinned pixels: give their size in angstrom with "
                "--pixel-size"
            )
            raise ValueError(msg)
        if min(size_xyz) < 1:
            msg = f"--tomogram-size is three whole numbers from 1 on, given {size_xyz}"
            raise ValueError(msg)
        extents = np.array([size_xyz]) * pixel_sizes[:, None]
    if voxel_size is not None:
        voxel_sizes = np.full(num, voxel_size)
    return Frames(voxel_sizes, pixel_sizes, extents)


def name_tomogram(table: ParticleTable, name: str) -> ParticleTable:
    """The same particles with the name of their tomogram, for a table that has none.

    Raises
    ------
    ValueError
        If the table names its tomograms otherwise.
    """
    if table.tomogram_names:
        others = [known for known in table.tomograms if known != name]
        if others:
            msg = f"the tomogram was called {name!r}, the table says {', '.join(others)}: leave out"
            raise ValueError(msg + " --tomogram-name")
        return table
    return table.with_columns(rlnTomoName=pd.array([name] * len(table), dtype="str"))


def locate_particles(
    table: ParticleTable, frames: Frames, *, coords_voxel_size: float | None = None
) -> tuple[Float[NDArray[np.float64], "n 3"], Frames]:
    """Positions ``(x, y, z)`` in angstrom from the centre of voxel 0, and frames that they fit.

    Parameters
    ----------
    table
        Particles, of any number of tomograms.
    frames
        Of each particle (:func:`find_frames`); the voxel size is filled in where the table has it.
    coords_voxel_size
        Angstrom per unit of coordinates that are counted in voxels.

    Raises
    ------
    ValueError
        If a unit or size that is needed is not known, a coordinate is no number, or a particle
        lies outside its tomogram.
    """
    unit, frames = _units(table, frames, coords_voxel_size)
    positions = read_positions(table, unit, frames.extent_xyz)
    refuse_outside(positions, _grace(frames, unit), frames.extent_xyz, table)
    return positions, frames


def convert_particles(
    table: ParticleTable,
    convention: CoordinateConvention,
    frames: Frames,
    *,
    tomograms: Mapping[str, TomogramInfo] | None = None,
    coords_voxel_size: float | None = None,
) -> ParticleTable:
    """The same particles in another convention, row by row.

    Offsets are folded into the coordinates: ``rlnOriginX/Y/ZAngst`` become 0, ``rlnOriginX/Y/Z``
    go. Angles stay as they are (M's first pose takes RELION's names), and so do all other columns
    and blocks, except that

    - the pixel size of the tilt series is called ``rlnMicrographOriginalPixelSize`` in RELION 3,
      where ``rlnTomoTiltSeriesPixelSize`` would say that coordinates are RELION 4's;
    - ``rlnPixelSize`` says the voxel size of coordinates that are counted in voxels; that of
      images, if it was one, becomes ``rlnImagePixelSize``;
    - a CSV file holds the particles alone.

    Parameters
    ----------
    table
        Particles, of any number of tomograms.
    convention
        To be written, as in :func:`cectflow.coordinates.write_positions`.
    frames
        Of each particle (:func:`find_frames`).
    tomograms
        By name; RELION pairs its tables by their spelling, so it is written for RELION 4 and 5.
    coords_voxel_size
        Angstrom per unit of coordinates that are counted in voxels.

    Raises
    ------
    ValueError
        If units or sizes that are needed are not known or contradict one another, a coordinate is
        no number, a particle lies outside its tomogram, or a name is missing.
    """
    positions, frames = locate_particles(table, frames, coords_voxel_size=coords_voxel_size)
    names = _names(table, convention, tomograms)
    columns = write_positions(positions, convention, frames)
    if convention in ("relion3", "csv"):
        columns["rlnPixelSize"] = frames.voxel_size
    elif convention == "relion4" and any(name.endswith(WARP_SUFFIX) for name in names):
        # Such names are those of exports, counted in exported pixels: these are unbinned ones.
        columns["rlnPixelSize"] = frames.pixel_size
    if TILT_PIXEL_SIZE in columns and look_up(table, TILT_PIXEL_SIZE) is not None:
        del columns[TILT_PIXEL_SIZE]  # is said already, and the same
    rows = _place(table, columns, convention)
    converted = ParticleTable(
        _blocks(replace(table, blocks={**table.blocks, table.block: rows}), convention),
        table.block if convention != "csv" else "particles",
    )
    return converted.with_columns(**_name_columns(converted, convention, names))


def _infos(table: ParticleTable, tomograms: Mapping[str, TomogramInfo]) -> list[TomogramInfo]:
    names = table.tomogram_names
    if not names and len(table):
        msg = (
            f"the particles name no tomogram, {len(tomograms)} are described: say which one they "
            "are in with --tomogram-name"
        )
        raise ValueError(msg)
    return [tomograms[find_tomogram(tomograms, name)] for name in names]


def _agreed(stated: Mapping[str, NDArray[np.float64] | None], num: int) -> NDArray[np.float64]:
    """Pixel size of each particle from several sources; NaN where none says it."""
    known = {source: values for source, values in stated.items() if values is not None}
    if not known:
        return np.full(num, np.nan)
    first, *others = known
    for other in others:
        differ = np.abs(known[other] - known[first]) > AGREEMENT * known[first]
        if differ.any():
            row = int(np.flatnonzero(differ)[0])
            msg = (
                f"the unbinned pixels of row {row} measure {known[first][row]:g} angstrom by "
                f"{first} and {known[other][row]:g} by {other}: give what belongs together"
            )
            raise ValueError(msg)
    return known[first]


def _units(
    table: ParticleTable, frames: Frames, coords_voxel_size: float | None
) -> tuple[NDArray[np.float64], Frames]:
    """Angstrom per unit of the coordinates, and frames in which that is the voxel size if none was.

    Coordinates in voxels of the tomogram take its voxel size, or ``rlnPixelSize`` beside them.
    """
    unit = stated_unit(table, coords_voxel_size)
    if unit is not None:
        return unit, frames
    voxel_size = frames.voxel_size
    beside = look_up(replace(table, blocks={table.block: table.rows}), "rlnPixelSize")
    if beside is None:
        unit = voxel_size
    else:
        differ = np.abs(beside - voxel_size) > VOXEL_AGREEMENT * voxel_size  # never where NaN
        if differ.any():
            row = int(np.flatnonzero(differ)[0])
            msg = (
                f"coordinates of row {row} are in voxels of {beside[row]:g} angstrom by "
                f"rlnPixelSize, those of the tomogram measure {voxel_size[row]:g}: say with "
                "--coords-voxel-size which they are counted in"
            )
            raise ValueError(msg)
        unit = np.where(np.isfinite(voxel_size), voxel_size, beside)
    if not (np.isfinite(unit) & (unit > 0)).all():
        msg = (
            "the coordinates are counted in voxels, whose size is not known: give it in angstrom "
            "with --coords-voxel-size, or the tomogram with --tomogram or --voxel-size"
        )
        raise ValueError(msg)
    return unit, replace(frames, voxel_size=unit)


def _grace(frames: Frames, unit: NDArray[np.float64]) -> NDArray[np.float64]:
    """Size of a voxel, or of the nearest thing that is known."""
    pixel = np.where(np.isfinite(frames.pixel_size), frames.pixel_size, unit)
    return np.where(np.isfinite(frames.voxel_size), frames.voxel_size, pixel)


def _names(
    table: ParticleTable,
    convention: CoordinateConvention,
    tomograms: Mapping[str, TomogramInfo] | None,
) -> list[str]:
    """Name of each particle's tomogram as the convention spells it."""
    names = list(table.tomogram_names)
    if convention not in ("relion3", "csv") and not names and len(table):
        msg = f"{convention} names the tomogram of each particle: give --tomogram-name"
        raise ValueError(msg)
    if convention == "warp":
        return [name.removesuffix(WARP_SUFFIX) + WARP_SUFFIX for name in names]
    if convention in ("relion4", "relion5") and tomograms is not None:
        return [find_tomogram(tomograms, name) for name in names]
    return names


def _place(
    table: ParticleTable,
    columns: Mapping[str, NDArray[np.float64]],
    convention: CoordinateConvention,
) -> pd.DataFrame:
    """Rows with new columns of position where the old ones stood."""
    rows = table.rows
    used = columns_of(rows)
    dropped = {*CENTRED, *CORNER, *M_SPECIES, *ORIGIN_PIXELS, *columns, *used}
    if convention == "csv":
        dropped |= {*PLAIN}
    renamed = dict(M_ANGLES) if used == M_SPECIES else {}
    if _is_of_images(table, "rlnPixelSize"):
        renamed["rlnPixelSize"] = "rlnImagePixelSize"
    if convention == "relion3":
        renamed[TILT_PIXEL_SIZE] = ORIGINAL_PIXEL_SIZE
    placed: dict[str, object] = {}
    for name in map(str, rows):
        if name == used[0]:
            placed |= {new: np.round(values, DECIMALS) for new, values in columns.items()}
        if name in renamed and renamed[name] not in rows:
            placed[renamed[name]] = rows[name].array
        elif name in ORIGIN:
            placed[name] = np.zeros(len(rows))
        elif name not in dropped and name not in ("rlnPixelSize", *renamed):
            placed[name] = rows[name].array
    return pd.DataFrame(placed)


def _is_of_images(table: ParticleTable, column: str) -> bool:
    """Whether a pixel size of the rows is that of the images too, as in exports of Warp."""
    stated = any("rlnImagePixelSize" in block for block in table.blocks.values())
    if stated or not {column, "rlnImageName"} <= {*table.rows.columns}:
        return False
    unbinned = look_up(table, TILT_PIXEL_SIZE)
    own = pd.to_numeric(table.rows[column], errors="coerce").to_numpy(np.float64)
    return unbinned is None or not np.allclose(unbinned, own)


def _blocks(table: ParticleTable, convention: CoordinateConvention) -> Blocks:
    """All blocks as the convention has them."""
    if convention == "csv":
        return {"particles": table.rows}
    if convention != "relion3":
        return table.blocks
    return {name: _without_tilt_series(block) for name, block in table.blocks.items()}


def _without_tilt_series(block: pd.DataFrame | dict[str, Any]) -> pd.DataFrame | dict[str, Any]:
    has_original = ORIGINAL_PIXEL_SIZE in block
    renamed = {} if has_original else {TILT_PIXEL_SIZE: ORIGINAL_PIXEL_SIZE}
    kept = [name for name in block if name != TILT_PIXEL_SIZE or not has_original]
    if isinstance(block, pd.DataFrame):
        return block[kept].rename(columns=renamed)
    return {renamed.get(str(name), str(name)): block[str(name)] for name in kept}


def _name_columns(
    table: ParticleTable, convention: CoordinateConvention, names: Sequence[str]
) -> dict[str, Any]:
    """Columns that name the tomograms, where the convention looks for them."""
    if not names:
        return {}
    texts = pd.array(list(names), dtype="str")
    column = "rlnMicrographName" if convention in ("relion3", "warp") else "rlnTomoName"
    if convention == "warp":
        # All that name it, lest an older spelling be found first.
        return {name: texts for name in TOMOGRAM_NAMES if name in table.rows} | {column: texts}
    if convention == "csv" or (convention == "relion3" and column in table.rows):
        return {}
    return {column: texts}

"""Particle tables: STAR and CSV files of picks, kept whole, and where their particles are.

A :class:`ParticleTable` holds every block of a file in order, so that what another program wrote
comes back out of it; :func:`coordinates_zyx` reads RELION 3, 4 and 5, Warp, M and plain
coordinates into voxels of a tomogram, and :func:`coordinate_columns` writes them.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import starfile
from jaxtyping import Float, Num
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cectflow.files import replacing

__all__ = [
    "PIXEL_SIZES",
    "PLACEMENT_COLUMNS",
    "CoordinateConvention",
    "ParticleTable",
    "coordinate_columns",
    "coordinates_zyx",
    "make_particle_rows",
    "particles_from",
    "read_particles",
]

CoordinateConvention = Literal["relion3", "relion4", "relion5"]

CENTRED = tuple(f"rlnCenteredCoordinate{axis}Angst" for axis in "XYZ")
CORNER = tuple(f"rlnCoordinate{axis}" for axis in "XYZ")
M_SPECIES = tuple(f"wrpCoordinate{axis}1" for axis in "XYZ")
PLAIN = ("x", "y", "z")
ORIGIN = tuple(f"rlnOrigin{axis}Angst" for axis in "XYZ")
ORIGIN_PIXELS = tuple(f"rlnOrigin{axis}" for axis in "XYZ")
SUBTOMOGRAM_ANGLES = ("rlnTomoSubtomogramRot", "rlnTomoSubtomogramTilt", "rlnTomoSubtomogramPsi")
TOMOGRAM_NAMES = ("rlnTomoName", "rlnMicrographName", "wrpSourceName")
PIXEL_SIZES = ("rlnTomoTiltSeriesPixelSize", "rlnPixelSize", "rlnImagePixelSize")
"""Columns that say what coordinates are counted in."""
PLACEMENT_COLUMNS = re.compile(
    r"rln(Centered)?Coordinate[XYZ](Angst)?|rlnOrigin[XYZ](Angst)?|wrpCoordinate[XYZ]1|"
    r"rln(Angle|TomoSubtomogram)(Rot|Tilt|Psi)|" + "|".join(PIXEL_SIZES)
)
"""Columns of position and orientation, and of the units of positions."""

_starfile: Any = starfile  # whose annotations are older than its behaviour
# Names and paths that look like numbers ("001", the PDB entry 1e10) stay as they are.
_TEXT_COLUMN = re.compile(r"^\s*_(\w*(?:Name|File|Hash))\b", re.MULTILINE)


@dataclass(frozen=True, eq=False)
class ParticleTable:
    """All blocks of a particle file, and which of them holds the particles.

    Parameters
    ----------
    blocks
        By name, in the order of the file: a table for each loop, a dict for key-value pairs. The
        block without a name is called ``""``.
    block
        Name of the block that holds the particles.

    Raises
    ------
    ValueError
        If that block is missing or no table.
    """

    blocks: dict[str, pd.DataFrame | dict[str, Any]]
    block: str

    def __post_init__(self) -> None:
        if not isinstance(self.blocks.get(self.block), pd.DataFrame):
            msg = f"there is no table {self.block!r} among the blocks {list(self.blocks)}"
            raise ValueError(msg)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def rows(self) -> pd.DataFrame:
        """The particles, one row each."""
        rows = self.blocks[self.block]
        assert isinstance(rows, pd.DataFrame)
        return rows

    @property
    def tomograms(self) -> tuple[str, ...]:
        """Names of the tomograms that the particles are in, in order of appearance."""
        return tuple(dict.fromkeys(_tomogram_names(self.rows)))

    def with_columns(self, **columns: Any) -> ParticleTable:
        """Table with the same rows, order and blocks, and these columns added or replaced.

        Parameters
        ----------
        **columns
            One value, or one for each row (taken by position, whatever its index).
        """
        plain: dict[str, Any] = {
            name: column.array if isinstance(column, pd.Series) else column
            for name, column in columns.items()
        }
        return self._with_rows(self.rows.assign(**plain))

    def select(self, keep: Sequence[bool] | NDArray[np.bool_]) -> ParticleTable:
        """Table of the rows where ``keep`` is true, in the same order; other blocks stay whole."""
        return self._with_rows(self.rows[np.asarray(keep, bool)].reset_index(drop=True))

    def in_tomogram(self, name: str) -> ParticleTable:
        """Table of the rows in one tomogram, in the same order; other blocks stay whole.

        Raises
        ------
        ValueError
            If no particle is in it; the message shows the names.
        """
        names = _tomogram_names(self.rows)
        if name not in names:
            known = ", ".join(self.tomograms) or "not named"
            msg = f"there are no particles in tomogram {name!r}: the tomograms are {known}"
            raise ValueError(msg)
        return self.select([other == name for other in names])

    def write(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the table as STAR, or its rows alone as CSV where the name ends so.

        Numbers are written with every digit they hold, and nothing depends on the time of day.

        Raises
        ------
        FileExistsError
            If the file exists and is not to be overwritten.
        """
        if path.suffix == ".csv":
            text = self.rows.to_csv(index=False)
        else:
            text = _starfile.to_string(self.blocks, float_format=None)
            text = "# Written by cectflow" + text[text.index("\n") :]  # in place of the time
        with replacing(path, overwrite=overwrite) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def _with_rows(self, rows: pd.DataFrame) -> ParticleTable:
        return replace(self, blocks={**self.blocks, self.block: rows})


def particles_from(rows: pd.DataFrame) -> ParticleTable:
    """Particle table of rows, as the block ``particles``."""
    return ParticleTable({"particles": rows}, "particles")


def make_particle_rows(
    positions_zyx: Num[NDArray[Any], "n 3"],
    *,
    tomogram: str,
    angles: Num[NDArray[Any], "n 3"] | None = None,
    **further: Any,
) -> pd.DataFrame:
    """Rows with tomogram name, position and, where known, orientation.

    Parameters
    ----------
    positions_zyx
        In voxels of the tomogram, 0-based; written as ``rlnCoordinateX/Y/Z``.
    tomogram
        Written as ``rlnTomoName``.
    angles
        RELION's rot, tilt, psi in degrees.
    further
        Columns that follow, by name.
    """
    names = pd.array([tomogram] * len(positions_zyx), dtype="str")
    columns: dict[str, Any] = {"rlnTomoName": names}
    columns |= zip(CORNER, positions_zyx.T[::-1], strict=True)
    if angles is not None:
        columns |= zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), angles.T, strict=True)
    return pd.DataFrame(columns | further)


def read_particles(path: Path) -> ParticleTable:
    """Particle table of a STAR file, or of a CSV file with the columns x, y, z.

    The particles are the block ``particles``, or else the only table with coordinates or image
    names.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no STAR or CSV file, or holds no or several such tables.
    """
    if not path.is_file():
        msg = f"there is no file {path}"
        raise FileNotFoundError(msg)
    if path.suffix == ".csv":
        return _read_csv(path)
    blocks = _read_star(path)
    if isinstance(blocks.get("particles"), dict):
        blocks["particles"] = pd.DataFrame([blocks["particles"]])
    if isinstance(blocks.get("particles"), pd.DataFrame):
        return ParticleTable(blocks, "particles")
    wanted = {CENTRED[0], CORNER[0], M_SPECIES[0], "rlnImageName"}
    found = [
        name
        for name, block in blocks.items()
        if isinstance(block, pd.DataFrame) and wanted & set(block.columns)
    ]
    if len(found) != 1:
        msg = (
            f"{path} has {len(found)} tables of particles among its blocks {list(blocks)}: "
            f"expected a block 'particles', or one table with any of {', '.join(sorted(wanted))}"
        )
        raise ValueError(msg)
    return ParticleTable(blocks, found[0])


def coordinates_zyx(
    table: ParticleTable,
    *,
    voxel_size: float,
    shape: tuple[int, int, int],
    coords_voxel_size: float | None = None,
) -> Float[NDArray[np.float64], "n 3"]:
    """Positions of all particles in a tomogram, in its voxels, 0-based, voxel centres at integers.

    The first of these that the table has is read:

    - ``rlnCenteredCoordinateX/Y/ZAngst`` (RELION 5): angstrom from the centre, which lies at half
      the unbinned size, as in ``getParticleCoordDecenteredPixel`` of RELION's particle_set.cpp and
      in its reconstruction (voxel 0 at pixel 0 since 4.1). The size is ``rlnTomoSizeX/Y/Z``
      where the table has it, else that of the tomogram. RELION's napari picker subtracts
      half the size minus one pixel (3dem/relion#1137); its picks lie one unbinned pixel off.
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

    Raises
    ------
    ValueError
        If the particles are in several tomograms, there are no coordinates, one is no number or
        lies more than a voxel outside the tomogram, or ``coords_voxel_size`` is given for
        coordinates in angstrom.
    """
    columns = _coordinate_columns_of(table.rows)
    if len(table.tomograms) > 1:
        msg = (
            f"the particles are in {len(table.tomograms)} tomograms, {table.tomograms[0]}, "
            f"{table.tomograms[1]} and so on: expected those of one"
        )
        raise ValueError(msg)
    in_angstrom = columns in (CENTRED, M_SPECIES)
    if coords_voxel_size is not None and (in_angstrom or coords_voxel_size <= 0):
        msg = (
            f"--coords-voxel-size {coords_voxel_size:g} cannot be applied: "
            f"{columns[0]} is in angstrom already"
            if in_angstrom
            else f"--coords-voxel-size is a positive number of angstrom, given {coords_voxel_size}"
        )
        raise ValueError(msg)
    unit = np.ones(1) if in_angstrom else _unit(table, columns, voxel_size, coords_voxel_size)
    if coords_voxel_size is None and columns == CORNER:
        _refuse_fractions(table)
    angstrom_xyz = _numbers(table.rows, columns) * unit[:, None]
    if columns == CENTRED:
        angstrom_xyz += _centre(table, voxel_size, shape)
    angstrom_xyz -= _offsets(table.rows, unit)
    positions_zyx = angstrom_xyz[:, ::-1] / voxel_size
    _refuse_outside(positions_zyx, shape, voxel_size, columns)
    return np.ascontiguousarray(positions_zyx)


def coordinate_columns(
    positions_zyx: Num[NDArray[Any], "n 3"],
    convention: CoordinateConvention,
    *,
    voxel_size: float,
    shape: tuple[int, int, int],
    tilt_series_pixel_size: float | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Coordinate columns that :func:`coordinates_zyx` reads back to the same positions.

    Parameters
    ----------
    positions_zyx
        In voxels of the tomogram, 0-based.
    convention
        ``relion3`` (also for Warp): voxels of the tomogram; ``relion4``: unbinned pixels, with
        their size beside them; ``relion5``: angstrom from the centre.
    voxel_size, shape
        Of the tomogram, in angstrom and in voxels ``(z, y, x)``.
    tilt_series_pixel_size
        Of the unbinned tilt images in angstrom; needed for ``relion4``, written for ``relion5``.

    Raises
    ------
    ValueError
        If the convention is ``relion4`` and the pixel size is missing.
    """
    xyz = np.asarray(positions_zyx, np.float64)[:, ::-1]
    columns: dict[str, NDArray[np.float64]] = {}
    if tilt_series_pixel_size is not None and convention != "relion3":
        columns["rlnTomoTiltSeriesPixelSize"] = np.full(len(xyz), tilt_series_pixel_size)
    if convention == "relion3":
        return dict(zip(CORNER, xyz.T, strict=True))
    if convention == "relion5":
        centred = (xyz - np.array(shape[::-1]) / 2) * voxel_size
        return dict(zip(CENTRED, centred.T, strict=True)) | columns
    if tilt_series_pixel_size is None:
        msg = "RELION 4 counts in unbinned pixels: their size in angstrom is needed"
        raise ValueError(msg)
    return dict(zip(CORNER, xyz.T * voxel_size / tilt_series_pixel_size, strict=True)) | columns


def _read_csv(path: Path) -> ParticleTable:
    try:
        rows = pd.read_csv(path)
    except (ValueError, pd.errors.ParserError) as error:
        msg = f"{path} is not a CSV file: {error}"
        raise ValueError(msg) from None
    if not {*PLAIN} <= {*rows.columns} and not {*CORNER} <= {*rows.columns}:
        msg = f"{path} lacks the columns x, y, z: its columns are {', '.join(rows.columns)}"
        raise ValueError(msg)
    return particles_from(rows)


def _read_star(path: Path) -> dict[str, pd.DataFrame | dict[str, Any]]:
    linecache.checkcache(str(path))  # through which starfile reads, without looking for changes
    try:
        text_columns = sorted(set(_TEXT_COLUMN.findall(path.read_text(encoding="utf-8"))))
        blocks = _starfile.read(path, always_dict=True, parse_as_string=text_columns)
    except (ValueError, TypeError, KeyError, pd.errors.ParserError) as error:
        linecache.clearcache()
        msg = f"{path} is not a STAR file: {error}"
        raise ValueError(msg) from None
    if not blocks:
        msg = f"{path} is not a STAR file: it has no line that begins with data_"
        raise ValueError(msg)
    return dict(blocks)


def _tomogram_names(rows: pd.DataFrame) -> list[str]:
    for column in TOMOGRAM_NAMES:
        if column in rows:
            return [str(name) for name in rows[column]]
    return []


def _coordinate_columns_of(rows: pd.DataFrame) -> tuple[str, ...]:
    known = (CENTRED, M_SPECIES, CORNER, PLAIN)
    for columns in known:
        if {*columns} <= {*rows.columns}:
            return columns
    msg = (
        f"the particles have no coordinates: looked for {'; '.join(', '.join(c) for c in known)}; "
        f"found {', '.join(map(str, rows.columns))}"
    )
    raise ValueError(msg)


def _numbers(rows: pd.DataFrame, columns: tuple[str, ...]) -> NDArray[np.float64]:
    numbers = [pd.to_numeric(rows[column], errors="coerce") for column in columns]
    values = np.stack([np.asarray(column, np.float64) for column in numbers], axis=1)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        msg = f"{len(bad)} particles lack a number in {', '.join(columns)}, first row {bad[0]}"
        raise ValueError(msg)
    return values


def _lookup(table: ParticleTable, column: str) -> NDArray[np.float64] | None:
    """Value for each particle, from its row or from the block that describes its group."""
    if column in table.rows:
        return _numbers(table.rows, (column,))[:, 0]
    for block in table.blocks.values():
        if isinstance(block, dict):
            if column in block:
                return np.full(len(table), float(block[column]))
        elif column in block:
            for key in ("rlnOpticsGroup", "rlnTomoName"):
                if key in block and key in table.rows:
                    values = block.drop_duplicates(key).set_index(key)[column]
                    frame = pd.DataFrame({column: table.rows[key].map(values)})
                    return _numbers(frame, (column,))[:, 0]
            if len(block) == 1:
                return np.full(len(table), float(block[column].iloc[0]))
    return None


def _unit(
    table: ParticleTable, columns: tuple[str, ...], voxel_size: float, given: float | None
) -> NDArray[np.float64]:
    """Angstrom per unit of coordinates that are counted in pixels or voxels, for each particle."""
    if given is not None:
        return np.full(len(table), given)
    sources: tuple[str, ...] = ()
    if columns == CORNER:
        sources = ("rlnTomoTiltSeriesPixelSize",)
        if _is_from_warp(table):
            # positions / BinnedPixelSizeMean in WarpLib's TiltSeries.ReconstructParticleSeries.cs
            sources = ("rlnPixelSize", "rlnImagePixelSize", *sources)
    for source in sources:
        unit = _lookup(table, source)
        if unit is not None:
            return unit
    return np.full(len(table), voxel_size)


def _is_from_warp(table: ParticleTable) -> bool:
    return bool(table.tomograms) and all(name.endswith(".tomostar") for name in table.tomograms)


def _refuse_fractions(table: ParticleTable) -> None:
    values = _numbers(table.rows, CORNER)
    if _is_from_warp(table) and len(values) and values.min() >= 0 and values.max() <= 1:
        msg = (
            "the coordinates lie between 0 and 1, as Warp's template matching writes them: "
            "multiply them by the tomogram's size in voxels first"
        )
        raise ValueError(msg)


def _centre(
    table: ParticleTable, voxel_size: float, shape: tuple[int, int, int]
) -> NDArray[np.float64]:
    """Centre (x, y, z) of each particle's tomogram, in angstrom from the centre of voxel 0."""
    pixel_size = _lookup(table, "rlnTomoTiltSeriesPixelSize")
    found = [_lookup(table, f"rlnTomoSize{axis}") for axis in "XYZ"]
    sizes = [size for size in found if size is not None]
    if pixel_size is None or len(sizes) < 3:
        return np.array([shape[::-1]]) * voxel_size / 2
    return np.stack(sizes, axis=1) * pixel_size[:, None] / 2


def _offsets(rows: pd.DataFrame, unit: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far each particle lies from its coordinates, (x, y, z) in angstrom, to be subtracted."""
    if {*ORIGIN} <= {*rows.columns}:
        offsets = _numbers(rows, ORIGIN)
    elif {*ORIGIN_PIXELS} <= {*rows.columns}:
        offsets = _numbers(rows, ORIGIN_PIXELS) * unit[:, None]
    else:
        return np.zeros((len(rows), 3))
    if {*SUBTOMOGRAM_ANGLES} <= {*rows.columns} and len(rows):
        angles = _numbers(rows, SUBTOMOGRAM_ANGLES)
        # RELION's matrix is the inverse of the intrinsic rotation Z Y Z by rot, tilt, psi.
        rotations = Rotation.from_euler("ZYZ", angles, degrees=True).inv()
        offsets = np.asarray(rotations.apply(offsets))
    return offsets


def _refuse_outside(
    positions_zyx: NDArray[np.float64],
    shape: tuple[int, int, int],
    voxel_size: float,
    columns: tuple[str, ...],
) -> None:
    # One voxel of grace: programs count from 0 or from 1.
    inside = (positions_zyx >= -1) & (positions_zyx <= np.array(shape))
    outside = np.flatnonzero(~inside.all(axis=1))
    if not len(outside):
        return
    row = int(outside[0])
    given = " x ".join(f"{value:.1f}" for value in positions_zyx[row, ::-1])
    expected = " x ".join(map(str, shape[::-1]))
    remedy = (
        "is it the tomogram they were picked in, uncropped?"
        if columns in (CENTRED, M_SPECIES)
        else "if they are counted in other voxels, give their size with --coords-voxel-size"
    )
    msg = (
        f"{len(outside)} of {len(inside)} particles lie outside the tomogram, the first in "
        f"row {row} at voxel {given} of {expected} (x, y, z; {voxel_size:g} angstrom): {remedy}"
    )
    raise ValueError(msg)

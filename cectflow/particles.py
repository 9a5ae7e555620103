"""Particle tables: STAR and CSV files of picks, kept whole.

A :class:`ParticleTable` holds every block of a file in order, so that what another program wrote
comes back out of it. Where its particles are says :mod:`cectflow.coordinates`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Num
from numpy.typing import NDArray

from cectflow.files import replacing
from cectflow.star import Blocks, read_star, star_pieces

__all__ = [
    "CENTRED",
    "CORNER",
    "M_SPECIES",
    "NOT_PREDICTED",
    "PLAIN",
    "TOMOGRAM_NAMES",
    "ParticleTable",
    "make_particle_rows",
    "particles_from",
    "read_particles",
]

CENTRED = tuple(f"rlnCenteredCoordinate{axis}Angst" for axis in "XYZ")
CORNER = tuple(f"rlnCoordinate{axis}" for axis in "XYZ")
M_SPECIES = tuple(f"wrpCoordinate{axis}1" for axis in "XYZ")
PLAIN = ("x", "y", "z")
"""Columns of positions: of RELION 5, of RELION 3, 4 and Warp, of M, and of plain CSV."""
NOT_PREDICTED = "none"
"""Class name of a particle that could not be predicted; its class number is 0."""
TOMOGRAM_NAMES = ("rlnTomoName", "rlnMicrographName", "wrpSourceName")
"""Columns that name a particle's tomogram, the first that there is."""


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

    blocks: Blocks
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
    def tomogram_names(self) -> tuple[str, ...]:
        """Name of each particle's tomogram; empty where the table names none."""
        column = self._tomogram_column
        return () if column is None else tuple(map(str, column))

    @property
    def tomograms(self) -> tuple[str, ...]:
        """Names of the tomograms that the particles are in, in order of appearance."""
        column = self._tomogram_column
        return () if column is None else tuple(dict.fromkeys(map(str, column.unique())))

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

    def take(self, rows: NDArray[np.int64]) -> ParticleTable:
        """Table of these rows, counted from 0, in their order; other blocks stay whole."""
        if len(rows) == len(self) and np.array_equal(rows, np.arange(len(self))):
            return self
        return self._with_rows(self.rows.iloc[rows].reset_index(drop=True))

    def rows_by_tomogram(self) -> dict[str, NDArray[np.int64]]:
        """Name of each tomogram, in order of appearance → its rows, counted from 0.

        All rows are under an empty name where the table names no tomograms.
        """
        column = self._tomogram_column
        if column is None or not len(self):
            return {"": np.arange(len(self))}
        numbers, names = pd.factorize(column.astype(str), use_na_sentinel=False)
        order = np.argsort(numbers, kind="stable")
        starts = np.searchsorted(numbers[order], np.arange(1, len(names)))
        return dict(zip(map(str, names), np.split(order, starts), strict=True))

    def in_tomogram(self, name: str) -> ParticleTable:
        """Table of the rows in one tomogram, in the same order; other blocks stay whole.

        Raises
        ------
        ValueError
            If no particle is in it; the message shows the names.
        """
        names = self.tomogram_names
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
        with replacing(path, overwrite=overwrite) as temporary:
            if path.suffix == ".csv":
                self.rows.to_csv(temporary, index=False)
                return
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(star_pieces(self.blocks))

    @property
    def _tomogram_column(self) -> pd.Series | None:
        column = next((name for name in TOMOGRAM_NAMES if name in self.rows), None)
        return None if column is None else self.rows[column]

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
    blocks = read_star(path)
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

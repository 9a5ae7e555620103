"""Particle files from one convention of coordinates to another: files in, file out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cectflow.conversion import convert_particles, find_frames, name_tomogram
from cectflow.coordinates import ORIGIN, ORIGIN_PIXELS, CoordinateConvention, columns_of
from cectflow.particles import ParticleTable, read_particles
from cectflow.star import refuse_unwritable
from cectflow.tomogram_table import TomogramInfo, read_tomograms
from cectflow.volume import read_volume

__all__ = ["ConversionOptions", "convert_file"]


@dataclass(frozen=True)
class ConversionOptions:
    """What the user says of tomograms and coordinates; lengths in angstrom.

    Attributes
    ----------
    tomograms
        Table of tomograms of RELION 4 or 5; or
    tomogram
        the volume of the one tomogram; or
    tomogram_size
        unbinned pixels ``(x, y, z)`` of all tomograms.
    tomogram_name
        Of the tomogram of a table that names none; default: that of the volume, or of a table of
        one tomogram.
    voxel_size
        Of the tomograms, where their binning or header does not say it.
    coords_voxel_size
        That the coordinates are counted in, where it is another one.
    pixel_size
        Of the unbinned tilt images.

    Raises
    ------
    ValueError
        If tomograms are described in two ways.
    """

    tomograms: Path | None = None
    tomogram: Path | None = None
    tomogram_size: tuple[int, int, int] | None = None
    tomogram_name: str | None = None
    voxel_size: float | None = None
    coords_voxel_size: float | None = None
    pixel_size: float | None = None

    def __post_init__(self) -> None:
        given = (self.tomograms, self.tomogram, self.tomogram_size)
        if sum(one is not None for one in given) > 1:
            msg = "--tomograms, --tomogram and --tomogram-size each say the size: give one of them"
            raise ValueError(msg)


def convert_file(
    source: Path,
    out: Path,
    convention: CoordinateConvention,
    options: ConversionOptions,
    *,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Convert a particle file; returns lines that say what was done.

    Parameters
    ----------
    source
        STAR or CSV, of any convention; it is told by its columns.
    out
        CSV for the convention ``csv``, STAR for the others.
    convention
        To be written.
    options
        What is known of the tomograms.
    overwrite
        Replace an existing file.

    Raises
    ------
    FileExistsError
        If ``out`` exists and is not to be overwritten.
    FileNotFoundError
        If an input is missing.
    ValueError
        As :func:`cectflow.conversion.convert_particles`; also if the ending of ``out`` is that of
        another kind of file, or a text cannot be kept. Nothing is written then.
    """
    if out.exists() and not overwrite:
        msg = f"{out} exists: choose another name, or replace it with --overwrite"
        raise FileExistsError(msg)
    if (out.suffix == ".csv") != (convention == "csv"):
        msg = (
            f"{out} for {convention}: a name that ends in .csv goes with --to csv, any other "
            "with the conventions of STAR files"
        )
        raise ValueError(msg)
    table = read_particles(source)
    tomograms = None if options.tomograms is None else read_tomograms(options.tomograms)
    name = options.tomogram_name or _only_name(options, tomograms)
    if name is not None and (options.tomogram_name or not table.tomogram_names):
        table = name_tomogram(table, name)
    voxel_size, extent = options.voxel_size, None
    if options.tomogram is not None:
        if len(table.tomograms) > 1:
            msg = (
                f"{source} holds particles of {len(table.tomograms)} tomograms, {options.tomogram} "
                "is one: give --tomograms tomograms.star, or --tomogram-size if all measure the "
                "same"
            )
            raise ValueError(msg)
        volume = read_volume(options.tomogram, voxel_size=voxel_size)
        voxel_size = volume.voxel_size
        extent = np.array(volume.shape[::-1], np.float64) * voxel_size
    frames = find_frames(
        table, tomograms=tomograms, extent_xyz=extent, size_xyz=options.tomogram_size,
        voxel_size=voxel_size, pixel_size=options.pixel_size,
    )  # fmt: skip
    converted = convert_particles(
        table, convention, frames, tomograms=tomograms, coords_voxel_size=options.coords_voxel_size
    )
    if convention != "csv":
        refuse_unwritable(converted.blocks)
    converted.write(out, overwrite=overwrite)
    return _tell(table, converted, convention)


def _only_name(
    options: ConversionOptions, tomograms: Mapping[str, TomogramInfo] | None
) -> str | None:
    if options.tomogram is not None:
        return options.tomogram.name.partition(".")[0]
    if tomograms is not None and len(tomograms) == 1:
        return next(iter(tomograms))
    return None


def _tell(
    table: ParticleTable, converted: ParticleTable, convention: CoordinateConvention
) -> tuple[str, ...]:
    num = max(1, len(table.tomograms))
    lines = [
        f"{len(table)} particles of {num} tomogram{'s' if num > 1 else ''}: "
        f"{columns_of(table.rows)[0]} became {columns_of(converted.rows)[0]} ({convention})"
    ]
    offsets = table.rows.reindex(columns=[*ORIGIN, *ORIGIN_PIXELS], fill_value=0)
    shifted = int((offsets != 0).any(axis=1).sum())
    if shifted:
        lines.append(f"offsets (rlnOrigin…) of {shifted} particles are folded into the coordinates")
    lost = [name for name in table.blocks if name not in converted.blocks and name != table.block]
    if lost:
        lines.append(f"left out, for CSV holds one table: the blocks {', '.join(lost)}")
    return tuple(lines)

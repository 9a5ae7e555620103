"""Particle files from one convention of coordinates to another: files in, file out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from cectflow.conversion import (
    convert_particles,
    find_frames,
    locate_particles,
    name_tomogram,
)
from cectflow.coordinates import ORIGIN, ORIGIN_PIXELS, CoordinateConvention, columns_of
from cectflow.copick import SESSION, read_picks, write_picks
from cectflow.particles import ParticleTable, read_particles
from cectflow.star import refuse_unwritable
from cectflow.tomogram_table import TomogramInfo, read_tomograms
from cectflow.volume import read_volume

__all__ = ["ConversionOptions", "convert_file"]

KINDS = {"csv": ".csv", "copick": ".json"}
"""Endings of files that are not STAR."""


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
    picks
        Of a copick project: ``OBJECT`` or ``OBJECT:USER/SESSION``.
    objects
        Class of the particles → object of the copick project that is written to.
    session
        Of the picks that are written there.

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
    picks: str | None = None
    objects: Mapping[str, str] = field(default_factory=dict)
    session: str = SESSION

    def __post_init__(self) -> None:
        given = (self.tomograms, self.tomogram, self.tomogram_size)
        if sum(one is not None for one in given) > 1:
            msg = "--tomograms, --tomogram and --tomogram-size each say the size: give one of them"
            raise ValueError(msg)


def convert_file(
    source: Path,
    out: Path,
    convention: CoordinateConvention | Literal["copick"],
    options: ConversionOptions,
    *,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Convert a particle file; returns lines that say what was done.

    Parameters
    ----------
    source
        STAR or CSV, of any convention, which is told by its columns; or the configuration of a
        copick project.
    out
        CSV for the convention ``csv``, a copick project's configuration for ``copick``, STAR for
        the others.
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
    if out.exists() and not overwrite and convention != "copick":
        msg = f"{out} exists: choose another name, or replace it with --overwrite"
        raise FileExistsError(msg)
    if KINDS.get(convention, "") != (out.suffix if out.suffix in KINDS.values() else ""):
        msg = (
            f"{out} for {convention}: a name that ends in .csv goes with --to csv, a project's "
            "configuration (.json) with --to copick, any other with the conventions of STAR files"
        )
        raise ValueError(msg)
    if convention != "copick" and (options.objects or options.session != SESSION):
        msg = f"--object and --session are for --to copick: leave them out with --to {convention}"
        raise ValueError(msg)
    table = _read(source, options)
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
    if convention == "copick":
        positions, _ = locate_particles(table, frames, coords_voxel_size=options.coords_voxel_size)
        written = write_picks(
            out, table, positions, objects=options.objects, session=options.session,
            overwrite=overwrite,
        )  # fmt: skip
        return tuple(f"written: {path}" for path in written)
    converted = convert_particles(
        table, convention, frames, tomograms=tomograms, coords_voxel_size=options.coords_voxel_size
    )
    if convention != "csv":
        refuse_unwritable(converted.blocks)
    converted.write(out, overwrite=overwrite)
    return _tell(table, converted, convention)


def _read(source: Path, options: ConversionOptions) -> ParticleTable:
    if (source.suffix == ".json") != (options.picks is not None):
        msg = (
            f"{source}: the configuration of a copick project (.json) goes with --picks OBJECT, or "
            "--picks OBJECT:USER/SESSION, and no other file does"
        )
        raise ValueError(msg)
    return read_particles(source) if options.picks is None else read_picks(source, options.picks)


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

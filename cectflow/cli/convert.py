"""``cectflow convert``: particle tables from one convention of coordinates to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cectflow.cli.options import CoordsOption, OverwriteOption

__all__ = ["convert"]

Convention = Literal["relion3", "relion4", "relion5", "warp", "csv", "copick"]


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="STAR, CSV, or copick's .json.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="STAR; .csv with --to csv; copick's .json.")
    ],
    to: Annotated[Convention, typer.Option("--to", help="Convention of OUT.")],
    tomograms: Annotated[
        Path | None,
        typer.Option("--tomograms", help="RELION's tomograms.star: sizes, pixel sizes, binning."),
    ] = None,
    tomogram: Annotated[
        Path | None, typer.Option("--tomogram", help="Volume of the one tomogram.")
    ] = None,
    tomogram_size: Annotated[
        tuple[int, int, int] | None,
        typer.Option("--tomogram-size", help="X Y Z of every tomogram in unbinned pixels."),
    ] = None,
    tomogram_name: Annotated[
        str | None,
        typer.Option("--tomogram-name", help="Of the tomogram of a table that names none."),
    ] = None,
    voxel_size: Annotated[
        float | None, typer.Option("--voxel-size", help="Å; of the (binned) tomograms.")
    ] = None,
    coords_voxel_size: CoordsOption = None,
    pixel_size: Annotated[
        float | None, typer.Option("--pixel-size", help="Å; of the unbinned tilt images.")
    ] = None,
    picks: Annotated[
        str | None,
        typer.Option("--picks", help="Of the copick project IN: OBJECT or OBJECT:USER/SESSION."),
    ] = None,
    objects: Annotated[
        list[str] | None,
        typer.Option("--object", help="Of the copick project OUT: CLASS=OBJECT, or one OBJECT."),
    ] = None,
    session: Annotated[
        str, typer.Option("--session", help="Of the picks that are written to copick.")
    ] = "0",
    overwrite: OverwriteOption = False,
) -> None:
    """Convert particles between RELION 3, 4 and 5, Warp, CSV and copick projects.

    The convention of IN is told by its columns.
    """
    from cectflow.flows.conversion import ConversionOptions, convert_file

    options = ConversionOptions(
        tomograms=tomograms,
        tomogram=tomogram,
        tomogram_size=tomogram_size,
        tomogram_name=tomogram_name,
        voxel_size=voxel_size,
        coords_voxel_size=coords_voxel_size,
        pixel_size=pixel_size,
        picks=picks,
        objects=dict(map(_as_pair, objects or ())),
        session=session,
    )
    for line in convert_file(source, out, to, options, overwrite=overwrite):
        typer.echo(line)


def _as_pair(given: str) -> tuple[str, str]:
    """Class and object; an object alone is what every class is."""
    name, mark, known = given.rpartition("=")
    if not known or (mark and not name):
        msg = f"--object {given}: expected CLASS=OBJECT, or one OBJECT for all particles"
        raise ValueError(msg)
    return name, known

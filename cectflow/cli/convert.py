"""``cectflow convert``: particle tables from one convention of coordinates to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cectflow.cli.options import CoordsOption, OverwriteOption

__all__ = ["convert"]

Convention = Literal["relion3", "relion4", "relion5", "warp", "csv"]


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="STAR or CSV.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="STAR; .csv with --to csv.")],
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
    overwrite: OverwriteOption = False,
) -> None:
    """Convert particles between RELION 3, 4 and 5, Warp and CSV; IN is told by its columns."""
    from cectflow.flows.conversion import ConversionOptions, convert_file

    options = ConversionOptions(
        tomograms=tomograms,
        tomogram=tomogram,
        tomogram_size=tomogram_size,
        tomogram_name=tomogram_name,
        voxel_size=voxel_size,
        coords_voxel_size=coords_voxel_size,
        pixel_size=pixel_size,
    )
    for line in convert_file(source, out, to, options, overwrite=overwrite):
        typer.echo(line)

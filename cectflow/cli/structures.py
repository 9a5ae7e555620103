"""``cectflow structures``: atomic models, density maps and phantoms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cectflow.cli.options import (
    JsonOption,
    OverwriteOption,
)
from cectflow.cli.output import print_json, print_table

__all__ = ["app"]

app = typer.Typer(help="Atomic models, density maps and phantoms.", no_args_is_help=True)


@app.command("list")
def structures_list(
    path: Annotated[str, typer.Argument(help="`builtin`, or comma-separated files and folders.")],
    json: JsonOption = False,
) -> None:
    """Print name, kind, mass of the assembly, extent and operators of structures."""
    from dataclasses import asdict

    from cectflow.simulation.structure import find_structures, summarise_structure

    summaries = [summarise_structure(source) for source in find_structures(path)]
    if json:
        print_json([asdict(summary) for summary in summaries])
        return
    rows = [
        (s.name, s.kind, f"{s.mass_kda:.0f}", f"{s.extent:.0f}", str(s.num_operators))
        for s in summaries
    ]
    print_table(("name", "kind", "mass (kDa)", "extent (Å)", "operators"), rows)


@app.command("fetch")
def structures_fetch(
    ids: Annotated[list[str], typer.Argument(help="PDB ids, such as 1KP8 3J9I.")],
    out: Annotated[Path, typer.Option("--out", help="Folder; digests.json is kept in it.")],
    base_url: Annotated[
        str, typer.Option("--base-url", help="Archive that serves ID.cif.gz.")
    ] = "https://files.rcsb.org/download",
    overwrite: OverwriteOption = False,
) -> None:
    """Download mmCIF files from the PDB archive; their digests are recorded."""
    from cectflow.simulation.download import fetch_structures

    for path in fetch_structures(ids, out, base_url=base_url, overwrite=overwrite):
        typer.echo(str(path))

"""``cectflow dataset``: look at, check, import, mask and export datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cectflow.cli.options import (
    ContrastOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    TrackingOption,
    VoxelSizeOption,
    connect_for,
)
from cectflow.cli.output import print_json, print_table
from cectflow.exit_codes import REFUSED

__all__ = ["app"]

app = typer.Typer(help="Look at, check, import, mask and export datasets.", no_args_is_help=True)


@app.command("info")
def dataset_info(folder: Path, json: JsonOption = False) -> None:
    """Print what a dataset holds and what was measured of it."""
    from cectflow.exchange import describe_dataset

    facts = describe_dataset(folder)
    if json:
        print_json(facts)
    else:
        print_table(("", ""), [(key, str(value)) for key, value in facts.items()])


@app.command("check")
def dataset_check(folder: Path) -> None:
    """Verify digests, shapes, labels, and that no field is in two splits; exit 3 on faults."""
    from cectflow.shards import check_dataset

    faults = check_dataset(folder)
    for fault in faults:
        typer.echo(fault)
    if faults:
        raise typer.Exit(REFUSED)
    typer.echo(f"{folder}: sound")


@app.command("import")
def dataset_import(
    out: Annotated[Path, typer.Option("--out", help="Dataset folder to make.")],
    subtomograms: Annotated[str, typer.Option("--subtomograms", help="MRC stack, folder, glob.")],
    labels: Annotated[
        Path, typer.Option("--labels", help="STAR or CSV with one row per cube, in order.")
    ],
    class_column: Annotated[
        str, typer.Option("--class-column", help="Column of class names or numbers.")
    ] = "class",
    classes: Annotated[
        str | None,
        typer.Option("--classes", help="Comma-separated names in class order; default: sorted."),
    ] = None,
    split: Annotated[
        Literal["train", "validation", "test", "by-tomogram"],
        typer.Option("--split", help="One split for all, or 80/10/10 by whole tomograms."),
    ] = "by-tomogram",
    voxel_labels: Annotated[
        Path | None,
        typer.Option("--voxel-labels", help="Stack in which 1 marks each cube's target."),
    ] = None,
    voxel_size: VoxelSizeOption = None,
    contrast: ContrastOption = "dark",
    ctf_correction: Annotated[
        Literal["none", "phase_flip", "premultiplied", "wiener"],
        typer.Option("--ctf-correction", help="That the cubes have had."),
    ] = "none",
) -> None:
    """Bring one's own subtomograms with known classes into a dataset folder."""
    from cectflow.importing import ImportOptions, import_subtomograms
    from cectflow.tracking.runs import cectflow_commit

    options = ImportOptions(
        class_column=class_column,
        classes=tuple(classes.split(",")) if classes else None,
        split=split,
        voxel_size=voxel_size,
        contrast=contrast,
        ctf_correction=ctf_correction,
    )
    dataset = import_subtomograms(
        subtomograms, labels, out, options, voxel_labels=voxel_labels, commit=cectflow_commit()
    )
    counts = {split: dataset.manifest.count(split) for split in dataset.manifest.planned_shards}
    typer.echo(f"{out}: {', '.join(f'{n} {name}' for name, n in counts.items())} subtomograms")


@app.command("mask")
def dataset_mask(
    folder: Path,
    model: ModelOption,
    out: Annotated[Path, typer.Option("--out", help="Dataset folder to make.")],
    device: DeviceOption = "auto",
    tracking_uri: TrackingOption = None,
) -> None:
    """Take the neighbours out of all cubes, for classifiers that predict with --mask-with."""
    from cectflow.flows.masking import mask_dataset

    connect_for(model, tracking_uri)
    dataset = mask_dataset(folder, out, model=model, device=device)
    counts = {split: dataset.manifest.count(split) for split in dataset.manifest.planned_shards}
    typer.echo(f"{out}: {', '.join(f'{n} {name}' for name, n in counts.items())} subtomograms")


@app.command("export")
def dataset_export(
    folder: Path,
    out: Annotated[Path, typer.Option("--out", help="Folder to make.")],
    split: Annotated[Literal["train", "validation", "test"], typer.Option("--split")] = "test",
) -> None:
    """Write one protein-white float32 .mrc per particle and a particles.star, for RELION."""
    from cectflow.exchange import export_relion

    typer.echo(str(export_relion(folder, out, split)))

"""``cectflow simulate``: simulate crowded subtomograms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cectflow.cli.options import (
    ClusterOption,
    Contrast,
    OverwriteOption,
    RecipeOption,
    SeedOption,
    StructuresOption,
    TrackingOption,
    VoxelSizeOption,
    WorkersOption,
)

__all__ = ["app"]

app = typer.Typer(help="Simulate crowded subtomograms.", no_args_is_help=True)


@app.command("dataset")
def simulate_dataset(
    out: Annotated[Path, typer.Option("--out", help="Dataset folder.")],
    recipe: RecipeOption = "demo",
    structures: StructuresOption = None,
    seed: SeedOption = None,
    workers: WorkersOption = 1,
    cluster: ClusterOption = None,
    tracking_uri: TrackingOption = None,
) -> None:
    """Simulate a recipe's dataset; a second call completes what is missing."""
    from cectflow.execution import Workplace
    from cectflow.flows.simulation import choose_recipe, simulate
    from cectflow.tracking.runs import connect

    where = Workplace(workers, cluster)
    chosen = choose_recipe(recipe, structures=structures, seed=seed)
    connect(tracking_uri)
    dataset = simulate(chosen, out, where=where)
    counts = {split: dataset.manifest.count(split) for split in dataset.manifest.planned_shards}
    typer.echo(f"{out}: {', '.join(f'{n} {split}' for split, n in counts.items())} subtomograms")


@app.command("calibrate")
def simulate_calibrate(
    stack: Annotated[
        str, typer.Option("--from", help="Real subtomograms: MRC stack, folder, glob.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Recipe to write (.yaml); a .png beside it.")],
    recipe: RecipeOption = "real",
    particles: Annotated[
        Path | None, typer.Option("--particles", help="STAR or CSV: which cubes, which tomograms.")
    ] = None,
    structures: StructuresOption = None,
    mask_radius: Annotated[
        float | None, typer.Option("--mask-radius", help="Å: leave out the particle within it.")
    ] = None,
    snr: Annotated[
        float | None, typer.Option("--snr", help="Of the reconstruction; default: an interval.")
    ] = None,
    contrast: Annotated[
        Contrast | None, typer.Option("--contrast", help="Of the cubes; checked if given.")
    ] = None,
    keep_defocus: Annotated[
        bool, typer.Option("--keep-defocus", help="Do not estimate the defocus range.")
    ] = False,
    hold_out: Annotated[
        str | None, typer.Option("--hold-out", help="Tomogram that judges and does not calibrate.")
    ] = None,
    voxel_size: VoxelSizeOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write noise spectrum, tilt range and SNR of real subtomograms into a recipe."""
    from cectflow.flows.calibration import CalibrationInput, calibrate_recipe
    from cectflow.flows.simulation import choose_recipe

    given = CalibrationInput(
        stack, particles, voxel_size, mask_radius, snr, contrast, keep_defocus, hold_out
    )
    chosen = choose_recipe(recipe, structures=structures)
    calibrate_recipe(chosen, given, out, overwrite=overwrite, tell=typer.echo)


@app.command("tomograms")
def simulate_tomograms(
    out: Annotated[Path, typer.Option("--out", help="Folder; each tomogram has one in it.")],
    recipe: RecipeOption = "demo",
    count: Annotated[int, typer.Option("--count", min=1, help="How many there shall be.")] = 1,
    shape: Annotated[
        tuple[int, int, int] | None,
        typer.Option("--shape", min=1, help="Voxels along z, y and x; default: recipe's field."),
    ] = None,
    tilt_series: Annotated[
        bool,
        typer.Option("--tilt-series", help="Record the projections too, and back-project those."),
    ] = False,
    structures: StructuresOption = None,
    seed: SeedOption = None,
    workers: WorkersOption = 1,
    cluster: ClusterOption = None,
    tracking_uri: TrackingOption = None,
) -> None:
    """Simulate whole tomograms with particles and label maps; a second call completes them."""
    from cectflow.execution import Workplace
    from cectflow.flows.simulation import choose_recipe
    from cectflow.flows.simulation import simulate_tomograms as flow
    from cectflow.tracking.runs import connect

    where = Workplace(workers, cluster)
    chosen = choose_recipe(recipe, structures=structures, seed=seed).simulation
    connect(tracking_uri)
    folders = flow(chosen, out, count=count, shape=shape, tilt_series=tilt_series, where=where)
    for folder in folders:
        typer.echo(str(folder / "tomogram.mrc"))

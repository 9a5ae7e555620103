"""``cectflow predict``: predict with registered models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cectflow.cli.options import (
    BatchOption,
    ContrastOption,
    CoordsOption,
    DeviceOption,
    ModelOption,
    OverwriteOption,
    ParticlesOption,
    RescaleOption,
    SubtomogramsOption,
    TomogramOption,
    TrackingOption,
    VoxelSizeOption,
)

__all__ = ["app"]

app = typer.Typer(help="Predict with registered models.", no_args_is_help=True)


@app.command("classify")
def predict_classify(
    model: ModelOption,
    out: Annotated[Path, typer.Option("--out", help="STAR file.")],
    subtomograms: SubtomogramsOption = None,
    tomogram: TomogramOption = None,
    particles: ParticlesOption = None,
    coords_voxel_size: CoordsOption = None,
    voxel_size: VoxelSizeOption = None,
    contrast: ContrastOption = "dark",
    rescale: RescaleOption = False,
    device: DeviceOption = "auto",
    batch_size: BatchOption = 64,
    overwrite: OverwriteOption = False,
    tracking_uri: TrackingOption = None,
) -> None:
    """Name the structure of each subtomogram, or of each pick in a tomogram."""
    from cectflow.flows.prediction import predict_classes
    from cectflow.prediction.contract import InputOptions
    from cectflow.prediction.source import InputFiles

    files = InputFiles(subtomograms, tomogram, particles, coords_voxel_size)
    options = InputOptions(voxel_size, contrast, rescale, device, batch_size, overwrite)
    _connect_for(model, tracking_uri)
    predict_classes(model, files, out, options, typer.echo)


@app.command("segment")
def predict_segment(
    model: ModelOption,
    out: Annotated[Path, typer.Option("--out", help="Label map (.mrc) or label stack (.mrcs).")],
    probabilities: Annotated[
        Path | None, typer.Option("--probabilities", help="Also write the foreground's.")
    ] = None,
    subtomograms: SubtomogramsOption = None,
    tomogram: TomogramOption = None,
    particles: ParticlesOption = None,
    coords_voxel_size: CoordsOption = None,
    voxel_size: VoxelSizeOption = None,
    contrast: ContrastOption = "dark",
    rescale: RescaleOption = False,
    device: DeviceOption = "auto",
    batch_size: BatchOption = 64,
    overwrite: OverwriteOption = False,
    tracking_uri: TrackingOption = None,
) -> None:
    """Outline the particle at the centre of each subtomogram, or at each pick of a tomogram."""
    from cectflow.flows.prediction import predict_segments
    from cectflow.prediction.contract import InputOptions
    from cectflow.prediction.source import InputFiles

    files = InputFiles(subtomograms, tomogram, particles, coords_voxel_size)
    options = InputOptions(voxel_size, contrast, rescale, device, batch_size, overwrite)
    _connect_for(model, tracking_uri)
    predict_segments(model, files, out, probabilities, options, typer.echo)


def _connect_for(model: str, tracking_uri: str | None) -> None:
    """Connect to the registry, which a model folder has no need of."""
    if not Path(model).is_dir():
        from cectflow.tracking.runs import connect

        connect(tracking_uri)

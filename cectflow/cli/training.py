"""``cectflow train`` and ``cectflow distill``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from cectflow.cli.options import (
    DatasetOption,
    DeviceOption,
    DevicesOption,
    OutFolderOption,
    PrecisionOption,
    RecipeOption,
    SeedOption,
    StructuresOption,
    TrackingOption,
    WorkersOption,
)

__all__ = ["distill", "train"]


def train(
    role: Annotated[
        Literal["segmenter", "tomogram-segmenter", "teacher"],
        typer.Argument(help="What to train."),
    ],
    recipe: RecipeOption = "demo",
    structures: StructuresOption = None,
    dataset: DatasetOption = None,
    out: OutFolderOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    seed: SeedOption = None,
    workers: WorkersOption = 1,
    devices: DevicesOption = 1,
    tracking_uri: TrackingOption = None,
) -> None:
    """Train and register a segmenter (of cubes or tomograms) or a teacher classifier."""
    from cectflow.flows import training
    from cectflow.tracking.runs import connect

    hardware = training.Hardware(device, precision, workers, devices)
    request = training.TrainingRequest(recipe, structures, dataset, out, seed, hardware)
    chosen, folder = request.prepare(role, typer.echo)
    connect(tracking_uri)
    flow = {
        "segmenter": training.train_segmenter,
        "tomogram-segmenter": training.train_tomogram_segmenter,
        "teacher": training.train_teacher,
    }[role]
    _tell_registered(flow(chosen, folder, hardware, dataset=dataset))


def distill(
    teacher: Annotated[
        str, typer.Option("--teacher", help="Registered teacher, or a model folder.")
    ] = "cectflow-teacher@production",
    student: Annotated[
        str | None, typer.Option("--student", help="Network; default: the recipe's.")
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="mse, kl or dkd; default: the recipe's.")
    ] = None,
    recipe: RecipeOption = "demo",
    structures: StructuresOption = None,
    dataset: DatasetOption = None,
    out: OutFolderOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    seed: SeedOption = None,
    workers: WorkersOption = 1,
    devices: DevicesOption = 1,
    tracking_uri: TrackingOption = None,
) -> None:
    """Distil and register a student of a teacher, beside the same student from labels alone."""
    from cectflow.flows import training
    from cectflow.tracking.runs import connect

    hardware = training.Hardware(device, precision, workers, devices)
    request = training.TrainingRequest(recipe, structures, dataset, out, seed, hardware)
    chosen, folder = request.prepare("student", typer.echo, with_students=False)
    connect(tracking_uri)
    registered = training.distill(
        chosen, folder, hardware, teacher=teacher, student=student, method=method, dataset=dataset
    )
    _tell_registered(registered)


def _tell_registered(registered: Any) -> None:
    card, version = registered.trained.card, registered.version
    scores = ", ".join(
        f"{name} {score.value:.3f} ({score.low:.3f} to {score.high:.3f})"
        for name, score in card.scores.items()
    )
    figures = ", ".join(f"{name} {value:.3f}" for name, value in registered.figures.items())
    typer.echo(f"{version.label}: {scores}" + (f"; {figures}" if figures else ""))
    typer.echo(f"promote it with: cectflow models promote {version.name}/{version.version}")

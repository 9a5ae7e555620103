"""``cectflow train`` and ``cectflow distill``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from cectflow.cli.options import (
    ContrastOption,
    DatasetOption,
    DeviceOption,
    OutFolderOption,
    PrecisionOption,
    RecipeOption,
    RescaleOption,
    SeedOption,
    StructuresOption,
    TrackingOption,
    VoxelSizeOption,
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
    tracking_uri: TrackingOption = None,
) -> None:
    """Train and register a segmenter (of cubes or tomograms) or a teacher classifier."""
    from cectflow.flows import training
    from cectflow.tracking.runs import connect

    hardware = training.Hardware(device, precision, workers)
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
        str,
        typer.Option(
            "--teacher",
            help="Registered teacher, or a model folder; of an ensemble several, comma-separated.",
        ),
    ] = "cectflow-teacher@production",
    student: Annotated[
        str | None, typer.Option("--student", help="Network; default: the recipe's.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", help="mse, kl, dkd, hint, or several joined by +; default: the recipe's."
        ),
    ] = None,
    unlabelled: Annotated[
        str | None,
        typer.Option(
            "--unlabelled", help="Real cubes to be shown beside: MRC stack, folder or glob."
        ),
    ] = None,
    voxel_size: VoxelSizeOption = None,
    contrast: ContrastOption = "dark",
    rescale: RescaleOption = False,
    allow_weak_teacher: Annotated[
        bool, typer.Option("--allow-weak-teacher", help="Even if it is no better than chance.")
    ] = False,
    recipe: RecipeOption = "demo",
    structures: StructuresOption = None,
    dataset: DatasetOption = None,
    out: OutFolderOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    seed: SeedOption = None,
    workers: WorkersOption = 1,
    tracking_uri: TrackingOption = None,
) -> None:
    """Distil and register a student of a teacher, beside the same student from labels alone."""
    from cectflow.flows import distillation, training
    from cectflow.flows.unlabelled import Unlabelled
    from cectflow.prediction.contract import InputOptions
    from cectflow.prediction.source import InputFiles
    from cectflow.tracking.runs import connect

    hardware = training.Hardware(device, precision, workers)
    request = training.TrainingRequest(recipe, structures, dataset, out, seed, hardware)
    chosen, folder = request.prepare("student", typer.echo, with_students=False)
    connect(tracking_uri)
    beside = None
    if unlabelled is not None:
        options = InputOptions(voxel_size, contrast, rescale)
        beside = Unlabelled(InputFiles(unlabelled), options, typer.echo)
    registered = distillation.distill(
        chosen, folder, hardware, teacher=teacher, student=student, method=method,
        unlabelled=beside, dataset=dataset, allow_weak_teacher=allow_weak_teacher,
    )  # fmt: skip
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

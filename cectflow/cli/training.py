"""``cectflow train``, ``cectflow distill`` and ``cectflow sweep``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from cectflow.cli.options import (
    ContrastOption,
    DatasetOption,
    DeviceOption,
    DevicesOption,
    MatchSpectrumOption,
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
from cectflow.cli.output import print_table

__all__ = ["distill", "sweep", "train"]


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


TeacherOption = Annotated[
    str,
    typer.Option(
        "--teacher",
        help="Registered teacher, or a model folder; of an ensemble several, comma-separated.",
    ),
]
StudentOption = Annotated[
    str | None, typer.Option("--student", help="Network; default: the recipe's.")
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method", help="mse, kl, dkd, hint, or several joined by +; default: the recipe's."
    ),
]
UnlabelledOption = Annotated[
    str | None,
    typer.Option("--unlabelled", help="Real cubes to be shown beside: MRC stack, folder or glob."),
]
AllowWeakOption = Annotated[
    bool, typer.Option("--allow-weak-teacher", help="Even if it is no better than chance.")
]


def distill(
    teacher: TeacherOption = "cectflow-teacher@production",
    student: StudentOption = None,
    method: MethodOption = None,
    unlabelled: UnlabelledOption = None,
    voxel_size: VoxelSizeOption = None,
    contrast: ContrastOption = "dark",
    rescale: RescaleOption = False,
    match_spectrum: MatchSpectrumOption = False,
    allow_weak_teacher: AllowWeakOption = False,
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
    from cectflow.flows import distillation, training
    from cectflow.flows.unlabelled import find_unlabelled
    from cectflow.prediction.contract import InputOptions
    from cectflow.tracking.runs import connect

    hardware = training.Hardware(device, precision, workers, devices)
    request = training.TrainingRequest(recipe, structures, dataset, out, seed, hardware)
    chosen, folder = request.prepare("student", typer.echo, with_students=False)
    connect(tracking_uri)
    options = InputOptions(voxel_size, contrast, rescale, match_spectrum=match_spectrum)
    registered = distillation.distill(
        chosen, folder, hardware, teacher=teacher, student=student, method=method,
        unlabelled=find_unlabelled(unlabelled, options, typer.echo), dataset=dataset,
        allow_weak_teacher=allow_weak_teacher,
    )  # fmt: skip
    _tell_registered(registered)


def sweep(
    trials: Annotated[int, typer.Option("--trials", min=1, help="Students in all.")] = 20,
    teacher: TeacherOption = "cectflow-teacher@production",
    student: StudentOption = None,
    method: MethodOption = None,
    unlabelled: UnlabelledOption = None,
    voxel_size: VoxelSizeOption = None,
    contrast: ContrastOption = "dark",
    rescale: RescaleOption = False,
    match_spectrum: MatchSpectrumOption = False,
    allow_weak_teacher: AllowWeakOption = False,
    recipe: RecipeOption = "demo",
    structures: StructuresOption = None,
    dataset: DatasetOption = None,
    out: OutFolderOption = None,
    device: DeviceOption = "auto",
    devices: DevicesOption = 1,
    precision: PrecisionOption = "auto",
    seed: SeedOption = None,
    workers: WorkersOption = 1,
    tracking_uri: TrackingOption = None,
) -> None:
    """Search a student's temperature, weight and learning rate, judged on validation cubes."""
    from cectflow.flows import training
    from cectflow.flows.sweep import sweep as search
    from cectflow.flows.sweep import tabulate_sweep
    from cectflow.flows.unlabelled import find_unlabelled
    from cectflow.prediction.contract import InputOptions
    from cectflow.tracking.runs import connect

    hardware = training.Hardware(device, precision, workers, devices)
    request = training.TrainingRequest(recipe, structures, dataset, out, seed, hardware)
    chosen, folder = request.prepare("sweep", typer.echo, with_students=False)
    connect(tracking_uri)
    options = InputOptions(voxel_size, contrast, rescale, match_spectrum=match_spectrum)
    outcome = search(
        chosen, folder, hardware, teacher=teacher, trials=trials, student=student, method=method,
        unlabelled=find_unlabelled(unlabelled, options, typer.echo), dataset=dataset,
        allow_weak_teacher=allow_weak_teacher, report=typer.echo,
    )  # fmt: skip
    print_table(*tabulate_sweep(outcome))
    typer.echo(f"distil with the best: cectflow distill {outcome.advice}")


def _tell_registered(registered: Any) -> None:
    card, version = registered.trained.card, registered.version
    scores = ", ".join(
        f"{name} {score.value:.3f} ({score.low:.3f} to {score.high:.3f})"
        for name, score in card.scores.items()
    )
    figures = ", ".join(f"{name} {value:.3f}" for name, value in registered.figures.items())
    typer.echo(f"{version.label}: {scores}" + (f"; {figures}" if figures else ""))
    typer.echo(f"promote it with: cectflow models promote {version.name}/{version.version}")

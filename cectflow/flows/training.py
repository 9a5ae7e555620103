"""From a dataset to registered networks: segmenter, teacher, and a student distilled from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from cectflow.dataset import BatchSource, Dataset, open_dataset
from cectflow.figures import draw_confusion, draw_learning_curves, draw_slices
from cectflow.flows.simulation import choose_recipe, load_structures, new_folder, simulate
from cectflow.learning.augmentation import allowed_turns
from cectflow.learning.fit import Device, FitRecipe, Precision, open_fabric
from cectflow.learning.objective import Classify, Distill, KnownLogits, Objective, Segment
from cectflow.learning.scores import Evaluation, bootstrap_ratio
from cectflow.learning.training import (
    TrainedNetwork,
    check_matches,
    evaluate_folder,
    train_network,
)
from cectflow.model_card import ModelCard, Role
from cectflow.networks import create_network
from cectflow.recipe import Recipe
from cectflow.runtime import load_program, load_runtime
from cectflow.simulation.field import prepare_specimen
from cectflow.simulation.live import open_live
from cectflow.tracking.registry import find_registered, register_model, resolve_model
from cectflow.tracking.runs import Run, cectflow_commit, start_run
from cectflow.tracking.versions import RegisteredVersion, registered_name

__all__ = [
    "DATASET_TAG",
    "Hardware",
    "Registered",
    "TrainingRequest",
    "distill",
    "log_evaluation",
    "train_segmenter",
    "train_teacher",
]

DATASET_TAG = "dataset.path"
"""Tag of a version: where the dataset lies on which it was judged."""


@dataclass(frozen=True, eq=False)
class Registered:
    """A trained network and its version in the registry.

    Attributes
    ----------
    trained, version
        See there.
    figures
        Measured beyond the card: a student's retention of its teacher and its control.
    """

    trained: TrainedNetwork
    version: RegisteredVersion
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Hardware:
    """Where a training runs."""

    device: Device = "auto"
    precision: Precision = "auto"
    workers: int = 1


@dataclass(frozen=True)
class TrainingRequest:
    """What every training door is asked for, as it was typed."""

    recipe: str = "demo"
    structures: str | None = None
    dataset: Path | None = None
    out: Path | None = None
    seed: int | None = None
    hardware: Hardware = Hardware()

    def prepare(self, name: str) -> tuple[Recipe, Path]:
        """The recipe with its changes, and the folder for the files of a run of this name.

        Raises
        ------
        ValueError
            If the recipe is unknown or not valid, a network is unknown or does not suit the box,
            or the device is absent: before any work.
        """
        open_fabric(self.hardware.device, self.hardware.precision)
        recipe = choose_recipe(self.recipe, structures=self.structures, seed=self.seed)
        for fit_recipe in (recipe.segmenter.fit, recipe.teacher, recipe.student.fit):
            with torch.device("meta"):
                create_network(
                    fit_recipe.network,
                    num_outputs=2,
                    box=recipe.simulation.box,
                    **fit_recipe.arguments,
                )
        return recipe, self.out or new_folder(Path(name).stem)


def train_segmenter(
    recipe: Recipe, folder: Path, hardware: Hardware, *,
    dataset: Path | None = None, nested: bool = False,
) -> Registered:  # fmt: skip
    """Registered segmenter of the task ``target``; without a dataset the recipe's is simulated."""
    objective = Segment(dice_weight=recipe.segmenter.dice_weight)
    with start_run("train_segmenter", tags={"role": "segmenter"}, nested=nested) as run:
        data = _open_or_simulate(recipe, folder, hardware, dataset)
        return _train(
            run, "segmenter", objective, data, recipe.segmenter.fit, recipe, folder, hardware
        )


def train_teacher(
    recipe: Recipe, folder: Path, hardware: Hardware, *,
    dataset: Path | None = None, nested: bool = False,
) -> Registered:  # fmt: skip
    """Registered teacher; without a dataset the recipe's is simulated."""
    with start_run("train_teacher", tags={"role": "teacher"}, nested=nested) as run:
        data = _open_or_simulate(recipe, folder, hardware, dataset)
        objective = Classify(len(data.manifest.classes))
        return _train(run, "teacher", objective, data, recipe.teacher, recipe, folder, hardware)


def distill(
    recipe: Recipe, folder: Path, hardware: Hardware, *,
    teacher: str, dataset: Path | None = None, nested: bool = False,
) -> Registered:  # fmt: skip
    """Registered student, distilled from a registered teacher.

    The run also trains the same student from labels alone (``labels_only_accuracy``), unless the
    recipe says otherwise, and logs the student's retention of the teacher's accuracy.

    Parameters
    ----------
    recipe, folder, hardware, dataset, nested
        As for the other trainings.
    teacher
        NAME, NAME@stage, NAME/VERSION, a ``models:/`` URI or a model folder.
    """
    teacher_folder, teacher_version = resolve_model(teacher)
    teacher_card = ModelCard.from_folder(teacher_folder)
    if teacher_card.task != "classify":
        msg = f"{teacher} is a {teacher_card.role}: expected a classifier as the teacher"
        raise ValueError(msg)
    teacher_uri = str(teacher_folder.resolve()) if teacher_version is None else teacher_version.uri
    with start_run("distill", tags={"role": "student"}, nested=nested) as run:
        if teacher_version is not None:
            run.log_input_model(teacher_version)
        data = _open_or_simulate(recipe, folder, hardware, dataset)
        check_matches(teacher_card, data)
        labels = Classify(len(data.manifest.classes))
        device = open_fabric(hardware.device, hardware.precision).device
        program = load_program(teacher_folder, device.type)
        student = recipe.student.fit
        turns = allowed_turns(data.manifest.tilt_range) if student.augment else ("identity",)
        # Of live data no view comes twice: there the teacher is asked with every batch.
        trained_on = () if recipe.live else ((data.split("train"), turns),)
        known = KnownLogits(
            program,
            (*trained_on, (data.split("validation"), ("identity",))),
            batch_size=student.batch_size,
            device=device,
        )
        objective = Distill(
            labels,
            program,
            known=known,
            method=recipe.student.method,
            weight=recipe.student.weight,
            temperature=recipe.student.temperature,
        )
        registered = _train(
            run, "student", objective, data, recipe.student.fit, recipe, folder, hardware,
            teacher=teacher_uri,
        )  # fmt: skip
        reference = evaluate_folder(teacher_folder, data)
        judged = registered.trained.evaluation
        retention = bootstrap_ratio(
            judged.scores["accuracy"], reference.scores["accuracy"], judged.fields
        )
        metrics = {
            "teacher_accuracy": float(reference.scores["accuracy"].mean()),
            "retention": retention.value,
            "retention_low": retention.low,
            "retention_high": retention.high,
        }
        if recipe.student.control:
            control = _train_control(recipe, labels, data, folder, hardware)
            metrics["labels_only_accuracy"] = control
        run.log(metrics)
    return replace(registered, figures=metrics)


def log_evaluation(
    run: Run, folder: Path, card: ModelCard, data: Dataset, evaluation: Evaluation
) -> None:
    """Log scores with intervals, and the picture of where a network is right and wrong."""
    for name in evaluation.scores:
        score = evaluation.interval(name)
        run.log({f"test_{name}": score.value, f"test_{name}_low": score.low,
                 f"test_{name}_high": score.high})  # fmt: skip
    title = f"{card.network} on test"
    if evaluation.predicted is not None:
        figure = draw_confusion(
            evaluation.class_ids, evaluation.predicted, data.manifest.classes, title
        )
        run.log_figure(figure, "figures/confusion.png")
    number = min(6, len(evaluation.class_ids))
    shown = np.linspace(0, len(evaluation.class_ids) - 1, number).astype(np.int64)
    batch = data.split("test").read(shown)
    names = [data.manifest.classes[i - 1] for i in batch.class_ids.tolist()]
    truth = None if batch.instances is None else (batch.instances == 1).numpy()
    predicted = None
    if card.task == "target":
        logits = load_runtime(folder)(batch.subtomograms.numpy())
        predicted = logits.argmax(axis=1)
    figure = draw_slices(
        batch.subtomograms[:, 0].numpy(), truth, predicted,
        voxel_size=data.manifest.voxel_size, titles=names,
    )  # fmt: skip
    run.log_figure(figure, "figures/slices.png")


def _train(
    run: Run, role: Role, objective: Objective, data: Dataset, fit_recipe: FitRecipe,
    recipe: Recipe, folder: Path, hardware: Hardware, *, teacher: str | None = None,
) -> Registered:  # fmt: skip
    """Fit, judge, log and register one network."""
    manifest = data.manifest
    run.log_config(recipe, "recipe")
    run.log_dataset(
        manifest.kind, manifest.content_digest(), str(data.folder.resolve()), "training"
    )
    with _live(recipe, data, hardware, role) as live:
        if live is not None:
            digest = live.manifest.content_digest()
            run.log_dataset("live", digest, str(data.folder.resolve()), "live")
        trained = train_network(
            role, objective, data, fit_recipe,
            recipe_digest=recipe.digest(),
            fabric=open_fabric(hardware.device, hardware.precision),
            folder=folder / role,
            log=run.log,
            live=live,
            commit=cectflow_commit(),
            teacher=teacher,
        )  # fmt: skip
    card = trained.card
    run.log_figure(
        draw_learning_curves(trained.result.history, f"{role}: {card.network}"),
        "figures/learning_curves.png",
    )
    log_evaluation(run, trained.folder, card, data, trained.evaluation)
    run.log(_card_metrics(card))
    name = registered_name(role, card.task)
    # A model that an earlier call finished and registered keeps its version.
    version = find_registered(trained.folder, name) or register_model(
        run, trained.folder, name=name, tags={DATASET_TAG: str(data.folder.resolve())}
    )
    return Registered(trained, version)


def _train_control(
    recipe: Recipe, labels: Classify, data: Dataset, folder: Path, hardware: Hardware
) -> float:
    """Test accuracy of the student trained from labels alone: same data, seed and budget."""
    with (
        start_run("labels_only", tags={"role": "control"}, nested=True) as run,
        _live(recipe, data, hardware, "student") as live,
    ):
        trained = train_network(
            "student", labels, data, recipe.student.fit,
            recipe_digest=recipe.digest(),
            fabric=open_fabric(hardware.device, hardware.precision),
            folder=folder / "labels_only",
            log=run.log,
            live=live,
        )  # fmt: skip
        run.log({"test_accuracy": trained.card.scores["accuracy"].value})
        return trained.card.scores["accuracy"].value


def _open_or_simulate(
    recipe: Recipe, folder: Path, hardware: Hardware, dataset: Path | None
) -> Dataset:
    if dataset is not None:
        return open_dataset(dataset)
    return simulate(recipe, folder / "dataset", workers=hardware.workers, nested=True)


@contextmanager
def _live(
    recipe: Recipe, data: Dataset, hardware: Hardware, role: Role
) -> Iterator[BatchSource | None]:
    """Live data of a recipe that asks for them; each role sees fields of its own."""
    if recipe.live is None:
        yield None
        return
    device = open_fabric(hardware.device, hardware.precision).device
    specimen = prepare_specimen(recipe.simulation, load_structures(recipe.simulation))
    with open_live(
        specimen.to(str(device)), data.manifest, recipe.live.subtomograms_per_epoch,
        workers=hardware.workers, name=role,
    ) as source:  # fmt: skip
        yield source


def _card_metrics(card: ModelCard) -> Mapping[str, float]:
    """Figures of a card that are worth a column on the web page."""
    metrics = {f"baseline_{name}_iou": value for name, value in card.baselines.items()}
    if card.parity is not None:
        metrics["parity"] = card.parity
    if card.cost is not None:
        metrics["parameters"] = card.cost.parameters
        metrics["macs"] = card.cost.macs
        metrics["subtomograms_per_s"] = card.cost.subtomograms_per_s
    return metrics

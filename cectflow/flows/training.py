"""From a dataset to registered networks: segmenter, teacher, and a student distilled from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from cectflow.dataset import BatchSource, Dataset, open_dataset
from cectflow.figures import draw_learning_curves
from cectflow.flows.evaluation import log_evaluation
from cectflow.flows.simulation import choose_recipe, load_structures, new_folder, simulate
from cectflow.flows.tuning import tune_picking
from cectflow.learning.fit import Device, FitRecipe, Precision, open_fabric
from cectflow.learning.objective import Classify, Distill, KnownLogits, Objective, Segment
from cectflow.learning.task import SemanticLabels
from cectflow.learning.training import (
    TrainedNetwork,
    check_matches,
    evaluate_folder,
    make_network,
    train_network,
)
from cectflow.learning.variants import make_variants
from cectflow.model_card import ModelCard, Role, Variant
from cectflow.recipe import Recipe, StudentRecipe, TomogramSegmenterRecipe
from cectflow.runtime import check_variant, load_program
from cectflow.simulation.field import prepare_specimen
from cectflow.simulation.live import open_live
from cectflow.tracking.registry import find_registered, register_model, resolve_model
from cectflow.tracking.runs import Run, cectflow_commit, start_run
from cectflow.tracking.versions import RegisteredVersion, registered_name, role_name
from cectflow.turns import allowed_turns

__all__ = [
    "DATASET_TAG",
    "Hardware",
    "Registered",
    "TrainingRequest",
    "distill",
    "train_segmenter",
    "train_teacher",
    "train_tomogram_segmenter",
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

    def prepare(
        self, name: str, report: Callable[[str], None], *, with_students: bool = True
    ) -> tuple[Recipe, Path]:
        """The recipe with its changes, and the folder for the files of a run of this name.

        The folder is reported: whoever interrupts the run goes on with it as ``--out``. The
        recipe's students need not suit where others may take their place (``with_students``).

        Raises
        ------
        ValueError
            If the recipe is unknown or not valid, a network is unknown or does not suit the box,
            or the device is absent: before any work.
        FileNotFoundError
            If there is no such dataset.
        """
        open_fabric(self.hardware.device, self.hardware.precision)
        if self.dataset is not None:
            open_dataset(self.dataset)
        recipe = choose_recipe(self.recipe, structures=self.structures, seed=self.seed)
        box = recipe.simulation.box
        tomogram, student = recipe.tomogram_segmenter, recipe.student_segmenter
        with torch.device("meta"):
            make_network(recipe.segmenter.fit, "target", 2, box)
            make_network(recipe.teacher, "classify", 2, box)
            if tomogram is not None:
                make_network(tomogram.fit, "semantic", 2, box)
            if with_students:
                make_network(recipe.student.fit, "classify", 2, box)
            if with_students and student is not None:
                make_network(student.fit, "target" if tomogram is None else "semantic", 2, box)
        for section in (recipe.student, student) if with_students else ():
            for variant in section.variants if section else ():
                check_variant(variant)
        folder = self.out or new_folder(Path(name).stem)
        report(f"files under {folder}")
        return recipe, folder


def train_segmenter(
    recipe: Recipe, folder: Path, hardware: Hardware, *,
    dataset: Path | None = None, nested: bool = False,
) -> Registered:  # fmt: skip
    """Registered segmenter of the task ``target``; without a dataset the recipe's is simulated."""
    with start_run("train_segmenter", tags={"role": "segmenter"}, nested=nested) as run:
        data = _open_or_simulate(recipe, folder, hardware, dataset)
        objective = Segment(recipe.segmenter.loss)
        return _train(
            run, "segmenter", objective, data, recipe.segmenter.fit, recipe, folder, hardware
        )


def train_tomogram_segmenter(
    recipe: Recipe, folder: Path, hardware: Hardware, *,
    dataset: Path | None = None, nested: bool = False,
) -> Registered:  # fmt: skip
    """Registered segmenter of the task ``semantic``; without a dataset the recipe's is simulated.

    Raises
    ------
    ValueError
        If the recipe has no section ``tomogram_segmenter``.
    """
    section = _tomogram_segmenter(recipe)
    with start_run("train_tomogram_segmenter", tags={"role": "segmenter"}, nested=nested) as run:
        data = _open_or_simulate(recipe, folder, hardware, dataset)
        objective = Segment(section.loss, section.labels(data.manifest.classes))
        return _train(run, "segmenter", objective, data, section.fit, recipe, folder, hardware)


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
    teacher: str, student: str | None = None, method: str | None = None,
    dataset: Path | None = None, nested: bool = False,
) -> Registered:  # fmt: skip
    """Registered student, distilled from a registered teacher or segmenter.

    The run also trains the same student from labels alone (``labels_only_accuracy``, or of a
    segmenter its IoU), unless the recipe says otherwise, and logs the student's retention of the
    teacher's score.

    Parameters
    ----------
    recipe, folder, hardware, dataset, nested
        As for the other trainings. A classifier is the teacher of the recipe's ``student``, a
        segmenter of either task that of its ``student_segmenter``.
    teacher
        NAME, NAME@stage, NAME/VERSION, a ``models:/`` URI or a model folder.
    student
        Network to train in place of the recipe's.
    method
        ``mse``, ``kl`` or ``dkd`` alone, in place of the recipe's ``soft``.

    Raises
    ------
    ValueError
        If the recipe lacks the section, the student does not suit the teacher's task or box, the
        method is unknown, or the dataset is not what the teacher expects.
    """
    teacher_folder, teacher_version = resolve_model(teacher)
    teacher_card = ModelCard.from_folder(teacher_folder)
    recipe, section = _choose_student(recipe, teacher_card, student, method)
    teacher_uri = str(teacher_folder.resolve()) if teacher_version is None else teacher_version.uri
    with start_run("distill", tags={"role": "student"}, nested=nested) as run:
        if teacher_version is not None:
            run.log_input_model(teacher_version)
        data = _open_or_simulate(recipe, folder, hardware, dataset)
        check_matches(teacher_card, data)
        labels = _objective_of(recipe, teacher_card, data)
        device = open_fabric(hardware.device, hardware.precision).device
        program = load_program(teacher_folder, device.type)
        objective = Distill(
            labels,
            program,
            known=_known_logits(program, recipe, section.fit, labels, data, device),
            soft=section.soft,
            weight=section.weight,
        )
        registered = _train(
            run, "student", objective, data, section.fit, recipe, folder, hardware,
            teacher=teacher_uri, variants=section.variants,
        )  # fmt: skip
        reference = evaluate_folder(teacher_folder, data)
        monitor = labels.monitor
        retention = registered.trained.evaluation.ratio(reference, monitor)
        metrics = {
            f"teacher_{monitor}": reference.interval(monitor).value,
            "retention": retention.value,
            "retention_low": retention.low,
            "retention_high": retention.high,
        }
        if section.control:
            control = _train_control(recipe, section.fit, labels, data, folder, hardware)
            metrics[f"labels_only_{monitor}"] = control
        run.log(metrics)
    return replace(registered, figures=metrics)


def _train(
    run: Run, role: Role, objective: Objective, data: Dataset, fit_recipe: FitRecipe,
    recipe: Recipe, folder: Path, hardware: Hardware, *, teacher: str | None = None,
    variants: Sequence[Variant] = (),
) -> Registered:  # fmt: skip
    """Fit, judge, log and register one network."""
    manifest = data.manifest
    part = role_name(role, objective.task)
    run.log_config(recipe, "recipe")
    run.log_dataset(
        manifest.kind, manifest.content_digest(), str(data.folder.resolve()), "training"
    )

    def measure(model: Path) -> Mapping[str, object]:
        measured: dict[str, object] = {"variants": make_variants(model, data, variants)}
        if objective.task == "semantic":
            measured["picking"] = tune_picking(model, manifest, recipe.simulation.structures)
        return measured

    with _live(recipe, data, hardware, part) as live:
        if live is not None:
            digest = live.manifest.content_digest()
            run.log_dataset("live", digest, str(data.folder.resolve()), "live")
        trained = train_network(
            role, objective, data, fit_recipe,
            recipe_digest=recipe.digest(),
            fabric=open_fabric(hardware.device, hardware.precision),
            folder=folder / part,
            log=run.log,
            live=live,
            commit=cectflow_commit(),
            teacher=teacher,
            measure=measure,
        )  # fmt: skip
    card = trained.card
    run.log_figure(
        draw_learning_curves(trained.result.history, f"{part}: {card.network}"),
        "figures/learning_curves.png",
    )
    log_evaluation(run, trained.folder, card, data, trained.evaluation, card.baselines)
    run.log(_card_metrics(card))
    name = registered_name(role, card.task)
    # A model that an earlier call finished and registered keeps its version.
    version = find_registered(trained.folder, name) or register_model(
        run, trained.folder, name=name, tags={DATASET_TAG: str(data.folder.resolve())}
    )
    return Registered(trained, version)


def _train_control(
    recipe: Recipe, fit_recipe: FitRecipe, labels: Objective, data: Dataset, folder: Path,
    hardware: Hardware,
) -> float:  # fmt: skip
    """Test score of the student trained from labels alone: same data, seed and budget."""
    part = role_name("student", labels.task)
    with (
        start_run("labels_only", tags={"role": "control"}, nested=True) as run,
        _live(recipe, data, hardware, part) as live,
    ):
        trained = train_network(
            "student", labels, data, fit_recipe,
            recipe_digest=recipe.digest(),
            fabric=open_fabric(hardware.device, hardware.precision),
            folder=folder / part.replace("student", "labels_only"),
            log=run.log,
            live=live,
        )  # fmt: skip
        score = trained.card.scores[labels.monitor].value
        run.log({f"test_{labels.monitor}": score})
        return score


def _tomogram_segmenter(recipe: Recipe) -> TomogramSegmenterRecipe:
    if recipe.tomogram_segmenter is None:
        msg = (
            "the recipe has no section tomogram_segmenter: add one, such as "
            "`tomogram_segmenter: {fit: {network: strided_ed_small, ...}}`"
        )
        raise ValueError(msg)
    return recipe.tomogram_segmenter


def _choose_student(
    recipe: Recipe, teacher: ModelCard, student: str | None, method: str | None
) -> tuple[Recipe, StudentRecipe]:
    """The recipe with its student changed as asked for, and the section of that student."""
    name = "student" if teacher.task == "classify" else "student_segmenter"
    section: StudentRecipe | None = getattr(recipe, name)
    if section is None:
        msg = (
            "the teacher is a segmenter, and the recipe has no section student_segmenter: add "
            "one, such as `student_segmenter: {fit: {network: strided_ed_small, ...}}`"
        )
        raise ValueError(msg)
    if student is not None and student != section.fit.network:
        fit = section.fit.model_copy(update={"network": student, "arguments": {}})
        section = section.model_copy(update={"fit": fit})
    if method is not None:
        section = section.model_copy(update={"soft": section.soft.only(method)})
    with torch.device("meta"):
        make_network(section.fit, teacher.task, teacher.num_outputs, teacher.box)
    return recipe.model_copy(update={name: section}), section


def _objective_of(recipe: Recipe, teacher: ModelCard, data: Dataset) -> Objective:
    """What a student learns from labels: the task and the labels of its teacher."""
    if teacher.task == "classify":
        return Classify(len(data.manifest.classes))
    if teacher.task == "target":
        return Segment(recipe.segmenter.loss)
    labels = SemanticLabels.of_card(teacher, data.manifest.classes)
    return Segment((recipe.tomogram_segmenter or recipe.segmenter).loss, labels)


def _known_logits(
    program: Callable[[Tensor], Tensor], recipe: Recipe, student: FitRecipe, labels: Objective,
    data: Dataset, device: torch.device,
) -> KnownLogits | None:  # fmt: skip
    """A classifier's logits of all views; those of a segmenter, one per voxel, are too many."""
    if labels.task != "classify":
        return None
    turns = allowed_turns(data.manifest.tilt_range) if student.augment else ("identity",)
    # Of live data no view comes twice: there the teacher is asked with every batch.
    trained_on = () if recipe.live else ((data.split("train"), turns),)
    return KnownLogits(
        program,
        (*trained_on, (data.split("validation"), ("identity",))),
        batch_size=student.batch_size,
        device=device,
    )


def _open_or_simulate(
    recipe: Recipe, folder: Path, hardware: Hardware, dataset: Path | None
) -> Dataset:
    if dataset is not None:
        return open_dataset(dataset)
    return simulate(recipe, folder / "dataset", workers=hardware.workers, nested=True)


@contextmanager
def _live(
    recipe: Recipe, data: Dataset, hardware: Hardware, name: str
) -> Iterator[BatchSource | None]:
    """Live data of a recipe that asks for them; each name sees fields of its own."""
    if recipe.live is None:
        yield None
        return
    device = open_fabric(hardware.device, hardware.precision).device
    specimen = prepare_specimen(recipe.simulation, load_structures(recipe.simulation))
    with open_live(
        specimen.to(str(device)), data.manifest, recipe.live.subtomograms_per_epoch,
        workers=hardware.workers, name=name,
    ) as source:  # fmt: skip
        yield source


def _card_metrics(card: ModelCard) -> Mapping[str, float]:
    """Figures of a card that are worth a column on the web page."""
    metrics = {f"baseline_{name}_iou": value for name, value in card.baselines.items()}
    if card.parity is not None:
        metrics["parity"] = card.parity
    if card.picking is not None:
        metrics["validation_picks_precision"] = card.picking.precision
        metrics["validation_picks_recall"] = card.picking.recall
    for variant, figures in card.variants.items():
        metrics[f"{variant}_score"] = figures.score.value
        metrics[f"{variant}_difference"] = figures.difference.value
        metrics[f"{variant}_parity"] = figures.parity
        metrics[f"{variant}_speedup"] = figures.speedup
    if card.cost is not None:
        metrics["parameters"] = card.cost.parameters
        metrics["macs"] = card.cost.macs
        metrics["subtomograms_per_s"] = card.cost.subtomograms_per_s
    return metrics

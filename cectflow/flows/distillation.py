"""Distillation: a student of registered teachers, beside the same student from labels alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cectflow.dataset import BatchSource, Dataset, open_dataset
from cectflow.flows.teachers import (
    Teachers,
    compare_with_teachers,
    log_embeddings,
    resolve_teachers,
)
from cectflow.flows.training import (
    Hardware,
    Registered,
    open_live_data,
    open_or_simulate,
    train_and_register,
)
from cectflow.flows.unlabelled import Unlabelled
from cectflow.learning.fit import FitRecipe
from cectflow.learning.objective import Classify, Distill, Objective, Segment
from cectflow.learning.task import SemanticLabels
from cectflow.learning.teacher import KnownLogits, Teacher
from cectflow.learning.training import make_network, train_network
from cectflow.learning.unlabelled import UnlabelledCubes
from cectflow.model_card import ModelCard
from cectflow.recipe import Recipe, StudentRecipe
from cectflow.runtime import Program, check_variant
from cectflow.tracking.runs import Run, start_run
from cectflow.tracking.versions import role_name
from cectflow.turns import allowed_turns

__all__ = ["Lesson", "choose_lesson", "distill", "open_lesson"]


@dataclass(frozen=True, eq=False)
class Lesson:
    """What students of the same teachers and data share.

    Attributes
    ----------
    teachers
        Whom they ask.
    data
        On which they are trained and judged.
    labels
        What they learn without a teacher.
    asked
        The teachers' networks, on the device of the training.
    known
        Their answers of views that come again and again; None: they are asked with every batch.
    unlabelled
        Shown beside the labelled cubes, if any.
    """

    teachers: Teachers
    data: Dataset
    labels: Objective
    asked: Teacher
    known: KnownLogits | None
    unlabelled: UnlabelledCubes | None

    def log_unlabelled(self, run: Run, given: Unlabelled | None) -> None:
        """Record where the unlabelled cubes lie, and what they were brought to the card with."""
        if self.unlabelled is None or given is None:
            return
        run.log_dataset("unlabelled", self.unlabelled.digest, given.pattern, "unlabelled")
        run.set_tags({"unlabelled.cubes": str(len(self.unlabelled)), **given.tags})

    def objective(self, section: StudentRecipe) -> Distill:
        """What a student with these settings learns."""
        return Distill(
            self.labels, self.asked, known=self.known, soft=section.soft, weight=section.weight
        )


def distill(
    recipe: Recipe, folder: Path, hardware: Hardware, *,
    teacher: str, student: str | None = None, method: str | None = None,
    unlabelled: Unlabelled | None = None, dataset: Path | None = None,
    allow_weak_teacher: bool = False, nested: bool = False,
) -> Registered:  # fmt: skip
    """Registered student, distilled from registered teachers or segmenters.

    The run also trains the same student from labels alone (``labels_only_accuracy``, or of a
    segmenter its IoU), unless the recipe says otherwise, and logs the student's retention of the
    teacher's score and, of classifiers, how often the two say the same.

    Parameters
    ----------
    recipe, folder, hardware, dataset, nested
        As for the other trainings. A classifier is the teacher of the recipe's ``student``, a
        segmenter of either task that of its ``student_segmenter``.
    teacher
        NAME, NAME@stage, NAME/VERSION, a ``models:/`` URI or a model folder; of an ensemble
        several, joined by commas.
    student
        Network to train in place of the recipe's.
    method
        Terms of the recipe's ``soft`` to take, the others left out, such as ``kl+hint``.
    unlabelled
        Real cubes that the student is shown beside the labelled ones.
    allow_weak_teacher
        Distil from a teacher that is no better than chance, too.

    Raises
    ------
    ValueError
        If the recipe lacks the section, the student does not suit the teacher's task or box, the
        method is unknown, dataset or unlabelled cubes are not what the teacher expects, or the
        teacher is no better than chance.
    """
    teachers, recipe, section = choose_lesson(
        recipe, teacher=teacher, student=student, method=method, dataset=dataset,
        allow_weak_teacher=allow_weak_teacher,
    )  # fmt: skip
    with start_run("distill", tags={"role": "student"}, nested=nested) as run:
        for version in teachers.versions:
            run.log_input_model(version)
        lesson = open_lesson(
            teachers, recipe, section, folder, hardware, dataset=dataset, unlabelled=unlabelled
        )
        lesson.log_unlabelled(run, unlabelled)
        registered = train_and_register(
            run, "student", lesson.objective(section), lesson.data, section.fit, recipe, folder,
            hardware, teacher=teachers.uri, unlabelled=lesson.unlabelled, variants=section.variants,
        )  # fmt: skip
        metrics = compare_with_teachers(
            run, registered.trained.card, registered.trained.evaluation, teachers,
            teachers.evaluate(lesson.data),
        )  # fmt: skip
        if lesson.labels.task == "classify":
            device = hardware.open().device
            trained = registered.trained
            networks = {
                f"teacher {teachers.networks}": lesson.asked,
                f"student {trained.card.network}": Teacher(Program(trained.folder, device.type)),
            }
            log_embeddings(run, networks, lesson.data, device)
        if section.control:
            control = _train_control(recipe, section.fit, lesson, folder, hardware)
            metrics[f"labels_only_{lesson.labels.monitor}"] = control
        run.log(metrics)
    return replace(registered, figures=metrics)


def open_lesson(
    teachers: Teachers, recipe: Recipe, section: StudentRecipe, folder: Path, hardware: Hardware, *,
    dataset: Path | None = None, unlabelled: Unlabelled | None = None,
) -> Lesson:  # fmt: skip
    """Teachers with the data on which they teach; what they say is asked when it is wanted.

    Raises
    ------
    ValueError
        If dataset or unlabelled cubes are not what the teachers expect.
    """
    extra = None
    if section.soft.hint and hardware.devices > 1:
        msg = (
            f"hints go with one device, not with {hardware.devices}: they compare the cubes of a "
            "whole batch with one another; give --devices 1, or --method kl"
        )
        raise ValueError(msg)
    if unlabelled is not None:
        if hardware.devices > 1:
            msg = (
                f"--unlabelled goes with one device, not with {hardware.devices}: the parts of a "
                "batch would differ in how many of their cubes have labels; give --devices 1"
            )
            raise ValueError(msg)
        extra = unlabelled.read(teachers.card)
    data = open_or_simulate(recipe, folder, hardware, dataset)
    teachers.check(data)
    beside = None
    if extra is not None:
        beside = UnlabelledCubes(extra, data.manifest, section.unlabelled_share)
    labels = _objective_of(recipe, teachers.card, data)
    device = hardware.open().device
    asked = teachers.load(device.type)
    known = _known_logits(teachers, asked, recipe, section, labels, data, beside, device)
    return Lesson(teachers, data, labels, asked, known, beside)


def _train_control(
    recipe: Recipe, fit_recipe: FitRecipe, lesson: Lesson, folder: Path, hardware: Hardware
) -> float:  # fmt: skip
    """Test score of the student trained from labels alone: same data, seed and budget."""
    labels, data = lesson.labels, lesson.data
    part = role_name("student", labels.task)
    with (
        start_run("labels_only", tags={"role": "control"}, nested=True) as run,
        open_live_data(recipe, data, hardware, part) as live,
    ):
        trained = train_network(
            "student", labels, data, fit_recipe,
            recipe_digest=recipe.digest(),
            fabric=hardware.open(),
            folder=folder / part.replace("student", "labels_only"),
            log=run.log,
            live=live,
        )  # fmt: skip
        score = trained.card.scores[labels.monitor].value
        run.log({f"test_{labels.monitor}": score})
        return score


def choose_lesson(
    recipe: Recipe, *, teacher: str, student: str | None, method: str | None,
    dataset: Path | None, allow_weak_teacher: bool,
) -> tuple[Teachers, Recipe, StudentRecipe]:  # fmt: skip
    """Teachers, the recipe with its student changed as asked for, and that student's section.

    Parameters
    ----------
    recipe, teacher, student, method, dataset, allow_weak_teacher
        As for :func:`distill`.

    Raises
    ------
    ValueError
        As there, of all that can be told before any work.
    """
    teachers = resolve_teachers(teacher)
    recipe, section = _choose_student(recipe, teachers.card, student, method)
    if dataset is not None:
        teachers.check(open_dataset(dataset))
    if not allow_weak_teacher:
        teachers.refuse_weak(dataset)
    return teachers, recipe, section


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
    for variant in section.variants:
        check_variant(variant)
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
    teachers: Teachers, asked: Teacher, recipe: Recipe, section: StudentRecipe, labels: Objective,
    data: Dataset, unlabelled: UnlabelledCubes | None, device: torch.device,
) -> KnownLogits | None:  # fmt: skip
    """Classifiers' logits of all views, kept beside the dataset.

    None of segmenters, whose logits, one per voxel, are too many, and where hints are wanted as
    well: these are asked for with every batch.
    """
    if labels.task != "classify" or section.soft.hint:
        return None
    turns = allowed_turns(data.manifest.tilt_range) if section.fit.augment else ("identity",)
    sources: list[tuple[BatchSource, tuple[str, ...]]] = [(data.split("validation"), ("identity",))]
    if not recipe.live:  # no view of live data comes twice: of those the teacher is asked anew
        sources.append((data.split("train"), turns))
        if unlabelled is not None:
            sources.append((unlabelled, turns))
    identity = f"{teachers.digest()} {data.manifest.content_digest()}"
    if unlabelled is not None:
        identity += f" {unlabelled.digest}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return KnownLogits(
        asked,
        sources,
        batch_size=section.fit.batch_size,
        device=device,
        store=data.folder / "logits" / f"{name}.npz",
        identity=identity,
    )

"""Teachers of a student: one registered network or an ensemble of them, found by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray

from cectflow.dataset import Dataset, open_dataset
from cectflow.files import sha256_of
from cectflow.learning.figures import draw_confusion, draw_embeddings
from cectflow.learning.scores import Evaluation
from cectflow.learning.task import MONITORS
from cectflow.learning.teacher import Teacher
from cectflow.learning.training import check_matches, evaluate_ensemble
from cectflow.model_card import ModelCard
from cectflow.runtime import PT2_FILE, Program
from cectflow.tracking.registry import resolve_model
from cectflow.tracking.runs import Run
from cectflow.tracking.versions import RegisteredVersion

__all__ = [
    "Teachers",
    "compare_with_teachers",
    "log_embeddings",
    "refuse_weak_teacher",
    "resolve_teachers",
]

COMMON = ("task", "num_outputs", "classes", "labels", "box", "contrast", "normalisation")
"""What the cards of an ensemble must say alike."""

EMBEDDED_CUBES = 400
"""Of the test split, that a picture of embeddings shows: more would not be told apart."""


@dataclass(frozen=True, eq=False)
class Teachers:
    """The networks that a student learns from.

    Attributes
    ----------
    folders
        Of the models, in the order in which they were named.
    versions
        Of those that are registered.
    names
        As they were named.
    uri
        Of them all, joined by commas: what a student's card says.
    card
        Of the first; the others' say the same of task, classes and input.
    """

    folders: tuple[Path, ...]
    versions: tuple[RegisteredVersion, ...]
    names: tuple[str, ...]
    uri: str
    card: ModelCard

    def load(self, device: str) -> Teacher:
        """The networks, ready to be asked on a device."""
        return Teacher(*(Program(folder, device) for folder in self.folders))

    def evaluate(self, dataset: Dataset) -> Evaluation:
        """Scores of their common answer on the test split."""
        return evaluate_ensemble(self.folders, dataset)

    def check(self, dataset: Dataset) -> None:
        """Refuse a dataset that one of them does not expect.

        Raises
        ------
        ValueError
            Naming what differs.
        """
        for folder in self.folders:
            check_matches(ModelCard.from_folder(folder), dataset)

    def refuse_weak(self, dataset: Path | None) -> None:
        """Refuse those whose test score is not above that of knowing nothing.

        Parameters
        ----------
        dataset
            Folder whose test split tells how frequent the classes are; None: it is not simulated
            yet.

        Raises
        ------
        ValueError
            With score and chance.
        """
        class_ids = None if dataset is None else open_dataset(dataset).split("test").class_ids
        for name, folder in zip(self.names, self.folders, strict=True):
            refuse_weak_teacher(name, ModelCard.from_folder(folder), class_ids)

    @property
    def networks(self) -> str:
        """Their names in the catalogue."""
        return " + ".join(ModelCard.from_folder(folder).network for folder in self.folders)

    def digest(self) -> str:
        """Of the weights of all."""
        return " ".join(sha256_of(folder / PT2_FILE) for folder in self.folders)


def resolve_teachers(names: str) -> Teachers:
    """Teachers of a name, or of several joined by commas.

    Parameters
    ----------
    names
        Each NAME, NAME@stage, NAME/VERSION, a ``models:/`` URI or a model folder.

    Raises
    ------
    ValueError
        If one is named twice, or an ensemble's members differ in task, classes or input.
    """
    named = [name.strip() for name in names.split(",")]
    found = [resolve_model(name) for name in named]
    folders = tuple(folder for folder, _ in found)
    uris = [str(folder.resolve()) if version is None else version.uri for folder, version in found]
    if len(set(uris)) < len(uris):
        msg = f"--teacher {names} names {len(uris)} teachers, {len(set(uris))} of them different"
        raise ValueError(msg)
    cards = [ModelCard.from_folder(folder) for folder in folders]
    for name, card in zip(named, cards, strict=True):
        for field in COMMON:
            given, expected = getattr(card, field), getattr(cards[0], field)
            if given != expected:
                msg = (
                    f"{name}: {field} is {given}, that of {named[0]} is {expected}: the teachers "
                    f"of an ensemble answer the same question"
                )
                raise ValueError(msg)
    versions = tuple(version for _, version in found if version is not None)
    return Teachers(folders, versions, tuple(named), ",".join(uris), cards[0])


def compare_with_teachers(
    run: Run, card: ModelCard, student: Evaluation, teachers: Teachers, teacher: Evaluation
) -> dict[str, float]:
    """Figures of a student beside its teachers on the same test cubes.

    Parameters
    ----------
    run
        Receives, of classifiers, the confusion matrices of both.
    card, student
        Of the student.
    teachers, teacher
        Who taught it, and their common answers.

    Returns
    -------
    dict of str to float
        The teachers' score, ``retention`` (student over teacher), and of classifiers ``agreement``,
        with the ends of their 95 % intervals; ``agreement_<class>`` of each true class.
    """
    monitor = MONITORS[card.task]
    taught, retention = teacher.interval(monitor), student.ratio(teacher, monitor)
    figures = {
        f"teacher_{monitor}": taught.value,
        f"teacher_{monitor}_low": taught.low,
        "retention": retention.value,
        "retention_low": retention.low,
        "retention_high": retention.high,
    }
    if student.predicted is None or teacher.predicted is None:
        return figures
    agreement = student.agreement(teacher, card.classes)
    figures |= {name: score.value for name, score in agreement.items()}
    figures["agreement_low"] = agreement["agreement"].low
    figures["agreement_high"] = agreement["agreement"].high
    panels = {
        f"teacher {teachers.networks}": teacher.predicted,
        f"student {card.network}": student.predicted,
    }
    figure = draw_confusion(student.class_ids, panels, card.classes)
    run.log_figure(figure, "figures/teacher_and_student.png")
    return figures


def log_embeddings(
    run: Run, networks: Mapping[str, Teacher], data: Dataset, device: torch.device
) -> None:
    """Log where classifiers put the same test cubes, each network's in a plane of its own.

    Parameters
    ----------
    run
        Receives the picture.
    networks
        Title → one network, or an ensemble.
    data
        Of whose test split up to :data:`EMBEDDED_CUBES` are shown, evenly spread.
    device
        Of the networks.
    """
    split = data.split("test")
    shown = np.unique(
        np.linspace(0, len(split) - 1, min(EMBEDDED_CUBES, len(split))).astype(np.int64)
    )
    cubes = split.read(shown).subtomograms
    panels = {
        title: torch.cat([
            network.embed(part.to(device))[1].float().cpu() for part in torch.split(cubes, 32)
        ]).numpy()
        for title, network in networks.items()
    }  # fmt: skip
    figure = draw_embeddings(panels, split.class_ids[shown], data.manifest.classes)
    run.log_figure(figure, "figures/embeddings.png")


def refuse_weak_teacher(
    teacher: str, card: ModelCard, class_ids: Int[NDArray[np.int64], " n"] | None
) -> None:
    """Refuse a teacher whose test score is not above that of knowing nothing.

    Parameters
    ----------
    teacher
        What the message calls it.
    card
        Its own: the lower end of the score's 95 % interval must be above chance. Chance is, of a
        classifier, one over the number of classes, or the share of the most frequent one in the
        test split; of a segmenter the best trivial method of the card.
    class_ids
        Of the test split; None: it is not simulated yet.

    Raises
    ------
    ValueError
        With score and chance.
    """
    remedy = (
        "train it longer or on more data, or distil from it all the same with "
        "--allow-weak-teacher (-P allow_weak_teacher=true)"
    )
    name = "accuracy" if card.task == "classify" else "foreground_iou"
    score = card.scores.get(name)
    if score is None:
        msg = f"the card of {teacher} states no {name}, which has to be above chance: {remedy}"
        raise ValueError(msg)
    chance, what = _chance_of(card, class_ids)
    if score.low <= chance:
        msg = (
            f"{teacher} is no better than chance: its {name} on the test split is "
            f"{score.value:.3f} (95 % interval {score.low:.3f} to {score.high:.3f}), and {what} "
            f"has {chance:.3f}; {remedy}"
        )
        raise ValueError(msg)


def _chance_of(card: ModelCard, class_ids: NDArray[np.int64] | None) -> tuple[float, str]:
    """Score of whoever knows nothing, and who that is."""
    if card.task != "classify":
        best = max(card.baselines, key=lambda name: card.baselines[name], default=None)
        return (0.0, "nothing") if best is None else (card.baselines[best], f"the best {best}")
    guess, what = 1.0 / len(card.classes), f"guessing one of {len(card.classes)} classes"
    most = 0.0 if class_ids is None else float(np.bincount(class_ids).max() / len(class_ids))
    if most > guess:
        return most, "always saying the most frequent class"
    return guess, what

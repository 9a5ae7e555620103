"""Teachers of a student: one registered network or an ensemble of them, found by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cectflow.dataset import Dataset
from cectflow.files import sha256_of
from cectflow.learning.scores import Evaluation
from cectflow.learning.teacher import Teacher
from cectflow.learning.training import check_matches, evaluate_ensemble
from cectflow.model_card import ModelCard
from cectflow.runtime import PT2_FILE, load_program
from cectflow.tracking.registry import resolve_model
from cectflow.tracking.versions import RegisteredVersion

__all__ = ["Teachers", "resolve_teachers"]

COMMON = ("task", "num_outputs", "classes", "labels", "box", "contrast", "normalisation")
"""What the cards of an ensemble must say alike."""


@dataclass(frozen=True, eq=False)
class Teachers:
    """The networks that a student learns from.

    Attributes
    ----------
    folders
        Of the models, in the order in which they were named.
    versions
        Of those that are registered.
    uri
        Of them all, joined by commas: what a student's card says.
    card
        Of the first; the others' say the same of task, classes and input.
    """

    folders: tuple[Path, ...]
    versions: tuple[RegisteredVersion, ...]
    uri: str
    card: ModelCard

    def load(self, device: str) -> Teacher:
        """The networks, ready to be asked on a device."""
        return Teacher(*(load_program(folder, device) for folder in self.folders))

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
    return Teachers(folders, versions, ",".join(uris), cards[0])

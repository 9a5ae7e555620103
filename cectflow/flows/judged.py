"""A network on a test split: its answers, and its scores by class with the numbers behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from cectflow.learning.scores import Evaluation, bootstrap_score
from cectflow.manifest import Manifest
from cectflow.model_card import ModelCard, Score
from cectflow.tracking.policy_figures import CLASS_SCORES, ends

__all__ = ["ClassScore", "Judged", "with_ends"]


@dataclass(frozen=True, eq=False)
class ClassScore:
    """Score of the subtomograms of one class, or of the voxels of one label.

    Attributes
    ----------
    name
        Of the class or label.
    subtomograms, fields
        How many of the test split have it.
    score
        With its interval over fields; None where there is none.
    """

    name: str
    subtomograms: int
    fields: int
    score: Score | None

    @property
    def numbers(self) -> str:
        """``ribosome: 12 subtomograms of 3 fields``."""
        return f"{self.name}: {self.subtomograms} subtomograms of {self.fields} fields"


@dataclass(frozen=True, eq=False)
class Judged:
    """One network, or an ensemble, on the test split.

    Attributes
    ----------
    label
        ``cectflow-student v3``.
    folders, card
        Of the model or models; the card of the first.
    evaluation
        On the test split.
    classes
        Scores by class.
    """

    label: str
    folders: tuple[Path, ...]
    card: ModelCard
    evaluation: Evaluation
    classes: tuple[ClassScore, ...]

    @classmethod
    def of(
        cls, label: str, folders: tuple[Path, ...], evaluation: Evaluation, manifest: Manifest
    ) -> Judged:
        """With its scores by class."""
        card = ModelCard.from_folder(folders[0])
        return cls(label, folders, card, evaluation, _class_scores(card, manifest, evaluation))

    def figures(self) -> dict[str, float]:
        """Scores, by class too, with the ends of their intervals."""
        found: dict[str, float] = {}
        for name, score in self.evaluation.summary().items():
            found |= with_ends(name, score)
        kind = CLASS_SCORES[self.card.task][0]
        measured = [each.score for each in self.classes if each.score is not None]
        for each in self.classes:
            if each.score is not None:
                found |= with_ends(f"{kind}_{each.name}", each.score)
        if measured and len(measured) == len(self.classes):
            worst = min(measured, key=lambda score: score.value)
            low = min(score.low for score in measured)
            found |= with_ends("worst_class", Score(value=worst.value, low=low, high=worst.high))
        return found

    def notes(self) -> dict[str, str]:
        """On how many subtomograms the figures of classes rest."""
        kind = CLASS_SCORES[self.card.task][0]
        rarest = min(self.classes, key=lambda each: each.subtomograms)
        absent = [each.name for each in self.classes if each.score is None]
        scored = [each for each in self.classes if each.score is not None]
        worst = min(scored, key=lambda each: _value(each), default=rarest)
        said = f"no test subtomogram of {', '.join(absent)}" if absent else worst.numbers
        notes = {f"{kind}_{each.name}{end}": each.numbers
                 for each in self.classes for end in ("", "_low", "_high")}  # fmt: skip
        return notes | dict.fromkeys(ends("worst_class"), said) | {"smallest_class": rarest.numbers}


def with_ends(name: str, score: Score) -> dict[str, float]:
    """A score and the ends of its interval, by name."""
    return {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}


def _value(each: ClassScore) -> float:
    return math.inf if each.score is None else each.score.value


def _class_scores(
    card: ModelCard, manifest: Manifest, evaluation: Evaluation
) -> tuple[ClassScore, ...]:
    found = []
    if evaluation.counts is not None:
        for number, name in enumerate(evaluation.labels, start=1):
            member: NDArray[np.bool_] = np.any(evaluation.counts[:, number], axis=1)
            score_name = "mean_iou" if len(evaluation.labels) == 1 else f"iou_{name}"
            score = evaluation.interval(score_name) if member.any() else None
            found.append(_of_members(name, member, evaluation, score))
        return tuple(found)
    values = evaluation.scores[CLASS_SCORES[card.task][0]]
    for class_id, name in enumerate(manifest.classes, start=1):
        of_class: NDArray[np.bool_] = np.logical_and(
            evaluation.class_ids == class_id, np.isfinite(values)
        )
        score = None
        if of_class.any():
            score = bootstrap_score(values[of_class], evaluation.fields[of_class])
        found.append(_of_members(name, of_class, evaluation, score))
    return tuple(found)


def _of_members(
    name: str, member: Bool[NDArray[np.bool_], " n"], evaluation: Evaluation, score: Score | None
) -> ClassScore:
    fields = np.unique(evaluation.fields[member])
    return ClassScore(name, int(member.sum()), len(fields), score)

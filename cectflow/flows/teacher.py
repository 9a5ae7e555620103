"""Teacher and student: whether a teacher is worth learning from, and how the two compare."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from cectflow.learning.figures import draw_confusion
from cectflow.learning.scores import Evaluation
from cectflow.learning.task import MONITORS
from cectflow.model_card import ModelCard
from cectflow.tracking.runs import Run

__all__ = ["compare_with_teacher", "refuse_weak_teacher"]


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


def compare_with_teacher(
    run: Run, card: ModelCard, student: Evaluation, teacher_card: ModelCard, teacher: Evaluation
) -> dict[str, float]:
    """Figures of a student beside its teacher on the same test cubes.

    Parameters
    ----------
    run
        Receives, of classifiers, the confusion matrices of both.
    card, student
        Of the student.
    teacher_card, teacher
        Of the teacher.

    Returns
    -------
    dict of str to float
        The teacher's score, ``retention`` (student over teacher), and of classifiers ``agreement``,
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
        f"teacher {teacher_card.network}": teacher.predicted,
        f"student {card.network}": student.predicted,
    }
    figure = draw_confusion(student.class_ids, panels, card.classes)
    run.log_figure(figure, "figures/teacher_and_student.png")
    return figures

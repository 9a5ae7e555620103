"""The figures that a promotion can measure and that the rules of a policy may name.

All are of the frozen test split, and all are measured when a promotion is asked for. Some exist
for one task or one role only; ``<class>`` stands for a class (of the task ``semantic``: a label).

========================  =========================================================================
figure                    what it is
========================  =========================================================================
``accuracy``              of a classifier; likewise the scores of segmenters (:data:`SCORES`)
``accuracy_<class>``      of the subtomograms of one class; ``foreground_iou_<class>`` of target
                          segmenters; ``iou_<class>`` and ``dice_<class>`` of the labels of
                          semantic ones
``worst_class``           the lowest of ``accuracy_<class>``, ``foreground_iou_<class>`` or
                          ``iou_<class>``; missing where a class has no test subtomogram
``smallest_class``        test subtomograms of the rarest class
``iou_margin``            foreground IoU less that of the best trivial method, which are
                          ``baseline_ball_iou`` and ``baseline_threshold_iou``
``ece``                   expected calibration error with the card's temperature, of classifiers
``retention``             a student's score over its teacher's, paired over fields
``agreement``             share of subtomograms of which student and teacher say the same
``gain``                  the policy's score less that of the version now in the stage, paired over
                          fields; not asked where the stage is empty
``parity``                largest difference of logits between model.pt2 and model.onnx
``int8_difference``       score of a sibling in lower precision less that of float32, paired;
                          ``int8_parity``; ``int8_agreement`` the share of subtomograms that both
                          call the same; ``bfloat16`` likewise; not asked of a version without it
``variant_difference``    the lowest of these differences; ``variant_parity`` the largest parity,
                          ``variant_agreement`` the lowest agreement
``parameters``, ``macs``  trained numbers, and multiply-accumulates of one subtomogram
``weights_mb``            10^6 bytes of the largest file of weights
``latency_ms``            of one batch, on a device with a runtime, which the rule names
``subtomograms_per_s``    likewise
``speedup``               likewise, a student's rate over its teacher's, measured by turns
========================  =========================================================================

Scores, retention, agreement, gain and differences also have the ends of their 95 % interval over
resampled fields: ``retention_low``, ``retention_high``; ``worst_class_low`` is the lowest lower end
of all classes. ``teacher_accuracy`` is the teacher's score,
``incumbent_accuracy`` that of the version now in the stage.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Literal

from cectflow.model_card import Role, Task

__all__ = [
    "BETTER_HIGHER",
    "CLASS_SCORES",
    "SCORES",
    "TIMED",
    "ends",
    "list_figures",
    "refuse_unknown_figure",
    "subject_of",
]

SCORES: dict[Task, tuple[str, ...]] = {
    "classify": ("accuracy",),
    "target": ("foreground_iou", "iou", "surface_distance", "hausdorff_95", "missed"),
    "semantic": (
        "foreground_iou", "iou", "mean_iou", "mean_dice", "surface_distance", "hausdorff_95",
        "missed",
    ),
}  # fmt: skip
"""What a network of each task is scored by; see :func:`cectflow.learning.scores.evaluate`."""
CLASS_SCORES: dict[Task, tuple[str, ...]] = {
    "classify": ("accuracy",),
    "target": ("foreground_iou",),
    "semantic": ("iou", "dice"),
}
"""What each class, or label, is scored by; the first of them gives ``worst_class``."""
TIMED = ("latency_ms", "subtomograms_per_s", "speedup")
"""Figures that hold for one device and runtime, and which say nothing without them."""
BETTER_HIGHER = ("accuracy", "foreground_iou", "iou", "mean_iou", "mean_dice")
"""Scores by which two networks may be compared: of the others the lower is better."""
ANY_CLASS = "<class>"

Subject = Literal["candidate", "teacher", "incumbent", "bfloat16", "int8", "variant"]


def ends(name: str) -> tuple[str, str, str]:
    """A figure, and the ends of its interval."""
    return name, f"{name}_low", f"{name}_high"


def list_figures(role: Role, task: Task, classes: Sequence[str] = (ANY_CLASS,)) -> tuple[str, ...]:
    """Names of all figures of a network.

    Parameters
    ----------
    role, task
        Of the network.
    classes
        Whose figures are listed, or one that stands for all.
    """
    by_class = [f"{score}_{name}" for score in CLASS_SCORES[task] for name in classes]
    scores = [end for name in (*SCORES[task], "worst_class", *by_class) for end in ends(name)]
    names = [*scores, "smallest_class", *(f"incumbent_{name}" for name in scores), *ends("gain")]
    if task == "classify":
        names.append("ece")
    else:
        names += ["iou_margin", "baseline_threshold_iou"]
    if task == "target":
        names.append("baseline_ball_iou")
    names.append("parity")
    for variant in ("bfloat16", "int8", "variant"):
        names += [*ends(f"{variant}_difference"), f"{variant}_parity"]
        if task == "classify":
            names.append(f"{variant}_agreement")
    names += ["parameters", "macs", "weights_mb", "latency_ms", "subtomograms_per_s"]
    if role == "student":
        names += [f"teacher_{name}" for name in scores]
        names += [*ends("retention"), "speedup"]
    if role == "student" and task == "classify":
        names += [*ends("agreement"), *(f"agreement_{name}" for name in classes)]
    return tuple(names)


def refuse_unknown_figure(name: str, known: Sequence[str]) -> None:
    """Refuse a name that is not among those of :func:`list_figures`.

    Raises
    ------
    ValueError
        With the names that are known, and those that look like it.
    """
    for each in known:
        if re.fullmatch(re.escape(each).replace(re.escape(ANY_CLASS), ".+"), name):
            return
    plain = [
        each
        for each in dict.fromkeys(known)
        if not each.startswith(("teacher_", "incumbent_")) and not each.endswith(("_low", "_high"))
    ]
    alike = difflib.get_close_matches(name, known, n=2)
    meant = f"; did you mean {' or '.join(alike)}?" if alike else ""
    msg = (
        f"unknown figure {name!r}: expected one of {', '.join(plain)}; scores, differences and "
        f"ratios also with _low and _high, scores also with teacher_ (of students) or incumbent_ "
        f"before them{meant}"
    )
    raise ValueError(msg)


def subject_of(figure: str) -> Subject:
    """Whom a figure is about: the candidate, another network, or siblings of the candidate."""
    if figure in ends("gain") or figure.startswith("incumbent_"):
        return "incumbent"
    if figure.startswith("teacher_"):
        return "teacher"
    siblings: tuple[Subject, ...] = ("bfloat16", "int8", "variant")
    for sibling in siblings:
        own = f"{sibling}_parity", f"{sibling}_agreement"
        if figure in (*ends(f"{sibling}_difference"), *own):
            return sibling
    return "candidate"

"""What a run logs of a judged network: its scores, and pictures of where it is right and wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cectflow.dataset import Dataset
from cectflow.figures import draw_groups, draw_slices
from cectflow.learning.breakdown import Group, break_down
from cectflow.learning.figures import draw_calibration, draw_confusion
from cectflow.learning.scores import Evaluation
from cectflow.learning.task import SemanticLabels, network_input, segmentation_truth
from cectflow.model_card import ModelCard
from cectflow.runtime import load_runtime
from cectflow.tracking.runs import Run
from cectflow.trust import probabilities_of

__all__ = ["draw_samples", "log_evaluation"]

SAMPLES = 3
"""Cubes that are shown of those that are right, and of those that are wrong."""


def log_evaluation(
    run: Run, folder: Path, card: ModelCard, data: Dataset, evaluation: Evaluation,
    trivial: Mapping[str, float],
) -> tuple[Group, ...]:  # fmt: skip
    """Log scores with intervals, and the pictures of where a network is right and wrong.

    Parameters
    ----------
    run
        Receives them.
    folder, card
        Of the network.
    data, evaluation
        The dataset, and what the network made of its test split.
    trivial
        Foreground IoU of trivial methods there; empty for classifiers.

    Returns
    -------
    tuple of Group
        The score of each subtomogram that the pictures show, by structure, occupancy and SNR.
    """
    for name, score in evaluation.summary().items():
        run.log({f"test_{name}": score.value, f"test_{name}_low": score.low,
                 f"test_{name}_high": score.high})  # fmt: skip
    title = f"{card.network} on test"
    score_name = "accuracy" if card.task == "classify" else "foreground_iou"
    groups = break_down(evaluation, data.manifest, score_name)
    rows = [{**asdict(group), "score": group.score.model_dump()} for group in groups]
    run.log_json(rows, f"{score_name}_by_group.json")
    figure = draw_groups(
        {
            "SNR": [_place(group) for group in groups if group.by == "SNR"],
            "mass (kDa)": [_place(group) for group in groups
                           if group.by == "structure" and group.position is not None],
        },
        "accuracy" if card.task == "classify" else "foreground IoU",
        title,
        reference=max(trivial.values(), default=None),
    )  # fmt: skip
    run.log_figure(figure, "figures/groups.png")
    if evaluation.predicted is not None:
        figure = draw_confusion(
            evaluation.class_ids, {title: evaluation.predicted}, data.manifest.classes
        )
        run.log_figure(figure, "figures/confusion.png")
    if evaluation.logits is not None and card.trust is not None:
        figure = draw_calibration(
            evaluation.logits, evaluation.class_ids, card.trust.temperature, title
        )
        run.log_figure(figure, "figures/reliability.png")
    number = len(evaluation.class_ids)
    shown = np.linspace(0, number - 1, min(6, number)).astype(np.int64)
    run.log_figure(_draw_cubes(folder, card, data, shown, {}), "figures/slices.png")
    if card.task != "classify":
        values = evaluation.scores[score_name]
        chosen = _choose_extremes(values)
        notes = {row: f"{word} {values[row]:.2f} " for row, word in chosen.items()}
        extremes = np.array(list(chosen), np.int64)
        run.log_figure(_draw_cubes(folder, card, data, extremes, notes), "figures/gallery.png")
    return groups


def draw_samples(folder: Path, card: ModelCard, data: Dataset, evaluation: Evaluation) -> Figure:
    """Slices of test cubes that a network gets right and wrong.

    Of a classifier up to three that are right, spread over the split, and the three of which it is
    wrong and most sure; of a segmenter the best, the median and the worst, outlined.

    Parameters
    ----------
    folder, card, data, evaluation
        As of :func:`log_evaluation`.
    """
    if evaluation.predicted is None or evaluation.logits is None:
        values = evaluation.scores["foreground_iou"]
        notes = {
            row: f"{word} {values[row]:.2f} " for row, word in _choose_extremes(values).items()
        }
    else:
        hits = evaluation.predicted == evaluation.class_ids
        right = np.flatnonzero(hits)
        right = right[np.linspace(0, len(right) - 1, min(SAMPLES, len(right))).astype(np.int64)]
        sure = probabilities_of(evaluation.logits).max(axis=1)
        wrong = np.flatnonzero(~hits)
        wrong = wrong[np.argsort(-sure[wrong], kind="stable")][:SAMPLES]
        said = [data.manifest.classes[i - 1] for i in evaluation.predicted]
        notes = {int(row): "right: " for row in right}
        notes |= {int(row): f"wrong: {said[row]} for " for row in wrong}
    return _draw_cubes(folder, card, data, np.array(list(notes), np.int64), notes)


def _place(group: Group) -> tuple[str, float, tuple[float, float, float]]:
    """Name, abscissa and score with its interval, for a figure."""
    assert group.position is not None
    # A range of SNR is read off the axis, a structure is not.
    name = group.name if group.by == "structure" else ""
    return name, group.position, (group.score.value, group.score.low, group.score.high)


def _choose_extremes(values: NDArray[np.float64]) -> dict[int, str]:
    """Rows of the two best, the two median and the two worst subtomograms, each named once."""
    order = np.argsort(-values, kind="stable")
    middle = len(order) // 2
    chosen: dict[int, str] = {}
    for word, rows in (
        ("best", order[:2]),
        ("worst", order[-2:]),
        ("median", order[max(middle - 1, 0) : middle + 1]),
    ):
        for row in rows.tolist():
            chosen.setdefault(row, word)
    return dict(sorted(chosen.items(), key=lambda item: -values[item[0]]))


def _draw_cubes(
    folder: Path, card: ModelCard, data: Dataset, rows: NDArray[np.int64], notes: Mapping[int, str]
) -> Figure:
    """Slices of test cubes with what is true and what a segmenter predicts."""
    batch = data.split("test").read(rows)
    names = [data.manifest.classes[i - 1] for i in batch.class_ids.tolist()]
    truth = predicted = None
    if batch.instances is not None:
        labels = None
        if card.task == "semantic":
            labels = SemanticLabels.of_card(card, data.manifest.classes)
        truth = segmentation_truth(batch, labels).numpy()
    if card.task != "classify":
        logits = load_runtime(folder)(network_input(batch, card.task).numpy())
        predicted = logits.argmax(axis=1)
    return draw_slices(
        batch.subtomograms[:, 0].numpy(), truth, predicted,
        voxel_size=data.manifest.voxel_size,
        titles=[notes.get(int(row), "") + name for row, name in zip(rows, names, strict=True)],
    )  # fmt: skip

"""Scores: what is reported, per subtomogram, with intervals from a bootstrap over fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from cectflow.dataset import Batch, BatchSource
from cectflow.model_card import Score, Task

__all__ = [
    "Evaluation",
    "SubtomogramIou",
    "baseline_ball",
    "baseline_threshold",
    "bootstrap_ratio",
    "bootstrap_score",
    "evaluate",
    "intersection_over_union",
    "target_mask",
]

NUM_RESAMPLES = 2000


def target_mask(batch: Batch) -> Int[Tensor, "n z y x"]:
    """1 in the voxels of each cube's target, 0 elsewhere: the truth of the task ``target``.

    Raises
    ------
    ValueError
        If the dataset has no voxel labels.
    """
    if batch.instances is None:
        msg = (
            "the dataset has no voxel labels: expected a simulated dataset, or one imported "
            "with --voxel-labels"
        )
        raise ValueError(msg)
    return (batch.instances == 1).long()


def intersection_over_union(
    predicted: Bool[Tensor, "n z y x"], truth: Bool[Tensor, "n z y x"]
) -> Float[Tensor, " n"]:
    """Intersection over union of each cube; 1 where both are empty."""
    axes = (1, 2, 3)
    union = (predicted | truth).sum(dim=axes)
    overlap = (predicted & truth).sum(dim=axes)
    return torch.where(union > 0, overlap / union.clamp(min=1), torch.ones_like(union).float())


class SubtomogramIou(Metric):
    """Mean over subtomograms of the foreground IoU, or of paper (a)'s score.

    Parameters
    ----------
    foreground_only
        Else the mean of foreground and background IoU (``meanIoU`` of the paper's code).
    """

    total: Tensor
    count: Tensor
    full_state_update = False

    def __init__(self, *, foreground_only: bool) -> None:
        super().__init__()
        self.foreground_only = foreground_only
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, truth: Tensor) -> None:
        """Add a batch.

        Parameters
        ----------
        logits
            ``(n, 2, z, y, x)``.
        truth
            ``(n, z, y, x)``, 1 in the foreground.
        """
        predicted, foreground = logits.argmax(dim=1) == 1, truth == 1
        scores = intersection_over_union(predicted, foreground)
        if not self.foreground_only:
            scores = (scores + intersection_over_union(~predicted, ~foreground)) / 2
        self.total += scores.sum()
        self.count += len(scores)

    def compute(self) -> Tensor:
        """Mean over the subtomograms seen."""
        return (self.total / self.count).float()


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a network made of each subtomogram of a split.

    Attributes
    ----------
    scores
        Name → value of each subtomogram; the mean over subtomograms is the reported score.
    class_ids
        Truth, from 1.
    predicted
        Predicted class ids of a classifier, from 1; None for segmenters.
    fields
        Index of each subtomogram's field: what the bootstrap resamples.
    """

    scores: dict[str, NDArray[np.float64]]
    class_ids: NDArray[np.int64]
    predicted: NDArray[np.int64] | None
    fields: NDArray[np.int64]

    def interval(self, name: str) -> Score:
        """Score of that name with its 95 % interval."""
        return bootstrap_score(self.scores[name], self.fields)


def evaluate(
    infer: Callable[[Tensor], Tensor], source: BatchSource, task: Task, *, batch_size: int = 64
) -> Evaluation:
    """Scores of every subtomogram of a source.

    Parameters
    ----------
    infer
        Cubes ``(n, 1, z, y, x)`` → logits.
    source
        Test data, in order.
    task
        ``classify`` gives ``accuracy``; ``target`` gives ``foreground_iou`` and ``iou``.
    batch_size
        Cubes at a time.
    """
    collected: dict[str, list[Tensor]] = {}
    predicted, class_ids, fields = [], [], []
    for batch in source.batches(batch_size):
        with torch.inference_mode():
            logits = infer(batch.subtomograms).float().cpu()
        if task == "classify":
            guess = logits.argmax(dim=1) + 1
            predicted.append(guess)
            found = {"accuracy": (guess == batch.class_ids).double()}
        else:
            guess, truth = logits.argmax(dim=1) == 1, target_mask(batch) == 1
            foreground = intersection_over_union(guess, truth)
            background = intersection_over_union(~guess, ~truth)
            found = {"foreground_iou": foreground, "iou": (foreground + background) / 2}
        for name, values in found.items():
            collected.setdefault(name, []).append(values.double())
        class_ids.append(batch.class_ids)
        fields.append(batch.fields)
    return Evaluation(
        {name: torch.cat(values).numpy() for name, values in collected.items()},
        torch.cat(class_ids).numpy(),
        torch.cat(predicted).numpy() if predicted else None,
        torch.cat(fields).numpy(),
    )


def bootstrap_score(
    values: Float[NDArray[np.float64], " n"], fields: Int[NDArray[np.int64], " n"], *, seed: int = 0
) -> Score:
    """Mean over subtomograms and its 95 % percentile interval over resampled fields.

    Fields are resampled, not subtomograms: those of one field share neighbours and noise.
    """
    sums, counts = _field_sums(values, fields), _field_sums(np.ones_like(values), fields)
    drawn = _resample(len(sums), seed)
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Score(value=float(values.mean()), low=float(low), high=float(high))


def bootstrap_ratio(
    values: Float[NDArray[np.float64], " n"],
    reference: Float[NDArray[np.float64], " n"],
    fields: Int[NDArray[np.int64], " n"],
    *,
    seed: int = 0,
) -> Score:
    """Ratio of two means over the same subtomograms, with its paired 95 % interval.

    Resamples in which the reference scores 0 have no ratio and are left out.

    Raises
    ------
    ValueError
        If the reference is zero throughout.
    """
    if not reference.any():
        msg = "the reference scores 0 on every subtomogram: expected a teacher that learned"
        raise ValueError(msg)
    sums, base = _field_sums(values, fields), _field_sums(reference, fields)
    drawn = _resample(len(sums), seed)
    totals, references = sums[drawn].sum(axis=1), base[drawn].sum(axis=1)
    ratios = totals[references > 0] / references[references > 0]
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Score(value=float(values.sum() / reference.sum()), low=float(low), high=float(high))


def baseline_ball(source: BatchSource) -> tuple[float, float]:
    """Best foreground IoU of one centred ball for all cubes, and its radius in voxels.

    The radius is chosen on the very data that are scored, in the baseline's favour.
    """
    box = source.manifest.box
    axis = torch.arange(box) - box // 2
    radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    balls = {float(r): radius <= r for r in np.arange(0.5, box / 2 + 0.5, 0.5)}

    def scores(batch: Batch) -> dict[float, Tensor]:
        truth = target_mask(batch) == 1
        return {
            r: intersection_over_union(ball.expand_as(truth), truth) for r, ball in balls.items()
        }

    return _best(source, scores)


def baseline_threshold(source: BatchSource) -> tuple[float, float]:
    """Best foreground IoU of one threshold on normalised cubes, and that threshold.

    Protein is dark: voxels below the threshold are foreground. Chosen like the ball's radius.
    """

    def scores(batch: Batch) -> dict[float, Tensor]:
        truth = target_mask(batch) == 1
        cubes = batch.subtomograms[:, 0]
        cubes = cubes - cubes.mean(dim=(1, 2, 3), keepdim=True)
        cubes = cubes / cubes.std(dim=(1, 2, 3), keepdim=True)
        return {
            float(t): intersection_over_union(cubes < t, truth) for t in np.arange(-3.0, 3.01, 0.25)
        }

    return _best(source, scores)


def _best(
    source: BatchSource, scores: Callable[[Batch], dict[float, Tensor]]
) -> tuple[float, float]:
    """Highest mean score and the setting that gave it."""
    sums: dict[float, float] = {}
    for batch in source.batches(64):
        for setting, values in scores(batch).items():
            sums[setting] = sums.get(setting, 0.0) + float(values.sum())
    setting = max(sums, key=lambda key: sums[key])
    return sums[setting] / len(source), setting


def _field_sums(values: NDArray[np.float64], fields: NDArray[np.int64]) -> NDArray[np.float64]:
    _, owner = np.unique(fields, return_inverse=True)
    return np.bincount(owner, weights=values).astype(np.float64)


def _resample(num_fields: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(num_fields, size=(NUM_RESAMPLES, num_fields))

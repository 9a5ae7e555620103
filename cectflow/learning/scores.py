"""Scores: what is reported, per subtomogram, with intervals from a bootstrap over fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from cectflow.dataset import Batch, BatchSource
from cectflow.learning.surface import surface_distances
from cectflow.learning.task import SemanticLabels, network_input, segmentation_truth
from cectflow.model_card import Score, Task

__all__ = [
    "Evaluation",
    "LabelIou",
    "SubtomogramIou",
    "baseline_ball",
    "baseline_threshold",
    "baselines",
    "bootstrap_ratio",
    "bootstrap_score",
    "evaluate",
    "intersection_over_union",
    "label_overlap",
    "resample_fields",
    "sum_over_fields",
]

NUM_RESAMPLES = 2000
_NOTHING_LEARNED = "the reference scores 0 on every subtomogram: expected a teacher that learned"


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
            ``(n, label, z, y, x)``.
        truth
            Labels ``(n, z, y, x)``; whatever is not 0 is foreground.
        """
        predicted, foreground = logits.argmax(dim=1) > 0, truth > 0
        scores = intersection_over_union(predicted, foreground)
        if not self.foreground_only:
            scores = (scores + intersection_over_union(~predicted, ~foreground)) / 2
        self.total += scores.sum()
        self.count += len(scores)

    def compute(self) -> Tensor:
        """Mean over the subtomograms seen."""
        return (self.total / self.count).float()


class LabelIou(MulticlassConfusionMatrix):
    """Mean over labels of the IoU of all voxels seen, background and absent labels left out.

    Parameters
    ----------
    num_outputs
        Labels, background included.
    """

    def __init__(self, num_outputs: int) -> None:
        super().__init__(num_classes=num_outputs)

    def compute(self) -> Tensor:
        """Mean over the labels that truth or prediction have; 1 where both have none."""
        counts = super().compute().cpu().numpy()
        found = label_overlap(counts.astype(np.float64), "iou")
        return torch.tensor(float(_mean_over_labels(found)))


def label_overlap(
    counts: Float[NDArray[np.float64], "*n label label"], kind: Literal["iou", "dice"]
) -> Float[NDArray[np.float64], "*n foreground"]:
    """IoU or Dice of each label but background from confusion counts ``[truth, predicted]``.

    NaN for a label that neither truth nor prediction has.
    """
    hits = np.diagonal(counts, axis1=-2, axis2=-1)[..., 1:]
    both = counts.sum(axis=-1)[..., 1:] + counts.sum(axis=-2)[..., 1:]
    over, under = (hits, both - hits) if kind == "iou" else (2.0 * hits, both)
    overlap = np.full(hits.shape, np.nan)
    np.divide(over, under, out=overlap, where=under > 0)
    return overlap


def _mean_over_labels(
    values: Float[NDArray[np.float64], "*n foreground"],
) -> Float[NDArray[np.float64], "*n"]:
    """Mean without what is NaN; 1 where all is: nothing there, and nothing predicted."""
    counted = np.isfinite(values)
    number = counted.sum(axis=-1)
    total = np.where(counted, values, 0.0).sum(axis=-1)
    return np.where(number > 0, total / np.maximum(number, 1), 1.0)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a network made of each subtomogram of a split.

    Attributes
    ----------
    scores
        Name → value of each subtomogram; the mean over subtomograms is the reported score. NaN
        where a subtomogram has none, which the mean leaves out.
    class_ids
        Truth, from 1.
    predicted
        Predicted class ids of a classifier, from 1; None for segmenters.
    fields
        Index of each subtomogram's field: what the bootstrap resamples.
    counts
        Of a semantic segmenter: voxels of each subtomogram by true and predicted label.
    labels
        Of a semantic segmenter: names of the labels from 1 on.
    logits
        Of a classifier.
    """

    scores: dict[str, NDArray[np.float64]]
    class_ids: NDArray[np.int64]
    predicted: NDArray[np.int64] | None
    fields: NDArray[np.int64]
    counts: Int[NDArray[np.int64], "n truth predicted"] | None = None
    labels: tuple[str, ...] = ()
    logits: Float[NDArray[np.float32], "n class"] | None = None

    def interval(self, name: str) -> Score:
        """Score of that name with its 95 % interval over resampled fields.

        Scores of labels are over all voxels of a resample, not means over subtomograms.
        """
        if name in self.scores:
            return bootstrap_score(self.scores[name], self.fields)
        value, drawn = self._overlap(name)
        low, high = np.quantile(drawn, [0.025, 0.975])
        return Score(value=value, low=float(low), high=float(high))

    def summary(self) -> dict[str, Score]:
        """All scores with their intervals."""
        named = [name for name, values in self.scores.items() if np.isfinite(values).any()]
        return {name: self.interval(name) for name in (*named, *self._overlap_names())}

    def ratio(self, reference: Evaluation, name: str) -> Score:
        """Ratio of a score to that of another network on the same subtomograms, paired.

        Raises
        ------
        ValueError
            If the reference is zero throughout.
        """
        if name in self.scores:
            return bootstrap_ratio(self.scores[name], reference.scores[name], self.fields)
        value, drawn = self._overlap(name)
        base, base_drawn = reference._overlap(name)
        if base == 0:
            raise ValueError(_NOTHING_LEARNED)
        # Both drew the same fields: the intervals of the two do not add.
        usable = base_drawn > 0
        low, high = np.quantile(drawn[usable] / base_drawn[usable], [0.025, 0.975])
        return Score(value=value / base, low=float(low), high=float(high))

    def agreement(self, other: Evaluation, classes: Sequence[str]) -> dict[str, Score]:
        """Share of subtomograms of which two classifiers say the same, right or wrong.

        Parameters
        ----------
        other
            Of the same subtomograms.
        classes
            Names in the order of the ids.

        Returns
        -------
        dict of str to Score
            ``agreement``, and ``agreement_<class>`` of the subtomograms of each true class.
        """
        assert self.predicted is not None, "segmenters name no classes"
        assert other.predicted is not None
        same = np.equal(self.predicted, other.predicted).astype(np.float64)
        found = {"agreement": bootstrap_score(same, self.fields)}
        for number, name in enumerate(classes, start=1):
            mine = self.class_ids == number
            if mine.any():
                found[f"agreement_{name}"] = bootstrap_score(same[mine], self.fields[mine])
        return found

    def difference(self, reference: Evaluation, name: str) -> Score:
        """A score less that of another network on the same subtomograms, paired.

        Of a score per subtomogram it is the mean difference over subtomograms.
        """
        if name in self.scores:
            return bootstrap_score(self.scores[name] - reference.scores[name], self.fields)
        (value, drawn), (base, base_drawn) = self._overlap(name), reference._overlap(name)
        low, high = np.quantile(drawn - base_drawn, [0.025, 0.975])
        return Score(value=value - base, low=float(low), high=float(high))

    def _overlap_names(self) -> tuple[str, ...]:
        if self.counts is None:
            return ()
        if len(self.labels) == 1:
            return ("mean_iou", "mean_dice")  # of the one label
        present = [
            label for number, label in enumerate(self.labels, start=1)
            if self.counts[:, number].any() or self.counts[:, :, number].any()
        ]  # fmt: skip
        return (
            "mean_iou", "mean_dice",
            *(f"iou_{label}" for label in present), *(f"dice_{label}" for label in present),
        )  # fmt: skip

    def _overlap(self, name: str) -> tuple[float, NDArray[np.float64]]:
        """Overlap of a label, or mean over labels: of all voxels, and of each resample."""
        if self.counts is None or name not in self._overlap_names():
            known = ", ".join((*self.scores, *self._overlap_names()))
            msg = f"no score {name!r}: expected one of {known}"
            raise ValueError(msg)
        kind: Literal["iou", "dice"] = (
            "iou" if name == "mean_iou" or name.startswith("iou_") else "dice"
        )
        sums = sum_over_fields(self.counts.reshape(len(self.counts), -1), self.fields)
        drawn = resample_fields(len(sums)) @ sums
        totals = np.concatenate([sums.sum(axis=0, keepdims=True), drawn])
        shape = (len(totals), *self.counts.shape[1:])
        overlap = label_overlap(totals.reshape(shape), kind)
        if name.startswith("mean_"):
            values = _mean_over_labels(overlap)
        else:
            column = overlap[:, self.labels.index(name.partition("_")[2])]
            # A resample that has nothing of a label says nothing of it.
            values = np.concatenate([column[:1], column[1:][np.isfinite(column[1:])]])
        return float(values[0]), values[1:]


def evaluate(
    infer: Callable[[Tensor], Tensor],
    source: BatchSource,
    task: Task,
    *,
    labels: SemanticLabels | None = None,
    batch_size: int = 64,
) -> Evaluation:
    """Scores of every subtomogram of a source.

    Parameters
    ----------
    infer
        Cubes ``(n, 1, z, y, x)`` → logits.
    source
        Test data, in order.
    task
        ``classify`` gives ``accuracy``; ``target`` and ``semantic`` give ``foreground_iou`` and
        ``iou`` (paper (a)'s mean of foreground and background), for which all labels are one,
        with ``surface_distance`` and ``hausdorff_95`` in Å (:func:`surface_distances`) and
        ``missed``, 1 where there is a foreground and none was found; ``semantic`` also gives, over
        all voxels, IoU and Dice of each label and their means.
    labels
        Of the task ``semantic``.
    batch_size
        Cubes at a time.
    """
    collected: dict[str, list[Tensor]] = {}
    answers, class_ids, fields, counts = [], [], [], []
    for batch in source.batches(batch_size):
        with torch.inference_mode():
            logits = infer(network_input(batch, task)).float().cpu()
        guess = logits.argmax(dim=1)
        if task == "classify":
            answers.append(logits)
            found = {"accuracy": (guess + 1 == batch.class_ids).double()}
        else:
            truth = segmentation_truth(batch, labels)
            foreground = intersection_over_union(guess > 0, truth > 0)
            background = intersection_over_union(guess == 0, truth == 0)
            found = {"foreground_iou": foreground, "iou": (foreground + background) / 2}
            distances = surface_distances(
                (guess > 0).numpy(), (truth > 0).numpy(), source.manifest.voxel_size
            )
            found["surface_distance"], found["hausdorff_95"] = torch.from_numpy(distances).T
            found["missed"] = (truth > 0).flatten(1).any(1) & (guess == 0).flatten(1).all(1)
            if labels is not None:
                counts.append(_confusion(guess, truth, labels.num_outputs))
        for name, values in found.items():
            collected.setdefault(name, []).append(values.double())
        class_ids.append(batch.class_ids)
        fields.append(batch.fields)
    answered = torch.cat(answers).numpy() if answers else None
    return Evaluation(
        {name: torch.cat(values).numpy() for name, values in collected.items()},
        torch.cat(class_ids).numpy(),
        None if answered is None else answered.argmax(axis=1) + 1,
        torch.cat(fields).numpy(),
        torch.cat(counts).numpy() if counts else None,
        () if labels is None else labels.names,
        answered,
    )


def _confusion(
    predicted: Int[Tensor, "n z y x"], truth: Int[Tensor, "n z y x"], number: int
) -> Int[Tensor, "n truth predicted"]:
    """Voxels of each cube by true and predicted label."""
    cube = torch.arange(len(truth))[:, None, None, None]
    flat = ((cube * number + truth) * number + predicted).flatten()
    return torch.bincount(flat, minlength=len(truth) * number**2).reshape(-1, number, number)


def bootstrap_score(
    values: Float[NDArray[np.float64], " n"], fields: Int[NDArray[np.int64], " n"], *, seed: int = 0
) -> Score:
    """Mean over subtomograms and its 95 % percentile interval over resampled fields.

    Fields are resampled, not subtomograms: those of one field share neighbours and noise.
    Subtomograms whose value is NaN are left out.
    """
    fields, values = fields[np.isfinite(values)], values[np.isfinite(values)]
    sums, counts = sum_over_fields(values, fields), sum_over_fields(np.ones_like(values), fields)
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
        raise ValueError(_NOTHING_LEARNED)
    sums, base = sum_over_fields(values, fields), sum_over_fields(reference, fields)
    drawn = _resample(len(sums), seed)
    totals, references = sums[drawn].sum(axis=1), base[drawn].sum(axis=1)
    ratios = totals[references > 0] / references[references > 0]
    low, high = np.quantile(ratios, [0.025, 0.975])
    return Score(value=float(values.sum() / reference.sum()), low=float(low), high=float(high))


def baseline_ball(source: BatchSource) -> tuple[float, float]:
    """Best foreground IoU of one centred ball for all cubes, and its radius in voxels.

    For the task ``target``. The radius is chosen on the very data that are scored, in the
    baseline's favour.
    """
    box = source.manifest.box
    axis = torch.arange(box) - box // 2
    radius = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()
    balls = {float(r): radius <= r for r in np.arange(0.5, box / 2 + 0.5, 0.5)}

    def scores(batch: Batch) -> dict[float, Tensor]:
        truth = segmentation_truth(batch, None) > 0
        return {
            r: intersection_over_union(ball.expand_as(truth), truth) for r, ball in balls.items()
        }

    return _best(source, scores)


def baseline_threshold(
    source: BatchSource, labels: SemanticLabels | None = None
) -> tuple[float, float]:
    """Best foreground IoU of one threshold on normalised cubes, and that threshold.

    Protein is dark: voxels below the threshold are foreground. Chosen like the ball's radius.
    Cubes are normalised as the networks see them: each by its own mean and standard deviation for
    the task ``target``, by median and robust standard deviation of its field for ``semantic``.

    Parameters
    ----------
    source
        Test data.
    labels
        Of the task ``semantic``; all of them are foreground.
    """

    def scores(batch: Batch) -> dict[float, Tensor]:
        truth = segmentation_truth(batch, labels) > 0
        if labels is not None:
            cubes = network_input(batch, "semantic")[:, 0]
        else:
            cubes = batch.subtomograms[:, 0]
            cubes = cubes - cubes.mean(dim=(1, 2, 3), keepdim=True)
            cubes = cubes / cubes.std(dim=(1, 2, 3), keepdim=True)
        return {
            float(t): intersection_over_union(cubes < t, truth) for t in np.arange(-8.0, 3.01, 0.25)
        }

    return _best(source, scores)


def baselines(source: BatchSource, task: Task, labels: SemanticLabels | None) -> dict[str, float]:
    """Foreground IoU of the trivial methods for a task; none for classifiers.

    There is no ball for the task ``semantic``, which knows no centre.
    """
    if task == "classify":
        return {}
    found = {"threshold": baseline_threshold(source, labels)[0]}
    return found if labels is not None else {"ball": baseline_ball(source)[0]} | found


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


def sum_over_fields(
    values: NDArray[np.float64] | NDArray[np.int64], fields: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Sum over the subtomograms of each field, along the first axis; fields in their order."""
    names, owner = np.unique(fields, return_inverse=True)
    sums = np.zeros((len(names), *values.shape[1:]))
    np.add.at(sums, owner, values)
    return sums


def _resample(num_fields: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(num_fields, size=(NUM_RESAMPLES, num_fields))


def resample_fields(num_fields: int, seed: int = 0) -> NDArray[np.float64]:
    """How often each resample of the bootstrap has drawn each field, ``(resample, field)``."""
    drawn = _resample(num_fields, seed)
    times = np.zeros((NUM_RESAMPLES, num_fields))
    np.add.at(times, (np.arange(NUM_RESAMPLES)[:, None], drawn), 1.0)
    return times

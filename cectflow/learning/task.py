"""What a network of each task is shown, and what is true of it: one place for loop and judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cectflow.dataset import Batch
from cectflow.manifest import JUNK_CLASS, Manifest
from cectflow.model_card import ModelCard, Task

__all__ = [
    "MONITORS",
    "SemanticLabels",
    "check_statistics",
    "network_input",
    "segmentation_truth",
    "target_mask",
]

MONITORS: dict[Task, str] = {
    "classify": "accuracy",
    "target": "foreground_iou",
    "semantic": "mean_iou",
}
"""The score of each task that chooses epochs and compares networks; higher is better."""

MERGED_LABEL = "particle"


@dataclass(frozen=True)
class SemanticLabels:
    """Which voxels of a dataset have which label in the task ``semantic``.

    Attributes
    ----------
    classes
        Whose particles are labelled; those of all other classes are background.
    names
        Of the labels from 1 on: the classes, or one name for all of them.
    of_class
        Label of each class id of the dataset, that of background (0) first.
    """

    classes: tuple[str, ...]
    names: tuple[str, ...]
    of_class: tuple[int, ...]

    @classmethod
    def choose(
        cls, known: Sequence[str], classes: Sequence[str] | None, *, merged: bool
    ) -> SemanticLabels:
        """Labels for a dataset.

        Parameters
        ----------
        known
            Classes of the dataset.
        classes
            To label, in the order of the labels; None: all but junk.
        merged
            One label for all of them.

        Raises
        ------
        ValueError
            If the dataset has none of the classes, or one is given twice.
        """
        chosen = tuple(known if classes is None else classes)
        chosen = tuple(name for name in chosen if name != JUNK_CLASS)
        if len(set(chosen)) < len(chosen) or not set(chosen) & set(known):
            msg = (
                f"classes to label are {', '.join(chosen) or 'none'}: expected distinct ones of "
                f"the dataset, which has {', '.join(known)}"
            )
            raise ValueError(msg)
        label = {name: 1 if merged else number for number, name in enumerate(chosen, start=1)}
        names = (MERGED_LABEL,) if merged else chosen
        return cls(chosen, names, (0, *(label.get(name, 0) for name in known)))

    @classmethod
    def of_card(cls, card: ModelCard, known: Sequence[str]) -> SemanticLabels:
        """Labels of a semantic segmenter for a dataset that has these classes."""
        return cls.choose(known, card.classes, merged=card.labels != card.classes)

    @property
    def num_outputs(self) -> int:
        """Logits of every voxel: background and labels."""
        return len(self.names) + 1

    def truth(self, batch: Batch) -> Int[Tensor, "n z y x"]:
        """Label of every voxel.

        Raises
        ------
        ValueError
            If the dataset has no voxel labels.
        """
        labels = _labelled(batch.voxel_labels)
        of_class = torch.tensor(self.of_class, device=labels.device)
        return of_class[labels.long()]


def target_mask(batch: Batch) -> Int[Tensor, "n z y x"]:
    """1 in the voxels of each cube's target, 0 elsewhere: the truth of the task ``target``.

    Raises
    ------
    ValueError
        If the dataset has no voxel labels.
    """
    return (_labelled(batch.instances) == 1).long()


def segmentation_truth(batch: Batch, labels: SemanticLabels | None) -> Int[Tensor, "n z y x"]:
    """Label of every voxel: that of :class:`SemanticLabels`, or without them the target's."""
    return target_mask(batch) if labels is None else labels.truth(batch)


def network_input(batch: Batch, task: Task) -> Float[Tensor, "n 1 z y x"]:
    """Cubes as a network of a task is shown them.

    Classifiers and target segmenters normalise each cube inside their graph and take it as it is.
    A semantic segmenter is shown windows of a tomogram, whose contents differ: they are normalised
    by median and robust standard deviation of the whole field, never by their own.

    Raises
    ------
    ValueError
        If the statistics of the fields are not known.
    """
    if task != "semantic":
        return batch.subtomograms
    if batch.statistics is None:
        raise ValueError(_NO_STATISTICS)
    median, deviation = batch.statistics.T[:, :, None, None, None, None]
    normalised: Tensor = (batch.subtomograms - median) / deviation
    return normalised


def check_statistics(manifest: Manifest) -> None:
    """Refuse a dataset that cannot serve the task ``semantic``.

    Raises
    ------
    ValueError
        If only the targets are labelled, or a field states no median and robust standard
        deviation, or one of 0.
    """
    if manifest.kind == "imported":
        msg = (
            "an imported dataset labels the target of each cube only, the task semantic needs "
            "every particle: give a simulated dataset"
        )
        raise ValueError(msg)
    for split in manifest.shards:
        for record in manifest.field_records(split):
            if record.robust_std is None:
                raise ValueError(_NO_STATISTICS)
            if record.robust_std == 0:
                msg = (
                    f"field {record.field} has one value in more than half of its voxels, so no "
                    f"robust standard deviation: simulate it with noise"
                )
                raise ValueError(msg)


_NO_STATISTICS = (
    "the dataset states no median and robust standard deviation of its fields, by which the task "
    "semantic normalises: it was made by an earlier cectflow, simulate it anew"
)


def _labelled(volumes: Tensor | None) -> Tensor:
    if volumes is None:
        msg = (
            "the dataset has no voxel labels: expected a simulated dataset, or one imported "
            "with --voxel-labels"
        )
        raise ValueError(msg)
    return volumes

"""Objectives: what segmenter, teacher and student learn; the loop never asks which one it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from cectflow.dataset import Batch
from cectflow.learning.losses import (
    CROSS_ENTROPY,
    LOGITS_APART,
    DistillationLoss,
    SegmentationLoss,
    similarity_difference,
)
from cectflow.learning.scores import LabelIou, SubtomogramIou
from cectflow.learning.task import MONITORS, SemanticLabels, network_input, segmentation_truth
from cectflow.learning.teacher import KnownLogits, LogitTable, Teacher
from cectflow.model_card import Task
from cectflow.networks.embedding import tapped_embedding

__all__ = ["NO_LABEL", "Classify", "Distill", "Objective", "Segment"]

NO_LABEL = -1
"""Truth of a cube that nobody labelled: soft labels need none."""


@runtime_checkable
class Objective(Protocol):
    """One thing to learn."""

    @property
    def task(self) -> Task:
        """Of the networks it trains."""
        ...

    @property
    def monitor(self) -> str:
        """The score that chooses the best epoch; higher is better."""
        ...

    @property
    def num_outputs(self) -> int:
        """Channels of the logits."""
        ...

    @property
    def labels(self) -> SemanticLabels | None:
        """Of the task ``semantic``; None of the others."""
        ...

    def __call__(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Terms of one step: ``loss`` (differentiable), ``output`` (logits) and named others."""
        ...

    def truth(self, batch: Batch) -> Tensor:
        """Truth with which the scores compare the output."""
        ...

    def make_scores(self) -> MetricCollection:
        """Fresh scores to be updated with output and truth."""
        ...


@dataclass(frozen=True)
class Classify:
    """Which structure is at the centre: cross entropy over the classes."""

    num_classes: int
    task: Task = "classify"
    monitor: str = MONITORS["classify"]
    labels: SemanticLabels | None = None

    @property
    def num_outputs(self) -> int:
        """Of the classes."""
        return self.num_classes

    def __call__(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Loss, the mean over the cubes that have a label, and logits ``(n, class)``."""
        logits, truth = network(batch.subtomograms), self.truth(batch)
        total = F.cross_entropy(logits, truth, ignore_index=NO_LABEL, reduction="sum")
        return {"loss": total / (truth != NO_LABEL).sum().clamp(min=1), "output": logits}

    def truth(self, batch: Batch) -> Tensor:
        """Class index from 0, as logits are counted; :data:`NO_LABEL` of a cube without one."""
        return batch.class_ids - 1

    def make_scores(self) -> MetricCollection:
        """Accuracy over all subtomograms."""
        return MetricCollection({"accuracy": MulticlassAccuracy(self.num_classes, average="micro")})


@dataclass(frozen=True)
class Segment:
    """Which voxels belong to the particle at the centre, or to the particles of some classes.

    Without labels it is the task ``target``: the particle at the centre against all else, its own
    kind included. With them it is ``semantic``: every voxel of every particle of their classes.
    """

    loss: SegmentationLoss = CROSS_ENTROPY
    labels: SemanticLabels | None = None

    def __post_init__(self) -> None:
        self.loss.check_outputs(self.num_outputs)

    @property
    def task(self) -> Task:
        """``target`` or ``semantic``."""
        return "target" if self.labels is None else "semantic"

    @property
    def monitor(self) -> str:
        """IoU of the target over subtomograms, or mean IoU of the labels over all voxels."""
        return MONITORS[self.task]

    @property
    def num_outputs(self) -> int:
        """Background and target, or background and labels."""
        return 2 if self.labels is None else self.labels.num_outputs

    def __call__(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Loss, its terms where there are several, and logits ``(n, label, z, y, x)``."""
        logits = network(network_input(batch, self.task))
        return self.loss.measure(logits, self.truth(batch)) | {"output": logits}

    def truth(self, batch: Batch) -> Tensor:
        """Label of every voxel; of the task ``target`` 1 in the target, 0 elsewhere."""
        return segmentation_truth(batch, self.labels)

    def make_scores(self) -> MetricCollection:
        """Foreground IoU and paper (a)'s score per subtomogram; of labels also over all voxels."""
        scores: dict[str, Metric] = {
            "foreground_iou": SubtomogramIou(foreground_only=True),
            "iou": SubtomogramIou(foreground_only=False),
        }
        if self.labels is not None:
            scores["mean_iou"] = LabelIou(self.num_outputs)
        # torchmetrics takes metrics whose states agree after the first batch for one and the
        # same, and these agree when that batch was segmented perfectly.
        return MetricCollection(dict(scores), compute_groups=False)


class Distill:
    """Another objective, learned from a teacher's logits as well.

    ``loss = weight * soft + (1 - weight) * hard``, where ``soft`` compares the logits.

    Parameters
    ----------
    objective
        What the student learns from labels; gives task, truth and scores.
    teacher
        Whose logits, and of a ``soft`` with hints whose embeddings, the student is to have.
    soft
        What the two are to have in common.
    weight
        Of the soft term, 0 to 1.
    known
        The teacher's logits of views that come again and again, instead of asking it anew; hints
        are asked for anew all the same.

    Raises
    ------
    ValueError
        If hints are asked for of another task than ``classify``.
    """

    def __init__(
        self,
        objective: Objective,
        teacher: Teacher,
        *,
        known: KnownLogits | LogitTable | None = None,
        soft: DistillationLoss = LOGITS_APART,
        weight: float = 1.0,
    ) -> None:
        self.objective = objective
        self.teacher = teacher
        self.known = known
        self.soft = soft
        self.weight = weight
        if soft.hint and objective.task != "classify":
            msg = (
                f"soft.hint compares embeddings of cubes, and networks of the task "
                f"{objective.task!r} have none: use mse, kl or dkd"
            )
            raise ValueError(msg)

    def __repr__(self) -> str:
        return f"Distill({self.objective!r}, {self.soft!r}, weight={self.weight:g})"

    @property
    def task(self) -> Task:
        """Of the wrapped objective."""
        return self.objective.task

    @property
    def monitor(self) -> str:
        """Of the wrapped objective."""
        return self.objective.monitor

    @property
    def num_outputs(self) -> int:
        """Of the wrapped objective."""
        return self.objective.num_outputs

    @property
    def labels(self) -> SemanticLabels | None:
        """Of the wrapped objective."""
        return self.objective.labels

    def __call__(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Loss, logits, and the two terms ``soft`` and ``hard``."""
        if self.soft.hint:
            with tapped_embedding(network) as seen:
                hard = self.objective(network, batch)
            teacher_logits, features = self.teacher.embed(batch.subtomograms)
        else:
            hard = self.objective(network, batch)
            teacher_logits = self._answers(batch)
        logits = hard["output"]
        soft = self.soft.measure(logits, teacher_logits.to(logits.dtype), self.truth(batch))
        if self.soft.hint:
            soft = soft + self.soft.hint * similarity_difference(seen[-1], features)
        loss = self.weight * soft + (1.0 - self.weight) * hard["loss"]
        return {"loss": loss, "output": logits, "soft": soft, "hard": hard["loss"]}

    def _answers(self, batch: Batch) -> Tensor:
        """The teacher's logits."""
        if self.known is not None and batch.views is not None:
            return self.known(batch.views).to(batch.subtomograms.device)
        return self.teacher(network_input(batch, self.task))

    def truth(self, batch: Batch) -> Tensor:
        """Of the wrapped objective."""
        return self.objective.truth(batch)

    def make_scores(self) -> MetricCollection:
        """Of the wrapped objective."""
        return self.objective.make_scores()

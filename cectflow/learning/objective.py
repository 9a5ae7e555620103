"""Objectives: what segmenter, teacher and student learn; the loop never asks which one it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from cectflow.dataset import Batch, BatchSource
from cectflow.execution import track
from cectflow.learning.augmentation import turned_batch
from cectflow.learning.losses import CROSS_ENTROPY, LOGITS_APART, DistillationLoss, SegmentationLoss
from cectflow.learning.scores import LabelIou, SubtomogramIou
from cectflow.learning.task import MONITORS, SemanticLabels, network_input, segmentation_truth
from cectflow.model_card import Task

__all__ = ["Classify", "Distill", "KnownLogits", "LogitTable", "Objective", "Segment"]


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
        """Loss and logits ``(n, class)``."""
        logits = network(batch.subtomograms)
        return {"loss": F.cross_entropy(logits, self.truth(batch)), "output": logits}

    def truth(self, batch: Batch) -> Tensor:
        """Class index from 0, as logits are counted."""
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


@dataclass(frozen=True, eq=False)
class LogitTable:
    """Logits of known views.

    Attributes
    ----------
    views
        In ascending order.
    logits
        Of each.
    """

    views: Int[Tensor, " view"]
    logits: Float[Tensor, "view class"]

    def __call__(self, views: Int[Tensor, " n"]) -> Float[Tensor, "n class"]:
        """Logits of these views."""
        return self.logits[torch.searchsorted(self.views, views)]


@dataclass(frozen=True, eq=False)
class KnownLogits:
    """A teacher's logits of every view of a few sources, computed at the first question.

    A turned cube is one of at most four views, so a training of many epochs would ask the teacher
    the same questions over and over. To another process it passes as the table of its answers, so
    that several ask but once.

    Attributes
    ----------
    teacher
        Cubes → logits ``(n, class)``.
    sources
        Each with the turns in which its cubes will be shown.
    batch_size, device
        How the teacher is asked; always in the same order, so that the answers are the same.
    """

    teacher: Callable[[Tensor], Tensor]
    sources: Sequence[tuple[BatchSource, tuple[str, ...]]]
    batch_size: int
    device: torch.device

    def __call__(self, views: Int[Tensor, " n"]) -> Float[Tensor, "n class"]:
        """Logits of these views, on the CPU."""
        return self._table(views)

    def __reduce__(self) -> tuple[type[LogitTable], tuple[Tensor, Tensor]]:
        return LogitTable, (self._table.views, self._table.logits)

    @cached_property
    def _table(self) -> LogitTable:
        views, logits = [], []
        passes = [(source, axis) for source, turns in self.sources for axis in turns]
        for source, axis in track(passes, total=len(passes), title="asking the teacher"):
            for batch in source.batches(self.batch_size):
                shown = turned_batch(batch, axis)
                assert shown.views is not None
                with torch.no_grad():
                    logits.append(self.teacher(shown.subtomograms.to(self.device)).float().cpu())
                views.append(shown.views)
        known, order = torch.cat(views).sort()
        return LogitTable(known, torch.cat(logits)[order])


class Distill:
    """Another objective, learned from a teacher's logits as well.

    ``loss = weight * soft + (1 - weight) * hard``, where ``soft`` compares the logits.

    Parameters
    ----------
    objective
        What the student learns from labels; gives task, truth and scores.
    teacher
        Cubes → logits, in evaluation mode; not part of the student's weights.
    soft
        How the logits are compared.
    weight
        Of the soft term, 0 to 1.
    known
        The teacher's logits of views that come again and again, instead of asking it anew.
    """

    def __init__(
        self,
        objective: Objective,
        teacher: Callable[[Tensor], Tensor],
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
        hard = self.objective(network, batch)
        if self.known is not None and batch.views is not None:
            teacher_logits = self.known(batch.views).to(batch.subtomograms.device)
        else:
            with torch.no_grad():
                teacher_logits = self.teacher(network_input(batch, self.task))
        logits = hard["output"]
        soft = self.soft.measure(logits, teacher_logits.to(logits.dtype), self.truth(batch))
        loss = self.weight * soft + (1.0 - self.weight) * hard["loss"]
        return {"loss": loss, "output": logits, "soft": soft, "hard": hard["loss"]}

    def truth(self, batch: Batch) -> Tensor:
        """Of the wrapped objective."""
        return self.objective.truth(batch)

    def make_scores(self) -> MetricCollection:
        """Of the wrapped objective."""
        return self.objective.make_scores()

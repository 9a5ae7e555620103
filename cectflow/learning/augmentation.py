"""Augmentation by the turns that keep the missing wedge and the hand of the specimen."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from cectflow.dataset import Batch
from cectflow.turns import HALF_TURNS

__all__ = ["augment", "turn", "turned_batch"]


def turn(volumes: Shaped[Tensor, "*n z y x"], axis: str) -> Shaped[Tensor, "*n z y x"]:
    """Volumes after a half turn; exact on the grid, so labels turn like images.

    With an even edge the centre voxel n//2 moves by one voxel, a translation that jittered
    targets see anyway.
    """
    axes = HALF_TURNS[axis]
    return volumes.flip(axes) if axes else volumes


def augment(
    batch: Batch,
    turns: tuple[str, ...],
    generator: torch.Generator,
    *,
    place: slice = slice(None),
    whole: int | None = None,
) -> Batch:
    """Batch whose cubes, each with its labels, are turned by one of the turns at random.

    Parameters
    ----------
    batch, turns, generator
        What is turned, by which turns, and what draws them.
    place, whole
        Of a part of a batch: where it lies in the whole one, and how many cubes that has. They
        are turned as they would be with the others.
    """
    number = len(batch) if whole is None else whole
    choice = torch.randint(len(turns), (number,), generator=generator)[place]
    chosen = choice.tolist()

    def turned(volumes: Tensor | None) -> Tensor | None:
        if volumes is None:
            return None
        return torch.stack([turn(v, turns[i]) for v, i in zip(volumes, chosen, strict=True)])

    subtomograms = turned(batch.subtomograms)
    assert subtomograms is not None
    return replace(
        batch,
        subtomograms=subtomograms,
        voxel_labels=turned(batch.voxel_labels),
        instances=turned(batch.instances),
        views=None if batch.views is None else batch.views + _view_numbers(turns)[choice],
    )


def turned_batch(batch: Batch, axis: str) -> Batch:
    """The batch with every cube, and its labels, turned alike."""
    return augment(batch, (axis,), torch.Generator())


def _view_numbers(turns: tuple[str, ...]) -> Int[Tensor, " turn"]:
    """Number of each turn among all half turns: the same whichever are allowed."""
    return torch.tensor([list(HALF_TURNS).index(axis) for axis in turns])

"""Cubes that nobody labelled, beside those of a dataset: a student learns from them by asking."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from cectflow.dataset import VIEWS_PER_CUBE, Batch, BatchSource
from cectflow.manifest import SPLITS, Manifest

__all__ = ["UnlabelledCubes", "WithUnlabelled"]


@dataclass(frozen=True, eq=False)
class UnlabelledCubes:
    """Real cubes as a :class:`~cectflow.dataset.BatchSource`, of class 0: unknown.

    Attributes
    ----------
    cubes
        Unnormalised, protein dark, of the manifest's box.
    manifest
        Of the dataset beside which they are shown.
    share
        How many are shown for each labelled cube; at least one a batch.
    """

    cubes: Float[Tensor, "n 1 z y x"]
    manifest: Manifest
    share: float

    def __post_init__(self) -> None:
        expected = (1, *(self.manifest.box,) * 3)
        if not len(self) or tuple(self.cubes.shape[1:]) != expected:
            msg = (
                f"unlabelled cubes have the shape {tuple(self.cubes.shape)}: expected at least one "
                f"of {self.manifest.box}³"
            )
            raise ValueError(msg)

    @cached_property
    def digest(self) -> str:
        """Name of the data: sha256 of all voxels."""
        return hashlib.sha256(self.cubes.contiguous().numpy().data).hexdigest()

    def __len__(self) -> int:
        return len(self.cubes)

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Batches of one pass: shuffled with a generator, in order without."""
        order = torch.arange(len(self))
        if generator is not None:
            order = torch.randperm(len(self), generator=generator)
        for rows in torch.split(order, batch_size):
            nowhere = torch.zeros(len(rows), dtype=torch.int64)
            views = (len(SPLITS) << 40) + rows * VIEWS_PER_CUBE
            yield Batch(self.cubes[rows], None, None, nowhere, nowhere - 1, views)


@dataclass(frozen=True, eq=False)
class WithUnlabelled:
    """A source whose every batch has some unlabelled cubes more.

    A pass is as long as the labelled source's. Unlabelled cubes come pass after pass, each pass
    in another order, however many or few there are.

    Attributes
    ----------
    labelled, unlabelled
        See there.
    """

    labelled: BatchSource
    unlabelled: UnlabelledCubes

    @property
    def manifest(self) -> Manifest:
        """Of the labelled source."""
        return self.labelled.manifest

    def __len__(self) -> int:
        return len(self.labelled)

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Batches of the labelled source, each with its share of unlabelled cubes at its end."""
        cubes = self._endless(generator)
        for batch in self.labelled.batches(batch_size, generator):
            number = max(1, round(self.unlabelled.share * len(batch)))
            yield _joined(batch, *islice(cubes, number))

    def _endless(self, generator: torch.Generator | None) -> Iterator[Batch]:
        """One unlabelled cube after the other."""
        while True:
            yield from self.unlabelled.batches(1, generator)


def _joined(*batches: Batch) -> Batch:
    """One batch of several, without what only voxel labels and whole fields know."""
    known = [batch.views for batch in batches if batch.views is not None]
    first = batches[0]
    device = first.subtomograms.device
    return replace(
        first,
        subtomograms=torch.cat([batch.subtomograms.to(device) for batch in batches]),
        voxel_labels=None,
        instances=None,
        class_ids=torch.cat([batch.class_ids.to(device) for batch in batches]),
        fields=torch.cat([batch.fields.to(device) for batch in batches]),
        views=torch.cat(known) if len(known) == len(batches) else None,
        statistics=None,
    )

"""Shares: how several processes learn from the same batches, each from a part of every one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray

from cectflow.dataset import Batch, BatchSource, batch_indices
from cectflow.learning.augmentation import augment
from cectflow.manifest import Manifest

__all__ = ["HandOut", "Part", "Share", "read_parts"]


@dataclass(frozen=True)
class Share:
    """One of several parts of every batch, which one process of several learns from.

    Attributes
    ----------
    number
        From 0.
    of
        How many parts there are.
    """

    number: int = 0
    of: int = 1

    def place(self, size: int) -> slice:
        """Where the part lies in a batch; parts follow one another and differ by a cube at most.

        Where there are fewer cubes than parts, a part that would be empty is the first cube.
        """
        first, end = (size * number // self.of for number in (self.number, self.number + 1))
        return slice(first, end) if end > first else slice(0, 1)

    def count(self, size: int) -> int:
        """Cubes of the part that count: none of a part that would be empty."""
        return size * (self.number + 1) // self.of - size * self.number // self.of


@dataclass(frozen=True, eq=False)
class Part:
    """A process's part of a batch.

    Attributes
    ----------
    batch
        Of at least one cube, so that every process takes every step.
    count
        How many of its cubes count: all, or none.
    whole
        Cubes of the batch that it is a part of.
    """

    batch: Batch
    count: int
    whole: int


@runtime_checkable
class _Indexed(Protocol):
    """A source whose subtomograms can be read one by one."""

    @property
    def manifest(self) -> Manifest: ...

    def __len__(self) -> int: ...

    def read(self, indices: Int[NDArray[np.int64], " n"]) -> Batch: ...


def read_parts(
    source: BatchSource,
    batch_size: int,
    share: Share,
    turns: tuple[str, ...] = ("identity",),
    generator: torch.Generator | None = None,
) -> Iterator[Part]:
    """A share of every batch of one pass, the same ones whatever the number of shares.

    Parameters
    ----------
    source
        Of a folder only the share is read.
    batch_size
        Cubes of a whole batch.
    turns, generator
        Shuffles, and turns each cube; without a generator they come in order, as they are.
    """
    for batch, whole in _read(source, batch_size, share, generator):
        place = share.place(whole)
        if generator is not None:
            batch = augment(batch, turns, generator, place=place, whole=whole)
        yield Part(batch, share.count(whole), whole)


def _read(
    source: BatchSource, batch_size: int, share: Share, generator: torch.Generator | None
) -> Iterator[tuple[Batch, int]]:
    """Share of each batch, and how many cubes the whole has."""
    if share.of == 1:
        yield from ((batch, len(batch)) for batch in source.batches(batch_size, generator))
    elif isinstance(source, _Indexed):
        for indices in batch_indices(len(source), batch_size, generator):
            yield source.read(indices[share.place(len(indices))]), len(indices)
    else:
        for batch in source.batches(batch_size, generator):
            yield batch.part(share.place(len(batch))), len(batch)


class HandOut:
    """Batches that only this process can make, handed out to others part by part.

    Parameters
    ----------
    read
        Epoch → its whole batches.
    num_shares
        Processes that ask, each for the same epochs one after the other.
    """

    def __init__(self, read: Callable[[int], Iterator[Part]], num_shares: int) -> None:
        self._read = read
        self._shares = [Share(number, num_shares) for number in range(num_shares)]
        self._epoch = 0
        self._batches: Iterator[Part] = iter(())
        self._waiting: list[deque[Part | None]] = [deque() for _ in self._shares]

    def __call__(self, number: int, epoch: int) -> Part | None:
        """Next part of a share in an epoch; None where it ends."""
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._read(epoch)
        if not self._waiting[number]:
            whole = next(self._batches, None)
            for share, parts in zip(self._shares, self._waiting, strict=True):
                parts.append(None if whole is None else _cut(whole.batch, share))
        return self._waiting[number].popleft()


def _cut(batch: Batch, share: Share) -> Part:
    size = len(batch)
    part = batch.part(share.place(size)).to(torch.device("cpu"))
    return Part(part, share.count(size), size)

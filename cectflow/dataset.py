"""The dataset folder: shards of subtomograms with voxel labels, and their batches.

One format holds simulated and imported data (design.md, section 5). A folder has a
``manifest.json`` (:mod:`cectflow.manifest`) and, per split and shard, ``NNNNN.mrcs``
(subtomograms), ``NNNNN_labels.mrcs`` (class of every voxel), ``NNNNN_instances.mrcs``
(0 background, 1 the target, 2… neighbours) and ``NNNNN.star`` (one row per subtomogram). Stacks are
read cube by cube, never whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cectflow.manifest import SPLITS, STACK_KINDS, FieldRecord, Manifest, SplitName, read_manifest
from cectflow.particles import read_particles
from cectflow.volume import read_stack

__all__ = [
    "VIEWS_PER_CUBE",
    "Batch",
    "BatchSource",
    "Dataset",
    "Selection",
    "Split",
    "batch_indices",
    "field_statistics",
    "open_dataset",
]

VIEWS_PER_CUBE = 4
"""The identity and three half turns: more views of a cube augmentation does not make."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What a network is trained or judged on in one step.

    Attributes
    ----------
    subtomograms
        Unnormalised, protein dark.
    voxel_labels, instances
        As of :class:`cectflow.shards.Subtomograms`; None where the dataset has none.
    class_ids
        From 1.
    fields
        Index of each cube's field within its split.
    views
        Number of each cube's view: the same number means the same voxels, whichever pass they are
        read in. Multiples of :data:`VIEWS_PER_CUBE`, to which augmentation adds the turn; None
        where cubes do not come twice.
    statistics
        Median and robust standard deviation of each cube's whole field; None where they are not
        known.
    """

    subtomograms: Float[Tensor, "n 1 z y x"]
    voxel_labels: Int[Tensor, "n z y x"] | None
    instances: Int[Tensor, "n z y x"] | None
    class_ids: Int[Tensor, " n"]
    fields: Int[Tensor, " n"]
    views: Int[Tensor, " n"] | None = None
    statistics: Float[Tensor, "n 2"] | None = None

    def __len__(self) -> int:
        return len(self.class_ids)

    def part(self, rows: slice) -> Batch:
        """Some of its cubes, copied, so that the others can be forgotten."""
        parts: dict[str, Any] = {
            name: None if values is None else values[rows].clone()
            for name, values in vars(self).items()
        }
        return Batch(**parts)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.subtomograms.to(device),
            None if self.voxel_labels is None else self.voxel_labels.to(device),
            None if self.instances is None else self.instances.to(device),
            self.class_ids.to(device),
            self.fields.to(device),
            self.views,
            None if self.statistics is None else self.statistics.to(device),
        )


@runtime_checkable
class BatchSource(Protocol):
    """Where batches come from: a split of a folder, or anything that behaves like one."""

    @property
    def manifest(self) -> Manifest:
        """Of the dataset."""
        ...

    def __len__(self) -> int: ...

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Batches of one pass: shuffled with a generator, in order without."""
        ...


def batch_indices(
    number: int, batch_size: int, generator: torch.Generator | None = None
) -> Iterator[Int[NDArray[np.int64], " n"]]:
    """Indices of one pass's batches: shuffled with a generator, in order without."""
    order = torch.arange(number)
    if generator is not None:
        order = torch.randperm(number, generator=generator)
    for indices in torch.split(order, batch_size):
        yield indices.numpy()


@dataclass(frozen=True, eq=False)
class _StackFile:
    """Where the cubes of a stack lie in its file.

    No file stays open: a memory map would hold one for each of perhaps thousands of stacks, more
    than a process may have.
    """

    path: Path
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, path: Path) -> _StackFile:
        stack, _ = read_stack(path)
        assert isinstance(stack, np.memmap), "cectflow writes stacks uncompressed"
        return cls(path, stack.offset, stack.dtype, stack.shape)

    def read_into(
        self, cubes: NDArray[Any], rows: NDArray[np.intp], indices: NDArray[np.int64]
    ) -> None:
        """Read the cubes of these indices into these rows."""
        with self.path.open("rb") as file:
            for row, index in zip(rows, indices, strict=True):
                file.seek(self.offset + int(index) * cubes[row].nbytes)
                if file.readinto(cubes[row]) != cubes[row].nbytes:
                    msg = f"{self.path} is truncated: cube {index} is missing; restore the file"
                    raise ValueError(msg)


class Split:
    """One split of a dataset folder: a :class:`BatchSource` over its stacks."""

    def __init__(self, folder: Path, manifest: Manifest, name: SplitName) -> None:
        self.name = name
        self._manifest = manifest
        shards = manifest.shards.get(name, ())
        self._stacks = {
            kind: [_StackFile.of(folder / f"{shard.name}{kind}.mrcs") for shard in shards]
            for kind in (STACK_KINDS if manifest.has_voxel_labels else ("",))
        }
        tables = [read_particles(folder / f"{shard.name}.star").rows for shard in shards]
        self.rows = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
        self._starts = np.concatenate([[0], np.cumsum([shard.count for shard in shards])])
        records = manifest.field_records(name)
        names = {record.field: i for i, record in enumerate(records)}
        tomograms = self.rows["rlnTomoName"].astype(str) if tables else pd.Series(dtype=str)
        self.fields = np.array([names[field] for field in tomograms], np.int64)
        self._statistics = field_statistics(records)
        class_numbers = self.rows["rlnClassNumber"] if tables else pd.Series(dtype=np.int64)
        self.class_ids = class_numbers.to_numpy(np.int64)

    @property
    def manifest(self) -> Manifest:
        """Of the dataset."""
        return self._manifest

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Batches of one pass: shuffled with a generator, in order without."""
        for indices in batch_indices(len(self), batch_size, generator):
            yield self.read(indices)

    def read(self, indices: Int[NDArray[np.int64], " n"]) -> Batch:
        """The batch of these subtomograms, in this order."""
        labelled = self._manifest.has_voxel_labels
        return Batch(
            torch.from_numpy(self._gather("", indices).astype(np.float32))[:, None],
            torch.from_numpy(self._gather("_labels", indices)) if labelled else None,
            torch.from_numpy(self._gather("_instances", indices)) if labelled else None,
            torch.from_numpy(self.class_ids[indices]),
            torch.from_numpy(self.fields[indices]),
            torch.from_numpy((SPLITS.index(self.name) << 40) + indices * VIEWS_PER_CUBE),
            None if self._statistics is None else self._statistics[self.fields[indices]],
        )

    def _gather(self, kind: str, indices: NDArray[np.int64]) -> NDArray[Any]:
        stacks = self._stacks[kind]
        shard_of = np.searchsorted(self._starts, indices, side="right") - 1
        cubes = np.empty((len(indices), *stacks[0].shape[1:]), stacks[0].dtype)
        for shard in np.unique(shard_of):
            rows = np.flatnonzero(shard_of == shard)
            stacks[shard].read_into(cubes, rows, indices[rows] - self._starts[shard])
        return cubes


@dataclass(frozen=True, eq=False)
class Selection:
    """Some subtomograms of a split: a :class:`BatchSource` of their own.

    Attributes
    ----------
    split
        To which they belong; their fields keep its numbers.
    rows
        Their places in it.
    """

    split: Split
    rows: Int[NDArray[np.int64], " n"]

    @property
    def manifest(self) -> Manifest:
        """Of the dataset."""
        return self.split.manifest

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Batches of one pass: shuffled with a generator, in order without."""
        for indices in batch_indices(len(self), batch_size, generator):
            yield self.read(indices)

    def read(self, indices: Int[NDArray[np.int64], " n"]) -> Batch:
        """The batch of these subtomograms, counted within the selection, in this order."""
        return self.split.read(self.rows[indices])


@dataclass(frozen=True, eq=False)
class Dataset:
    """An opened dataset folder."""

    folder: Path
    manifest: Manifest

    def split(self, name: SplitName) -> Split:
        """One split, ready to give batches.

        Raises
        ------
        ValueError
            If the split is empty.
        """
        if self.manifest.count(name) == 0:
            filled = [split for split in SPLITS if self.manifest.count(split)]
            msg = f"{self.folder} has no {name} split: it holds {', '.join(filled) or 'nothing'}"
            raise ValueError(msg)
        return Split(self.folder, self.manifest, name)


def field_statistics(records: Sequence[FieldRecord]) -> Float[Tensor, "field 2"] | None:
    """Median and robust standard deviation of each field; None if one of them states none."""
    pairs = [(record.median, record.robust_std) for record in records]
    if not pairs or any(None in pair for pair in pairs):
        return None
    return torch.tensor(pairs, dtype=torch.float32)


def open_dataset(folder: Path) -> Dataset:
    """Dataset of a folder.

    Raises
    ------
    FileNotFoundError
        If the folder has no manifest.
    ValueError
        If the manifest is not valid, or shards are still missing.
    """
    manifest = read_manifest(folder)
    if not manifest.is_complete:
        done = sum(len(shards) for shards in manifest.shards.values())
        command = "simulate dataset" if manifest.masking is None else "dataset mask"
        msg = (
            f"{folder} is incomplete: {done} of {sum(manifest.planned_shards.values())} shards; "
            f"run the same `cectflow {command}` again, it goes on from there"
        )
        raise ValueError(msg)
    return Dataset(folder, manifest)

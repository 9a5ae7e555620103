"""The dataset folder: shards of subtomograms with voxel labels, and their batches.

One format holds simulated and imported data (design.md, section 5). A folder has a
``manifest.json`` (:mod:`cectflow.manifest`) and, per split and shard, ``NNNNN.mrcs``
(subtomograms), ``NNNNN_labels.mrcs`` (class of every voxel), ``NNNNN_instances.mrcs``
(0 background, 1 the target, 2… neighbours) and ``NNNNN.star`` (one row per subtomogram). Stacks are
read cube by cube, never whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from cectflow.files import refuse_existing_folder, remove_leftovers, sha256_of
from cectflow.manifest import (
    JUNK_CLASS,
    MANIFEST_FILE,
    SPLITS,
    STACK_KINDS,
    FieldRecord,
    Manifest,
    ShardRecord,
    SplitName,
    read_manifest,
)
from cectflow.particles import particles_from, read_particles
from cectflow.volume import create_volume, read_stack

__all__ = [
    "VIEWS_PER_CUBE",
    "Batch",
    "BatchSource",
    "Dataset",
    "Selection",
    "Split",
    "Subtomograms",
    "batch_indices",
    "check_dataset",
    "check_files",
    "field_statistics",
    "open_dataset",
    "remove_partial_shards",
    "start_dataset",
    "write_shard",
]

VIEWS_PER_CUBE = 4
"""The identity and three half turns: more views of a cube augmentation does not make."""


@dataclass(frozen=True, eq=False)
class Subtomograms:
    """Content of a shard before it is written.

    Attributes
    ----------
    cubes
        Unnormalised, protein dark.
    voxel_labels, instances
        Class and particle of every voxel, or None where nobody knows them.
    rows
        One per cube: rlnTomoName (the field), rlnClassNumber, cectflowClassName, position, angles.
    """

    cubes: Float[NDArray[Any], "n z y x"]
    voxel_labels: Int[NDArray[np.int8], "n z y x"] | None
    instances: Int[NDArray[np.int16], "n z y x"] | None
    rows: pd.DataFrame


@dataclass(frozen=True, eq=False)
class Batch:
    """What a network is trained or judged on in one step.

    Attributes
    ----------
    subtomograms
        Unnormalised, protein dark.
    voxel_labels, instances
        See :class:`Subtomograms`; None where the dataset has none.
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


def start_dataset(folder: Path, manifest: Manifest) -> Manifest:
    """Manifest to go on from: that of an earlier start of the same data, or the new one, written.

    Data are the same whose recipe, planned shards and masking are; what a kill left behind is
    removed.

    Parameters
    ----------
    folder
        Created when missing.
    manifest
        Of the data, without shards.

    Raises
    ------
    FileExistsError
        If the folder holds something else.
    """
    if (folder / MANIFEST_FILE).is_file():
        earlier = read_manifest(folder)
        same = ("recipe_digest", "planned_shards", "masking", "masked_from")
        if all(getattr(earlier, name) == getattr(manifest, name) for name in same):
            remove_partial_shards(folder)
            return earlier
        msg = f"{folder} holds another dataset: give another folder, or remove it first"
        raise FileExistsError(msg)
    refuse_existing_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest.write(folder)
    return manifest


def remove_partial_shards(folder: Path) -> None:
    """Remove from a dataset folder what processes that died left there.

    No other process may be writing into it.
    """
    for place in (folder, *(folder / split for split in SPLITS)):
        remove_leftovers(place)


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


def write_shard(
    folder: Path,
    name: str,
    content: Subtomograms,
    fields: tuple[FieldRecord, ...],
    voxel_size: float,
) -> ShardRecord:
    """Write one shard and return its record; a shard of that name is replaced.

    All files are written in a temporary folder first and moved when complete. The statistics in
    their headers are marked as undetermined: they would take as long as all the rest.

    Raises
    ------
    ValueError
        If there is no subtomogram, or a value is not finite.
    """
    for row, cube in enumerate(content.cubes):
        # One sum tells of any value that is not finite; float64 holds that of any finite ones.
        if not np.isfinite(float(torch.from_numpy(cube).double().sum())):
            msg = f"shard {name}: subtomogram {row} has values that are not finite: remove it first"
            raise ValueError(msg)
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    stacks: Mapping[str, NDArray[Any] | None] = dict(
        zip(STACK_KINDS, (content.cubes, content.voxel_labels, content.instances), strict=True)
    )
    with tempfile.TemporaryDirectory(".tmp", f".{target.name}.", target.parent) as scratch:
        temporary = Path(scratch)
        for kind, stack in stacks.items():
            if stack is not None:
                path = temporary / f"{target.name}{kind}.mrcs"
                with create_volume(path, stack.shape, voxel_size, stack.dtype) as written:
                    written[...] = stack
        particles_from(content.rows).write(temporary / f"{target.name}.star")
        digests = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
        for file_name in digests:
            (temporary / file_name).replace(target.parent / file_name)
    return ShardRecord(name=name, count=len(content.rows), fields=fields, sha256=digests)


def check_dataset(folder: Path) -> tuple[str, ...]:
    """Every fault found in a dataset folder; empty when it is sound.

    Digests, shapes, finite values, label ranges, the target's presence, and that no field is in
    two splits or twice in one.
    """
    dataset = open_dataset(folder)
    faults: list[str] = []
    seen: dict[str, str] = {}
    for split in SPLITS:
        for shard in dataset.manifest.shards.get(split, ()):
            faults += _check_shard(dataset, shard)
            for record in shard.fields:
                if record.field in seen:
                    faults.append(f"field {record.field} is in {seen[record.field]} and {split}")
                seen.setdefault(record.field, split)
    return tuple(faults)


def check_files(dataset: Dataset, split: SplitName) -> tuple[str, ...]:
    """Files of a split that are missing or not those of the manifest's digests."""
    return tuple(
        fault
        for shard in dataset.manifest.shards.get(split, ())
        for fault in _check_files(dataset, shard)
    )


def _check_shard(dataset: Dataset, shard: ShardRecord) -> list[str]:
    manifest = dataset.manifest
    faults = _check_files(dataset, shard)
    if faults:
        return faults
    cubes, voxel_size = read_stack(dataset.folder / f"{shard.name}.mrcs")
    rows = read_particles(dataset.folder / f"{shard.name}.star").rows
    if cubes.shape != (shard.count, *(manifest.box,) * 3) or len(rows) != shard.count:
        faults.append(f"{shard.name}: shape {cubes.shape}, {len(rows)} rows, count {shard.count}")
        return faults
    if abs(voxel_size - manifest.voxel_size) > 0.01 * manifest.voxel_size:
        faults.append(f"{shard.name}: voxel size {voxel_size:g} Å, not {manifest.voxel_size:g} Å")
    if not np.isfinite(cubes).all():
        faults.append(f"{shard.name}: values that are not finite")
    class_ids = rows["rlnClassNumber"].to_numpy()
    if not np.isin(class_ids, np.arange(1, len(manifest.classes) + 1)).all():
        faults.append(f"{shard.name}: class numbers outside 1..{len(manifest.classes)}")
    if not set(rows["rlnTomoName"].astype(str)) <= {record.field for record in shard.fields}:
        faults.append(f"{shard.name}: rows of fields that the manifest does not list")
    if manifest.has_voxel_labels:
        faults += _check_voxel_labels(dataset, shard, class_ids)
    return faults


def _check_files(dataset: Dataset, shard: ShardRecord) -> list[str]:
    kinds = STACK_KINDS if dataset.manifest.has_voxel_labels else ("",)
    stem = Path(shard.name).name
    expected = {f"{stem}.star", *(f"{stem}{kind}.mrcs" for kind in kinds)}
    unlisted = expected - set(shard.sha256)
    if unlisted:
        return [f"{shard.name}: the manifest lists no {', '.join(sorted(unlisted))}"]
    for file_name, digest in shard.sha256.items():
        path = (dataset.folder / shard.name).parent / file_name
        if not path.is_file():
            return [f"{path}: missing"]
        if sha256_of(path) != digest:
            return [f"{path}: digest differs from the manifest's"]
    return []


def _check_voxel_labels(dataset: Dataset, shard: ShardRecord, class_ids: NDArray[Any]) -> list[str]:
    num_classes, box = len(dataset.manifest.classes), dataset.manifest.box
    labels, _ = read_stack(dataset.folder / f"{shard.name}_labels.mrcs")
    instances, _ = read_stack(dataset.folder / f"{shard.name}_instances.mrcs")
    if not labels.shape == instances.shape == (shard.count, box, box, box):
        shapes = f"{labels.shape} and {instances.shape}"
        return [f"{shard.name}: voxel labels and instances have the shapes {shapes}"]
    faults = []
    has_junk = dataset.manifest.classes[-1] == JUNK_CLASS
    if labels.min() < 0 or labels.max() > num_classes:
        faults.append(f"{shard.name}: voxel labels outside 0..{num_classes}")
    if ((labels == 0) != (instances == 0)).any():
        faults.append(f"{shard.name}: voxel labels and instances disagree on background")
    for index in range(shard.count):
        target = labels[index][instances[index] == 1]
        is_junk = has_junk and class_ids[index] == num_classes
        if (target.size == 0 and not is_junk) or (target != class_ids[index]).any():
            faults.append(f"{shard.name}: cube {index} has no target of its class")
    return faults

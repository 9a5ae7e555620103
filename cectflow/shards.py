"""Shards of a dataset folder: begun, written one by one, and checked for every fault.

The format is that of :mod:`cectflow.dataset`, which reads it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy.typing import NDArray

from cectflow.dataset import Dataset, open_dataset
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
from cectflow.subtomogram import are_finite
from cectflow.volume import read_stack
from cectflow.volume_writer import write_stack

__all__ = [
    "Subtomograms",
    "check_dataset",
    "check_files",
    "collect_shards",
    "remove_partial_shards",
    "start_dataset",
    "write_shard",
]


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


def collect_shards(
    folder: Path, manifest: Manifest, finished: Iterable[tuple[SplitName, ShardRecord]]
) -> Manifest:
    """Manifest with shards added as they are finished; written in between, and at the end.

    The file names every shard, so that writing it takes ever longer: it gets one part in 20 of the
    time. A failure loses no finished shard; a kill loses one only where they come so fast.

    Parameters
    ----------
    folder, manifest
        As :func:`start_dataset` gave it.
    finished
        Splits and shards in any order; shards are sorted by name.
    """
    shards, are_written = dict(manifest.shards), True
    start, spent = time.monotonic(), 0.0
    try:
        for split, record in finished:
            shards[split] = tuple(sorted((*shards[split], record), key=lambda shard: shard.name))
            manifest, are_written = manifest.model_copy(update={"shards": {**shards}}), False
            begun = time.monotonic()
            if spent <= (begun - start) / 20:
                manifest.write(folder)
                are_written = True
                spent += time.monotonic() - begun
    except BaseException as error:
        if not are_written:
            try:
                manifest.write(folder)
            except OSError as other:  # what failed first is what the user is to mend
                error.add_note(f"{folder / MANIFEST_FILE} could not be written either: {other}")
        raise
    if not are_written:
        manifest.write(folder)
    return manifest


def remove_partial_shards(folder: Path) -> None:
    """Remove from a dataset folder what processes that died left there.

    No other process may be writing into it.
    """
    for place in (folder, *(folder / split for split in SPLITS)):
        remove_leftovers(place)


def write_shard(
    folder: Path,
    name: str,
    content: Subtomograms,
    fields: tuple[FieldRecord, ...],
    voxel_size: float,
) -> ShardRecord:
    """Write one shard and return its record; a shard of that name is replaced.

    All files are written in a temporary folder first and moved when complete. Nobody waits for the
    disk: what a loss of power costs, :func:`check_dataset` finds.

    Raises
    ------
    ValueError
        If there is no subtomogram, or a value is not finite.
    """
    for row in np.flatnonzero(~are_finite(content.cubes)):
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
                write_stack(path, stack, voxel_size, statistics=False)
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

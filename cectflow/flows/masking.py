"""Masked datasets: cubes without their neighbours, for classifiers that are to see no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from cectflow.dataset import Dataset, open_dataset
from cectflow.flows.prediction import load_model
from cectflow.manifest import SPLITS, ShardRecord, SplitName
from cectflow.model_card import Masking
from cectflow.particles import read_particles
from cectflow.prediction.mask import mask_neighbours, refuse_other_cubes
from cectflow.progress import track
from cectflow.shards import Subtomograms, collect_shards, start_dataset, write_shard
from cectflow.volume import read_stack

__all__ = ["Outline", "mask_cubes_of", "mask_dataset"]

Outline = Callable[
    [Float[NDArray[np.float32], "n z y x"], Subtomograms], Bool[NDArray[np.bool_], "n z y x"]
]
"""Outlines of the targets of cubes, whose ground truth comes with them."""

BATCH_SIZE = 64


def mask_dataset(folder: Path, out: Path, *, model: str, device: str = "auto") -> Dataset:
    """Dataset in whose cubes only what a segmenter outlines is left (:func:`mask_neighbours`).

    Splits, fields, voxel labels and particle tables are those of the source. Shards that are there
    already are kept, so the same call goes on where it was broken off.

    Parameters
    ----------
    folder
        Dataset of the segmenter's box, voxel size and contrast.
    out
        Dataset folder to make.
    model
        Registered target segmenter or model folder.
    device
        ``auto``, ``cpu`` or ``cuda``.

    Raises
    ------
    FileExistsError
        If ``out`` holds something other than an earlier start of this very call.
    ValueError
        If the model is no target segmenter, or does not suit the dataset.
    """
    dataset, segmenter = open_dataset(folder), load_model(model, ("target",), device)
    manifest = dataset.manifest
    refuse_other_cubes(
        segmenter, str(folder),
        box=manifest.box, voxel_size=manifest.voxel_size, contrast=manifest.contrast,
    )  # fmt: skip

    def outline(
        cubes: Float[NDArray[np.float32], "n z y x"], _: Subtomograms
    ) -> Bool[NDArray[np.bool_], "n z y x"]:
        logits = segmenter.infer(cubes[:, None])
        return np.asarray(logits[:, 1] > logits[:, 0])

    return mask_cubes_of(dataset, out, outline, segmenter.masking)


def mask_cubes_of(dataset: Dataset, out: Path, outline: Outline, masking: Masking) -> Dataset:
    """Dataset in whose cubes only what is outlined is left: :func:`mask_dataset`.

    Parameters
    ----------
    dataset
        Of plain cubes.
    out
        Dataset folder to make.
    outline
        Finds the targets.
    masking
        What the manifest, and the card of a network trained on it, say of the outlines.

    Raises
    ------
    FileExistsError
        If ``out`` holds something else.
    ValueError
        If the cubes are masked already.
    """
    if dataset.manifest.masking is not None:
        msg = (
            f"{dataset.folder} is masked already, with {dataset.manifest.masking.segmenter}: give "
            "the dataset that it was made from"
        )
        raise ValueError(msg)
    manifest = dataset.manifest.model_copy(
        update={
            "masking": masking,
            "masked_from": dataset.manifest.content_digest(),
            "shards": dict.fromkeys(dataset.manifest.shards, ()),
        }
    )
    manifest = start_dataset(out, manifest)
    done = {shard.name for shards in manifest.shards.values() for shard in shards}
    jobs = [
        (split, shard)
        for split in SPLITS
        for shard in dataset.manifest.shards.get(split, ())
        if shard.name not in done
    ]

    def mask(split: SplitName, shard: ShardRecord) -> tuple[SplitName, ShardRecord]:
        content = _mask_shard(dataset, shard, outline)
        return split, write_shard(out, shard.name, content, shard.fields, manifest.voxel_size)

    finished = (mask(*job) for job in track(jobs, total=len(jobs), title="masking"))
    collect_shards(out, manifest, finished)
    return open_dataset(out)


def _mask_shard(dataset: Dataset, shard: ShardRecord, outline: Outline) -> Subtomograms:
    """Content of a shard, its cubes masked in batches."""
    path = dataset.folder / shard.name
    cubes, labels, instances = (
        np.asarray(read_stack(path.with_name(f"{path.name}{kind}.mrcs"))[0])
        if dataset.manifest.has_voxel_labels or not kind
        else None
        for kind in ("", "_labels", "_instances")
    )
    assert cubes is not None
    rows = read_particles(path.with_name(f"{path.name}.star")).rows
    masked = np.empty_like(cubes)
    for start in range(0, len(cubes), BATCH_SIZE):
        some = slice(start, start + BATCH_SIZE)
        part = cubes[some].astype(np.float32)
        truth = Subtomograms(
            part,
            None if labels is None else labels[some],
            None if instances is None else instances[some],
            rows.iloc[some],
        )
        masked[some] = mask_neighbours(part, outline(part, truth))
    return Subtomograms(masked, labels, instances, rows)

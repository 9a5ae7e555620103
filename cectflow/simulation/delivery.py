"""Delivery: the dataset folder of a recipe; the same recipe gives the same bytes anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from cectflow.dataset import Dataset, open_dataset
from cectflow.execution import HERE, Workplace, run_all, single_thread
from cectflow.manifest import SPLITS, Manifest, ShardRecord, SplitName
from cectflow.shards import (
    Subtomograms,
    collect_shards,
    remove_partial_shards,
    start_dataset,
    write_shard,
)
from cectflow.simulation.extraction import simulate_subtomograms
from cectflow.simulation.field import Specimen, leave_out, prepare_specimen
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.structure import Structure

__all__ = ["simulate_dataset"]


def simulate_dataset(
    recipe: SimulationRecipe,
    structures: Sequence[Structure],
    folder: Path,
    *,
    where: Workplace = HERE,
    commit: str = "unknown",
    splits: Sequence[SplitName] = SPLITS,
    left_out: Sequence[str] = (),
) -> Dataset:
    """Dataset folder of a recipe; shards that are already there are kept.

    A shard holds whole fields. The bytes do not depend on ``where``. Whatever ends the work, a
    full disk or a kill, finished shards stay, and the same call makes the others.

    Parameters
    ----------
    recipe, structures
        What to simulate.
    folder
        Where to; created when missing.
    where
        Which processes do the work.
    commit
        Of cectflow, for the manifest.
    splits
        Of the recipe's, those that are made.
    left_out
        Structures of which no particle is placed (:func:`~cectflow.simulation.field.leave_out`).

    Raises
    ------
    FileExistsError
        If the folder holds something other than an earlier start of this very simulation.
    ValueError
        If a structure does not fit the box, or the occupancy cannot be packed.
    """
    specimen = leave_out(prepare_specimen(recipe, structures), left_out)
    manifest = _start_manifest(specimen, structures, folder, commit, splits)
    done = {shard.name for shards in manifest.shards.values() for shard in shards}
    jobs = [
        _Job(folder.absolute(), split, index)
        for split in splits
        for index in range(recipe.shards_of(split))
        if _shard_name(split, index) not in done
    ]
    simulate = partial(_simulate_shard, specimen)
    finished = run_all(simulate, jobs, where=where, title="simulating", paths=[folder])
    collect_shards(folder, manifest, finished)
    remove_partial_shards(folder)
    return open_dataset(folder)


@dataclass(frozen=True, eq=False)
class _Job:
    folder: Path
    split: SplitName
    index: int

    def __str__(self) -> str:
        return f"shard {_shard_name(self.split, self.index)}"


def _simulate_shard(specimen: Specimen, job: _Job) -> tuple[SplitName, ShardRecord]:
    recipe, parts, records = specimen.recipe, [], []
    with single_thread():
        for index in recipe.fields_of(job.split, job.index):
            part, record_of_field = simulate_subtomograms(specimen, job.split, index)
            parts.append(part)
            records.append(record_of_field)
    name = _shard_name(job.split, job.index)
    content = _concatenate(parts)
    record = write_shard(job.folder, name, content, tuple(records), recipe.voxel_size)
    return job.split, record


def _concatenate(parts: Sequence[Subtomograms]) -> Subtomograms:
    if len(parts) == 1:
        return parts[0]
    labels = [part.voxel_labels for part in parts if part.voxel_labels is not None]
    instances = [part.instances for part in parts if part.instances is not None]
    return Subtomograms(
        np.concatenate([part.cubes for part in parts]),
        np.concatenate(labels),
        np.concatenate(instances),
        pd.concat([part.rows for part in parts], ignore_index=True),
    )


def _start_manifest(
    specimen: Specimen, structures: Sequence[Structure], folder: Path, commit: str,
    splits: Sequence[SplitName],
) -> Manifest:  # fmt: skip
    """Manifest of the folder: the one that is there, if it is of this simulation, or a new one."""
    recipe = specimen.recipe
    manifest = Manifest(
        kind="simulated",
        recipe=recipe.model_dump(mode="json"),
        recipe_digest=specimen.recipe_digest,
        sources={structure.name: structure.digest for structure in structures},
        commit=commit,
        classes=specimen.classes,
        left_out=specimen.left_out,
        box=recipe.box,
        voxel_size=recipe.voxel_size,
        ctf_correction=recipe.ctf_correction,
        tilt_range=recipe.tilts.range,
        snr_stage=recipe.snr_stage,
        snr=recipe.snr,
        noise_spectrum=recipe.microscope.noise_spectrum_name,
        occupancy=recipe.occupancy,
        masses_kda={structure.name: structure.mass_kda for structure in structures},
        jitter=recipe.jitter,
        has_voxel_labels=True,
        planned_shards={split: recipe.shards_of(split) for split in SPLITS if split in splits},
        shards=dict.fromkeys(SPLITS, ()),
    )
    return start_dataset(folder, manifest)


def _shard_name(split: str, index: int) -> str:
    return f"{split}/{index:05d}"

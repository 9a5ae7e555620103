"""Extraction: subtomograms of a simulated field, with labels, instances and one row each."""

from __future__ import annotations

from typing import no_type_check

import numba
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from cectflow.dataset import FieldRecord, Subtomograms
from cectflow.particles import make_particle_rows
from cectflow.simulation.distractors import choose_junk
from cectflow.simulation.field import SimulatedField, Specimen, seed_of, simulate_field
from cectflow.subtomogram import cut

__all__ = ["cut_targets", "simulate_subtomograms"]


def simulate_subtomograms(
    specimen: Specimen, split: str, index: int
) -> tuple[Subtomograms, FieldRecord]:
    """Subtomograms of field number ``index`` of a split, and what was measured of the field."""
    field = simulate_field(specimen, split, index)
    seed = seed_of(specimen, f"{split}-cut", index)
    return cut_targets(specimen, field, seed), field.record


def cut_targets(specimen: Specimen, field: SimulatedField, seed: int) -> Subtomograms:
    """Subtomograms about the field's particles, with labels, instances and one row each.

    Those of the class junk come after them. They have no target: no voxel of theirs is of
    instance 1 or of the class, and distractors are background in all cubes alike.
    """
    recipe, scene = specimen.recipe, field.scene
    generator = np.random.default_rng(seed)
    # A particle that its neighbours' densities hide has no voxel to segment: no target.
    whole = np.zeros((1, 3), np.int64)
    (visible,) = _find_owners(field.owners, whole, field.owners.shape, len(scene) + 2)
    targets = generator.permutation(np.flatnonzero(visible[1:]))[: recipe.targets_per_field]
    targets.sort()
    if recipe.independent:
        targets = targets[targets == 0]
    junk = _choose_junk_of(specimen, field, len(targets), generator)
    if recipe.independent and len(junk):
        targets = targets[:0]
    offsets = generator.uniform(-1.0, 1.0, (len(targets), 3)) * recipe.jitter / recipe.voxel_size
    centres = np.round(np.concatenate([scene.positions_zyx[targets] + offsets, junk]))
    class_ids = np.concatenate(
        [scene.class_ids[targets], np.full(len(junk), len(specimen.classes), np.int64)]
    )
    positions = np.concatenate([scene.positions_zyx[targets], junk])
    angles = np.concatenate([scene.angles[targets], np.zeros((len(junk), 3))])
    # One more than the last particle stands for junk, which has no voxel.
    owners = np.concatenate([targets + 1, np.full(len(junk), len(scene) + 1)])
    corners = centres.astype(np.int64) - recipe.box // 2
    box = (recipe.box, recipe.box, recipe.box)
    present = _find_owners(field.owners, corners, box, len(scene) + 2)
    # Junk has no target that could be missing.
    kept = present[np.arange(len(owners)), owners] | (owners > len(scene))
    instances = np.empty((int(kept.sum()), *box), np.int16)
    voxel_labels = np.empty(instances.shape, np.int8)
    _write_labels(
        field.owners,
        corners[kept],
        np.concatenate([[0], scene.class_ids, [0]]).astype(np.int8),
        _number_instances(present[kept], owners[kept]),
        voxel_labels,
        instances,
    )
    halves = torch.from_numpy(field.tomogram).half().numpy()
    cubes = cut(halves, centres[kept], recipe.box, periodic=True)
    names = [specimen.classes[class_id - 1] for class_id in class_ids[kept]]
    z, y, x = centres[kept].astype(np.int64).T
    rows = make_particle_rows(
        positions[kept],
        angles=angles[kept],
        tomogram=field.record.field,
        rlnClassNumber=class_ids[kept],
        cectflowClassName=pd.array(names, dtype="str"),
        cectflowCentreX=x,
        cectflowCentreY=y,
        cectflowCentreZ=z,
    )
    return Subtomograms(cubes, voxel_labels, instances, rows)


def _choose_junk_of(
    specimen: Specimen, field: SimulatedField, num_targets: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Centres of the field's junk in voxels; of an independent field one or none."""
    recipe = specimen.recipe
    nowhere = np.zeros((0, 3))
    if recipe.junk is None:
        return nowhere
    shares = recipe.junk.shares
    if recipe.independent:
        # One cube of a field: junk as often as the shares say, and then of one kind.
        weights = np.array([1.0, *shares.values()])
        drawn = generator.choice(len(weights), p=weights / weights.sum())
        numbers = {kind: int(drawn == place) for place, kind in enumerate(shares, start=1)}
    else:
        numbers = {
            kind: int(share * num_targets + generator.random()) for kind, share in shares.items()
        }
    found = [
        choose_junk(
            kind,
            number,
            owners=field.owners,
            kinds=field.distractor_kinds,
            distractors=field.scene.distractors,
            voxel_size=recipe.voxel_size,
            box=recipe.box,
            generator=generator,
        )
        for kind, number in numbers.items()
        if number
    ]
    return np.concatenate([nowhere, *found])


def _number_instances(present: NDArray[np.bool_], targets: NDArray[np.int64]) -> NDArray[np.int16]:
    """Instance of each owner in each cube: 1 the target, 2… its neighbours in their order."""
    cubes = np.arange(len(targets))
    neighbours = present.copy()
    neighbours[:, 0] = neighbours[cubes, targets] = False
    numbers = (np.cumsum(neighbours, axis=1) + 1).astype(np.int16)
    numbers[:, 0], numbers[cubes, targets] = 0, 1
    return numbers


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _find_owners(
    owners: NDArray[np.int32],
    corners: NDArray[np.int64],
    box: tuple[int, int, int],
    num_owners: int,
) -> NDArray[np.bool_]:
    """Which owners have voxels in each box of a periodic field."""
    depth, height, width = owners.shape
    present = np.zeros((corners.shape[0], num_owners), np.bool_)
    for cube in range(corners.shape[0]):
        for i in range(box[0]):
            z = (corners[cube, 0] + i) % depth
            for j in range(box[1]):
                y = (corners[cube, 1] + j) % height
                x, first = corners[cube, 2] % width, 0
                while first < box[2]:  # stretches between the faces of the field
                    stop = min(box[2], first + width - x)
                    last = -1
                    for owner in owners[z, y, x : x + stop - first]:
                        if owner != last:  # voxels of one owner lie together
                            present[cube, owner] = True
                            last = owner
                    first, x = stop, 0
    return present


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _write_labels(
    owners: NDArray[np.int32],
    corners: NDArray[np.int64],
    classes: NDArray[np.int8],
    numbers: NDArray[np.int16],
    voxel_labels: NDArray[np.int8],
    instances: NDArray[np.int16],
) -> None:
    """Class and instance of each voxel of the cubes, from those of each owner in each cube."""
    depth, height, width = owners.shape
    box = instances.shape[1:]
    for cube in range(corners.shape[0]):
        number_of_owner = numbers[cube]
        for i in range(box[0]):
            z = (corners[cube, 0] + i) % depth
            for j in range(box[1]):
                y = (corners[cube, 1] + j) % height
                x, first = corners[cube, 2] % width, 0
                while first < box[2]:
                    stop = min(box[2], first + width - x)
                    row = owners[z, y, x : x + stop - first]
                    labels = voxel_labels[cube, i, j, first:stop]
                    numbered = instances[cube, i, j, first:stop]
                    for k in range(row.size):
                        labels[k] = classes[row[k]]
                        numbered[k] = number_of_owner[row[k]]
                    first, x = stop, 0

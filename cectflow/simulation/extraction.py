"""Extraction: subtomograms of a simulated field, with labels, instances and one row each.

Where to cut, labels and instances follow from the scene alone and are made on the CPU; the cubes
are cut where the tomogram is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import numba
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from cectflow.manifest import FieldRecord
from cectflow.particles import make_particle_rows
from cectflow.shards import Subtomograms
from cectflow.simulation.distractors import choose_junk
from cectflow.simulation.field import (
    RenderedField,
    Specimen,
    draw_field,
    image_rendered,
    render_drawn,
    seed_of,
)
from cectflow.subtomogram import cut

__all__ = ["Targets", "choose_targets", "cut_cubes", "simulate_subtomograms"]


@dataclass(frozen=True, eq=False)
class Targets:
    """What subtomograms of a field are about: all of them but the cubes.

    Attributes
    ----------
    centres
        Voxels (z, y, x) at which cubes are cut.
    voxel_labels, instances, rows
        As of :class:`~cectflow.shards.Subtomograms`.
    """

    centres: NDArray[np.float64]
    voxel_labels: NDArray[np.int8]
    instances: NDArray[np.int16]
    rows: pd.DataFrame


def simulate_subtomograms(
    specimen: Specimen, split: str, index: int
) -> tuple[Subtomograms, FieldRecord]:
    """Subtomograms of field number ``index`` of a split, and what was measured of the field."""
    rendered = render_drawn(specimen, draw_field(specimen, split, index))
    targets = choose_targets(specimen, rendered, seed_of(specimen, f"{split}-cut", index))
    tomogram, record = image_rendered(specimen, rendered)
    cubes = cut_cubes(tomogram, targets.centres, specimen.recipe.box).cpu().numpy()
    return Subtomograms(cubes, targets.voxel_labels, targets.instances, targets.rows), record


def cut_cubes(tomogram: Tensor, centres: NDArray[np.float64], box: int) -> Tensor:
    """Cubes of a periodic tomogram in float16, on its device; :func:`~cectflow.subtomogram.cut`."""
    halves = tomogram.half()
    if halves.device.type == "cpu":  # copies whole blocks
        return torch.from_numpy(cut(halves.numpy(), centres, box, periodic=True))
    return _gather(halves, centres, box)


def _gather(volume: Tensor, centres: NDArray[np.float64], box: int) -> Tensor:
    """Cubes of a periodic volume about whole voxels, by their indices, on its device."""
    device = volume.device
    corners = torch.from_numpy(np.round(centres).astype(np.int64) - box // 2).to(device)
    sizes = torch.tensor(volume.shape, device=device)
    along = torch.arange(box, device=device)
    z, y, x = ((corners[..., None] + along) % sizes[:, None]).unbind(1)
    return volume[z[:, :, None, None], y[:, None, :, None], x[:, None, None, :]]


def choose_targets(specimen: Specimen, field: RenderedField, seed: int) -> Targets:
    """Places of subtomograms about the field's particles, with labels, instances and rows.

    Those of the class junk come after them. They have no target: no voxel of theirs is of
    instance 1 or of the class, and distractors are background in all cubes alike.
    """
    recipe, scene = specimen.recipe, field.drawn.scene
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
    names = [specimen.classes[class_id - 1] for class_id in class_ids[kept]]
    z, y, x = centres[kept].astype(np.int64).T
    rows = make_particle_rows(
        positions[kept],
        angles=angles[kept],
        tomogram=field.drawn.name,
        rlnClassNumber=class_ids[kept],
        cectflowClassName=pd.array(names, dtype="str"),
        cectflowCentreX=x,
        cectflowCentreY=y,
        cectflowCentreZ=z,
    )
    return Targets(centres[kept], voxel_labels, instances, rows)


def _choose_junk_of(
    specimen: Specimen, field: RenderedField, num_targets: int, generator: np.random.Generator
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
            kinds=field.kinds,
            distractors=field.drawn.scene.distractors,
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

"""Scene: particles packed without overlap in a periodic field, the ground truth of a simulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import numba
import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cectflow.simulation.beads import Beads

__all__ = ["Scene", "pack_scene"]

CELL = 10.0
"""Edge in Å, rounded so that cells fill the field, of the cells in which overlap is looked up.

The beads of two particles stay more than half a cell apart along at least one axis."""
POSITIONS_PER_ORIENTATION = 512
ORIENTATIONS_PER_PARTICLE = 60
SHORTFALL = 0.8
"""Fraction of the drawn particles' volume below which a scene is refused as too crowded."""


@dataclass(frozen=True, eq=False)
class Scene:
    """Packed ground truth in a periodic field.

    Attributes
    ----------
    class_ids
        Of each particle, from 1.
    positions_zyx
        Particle centres in voxels of the field, voxel centres at integers.
    angles
        RELION ZYZ (rot, tilt, psi) in degrees.
    occupancy
        Molecular volume over the field's volume.
    """

    class_ids: Int[NDArray[np.int64], " particle"]
    positions_zyx: Float[NDArray[np.float64], "particle 3"]
    angles: Float[NDArray[np.float64], "particle 3"]
    occupancy: float

    def __len__(self) -> int:
        return len(self.class_ids)


def pack_scene(
    beads: tuple[Beads, ...],
    *,
    shape: tuple[int, int, int],
    voxel_size: float,
    occupancy: float,
    generator: np.random.Generator,
) -> Scene:
    """Scene of randomly placed and turned particles that fill a fraction of a periodic field.

    Classes are drawn with equal probability until their molecular volume reaches the request;
    the largest particles are placed first. Each is tried at random positions and orientations
    against the cells that are taken: a few far-apart beads reject most trials, all beads decide.

    Parameters
    ----------
    beads
        Of each class.
    shape
        Of the field in voxels.
    voxel_size
        In Å.
    occupancy
        Requested molecular volume over the field's volume.
    generator
        Source of all randomness.

    Raises
    ------
    ValueError
        If a structure is larger than the field or has more volume than the occupancy stands for,
        or if less than 80 % of the volume drawn could be placed; the message says what was.
    """
    edges = np.array(shape) * voxel_size
    field_volume = float(edges.prod())
    for grains in beads:
        if grains.diameter > edges.min():
            msg = (
                f"{grains.name} is {grains.diameter:.0f} Å across, the field only "
                f"{edges.min():.0f} Å: expected a field of at least "
                f"{int(np.ceil(grains.diameter / voxel_size))} voxels along each axis"
            )
            raise ValueError(msg)
        if grains.molecular_volume > occupancy * field_volume:
            msg = (
                f"occupancy {occupancy:g} of {shape} voxels of {voxel_size:g} Å is less than one "
                f"{grains.name}: expected at least {grains.molecular_volume / field_volume:.2g}, "
                f"or a larger field"
            )
            raise ValueError(msg)
    classes = _draw_classes(beads, occupancy * field_volume, generator)
    cells = np.maximum(np.round(edges / CELL), 1).astype(np.int64)
    taken = np.zeros(tuple(cells), np.bool_)
    state = np.array([generator.integers(1, 2**63 - 1)], np.uint64)
    kept, positions, quaternions, volume = [], [], [], 0.0
    for class_index in classes:
        grains = beads[class_index]
        centre, quaternion, placed = _place_particle(
            grains.positions_zyx.astype(np.float64), edges / cells, taken, state
        )
        if placed:
            kept.append(class_index + 1)
            positions.append(centre / voxel_size)
            quaternions.append(quaternion)
            volume += grains.molecular_volume
    reached = volume / field_volume
    # Against what was drawn: that falls short of the request by up to one particle by itself.
    if volume < SHORTFALL * sum(beads[index].molecular_volume for index in classes):
        msg = (
            f"occupancy {occupancy:g} was requested, {reached:.3f} could be packed into "
            f"{shape} voxels of {voxel_size:g} Å: lower the occupancy or enlarge the field"
        )
        raise ValueError(msg)
    angles = Rotation.from_quat(np.array(quaternions)).as_euler("ZYZ", degrees=True)
    return Scene(np.array(kept, np.int64), np.array(positions), angles, reached)


def _draw_classes(
    beads: tuple[Beads, ...], volume: float, generator: np.random.Generator
) -> list[int]:
    """Class indices, largest first, whose volumes add up to about the request."""
    drawn: list[int] = []
    total = 0.0
    while True:
        index = int(generator.integers(len(beads)))
        # The last particle goes in with the probability that makes the expectation exact.
        missing = (volume - total) / beads[index].molecular_volume
        if missing < 1.0 and generator.random() > missing:
            break
        drawn.append(index)
        total += beads[index].molecular_volume
        if total >= volume:
            break
    return sorted(drawn, key=lambda index: -beads[index].molecular_volume)


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _uniform(state: NDArray[np.uint64]) -> float:
    """Uniform number in [0, 1): splitmix64 (Steele et al. 2014), the top 53 bits."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return float(z >> np.uint64(11)) / 9007199254740992.0


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _random_quaternion(state: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniform unit quaternion (x, y, z, w): Shoemake 1992."""
    u, v, w = _uniform(state), 2 * np.pi * _uniform(state), 2 * np.pi * _uniform(state)
    a, b = np.sqrt(1 - u), np.sqrt(u)
    return np.array([a * np.sin(v), a * np.cos(v), b * np.sin(w), b * np.cos(w)])


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _rotate_zyx(
    points: NDArray[np.float64], quaternion: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Points (z, y, x) turned by a quaternion that acts on x y z columns."""
    x, y, z, w = quaternion
    r00, r01, r02 = 1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)
    r10, r11, r12 = 2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)
    r20, r21, r22 = 2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)
    turned = np.empty_like(points)
    for i in range(points.shape[0]):
        pz, py, px = points[i, 0], points[i, 1], points[i, 2]
        turned[i, 2] = r00 * px + r01 * py + r02 * pz
        turned[i, 1] = r10 * px + r11 * py + r12 * pz
        turned[i, 0] = r20 * px + r21 * py + r22 * pz
    return turned


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _place_particle(
    positions: NDArray[np.float64],
    cell: NDArray[np.float64],
    taken: NDArray[np.bool_],
    state: NDArray[np.uint64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], bool]:
    """Centre (Å), quaternion and success of one particle; its cells are marked as taken."""
    depth, height, width = taken.shape
    centre = np.zeros(3)
    quaternion = np.zeros(4)
    for _ in range(ORIENTATIONS_PER_PARTICLE):
        quaternion = _random_quaternion(state)
        turned = _rotate_zyx(positions, quaternion)
        for i in range(turned.shape[0]):
            for axis in range(3):
                turned[i, axis] /= cell[axis]
        for _ in range(POSITIONS_PER_ORIENTATION):
            oz, oy, ox = (
                _uniform(state) * depth,
                _uniform(state) * height,
                _uniform(state) * width,
            )
            free = True
            for i in range(turned.shape[0]):
                # A bead's nearest cell; taken cells are the eight around each bead, so two
                # particles' beads stay more than half a cell apart along some axis.
                z = int(np.floor(turned[i, 0] + oz + 0.5)) % depth
                y = int(np.floor(turned[i, 1] + oy + 0.5)) % height
                x = int(np.floor(turned[i, 2] + ox + 0.5)) % width
                if taken[z, y, x]:
                    free = False
                    break
            if free:
                for i in range(turned.shape[0]):
                    z0 = int(np.floor(turned[i, 0] + oz))
                    y0 = int(np.floor(turned[i, 1] + oy))
                    x0 = int(np.floor(turned[i, 2] + ox))
                    for dz in range(2):
                        for dy in range(2):
                            for dx in range(2):
                                z, y, x = (z0 + dz) % depth, (y0 + dy) % height, (x0 + dx) % width
                                taken[z, y, x] = True
                centre[0], centre[1], centre[2] = oz * cell[0], oy * cell[1], ox * cell[2]
                return centre, quaternion, True
    return centre, quaternion, False

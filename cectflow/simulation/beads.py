"""Beads: a structure coarse-grained to weighted points, and their Gaussian density on a grid.

A complex of 50,000 atoms becomes about a thousand beads of 10 Å. Rotating and shifting beads is
exact, so no map is ever interpolated, and one set of beads serves density, labels and packing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, no_type_check

import numba
import numpy as np
from jaxtyping import Float, Int
from llvmlite import ir
from numba.extending import intrinsic
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cectflow.simulation.structure import Structure

__all__ = ["Beads", "coarse_grain", "label_threshold", "render_field", "rotate_beads"]

GAUSSIAN_REACH = 3.3
"""Half-width of a rendered bead in sigmas; what is cut off is renormalised, so mass is exact.

The 0.1 % of a Gaussian beyond it change the density by 0.2 % rms, the coarse-graining by 3 %."""
STEPS = 512
"""Places within a voxel to which a bead is rounded along each axis: 0.01 Å at 10 Å per voxel."""
LANES = 8
"""Voxels along x that are added to at once, the float32 of one vector register."""


@dataclass(frozen=True, eq=False)
class Beads:
    """Coarse grains of one structure.

    Attributes
    ----------
    name
        Of the structure.
    positions_zyx
        Å from the weighted centre; ordered farthest-first, so that any leading few span the shape.
    weights
        Scattering potential above vitreous ice, V Å³.
    variance
        Mean variance in Å² of the matter inside a bead along one axis. It is **added** to the
        variance of the blur: a bead stands for matter that is spread out.
    molecular_volume
        Å³ (1.21 Å³/Da).
    """

    name: str
    positions_zyx: Float[NDArray[np.float32], "n 3"]
    weights: Float[NDArray[np.float32], " n"]
    variance: float
    molecular_volume: float

    @cached_property
    def diameter(self) -> float:
        """Twice the largest distance of a bead from the centre, in Å."""
        return 2.0 * float(np.linalg.norm(self.positions_zyx, axis=1).max())


def coarse_grain(structure: Structure, *, spacing: float = 10.0) -> Beads:
    """Beads of a structure: its points binned to cubes, one bead at each cube's centre of weight.

    Parameters
    ----------
    structure
        Atoms, map voxels or a phantom's points.
    spacing
        Edge of the cubes in Å. 10 Å keeps the rms error of the density below 4 % at a blur of
        sigma 6.75 Å; 12.5 Å doubles it (notes/simulation.md).
    """
    cells = np.floor(structure.positions_zyx / spacing).astype(np.int64)
    _, owner = np.unique(cells, axis=0, return_inverse=True)
    owner = owner.reshape(-1)
    num_beads = int(owner.max()) + 1
    # A few atoms scatter less than the ice they displace; positive shares keep centres inside.
    shares = np.maximum(structure.weights.astype(np.float64), 1e-6)
    total = np.bincount(owner, shares, num_beads)
    centres = np.stack(
        [
            np.bincount(owner, shares * structure.positions_zyx[:, axis], num_beads) / total
            for axis in range(3)
        ],
        axis=1,
    )
    squares = ((structure.positions_zyx - centres[owner]) ** 2).sum(axis=1)
    variance = float((shares * squares).sum() / shares.sum() / 3.0) + structure.spread**2
    order = _farthest_first(centres)
    return Beads(
        name=structure.name,
        positions_zyx=centres[order].astype(np.float32),
        weights=np.bincount(owner, structure.weights, num_beads)[order].astype(np.float32),
        variance=variance,
        molecular_volume=structure.molecular_volume,
    )


def rotate_beads(
    beads: Beads, angles: Float[NDArray[np.float64], "3"]
) -> Float[NDArray[np.float64], "n 3"]:
    """Positions (z, y, x) in Å of the beads turned by RELION's ZYZ angles (rot, tilt, psi).

    The angles, in degrees, turn the reference into the particle: intrinsic ZYZ, acting on x y z
    columns.
    """
    turned: NDArray[np.float64] = beads.positions_zyx @ _matrices_zyx(angles[None])[0].T
    return turned


def render_field(
    beads: tuple[Beads, ...],
    class_ids: Int[NDArray[np.int64], " particle"],
    positions_zyx: Float[NDArray[np.float64], "particle 3"],
    angles: Float[NDArray[np.float64], "particle 3"],
    *,
    shape: tuple[int, int, int],
    voxel_size: float,
    sigma: float,
    thresholds: Float[NDArray[np.float64], " class"],
) -> tuple[Float[NDArray[np.float32], "z y x"], Int[NDArray[np.int32], "z y x"]]:
    """Density of a periodic field and the owner of each of its voxels.

    Parameters
    ----------
    beads
        Of each class.
    class_ids
        Of each particle, from 1.
    positions_zyx
        Particle centres in voxels.
    angles
        RELION ZYZ in degrees.
    shape
        Of the field in voxels.
    voxel_size
        In Å.
    sigma
        Of the blur in Å; each bead's own variance is added.
    thresholds
        Density of each class above which a voxel belongs to a particle.

    Returns
    -------
    density
        Potential above ice, V (bright protein), float32.
    owners
        0 background, else 1 + index of the particle; a contested voxel belongs to the particle
        that is denser there. Made from the particles' own densities, before any CTF.
    """
    density = np.zeros(shape, np.float32)
    strongest = np.zeros(shape, np.float32)
    owners = np.zeros(shape, np.int32)
    turns = _matrices_zyx(angles)
    for index, class_id in enumerate(class_ids.tolist()):
        local, corner, length = _render_pose(
            beads[class_id - 1], turns[index], positions_zyx[index], voxel_size, sigma
        )
        threshold = np.float32(thresholds[class_id - 1])
        owner = np.int32(index + 1)
        _place(local, corner, length, owner, threshold, density, strongest, owners)
    return density, owners


def label_threshold(
    beads: Beads, *, voxel_size: float, sigma: float, volume_factor: float, seed: int = 0
) -> float:
    """Density at which a particle's labelled volume is its molecular volume times a factor.

    Parameters
    ----------
    beads
        Of the structure.
    voxel_size, sigma
        Grid and blur in Å, as for :func:`render_field`.
    volume_factor
        Labelled volume over 1.21 Å³/Da times the mass; 1.5 includes the hydration shell.
    seed
        Of the orientations over which the threshold is averaged.
    """
    num_voxels = volume_factor * beads.molecular_volume / voxel_size**3
    generator = np.random.default_rng(seed)
    thresholds = []
    for turn in _matrices_zyx(Rotation.random(8, rng=generator).as_euler("ZYZ", degrees=True)):
        position = generator.uniform(-0.5, 0.5, 3)
        local, _, length = _render_pose(beads, turn, position, voxel_size, sigma)
        local = local[:, :, :length]
        rank = min(round(num_voxels), local.size - 1)
        thresholds.append(float(np.partition(local.ravel(), -rank - 1)[-rank - 1]))
    return max(float(np.mean(thresholds)), 1e-6)


def _farthest_first(points: NDArray[np.float64], leading: int = 32) -> NDArray[np.int64]:
    """Order in which each of the leading points is the farthest from those before it."""
    chosen = [int(np.argmax((points**2).sum(axis=1)))]
    nearest = ((points - points[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < min(leading, len(points)):
        chosen.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
    rest = np.setdiff1d(np.arange(len(points)), chosen)
    return np.concatenate([np.array(chosen, np.int64), rest])


def _matrices_zyx(
    angles: Float[NDArray[np.float64], "n 3"],
) -> Float[NDArray[np.float64], "n 3 3"]:
    """Matrices of RELION's ZYZ angles that act on z y x columns."""
    matrices = Rotation.from_euler("ZYZ", angles, degrees=True).as_matrix()
    return np.ascontiguousarray(matrices[:, ::-1, ::-1])


def _render_pose(
    beads: Beads,
    turn: NDArray[np.float64],
    position: NDArray[np.float64],
    voxel_size: float,
    sigma: float,
) -> tuple[Float[NDArray[np.float32], "z y x"], Int[NDArray[np.int64], "3"], int]:
    """Density of one particle, turned and placed: see :func:`_render_particle`."""
    sigma_voxels = float(np.sqrt(sigma**2 + beads.variance)) / voxel_size
    rows, width = _gaussian_rows(sigma_voxels)
    rendered: tuple[NDArray[np.float32], NDArray[np.int64], int] = _render_particle(
        beads.positions_zyx, beads.weights, turn, position, voxel_size, rows, width
    )
    return rendered


@lru_cache(maxsize=256)
def _gaussian_rows(sigma: float) -> tuple[Float[NDArray[np.float32], "step lane"], int]:
    """Gaussians of unit sum at each step of a voxel, and how many of their lanes are not 0.

    A bead at c has the voxels from ceil(c - width / 2) on; a step is the distance of the first
    of them from c - width / 2.
    """
    width = int(np.ceil(2 * GAUSSIAN_REACH * sigma))
    steps = (np.arange(STEPS) + 0.5) / STEPS
    distances = steps[:, None] + np.arange(width) - width / 2
    gaussians = np.exp(-0.5 * (distances / sigma) ** 2)
    rows = np.zeros((STEPS, -(-width // LANES) * LANES), np.float32)
    rows[:, :width] = gaussians / gaussians.sum(axis=1, keepdims=True)
    return rows, width


@intrinsic
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _add_lanes(typing_context, target, place, row, lane, factor):
    """``target[place + i] += factor * row[lane + i]`` for ``LANES`` values of flat float32 arrays.

    As one vector: numba unrolls so short a loop into single numbers, which takes twice as long.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), LANES)
        pointers = []
        for array, index in ((0, 1), (2, 3)):
            struct = context.make_array(signature.args[array])
            data = struct(context, builder, arguments[array]).data
            first = builder.gep(data, [arguments[index]])
            pointers.append(builder.bitcast(first, vector.as_pointer()))
        undefined = ir.Constant(vector, ir.Undefined)
        integer = ir.IntType(32)
        single = builder.insert_element(undefined, arguments[4], ir.Constant(integer, 0))
        nowhere = ir.Constant(ir.VectorType(integer, LANES), [0] * LANES)
        factors = builder.shuffle_vector(single, undefined, nowhere)
        old, added = (builder.load(pointer, align=4) for pointer in pointers)
        total = builder.fadd(old, builder.fmul(factors, added))
        builder.store(total, pointers[0], align=4)
        return context.get_dummy_value()

    return numba.void(target, place, row, lane, factor), generate


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _render_particle(
    positions: NDArray[np.float32],
    weights: NDArray[np.float32],
    turn: NDArray[np.float64],
    position: NDArray[np.float64],
    voxel_size: float,
    gaussians: NDArray[np.float32],
    width: int,
) -> tuple[NDArray[np.float32], NDArray[np.int64], int]:
    """Density in a box that holds one particle, the box's corner, and its length along x.

    Beyond that length the rows have room for the lanes that are 0.
    """
    starts = np.empty((3, positions.shape[0]))
    corner = np.empty(3, np.int64)
    edges = np.empty(3, np.int64)
    for axis in range(3):
        to_z, to_y, to_x = turn[axis] / voxel_size
        origin = position[axis] - 0.5 * width
        lowest, highest = np.inf, -np.inf
        for bead in range(positions.shape[0]):
            z, y, x = positions[bead, 0], positions[bead, 1], positions[bead, 2]
            start = origin + to_z * z + to_y * y + to_x * x
            lowest, highest = min(lowest, start), max(highest, start)
            starts[axis, bead] = start
        corner[axis] = int(np.ceil(lowest))
        edges[axis] = int(np.ceil(highest)) + width - corner[axis]
    num_lanes = gaussians.shape[1]
    pitch = edges[2] + num_lanes - width
    local = np.zeros((edges[0], edges[1], pitch), np.float32)
    flat, rows = local.ravel(), gaussians.ravel()
    scale = np.float32(1.0 / voxel_size**3)
    for bead in range(positions.shape[0]):
        z, y, x = np.ceil(starts[0, bead]), np.ceil(starts[1, bead]), np.ceil(starts[2, bead])
        # Rounding can make a step of exactly 1.
        along_z = min(int((z - starts[0, bead]) * STEPS), STEPS - 1)
        along_y = min(int((y - starts[1, bead]) * STEPS), STEPS - 1)
        along_x = min(int((x - starts[2, bead]) * STEPS), STEPS - 1) * num_lanes
        plane = ((int(z) - corner[0]) * edges[1] + int(y) - corner[1]) * pitch + int(x) - corner[2]
        weight = weights[bead] * scale
        for i in range(width):
            weight_z = weight * gaussians[along_z, i]
            for j in range(width):
                place = plane + (i * edges[1] + j) * pitch
                weight_zy = weight_z * gaussians[along_y, j]
                for lane in range(0, num_lanes, LANES):
                    _add_lanes(flat, place + lane, rows, along_x + lane, weight_zy)
    return local, corner, edges[2]


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _place(
    local: NDArray[np.float32],
    corner: NDArray[np.int64],
    length: int,
    owner: int,
    threshold: float,
    density: NDArray[np.float32],
    strongest: NDArray[np.float32],
    owners: NDArray[np.int32],
) -> None:
    """Add a particle to the periodic field; claim the voxels where it is dense, and densest."""
    depth, height, width = density.shape
    for i in range(local.shape[0]):
        z = (corner[0] + i) % depth
        for j in range(local.shape[1]):
            y = (corner[1] + j) % height
            x, first = corner[2] % width, 0
            while first < length:  # stretches between the faces of the field
                stop = min(length, first + width - x)
                row = local[i, j, first:stop]
                total = density[z, y, x : x + stop - first]
                highest = strongest[z, y, x : x + stop - first]
                owned = owners[z, y, x : x + stop - first]
                dense = 0
                for k in range(row.size):
                    total[k] += row[k]
                    dense += row[k] > threshold
                if dense:
                    for k in range(row.size):
                        if row[k] > threshold and row[k] > highest[k]:
                            highest[k] = row[k]
                            owned[k] = owner
                first, x = stop, 0

"""Beads: a structure coarse-grained to weighted points, and their Gaussian density on a grid.

A complex of 50,000 atoms becomes about a thousand beads of 10 Å. Rotating and shifting beads is
exact, so no map is ever interpolated, and one set of beads serves density, labels and packing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import numba
import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cectflow.simulation.structure import Structure

__all__ = ["Beads", "coarse_grain", "label_threshold", "render_field", "rotate_beads"]

GAUSSIAN_REACH = 3.5
"""Half-width of a rendered bead in sigmas; what is cut off is renormalised, so mass is exact."""


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

    @property
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
    turn = Rotation.from_euler("ZYZ", angles, degrees=True)
    turned: NDArray[np.float64] = turn.apply(beads.positions_zyx[:, ::-1])[:, ::-1]
    return np.ascontiguousarray(turned)


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
    for index, (class_id, position) in enumerate(zip(class_ids, positions_zyx, strict=True)):
        grains = beads[class_id - 1]
        centres = rotate_beads(grains, angles[index]) / voxel_size + position
        sigma_voxels = float(np.sqrt(sigma**2 + grains.variance)) / voxel_size
        local, corner = _render_particle(
            centres, grains.weights / np.float32(voxel_size**3), sigma_voxels
        )
        _place(local, corner, index + 1, thresholds[class_id - 1], density, strongest, owners)
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
    sigma_voxels = float(np.sqrt(sigma**2 + beads.variance)) / voxel_size
    generator = np.random.default_rng(seed)
    thresholds = []
    for angles in Rotation.random(8, rng=generator).as_euler("ZYZ", degrees=True):
        centres = rotate_beads(beads, angles) / voxel_size + generator.uniform(-0.5, 0.5, 3)
        local, _ = _render_particle(
            centres, beads.weights / np.float32(voxel_size**3), sigma_voxels
        )
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


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _gaussian_row(centre: float, first: int, sigma: float, row: NDArray[np.float64]) -> None:
    total = 0.0
    for i in range(row.size):
        row[i] = np.exp(-0.5 * ((first + i - centre) / sigma) ** 2)
        total += row[i]
    for i in range(row.size):
        row[i] /= total


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _render_particle(
    centres: NDArray[np.float64], weights: NDArray[np.float32], sigma: float
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Density of one particle in the smallest box that holds it, and that box's corner."""
    reach = int(np.ceil(GAUSSIAN_REACH * sigma))
    corner = np.empty(3, np.int64)
    edges = np.empty(3, np.int64)
    for axis in range(3):
        corner[axis] = int(np.floor(centres[:, axis].min() + 0.5)) - reach
        edges[axis] = int(np.floor(centres[:, axis].max() + 0.5)) + reach + 1 - corner[axis]
    local = np.zeros((edges[0], edges[1], edges[2]), np.float32)
    width = 2 * reach + 1
    rows = np.empty((3, width))
    for bead in range(centres.shape[0]):
        first = np.empty(3, np.int64)
        for axis in range(3):
            first[axis] = int(np.floor(centres[bead, axis] + 0.5)) - reach
            _gaussian_row(centres[bead, axis], first[axis], sigma, rows[axis])
        z0, y0, x0 = first[0] - corner[0], first[1] - corner[1], first[2] - corner[2]
        for i in range(width):
            along_z = weights[bead] * rows[0, i]
            for j in range(width):
                along_zy = along_z * rows[1, j]
                for k in range(width):
                    local[z0 + i, y0 + j, x0 + k] += np.float32(along_zy * rows[2, k])
    return local, corner


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _place(
    local: NDArray[np.float32],
    corner: NDArray[np.int64],
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
            for k in range(local.shape[2]):
                x = (corner[2] + k) % width
                value = local[i, j, k]
                density[z, y, x] += value
                if value > threshold and value > strongest[z, y, x]:
                    strongest[z, y, x] = value
                    owners[z, y, x] = owner

"""Scene: particles packed without overlap in a periodic field, the ground truth of a simulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import numba
import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from cectflow.simulation.beads import Beads
from cectflow.simulation.distractors import Distractor, Distractors, draw_distractors

__all__ = ["Scene", "pack_scene"]

CELL = 10.0
"""Edge in Å, rounded so that cells fill the field, of the cells in which overlap is looked up.

The beads of two particles stay more than half a cell apart along at least one axis."""
POSITIONS_PER_ORIENTATION = 128
RANDOM_ORIENTATIONS = 8
"""Orientations that are tried at random positions; cheap while the field is sparse."""
SEARCHED_ORIENTATIONS = 200
"""Orientations that are then tried at every cell of the field."""
SHORTFALL = 0.8
"""Fraction of the drawn particles' volume below which a scene is refused as too crowded."""

NO_DISTRACTORS = Distractors()


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
    distractors
        What else the field holds.
    """

    class_ids: Int[NDArray[np.int64], " particle"]
    positions_zyx: Float[NDArray[np.float64], "particle 3"]
    angles: Float[NDArray[np.float64], "particle 3"]
    occupancy: float
    distractors: tuple[Distractor, ...] = ()

    def __len__(self) -> int:
        return len(self.class_ids)


def pack_scene(
    beads: tuple[Beads, ...],
    *,
    shape: tuple[int, int, int],
    voxel_size: float,
    occupancy: float,
    generator: np.random.Generator,
    abundances: Float[NDArray[np.float64], " class"] | None = None,
    keep_out: float = 0.0,
    distractors: Distractors = NO_DISTRACTORS,
    target_offset: Float[NDArray[np.float64], "3"] | None = None,
) -> Scene:
    """Scene of randomly placed and turned particles that fill a fraction of a periodic field.

    Classes are drawn until their molecular volume reaches the request; the largest particles are
    placed first. Each is tried at random positions and orientations against the cells that are
    taken: a few far-apart beads reject most trials, all beads decide. Where that finds no place,
    further orientations are tried at every cell of the field.

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
    abundances
        Relative numbers of particles of each class; None: equal.
    keep_out
        Distance in Å that is left free between particles, and between them and distractors,
        beyond the half cell that two particles' beads stay apart in any case.
    distractors
        Placed before the particles, which leave them free.
    target_offset
        Of a target from the field's centre in voxels (z, y, x). With it the first particle of the
        scene is placed there before all else, in a random orientation; None: no such particle.

    Raises
    ------
    ValueError
        If a structure is larger than the field or has more volume than the occupancy stands for,
        or if less than 80 % of the volume drawn could be placed; the message says what was.
    """
    edges = np.array(shape) * voxel_size
    field_volume = float(edges.prod())
    shares = np.ones(len(beads)) if abundances is None else abundances
    for grains, share in zip(beads, shares, strict=True):
        if share == 0:
            continue
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
    drawn = _draw_classes(beads, shares, occupancy * field_volume, generator)
    cells = np.maximum(np.round(edges / CELL), 1).astype(np.int64)
    cell = edges / cells
    taken = np.zeros(tuple(cells), np.bool_)
    bits: NDArray[np.uint64] | None = None
    state = np.array([generator.integers(1, 2**63 - 1)], np.uint64)
    kept, positions, quaternions, volume = [], [], [], 0.0
    if target_offset is not None:
        target = drawn.pop(0)
        quaternion = _random_quaternion(state)
        centre = np.mod((np.array(shape) // 2 + target_offset) * voxel_size, edges) / cell
        turned = _turn_into_cells(beads[target].positions_zyx, quaternion, cell)
        _take_cells(turned, centre, cell, keep_out, taken)
        kept.append(target + 1)
        positions.append(centre * cell / voxel_size)
        quaternions.append(quaternion)
        volume += beads[target].molecular_volume
    placed_distractors = draw_distractors(
        distractors, taken, cell, keep_out=keep_out, generator=generator
    )
    full: set[int] = set()
    for class_index in sorted(drawn, key=lambda index: -beads[index].molecular_volume):
        if class_index in full:
            continue
        points = beads[class_index].positions_zyx
        placed, centre, quaternion, turned = _place_at_random(points, cell, taken, state)
        if not placed:
            if bits is None:
                bits = _pack_bits(taken)
            placed, centre, quaternion, turned = _place_by_search(
                points, cell, bits, taken.shape[2], state
            )
        if not placed:
            full.add(class_index)
            continue
        _take_cells(turned, centre, cell, keep_out, taken)
        if bits is not None:
            _update_bits(turned, centre, int(np.ceil(keep_out / cell.min())), taken, bits)
        kept.append(class_index + 1)
        positions.append(centre * cell / voxel_size)
        quaternions.append(quaternion)
        volume += beads[class_index].molecular_volume
    reached = volume / field_volume
    # Against what was drawn: that falls short of the request by up to one particle by itself.
    drawn_volume = sum(beads[index].molecular_volume for index in drawn)
    if target_offset is not None:
        drawn_volume += beads[kept[0] - 1].molecular_volume
    if volume < SHORTFALL * drawn_volume:
        msg = (
            f"occupancy {occupancy:g} was requested, {reached:.3f} could be packed into "
            f"{shape} voxels of {voxel_size:g} Å: lower the occupancy"
            f"{', the keep-out distance' if keep_out else ''}"
            f"{' or the number of distractors' if placed_distractors else ''}"
            f" or enlarge the field"
        )
        raise ValueError(msg)
    angles = Rotation.from_quat(np.array(quaternions)).as_euler("ZYZ", degrees=True)
    return Scene(np.array(kept, np.int64), np.array(positions), angles, reached, placed_distractors)


def _draw_classes(
    beads: tuple[Beads, ...],
    abundances: NDArray[np.float64],
    volume: float,
    generator: np.random.Generator,
) -> list[int]:
    """Class indices whose volumes add up to the request on average, in the order of the draw."""
    limits = np.cumsum(abundances / abundances.sum())
    drawn: list[int] = []
    total = 0.0
    while True:
        index = int(np.searchsorted(limits, generator.random() * limits[-1], side="right"))
        # The last particle goes in with the probability that makes the expectation exact.
        missing = (volume - total) / beads[index].molecular_volume
        if missing < 1.0 and generator.random() > missing:
            return drawn
        drawn.append(index)
        total += beads[index].molecular_volume
        if total >= volume:
            return drawn


def _pack_bits(taken: Bool[NDArray[np.bool_], "z y x"]) -> NDArray[np.uint64]:
    """Rows along x as words (z, word, y), continued so that 64 bits can be read from any cell."""
    width = taken.shape[2]
    words = (width + 127) // 64
    copies = -(-words * 64 // width)
    continued = np.concatenate([taken] * copies, axis=2)[:, :, : words * 64]
    packed = np.packbits(continued, axis=2, bitorder="little").view("<u8").astype(np.uint64)
    return np.ascontiguousarray(packed.transpose(0, 2, 1))


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
def _turn_into_cells(
    positions: NDArray[np.float32], quaternion: NDArray[np.float64], cell: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Positions turned and measured in cells."""
    turned = _rotate_zyx(positions.astype(np.float64), quaternion)
    for i in range(turned.shape[0]):
        for axis in range(3):
            turned[i, axis] /= cell[axis]
    return turned


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _wrap(index: int, number: int) -> int:
    """Index in a periodic row, of one that is outside by less than a period."""
    if index < 0:
        return index + number
    return index - number if index >= number else index


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _take_cells(
    turned: NDArray[np.float64],
    centre: NDArray[np.float64],
    cell: NDArray[np.float64],
    keep_out: float,
    taken: NDArray[np.bool_],
) -> None:
    """Mark the cells about each bead u: those c where |c - u| < 1 along every axis.

    With a keep-out distance, those from which that cube is nearer than it.
    """
    depth, height, width = taken.shape
    if keep_out == 0:  # the general case below, some times faster
        for i in range(turned.shape[0]):
            z0 = _wrap(int(np.floor(turned[i, 0] + centre[0])), depth)
            y0 = _wrap(int(np.floor(turned[i, 1] + centre[1])), height)
            x0 = _wrap(int(np.floor(turned[i, 2] + centre[2])), width)
            z1, y1, x1 = _wrap(z0 + 1, depth), _wrap(y0 + 1, height), _wrap(x0 + 1, width)
            taken[z0, y0, x0] = taken[z0, y0, x1] = True
            taken[z0, y1, x0] = taken[z0, y1, x1] = True
            taken[z1, y0, x0] = taken[z1, y0, x1] = True
            taken[z1, y1, x0] = taken[z1, y1, x1] = True
        return
    reach_z, reach_y = 1 + keep_out / cell[0], 1 + keep_out / cell[1]
    for i in range(turned.shape[0]):
        uz, uy, ux = turned[i, 0] + centre[0], turned[i, 1] + centre[1], turned[i, 2] + centre[2]
        for cz in range(int(np.floor(uz - reach_z)) + 1, int(np.ceil(uz + reach_z))):
            away_z = max(abs(cz - uz) - 1, 0.0) * cell[0]
            z = _wrap(cz, depth)
            for cy in range(int(np.floor(uy - reach_y)) + 1, int(np.ceil(uy + reach_y))):
                away_y = max(abs(cy - uy) - 1, 0.0) * cell[1]
                left = keep_out * keep_out - away_z * away_z - away_y * away_y
                if left < 0:
                    continue
                reach_x = 1 + np.sqrt(left) / cell[2]
                y = _wrap(cy, height)
                for cx in range(int(np.floor(ux - reach_x)) + 1, int(np.ceil(ux + reach_x))):
                    taken[z, y, _wrap(cx, width)] = True


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _fits(
    turned: NDArray[np.float64],
    centre: NDArray[np.float64],
    taken: NDArray[np.bool_],
) -> bool:
    """Whether the cell nearest to each bead is free."""
    depth, height, width = taken.shape
    for i in range(turned.shape[0]):
        z = _wrap(int(np.floor(turned[i, 0] + centre[0] + 0.5)), depth)
        y = _wrap(int(np.floor(turned[i, 1] + centre[1] + 0.5)), height)
        x = _wrap(int(np.floor(turned[i, 2] + centre[2] + 0.5)), width)
        if taken[z, y, x]:
            return False
    return True


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _update_bits(
    turned: NDArray[np.float64],
    centre: NDArray[np.float64],
    margin: int,
    taken: NDArray[np.bool_],
    bits: NDArray[np.uint64],
) -> None:
    """Bits of the rows in which a particle, and a margin of cells about it, takes cells."""
    depth, height, width = taken.shape
    lowest_z = int(np.floor(turned[:, 0].min() + centre[0])) - margin
    lowest_y = int(np.floor(turned[:, 1].min() + centre[1])) - margin
    highest_z = int(np.floor(turned[:, 0].max() + centre[0])) + 1 + margin
    highest_y = int(np.floor(turned[:, 1].max() + centre[1])) + 1 + margin
    for row_z in range(lowest_z, min(highest_z + 1, lowest_z + depth)):
        z = row_z % depth
        for row_y in range(lowest_y, min(highest_y + 1, lowest_y + height)):
            y, x = row_y % height, 0
            for word in range(bits.shape[1]):
                packed = np.uint64(0)
                for bit in range(64):
                    packed |= np.uint64(taken[z, y, x]) << np.uint64(bit)
                    x = x + 1 if x + 1 < width else 0
                bits[z, word, y] = packed


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _search_everywhere(
    turned: NDArray[np.float64],
    centre: NDArray[np.float64],
    bits: NDArray[np.uint64],
    width: int,
    state: NDArray[np.uint64],
) -> bool:
    """Whether an orientation fits anywhere on a randomly shifted grid of cells; sets the centre.

    Planes of the field are tried from a random one on, all places of a plane at once, as the bits
    of words; one of those that are left is chosen at random.
    """
    depth, _, height = bits.shape
    shift = np.array([_uniform(state), _uniform(state), _uniform(state)])
    nearest = np.empty(turned.shape, np.int64)
    for i in range(turned.shape[0]):
        nearest[i, 0] = int(np.floor(turned[i, 0] + shift[0] + 0.5)) % depth
        nearest[i, 1] = int(np.floor(turned[i, 1] + shift[1] + 0.5)) % height
        nearest[i, 2] = int(np.floor(turned[i, 2] + shift[2] + 0.5)) % width
    blocks = (width + 63) // 64
    free = np.empty((blocks, height), np.uint64)
    first = int(_uniform(state) * depth)
    for step in range(depth):
        z0 = (first + step) % depth
        free[:] = ~np.uint64(0)
        if width % 64:
            free[blocks - 1] = (np.uint64(1) << np.uint64(width % 64)) - np.uint64(1)
        left = np.uint64(1)
        for i in range(nearest.shape[0]):
            z, dy = _wrap(z0 + nearest[i, 0], depth), nearest[i, 1]
            left = np.uint64(0)
            for block in range(blocks):
                x = _wrap(block * 64 + nearest[i, 2], width)
                word, bit = x >> 6, np.uint64(x & 63)
                row, low, high = free[block], bits[z, word], bits[z, word + 1]
                left |= _strike(row[: height - dy], low[dy:], high[dy:], bit)
                left |= _strike(row[height - dy :], low[:dy], high[:dy], bit)
            if left == 0:
                break
        if left:
            _choose_place(free, centre, state)
            centre[0] = z0
            centre += shift
            return True
    return False


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _strike(
    free: NDArray[np.uint64], low: NDArray[np.uint64], high: NDArray[np.uint64], bit: np.uint64
) -> np.uint64:
    """Clear in each row what is taken in the 64 cells from a bit on; what is left of any row."""
    left = np.uint64(0)
    rest = np.uint64(63) - bit  # shifts of 64 bits are undefined
    for y in range(free.shape[0]):
        free[y] &= ~((low[y] >> bit) | ((high[y] << np.uint64(1)) << rest))
        left |= free[y]
    return left


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _choose_place(
    free: NDArray[np.uint64], centre: NDArray[np.float64], state: NDArray[np.uint64]
) -> None:
    """Set y and x of the centre to one of the bits that are set, each with equal probability."""
    seen = 0
    for block in range(free.shape[0]):
        for y in range(free.shape[1]):
            if free[block, y] == 0:
                continue
            for bit in range(64):
                if (free[block, y] >> np.uint64(bit)) & np.uint64(1):
                    seen += 1
                    if _uniform(state) * seen < 1:  # keeps each of n with probability 1/n
                        centre[1], centre[2] = y, block * 64 + bit


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _place_at_random(
    positions: NDArray[np.float32],
    cell: NDArray[np.float64],
    taken: NDArray[np.bool_],
    state: NDArray[np.uint64],
) -> tuple[bool, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Whether a place was found; its centre in cells, the quaternion and the turned beads."""
    depth, height, width = taken.shape
    centre, quaternion, turned = np.zeros(3), np.zeros(4), np.zeros((0, 3))
    for _ in range(RANDOM_ORIENTATIONS):
        quaternion = _random_quaternion(state)
        turned = _turn_into_cells(positions, quaternion, cell)
        for _ in range(POSITIONS_PER_ORIENTATION):
            centre[0] = _uniform(state) * depth
            centre[1] = _uniform(state) * height
            centre[2] = _uniform(state) * width
            if _fits(turned, centre, taken):
                return True, centre, quaternion, turned
    return False, centre, quaternion, turned


@numba.njit(cache=True)
@no_type_check  # pytest's jaxtyping hook would wrap what numba has to compile
def _place_by_search(
    positions: NDArray[np.float32],
    cell: NDArray[np.float64],
    bits: NDArray[np.uint64],
    width: int,
    state: NDArray[np.uint64],
) -> tuple[bool, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """As :func:`_place_at_random`, but every cell of the field is tried."""
    centre, quaternion, turned = np.zeros(3), np.zeros(4), np.zeros((0, 3))
    for _ in range(SEARCHED_ORIENTATIONS):
        quaternion = _random_quaternion(state)
        turned = _turn_into_cells(positions, quaternion, cell)
        if _search_everywhere(turned, centre, bits, width, state):
            return True, centre, quaternion, turned
    return False, centre, quaternion, turned

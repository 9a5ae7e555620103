"""From probabilities to particles: bodies told apart, measured and turned into picks.

Foreground voxels are flooded from the thickest places downwards (a watershed of the distance to
the background). Where two bodies meet they become one if the neck between them is nearly as thick
as the thinner of the two, and stay two otherwise. Each body is measured by the block of the volume
that holds its thickest voxel, so memory does not grow with the tomogram.

scipy's ``watershed_ift`` takes differences of neighbouring values for its costs, under which a
distance map, whose neighbours all differ by about one voxel, has no valleys; hence our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, no_type_check

import numba
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage
from scipy.spatial import cKDTree

from cectflow.config import Config
from cectflow.particles import ParticleTable, make_particle_rows, particles_from
from cectflow.progress import track
from cectflow.star import refuse_unwritable

__all__ = ["Bodies", "PickRules", "check_pick_name", "find_bodies", "make_picks", "suppress"]

SMOOTHING = 1.0
"""Sigma in voxels of the Gaussian over the distance to the background."""
CORE = 128
"""Edge in voxels of the blocks that bodies are looked for in."""
SCORE_DECIMALS = 6
REACH = 250.0
"""Å around a block that are flooded with it: what of a body is farther from its thickest voxel may
be left out of its measures."""


class PickRules(Config):
    """When foreground is a particle."""

    probability: float = Field(default=0.5, gt=0, lt=1)
    """Above which a voxel is foreground."""
    min_volume: float = Field(default=50_000.0, ge=0)
    """Å³ of the smallest body; the default is 41 kDa at 1.21 Å³/Da."""
    max_volume: float | None = Field(default=None, gt=0)
    """Å³ of the largest; None: any."""
    radius: float = Field(default=60.0, ge=0)
    """Å: no two picks are closer (non-maximum suppression, the higher score stays). The default is
    the diameter of a sphere of 93 kDa at 1.21 Å³/Da."""
    neck: float = Field(default=0.75, gt=0, le=1)
    """Thickness of the neck between two bodies, over that of the thinner one, from which on they
    are one. Of two equal spheres it is 0 at contact and 0.75 where they share a third of their
    diameter."""
    min_score: float | None = Field(default=None, ge=0, le=1)
    """Of the worst pick that is kept; None: the network's own, of its validation, or else 0."""


@dataclass(frozen=True, eq=False)
class Bodies:
    """Connected pieces of foreground, told apart.

    Attributes
    ----------
    centres_zyx
        In voxels, weighted by probability.
    voxels
        Number of foreground voxels.
    scores
        Mean probability of the foreground, times the share of the most frequent label.
    labels
        Most frequent label, from 1.
    """

    centres_zyx: Float[NDArray[np.float64], "body 3"]
    voxels: Int[NDArray[np.int64], " body"]
    scores: Float[NDArray[np.float64], " body"]
    labels: Int[NDArray[np.int64], " body"]

    def __len__(self) -> int:
        return len(self.voxels)

    def select(self, keep: Shaped[NDArray[Any], " chosen"]) -> Bodies:
        """Bodies by mask or by index."""
        return Bodies(
            self.centres_zyx[keep], self.voxels[keep], self.scores[keep], self.labels[keep]
        )


def find_bodies(
    probabilities: Float[NDArray[np.float32], "z y x"],
    labels: Shaped[NDArray[Any], "z y x"],
    num_labels: int,
    voxel_size: float,
    rules: PickRules,
    *,
    core: int = CORE,
) -> Bodies:
    """Bodies that keep the rules, the highest score first.

    Parameters
    ----------
    probabilities
        Of the foreground; may be memory-mapped.
    labels
        Label of every voxel if it is foreground, from 1; may be memory-mapped.
    num_labels
        Highest label.
    voxel_size
        In Å.
    rules
        When foreground is a particle.
    core
        Edge of a block in voxels; the result does not depend on it as long as bodies, with
        those that they touch, reach less than 250 Å from their thickest voxels.
    """
    margin = int(np.ceil(REACH / voxel_size))
    shape = probabilities.shape
    corners = list(product(*(range(0, length, core) for length in shape)))
    found: list[NDArray[np.float64]] = [np.zeros((0, 5 + num_labels))]
    for corner in track(corners, total=len(corners), title="finding particles"):
        low = [max(0, start - margin) for start in corner]
        high = [
            min(length, start + core + margin) for start, length in zip(corner, shape, strict=True)
        ]
        block = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        owned = tuple(
            slice(start - a, start - a + core) for start, a in zip(corner, low, strict=True)
        )
        inside = np.asarray(probabilities[block], np.float32)
        measured = _measure(inside, np.asarray(labels[block]), num_labels, rules, owned)
        measured[:, 1:4] += low
        found.append(measured)
    return _judged(np.concatenate(found), voxel_size, rules)


def suppress(
    positions: Float[NDArray[np.float64], "n 3"],
    scores: Float[NDArray[np.float64], " n"],
    radius: float,
) -> Int[NDArray[np.int64], " kept"]:
    """Rows that stay when of any two closer than a radius only the higher score does.

    Parameters
    ----------
    positions
        In the unit of the radius.
    scores
        Of equal ones the earlier row stays.
    radius
        0 keeps all.

    Returns
    -------
    NDArray
        Indices, the highest score first.
    """
    order = np.argsort(-scores, kind="stable")
    if radius <= 0 or len(order) < 2:
        return order.astype(np.int64)
    tree = cKDTree(positions)
    alive = np.ones(len(order), bool)
    kept = []
    for row in order.tolist():
        if alive[row]:
            kept.append(row)
            alive[tree.query_ball_point(positions[row], np.nextafter(radius, 0.0))] = False
    return np.array(kept, np.int64)


def make_picks(
    bodies: Bodies,
    positions_zyx: Float[NDArray[np.float64], "body 3"],
    names: tuple[str, ...],
    *,
    tomogram: str,
    voxel_size: float,
    volumes: Float[NDArray[np.float64], " body"],
    model: str,
) -> ParticleTable:
    """STAR table of bodies.

    ``rlnCoordinateX/Y/Z`` count voxels of the tomogram from 0, as in RELION 3, and ``rlnPixelSize``
    states their size; the score is in ``cectflowScore`` and ``rlnAutopickFigureOfMerit``.
    ``cectflowModel`` and the classes are those of the last prediction: where a classifier follows
    they become its own, and ``cectflowPickModel`` stays.

    Parameters
    ----------
    bodies
        One row each.
    positions_zyx
        Centres in voxels of the tomogram.
    names
        Of the labels, from 1.
    tomogram
        Written as ``rlnTomoName``.
    voxel_size
        Of the tomogram, in Å.
    volumes
        Of the bodies, in Å³.
    model
        Who found them.
    """
    rows = make_particle_rows(positions_zyx, tomogram=tomogram)
    scores = bodies.scores.round(SCORE_DECIMALS)
    columns: dict[str, Any] = {
        "rlnPixelSize": np.full(len(bodies), voxel_size),
        "rlnAutopickFigureOfMerit": scores,
        "rlnClassNumber": bodies.labels,
        "cectflowClassName": pd.array([names[i - 1] for i in bodies.labels], dtype="str"),
        "cectflowClassNumber": bodies.labels,
        "cectflowScore": scores,
        "cectflowVolume": volumes.round(1),
        "cectflowModel": pd.array([model] * len(bodies), dtype="str"),
        "cectflowPickModel": pd.array([model] * len(bodies), dtype="str"),
    }
    return particles_from(rows.assign(**columns))


def check_pick_name(tomogram: str, picks: Path | None) -> None:
    """Refuse the name of a tomogram that a STAR file of picks would not give back.

    Raises
    ------
    ValueError
        With the remedy.
    """
    if picks is None or picks.suffix != ".star":
        return
    try:
        refuse_unwritable({"particles": pd.DataFrame({"rlnTomoName": [tomogram]})})
    except ValueError as error:
        msg = (
            f"the tomogram's name {tomogram!r} cannot be written into {picks}: {error}; name it "
            "otherwise by a path with {name}, or give --picks a name in .csv"
        )
        raise ValueError(msg) from None


def _judged(measured: NDArray[np.float64], voxel_size: float, rules: PickRules) -> Bodies:
    """Bodies of the blocks' sums that keep the rules, the highest score first."""
    voxels, mass, votes = measured[:, 0], measured[:, 4], measured[:, 5:]
    best = votes.argmax(axis=1) if len(votes) else np.zeros(0, np.int64)
    share = np.take_along_axis(votes, best[:, None], axis=1)[:, 0] / np.maximum(voxels, 1)
    bodies = Bodies(
        measured[:, 1:4].copy(), voxels.astype(np.int64),
        mass / np.maximum(voxels, 1) * share, best.astype(np.int64) + 1,
    )  # fmt: skip
    volumes = bodies.voxels * voxel_size**3
    largest = np.inf if rules.max_volume is None else rules.max_volume
    is_particle = (volumes >= rules.min_volume) & (volumes <= largest)
    # As they are written, or a threshold taken from picks would drop the very pick it came from.
    scores = bodies.scores.round(SCORE_DECIMALS)
    bodies = bodies.select(is_particle & (scores >= (rules.min_score or 0.0)))
    # Ties in the score fall to the place, so that the order of the blocks does not show.
    bodies = bodies.select(np.lexsort(bodies.centres_zyx.T[::-1]))
    return bodies.select(suppress(bodies.centres_zyx * voxel_size, bodies.scores, rules.radius))


def _measure(
    probabilities: Float[NDArray[np.float32], "z y x"],
    labels: Shaped[NDArray[Any], "z y x"],
    num_labels: int,
    rules: PickRules,
    owned: tuple[slice, ...],
) -> Float[NDArray[np.float64], "body columns"]:
    """Sums over the bodies of a block whose thickest voxel is in its core.

    Columns: voxels; centre (z, y, x); sum of probabilities; voxels of each label.
    """
    empty = np.zeros((0, 5 + num_labels))
    foreground = probabilities > rules.probability
    if not foreground.any():
        return empty
    depth = ndimage.distance_transform_edt(_without_holes(foreground)).astype(np.float32)
    # Smoothing gives plateaus and ridges of the distance a single top.
    depth = ndimage.gaussian_filter(depth, SMOOTHING, truncate=2.0)
    depth[~foreground] = 0.0
    places = np.flatnonzero(depth)
    order = places[np.argsort(-depth.ravel()[places], kind="stable")]
    owner = np.full(depth.shape, -1, np.int32)
    tops = _flood(depth, order, owner, rules.neck)
    bodies = owner[foreground]
    top_places = np.stack(np.unravel_index(order[tops], depth.shape), axis=1)
    low, high = ([getattr(part, end) for part in owned] for end in ("start", "stop"))
    is_owned = np.asarray(((top_places >= low) & (top_places < high)).all(axis=1))
    numbers = np.unique(bodies)
    numbers = numbers[is_owned[numbers]]
    if not len(numbers):
        return empty
    weights = probabilities[foreground].astype(np.float64)
    size = len(tops)
    counts = np.bincount(bodies, minlength=size)
    mass = np.bincount(bodies, weights, size)
    centres = [
        np.bincount(bodies, weights * along, size) / np.maximum(mass, 1e-30)
        for along in np.nonzero(foreground)
    ]
    given = labels[foreground].astype(np.int64)
    votes = [np.bincount(bodies[given == i], minlength=size) for i in range(1, num_labels + 1)]
    return np.asarray(np.stack([counts, *centres, mass, *votes], axis=1)[numbers], np.float64)


def _without_holes(mask: Bool[NDArray[np.bool_], "z y x"]) -> Bool[NDArray[np.bool_], "z y x"]:
    """Mask whose enclosed hollows are filled: a shell is as thick as the ball it encloses."""
    outside, number = ndimage.label(~mask)
    if number < 2:
        return mask
    largest = np.bincount(outside.ravel())[1:].argmax() + 1
    touching = {int(largest)}
    for axis in range(3):
        for end in (0, -1):
            touching |= set(np.unique(np.take(outside, end, axis)).tolist())
    is_hollow = np.ones(number + 1, bool)
    is_hollow[[0, *touching]] = False
    filled: NDArray[np.bool_] = mask | is_hollow[outside]
    return filled


@no_type_check
@numba.njit(cache=True)
def _flood(depth, order, owner, neck):
    """Watershed from the thickest voxels downwards; thick necks join bodies.

    ``order`` holds the flat places of the foreground, the thickest first. ``owner`` receives the
    number of each voxel's body; returned is, for each number, the position in ``order`` of its
    top. Bodies that were joined share the number of the thicker one.
    """
    num_z, num_y, num_x = depth.shape
    flat_depth = depth.ravel()
    flat_owner = owner.ravel()
    parent = np.empty(order.size, np.int32)
    top = np.empty(order.size, np.int64)
    number = 0
    for position in range(order.size):
        place = order[position]
        z = place // (num_y * num_x)
        y = place // num_x % num_y
        x = place % num_x
        best = -1
        highest = -1.0
        for dz in range(-1, 2):
            for dy in range(-1, 2):
                for dx in range(-1, 2):
                    nz, ny, nx = z + dz, y + dy, x + dx
                    if nz < 0 or ny < 0 or nx < 0 or nz >= num_z or ny >= num_y or nx >= num_x:
                        continue
                    neighbour = (nz * num_y + ny) * num_x + nx
                    other = flat_owner[neighbour]
                    if other < 0:
                        continue
                    while parent[other] != other:
                        other = parent[other]
                    if best >= 0 and other != best:
                        # Numbers count from the thickest top down: the smaller one is thicker.
                        thick, thin = min(best, other), max(best, other)
                        if flat_depth[place] >= neck * flat_depth[order[top[thin]]]:
                            parent[thin] = thick
                            best = thick
                            other = thick
                    # Uphill, or a body would creep around its neighbour along the surface.
                    if flat_depth[neighbour] > highest:
                        highest = flat_depth[neighbour]
                        best = other
        if best < 0:
            best = number
            parent[number] = number
            top[number] = position
            number += 1
        flat_owner[place] = best
    for position in range(order.size):
        body = flat_owner[order[position]]
        while parent[body] != body:
            body = parent[body]
        flat_owner[order[position]] = body
    return top[:number]

"""Phantoms: invented complexes, each filled with points at protein density from a few numbers.

They need no file and no network, and no two have the same silhouette. :func:`list_phantoms` names
them, :func:`build_phantom` gives the points of one.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

__all__ = ["Phantom", "build_phantom", "list_phantoms"]

_SPACING = 3.5  # angstrom between points
_JITTER = 0.35  # of the spacing, largest: without it a lattice would show in projections

Number = float | int  # beartype does not take an int for a float
Vector = tuple[Number, Number, Number]


@dataclass(frozen=True, eq=False)
class Phantom:
    """Points that fill an invented complex at the density of protein.

    Parameters
    ----------
    name
        As :func:`list_phantoms` has it.
    positions_zyx
        In angstrom, about the origin of the numbers it was made from (not its centre of mass).
    point_volume
        Volume that each point stands for, in cubic angstrom.
    digest
        Hexadecimal sha256 of the numbers as JSON.
    """

    name: str
    positions_zyx: Float[NDArray[np.float32], "n 3"]
    point_volume: float
    digest: str

    @property
    def spread(self) -> float:
        """Standard deviation, along each axis, of the cube that a point stands for; angstrom."""
        return math.cbrt(self.point_volume) / math.sqrt(12)


@dataclass(frozen=True)
class _Solid:
    """A body of revolution or a slab, in angstrom, ``z y x``.

    The sizes are, along and across the axis: of a spheroid its half length, half width and wall
    (0: solid); of a tube its half length, outer and inner radius; of a torus the radius of the
    ring, of its section, and the arc in degrees; of a slab its three half edges. An arc is
    centred on x, and a slab's second edge points there, or along y where the axis itself is x.
    ``fold`` copies stand around z. A hole is taken away from everything else.
    """

    kind: Literal["spheroid", "tube", "torus", "slab"]
    sizes: Vector
    centre: Vector = (0, 0, 0)
    axis: Vector = (1, 0, 0)
    fold: int = 1
    hole: bool = False


def list_phantoms() -> tuple[str, ...]:
    """Names of the invented complexes, sorted."""
    return tuple(sorted(_PHANTOMS))


def build_phantom(name: str) -> Phantom:
    """Points of one invented complex on a jittered lattice; the same ones at every call.

    Parameters
    ----------
    name
        One of :func:`list_phantoms`.

    Raises
    ------
    ValueError
        If there is no such phantom; the message lists the known ones.
    """
    if name not in _PHANTOMS:
        msg = f"unknown phantom {name!r}: expected one of {', '.join(list_phantoms())}"
        raise ValueError(msg)
    solids = _PHANTOMS[name]
    lattice = _jittered_lattice(max(_reach(solid) for solid in solids))
    inside = np.zeros(lattice.shape[:3], bool)
    for solid in sorted(solids, key=lambda solid: solid.hole):  # holes last
        _mark(solid, lattice, inside)
    numbers = {"spacing": _SPACING, "jitter": _JITTER, "solids": [asdict(s) for s in solids]}
    canonical = json.dumps(numbers, sort_keys=True, separators=(",", ":"))
    return Phantom(
        name=name,
        positions_zyx=lattice[inside],
        point_volume=_SPACING**3,
        digest=hashlib.sha256(canonical.encode()).hexdigest(),
    )


def _jittered_lattice(reach: float) -> Float[NDArray[np.float32], "k k k 3"]:
    ticks = np.arange(-math.ceil(reach / _SPACING), math.ceil(reach / _SPACING) + 1)
    points = np.stack(np.meshgrid(ticks, ticks, ticks, indexing="ij"), axis=-1)
    jitter = np.random.default_rng(0).uniform(-_JITTER, _JITTER, points.shape)
    moved: Float[NDArray[np.float32], "k k k 3"] = ((points + jitter) * _SPACING).astype(np.float32)
    return moved


def _radius(solid: _Solid) -> float:
    """Radius about its centre that holds the solid."""
    radii: dict[str, Number] = {
        "spheroid": max(solid.sizes[:2]),
        "tube": math.hypot(*solid.sizes[:2]),
        "torus": sum(solid.sizes[:2]),
        "slab": math.hypot(*solid.sizes),
    }
    return float(radii[solid.kind])


def _reach(solid: _Solid) -> float:
    """Radius about the origin that holds the solid and its copies."""
    return 0.0 if solid.hole else math.hypot(*solid.centre) + _radius(solid)


def _mark(
    solid: _Solid,
    lattice: Float[NDArray[np.float32], "k k k 3"],
    inside: Bool[NDArray[np.bool], "k k k"],
) -> None:
    """Mark the points in a solid and its copies, or clear them if it is a hole."""
    middle = len(lattice) // 2
    half = math.ceil(_radius(solid) / _SPACING) + 1  # in points; the jitter is less than one
    for copy in range(solid.fold):
        angle = 2 * math.pi * copy / solid.fold
        cos, sin = math.cos(angle), math.sin(angle)
        turn = np.array([[1, 0, 0], [0, cos, sin], [0, -sin, cos]])
        centre, axes = turn @ np.array(solid.centre, float), _frame(solid.axis) @ turn.T
        nearest = np.round(centre / _SPACING).astype(int) + middle
        block = tuple(slice(max(n - half, 0), max(n + half + 1, 0)) for n in nearest.tolist())
        local = (lattice[block] - centre).reshape(-1, 3) @ axes.T
        contained = _contains(solid, local).reshape(lattice[block].shape[:3])
        if solid.hole:
            inside[block] &= ~contained
        else:
            inside[block] |= contained


def _contains(
    solid: _Solid, local: Float[NDArray[np.float64], "n 3"]
) -> Bool[NDArray[np.bool], "n"]:
    along, first, second = local.T
    across = np.hypot(first, second)
    a, b, c = solid.sizes
    if solid.kind == "spheroid":
        inside = (along / a) ** 2 + (across / b) ** 2 <= 1
        if c > 0:
            inside &= (along / (a - c)) ** 2 + (across / (b - c)) ** 2 > 1
    elif solid.kind == "tube":
        inside = (np.abs(along) <= a) & (across <= b) & (across >= c)
    elif solid.kind == "torus":
        inside = along**2 + (across - a) ** 2 <= b**2
        inside &= np.abs(np.arctan2(second, first)) <= math.radians(c / 2)
    else:
        inside = (np.abs(along) <= a) & (np.abs(first) <= b) & (np.abs(second) <= c)
    return np.asarray(inside, bool)


def _frame(axis: Vector) -> Float[NDArray[np.float64], "3 3"]:
    """Rows: the axis, the part of x across it (of y if the axis is x), and what completes them."""
    along = np.array(axis, float) / math.hypot(*axis)
    reference = np.array([0, 0, 1.0]) if abs(along[2]) < 0.9 else np.array([0, 1.0, 0])
    first = reference - along * (reference @ along)
    first /= np.linalg.norm(first)
    return np.array([along, first, np.cross(along, first)])


def _ball(radius: Number, centre: Vector, *, fold: int = 1) -> _Solid:
    return _Solid("spheroid", (radius, radius, 0), centre, fold=fold)


def _bar(
    start: Vector, end: Vector, radius: Number, *, fold: int = 1, hole: bool = False
) -> _Solid:
    (z0, y0, x0), (z1, y1, x1) = start, end
    centre = ((z0 + z1) / 2, (y0 + y1) / 2, (x0 + x1) / 2)
    axis = (z1 - z0, y1 - y0, x1 - x0)
    return _Solid("tube", (math.dist(start, end) / 2, radius, 0), centre, axis, fold, hole)


def _coil(radius: Number, pitch: Number, turns: Number, thickness: Number) -> tuple[_Solid, ...]:
    """Balls along a right-handed helix around z."""
    number = math.ceil(turns * math.tau * radius / (0.6 * thickness))
    angles = [turns * math.tau * (i / (number - 1) - 0.5) for i in range(number)]
    return tuple(
        _ball(thickness, (pitch * a / math.tau, radius * math.sin(a), radius * math.cos(a)))
        for a in angles
    )


def _box_edges(half: Number, radius: Number) -> tuple[_Solid, ...]:
    ends = (-half, half)
    corners = [(z, y, x) for z in ends for y in ends for x in ends]
    return tuple(
        _bar(p, q, radius)
        for i, p in enumerate(corners)
        for q in corners[i + 1 :]
        if sum(a != b for a, b in zip(p, q, strict=True)) == 1
    )


# Sizes in angstrom. Most bodies carry a knob, a cap or a hole, so that one end can be told from the
# other at 20-30 angstrom.
_PHANTOMS: dict[str, tuple[_Solid, ...]] = {
    "barrel": (
        _Solid("tube", (62, 47, 22)),
        _Solid("tube", (8, 40, 0), (-54, 0, 0)),
        _Solid("torus", (47, 11, 360), (28, 0, 0)),
    ),
    "boulder": (
        _Solid("spheroid", (72, 96, 0), (-30, 0, 0)),
        _Solid("spheroid", (48, 82, 0), (62, 0, 14), (1, 0, 0.2)),
        _bar((-20, 60, 60), (0, 105, 95), 18),
        _Solid("spheroid", (40, 30, 0), (26, -60, 70), (0, 1, -1), hole=True),
    ),
    "bowl": (
        _Solid("spheroid", (68, 68, 17)),
        _Solid("slab", (60, 90, 90), (72, 0, 0), hole=True),
        _ball(22, (-74, 0, 0)),
    ),
    "cage": (*_box_edges(72, 12), _bar((-72, -72, -72), (-72, 72, 72), 12)),
    "capsid": (
        _Solid("spheroid", (124, 124, 24)),
        _ball(22, (40, 0, 128), fold=5),
        _bar((0, 0, 0), (-160, 0, 0), 34, hole=True),
    ),
    "crown": (
        _Solid("tube", (15, 66, 36), (-30, 0, 0)),
        _Solid("spheroid", (42, 16, 0), (18, 0, 52), (1, 0, 0.25), fold=7),
    ),
    "discs": (
        _Solid("tube", (9, 64, 0), (-46, 0, 0)),
        _Solid("tube", (9, 52, 0), (0, 0, 12)),
        _Solid("tube", (9, 38, 0), (44, 0, 0)),
        _bar((-46, 0, 0), (44, 0, 0), 13),
    ),
    "dumbbell": (
        _ball(39, (-38, 0, 0)),
        _ball(29, (46, 0, 0)),
        _bar((-38, 0, 0), (46, 0, 0), 13),
    ),
    "elbow": (
        _bar((0, -64, -38), (0, 64, -38), 20),
        _bar((0, -44, -38), (0, -44, 62), 20),
        _ball(24, (14, -44, 50)),
    ),
    "fork": (
        _bar((0, -78, 0), (0, 6, 0), 17),
        _bar((0, 0, 0), (0, 62, 50), 17),
        _bar((0, 0, 0), (0, 50, -62), 14),
        _ball(23, (0, 56, 46)),
    ),
    "horseshoe": (
        _Solid("torus", (56, 18, 250)),
        _ball(27, (0, 46, -32)),
    ),
    "mallet": (
        _Solid("slab", (26, 62, 32), (36, 0, 0)),
        _bar((20, 0, 0), (-94, 12, 0), 16),
    ),
    "propeller": (
        _ball(34, (0, 0, 0)),
        _Solid("slab", (9, 50, 28), (0, 0, 72), (1, 0.5, 0), fold=5),
        _bar((0, 0, 0), (76, 0, 0), 15),
    ),
    "ring": (
        _Solid("torus", (54, 19, 360)),
        _ball(22, (20, 0, 54)),
    ),
    "rod": (
        _bar((-79, 0, 0), (76, 0, 0), 18),
        _ball(28, (34, 0, 8)),
    ),
    "shell": (
        _Solid("spheroid", (58, 70, 16)),
        _bar((0, 0, 0), (80, 0, 0), 24, hole=True),
    ),
    "spring": _coil(34, 58, 2.25, 14),
    "tripod": (
        _ball(31, (44, 0, 0)),
        _bar((40, 0, 0), (-56, 0, 58), 14, fold=3),
        _ball(21, (-50, 0, 56)),
    ),
}

"""Distractors: lipid membranes and gold fiducials, what a field holds besides its particles.

A distractor is a surface or a ball in the periodic field. Its density depends on the distance from
that surface alone, so it is rendered from a table of the blurred profile, and the cells that it
takes from particles are those nearer to it than its half thickness.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from pydantic import Field, model_validator
from scipy.ndimage import maximum_filter
from scipy.special import erf

from cectflow.config import Config
from cectflow.simulation.rasters import (
    TABLE_STEP,
    mark_sheet,
    mark_sphere,
    render_sheet,
    render_sphere,
)

__all__ = [
    "GOLD",
    "MEMBRANE",
    "Distractor",
    "Distractors",
    "GoldBead",
    "Junk",
    "Sheet",
    "Vesicle",
    "choose_junk",
    "draw_distractors",
    "render_distractors",
]

MEMBRANE, GOLD = 1, 2
"""Kinds of voxels that :func:`render_distractors` tells apart; 0 is neither."""

# Fluid DPPC, Nagle and Tristram-Nagle 2000 (Biochim. Biophys. Acta 1469, 159): 64 Å² and 1232 Å³ a
# lipid, 319 Å³ of it the head group (C10 H18 N O8 P); tails (2 C15 H31) fill 28.5 Å between the
# heads, whose densest planes are 38.3 Å apart. Potentials above ice follow from these volumes by
# the rule for atoms (atoms.py): 47.88 V Å² times the atoms' electron scattering factors at zero
# angle, over the volume, less the 4.53 V of ice.
HEAD_DISTANCE = 38.3
"""Å between the planes of the two leaflets' head groups."""
HEAD_WIDTH = 3.0
"""Gaussian sigma in Å of a head group's position and extent: 9 Å of matter have 2.6 Å."""
HEAD_EXCESS = 20.9
"""Potential above ice of one leaflet's heads per area, V Å."""
TAIL_THICKNESS = 28.5
"""Å."""
TAIL_EXCESS = 1.14
"""Potential of the tails above ice, V: a third of a protein's."""
HALF_MEMBRANE = 23.3
"""Half the steric thickness of the bilayer (46.5 Å, ibid.) in Å, which no particle enters."""
GOLD_EXCESS = 25.3
"""Potential of gold above ice, V: 0.0590 atoms per Å³ (19.3 g/cm³) of 10.57 Å scattering factor,
by the same rule, less ice; seven times a protein's. Imaging is linear here, so that the strong
phase shift and the absorption of real gold beads are not in it."""

PLACES_PER_DISTRACTOR = 100
NUM_WAVES = 4
REACH = 4.0
"""Sigmas after which a blurred edge is taken to have ended."""
Vector: TypeAlias = tuple[float, float, float]
JunkKind: TypeAlias = Literal["membrane", "gold", "empty"]


class Distractors(Config):
    """Numbers and sizes of membranes and gold beads; by default there are none.

    Numbers are means per field; each field's own is drawn from the Poisson distribution. A
    distractor for which a field has no room is left out of it.
    """

    vesicles: float = Field(0.0, ge=0, le=1000)
    """Mean number per field of closed, spherical bilayers; particles fill them too."""
    vesicle_radius: tuple[float, float] = (150.0, 300.0)
    """Lowest and highest in Å, to the middle of the bilayer; drawn uniformly."""
    sheets: float = Field(0.0, ge=0, le=100)
    """Mean number per field of bilayers that run through the whole field."""
    undulation: float = Field(20.0, ge=0)
    """Of a sheet: rms height in Å of the waves on it."""
    gold: float = Field(0.0, ge=0, le=1000)
    """Mean number per field of gold beads."""
    gold_diameter: tuple[float, float] = (50.0, 150.0)
    """Lowest and highest in Å; drawn uniformly."""

    @model_validator(mode="after")
    def _check(self) -> Distractors:
        for name, lowest in (("vesicle_radius", 2 * HALF_MEMBRANE), ("gold_diameter", 0.0)):
            low, high = getattr(self, name)
            if not lowest < low <= high:
                msg = f"{name} is ({low:g}, {high:g}): expected {lowest:g} < lowest <= highest, Å"
                raise ValueError(msg)
        return self

    def in_volume(self, growth: float) -> Distractors:
        """Numbers for a field so many times larger: as many per volume, sheets of as much area."""
        numbers = {
            "vesicles": self.vesicles * growth,
            "gold": self.gold * growth,
            "sheets": self.sheets * growth ** (1 / 3),
        }
        return self.model_copy(update=numbers)

    @property
    def largest(self) -> float:
        """Diameter in Å of the largest vesicle or bead that can be drawn."""
        vesicle = 2 * (self.vesicle_radius[1] + HALF_MEMBRANE) if self.vesicles else 0.0
        return max(vesicle, self.gold_diameter[1] if self.gold else 0.0)


class Junk(Config):
    """Subtomograms of the last class, ``junk``, from which a classifier learns to refuse.

    Each share is the number of such subtomograms for one of a particle; a field that has fewer
    such places gives fewer.
    """

    membrane: float = Field(0.05, ge=0, le=10)
    """Centred on a random place in a membrane."""
    gold: float = Field(0.02, ge=0, le=10)
    """Centred on a gold bead, each at most once."""
    empty: float = Field(0.05, ge=0, le=10)
    """Neither particle nor distractor within the central quarter of the box along each axis."""

    @property
    def shares(self) -> dict[JunkKind, float]:
        """Kind → share."""
        return {"membrane": self.membrane, "gold": self.gold, "empty": self.empty}


@dataclass(frozen=True)
class Vesicle:
    """Spherical bilayer; centre (z, y, x) and radius of the bilayer's middle in Å."""

    centre_zyx: Vector
    radius: float


@dataclass(frozen=True)
class GoldBead:
    """Solid sphere; centre (z, y, x) and radius in Å."""

    centre_zyx: Vector
    radius: float


@dataclass(frozen=True)
class Sheet:
    """Bilayer without an edge: where ``n·s - offset - Σ a cos(2π (m·s) + φ)`` is a whole number.

    Here s is the position as a fraction of the field along z, y, x. Whole numbers in n and m make
    the sheet periodic, as everything in a field is.

    Attributes
    ----------
    normal
        n.
    offset
        In periods.
    waves
        (a, m_z, m_y, m_x, φ) of each wave; a in periods, φ in radians.
    """

    normal: tuple[int, int, int]
    offset: float
    waves: tuple[tuple[float, int, int, int, float], ...]


Distractor: TypeAlias = Vesicle | GoldBead | Sheet


def draw_distractors(
    distractors: Distractors,
    taken: Bool[NDArray[np.bool_], "z y x"],
    cell: Float[NDArray[np.float64], "3"],
    *,
    keep_out: float,
    generator: np.random.Generator,
) -> tuple[Distractor, ...]:
    """Distractors of one field at random free places; their cells are marked as taken.

    A cell is taken if a bead in it could lie in the distractor or within the keep-out distance.

    Parameters
    ----------
    distractors
        Numbers and sizes.
    taken
        Cells of the periodic field, changed in place.
    cell
        Edges of a cell in Å.
    keep_out
        Å.
    generator
        Source of all randomness.
    """
    edges = cell * taken.shape
    numbers = {
        name: int(generator.poisson(getattr(distractors, name)))
        for name in ("sheets", "vesicles", "gold")
    }
    radii = np.sort(generator.uniform(*distractors.vesicle_radius, numbers["vesicles"]))[::-1]
    beads = generator.uniform(*distractors.gold_diameter, numbers["gold"]) / 2
    sizes = (
        [("sheet", 0.0)] * numbers["sheets"]
        + [("vesicle", float(radius)) for radius in radii]
        + [("gold", float(radius)) for radius in beads]
    )
    # The nearest cell to a bead is up to half a cell from it along each axis.
    margin = keep_out + float(np.linalg.norm(cell)) / 2
    placed: list[Distractor] = []
    for kind, radius in sizes:
        for _ in range(PLACES_PER_DISTRACTOR):
            if kind == "sheet":
                trial: Distractor = _draw_sheet(distractors.undulation, edges, generator)
            else:
                z, y, x = (generator.random(3) * edges).tolist()
                trial = (Vesicle if kind == "vesicle" else GoldBead)((z, y, x), radius)
            if _mark(trial, taken, cell, margin, write=False):
                _mark(trial, taken, cell, margin, write=True)
                placed.append(trial)
                break
    return tuple(placed)


def render_distractors(
    distractors: tuple[Distractor, ...],
    *,
    shape: tuple[int, int, int],
    voxel_size: float,
    sigma: float,
) -> tuple[Float[NDArray[np.float32], "z y x"], Int[NDArray[np.int8], "z y x"]]:
    """Density of the distractors of a periodic field, and the kind of each of its voxels.

    Spheres are exact: a ball and a thin shell convolved with a Gaussian have closed forms. On a
    sheet the profile is that of a flat bilayer.

    Parameters
    ----------
    distractors
        As :func:`draw_distractors` gives them.
    shape
        Of the field in voxels.
    voxel_size
        In Å.
    sigma
        Of the blur in Å.

    Returns
    -------
    density
        Potential above ice, V, blurred.
    kinds
        :data:`MEMBRANE` or :data:`GOLD` in the voxels whose centre is in one, else 0.
    """
    density = np.zeros(shape, np.float32)
    kinds = np.zeros(shape, np.int8)
    edges = np.array(shape) * voxel_size
    for distractor in distractors:
        if isinstance(distractor, Sheet):
            reach = HALF_MEMBRANE + REACH * float(np.hypot(sigma, HEAD_WIDTH))
            table = _flat_bilayer(np.arange(0.0, reach + TABLE_STEP, TABLE_STEP), sigma)
            render_sheet(
                np.array(distractor.normal, np.float64), distractor.offset,
                np.array(distractor.waves, np.float64).reshape(-1, 5), edges,
                table, reach, HALF_MEMBRANE, MEMBRANE, density, kinds,
            )  # fmt: skip
            continue
        is_gold = isinstance(distractor, GoldBead)
        radius = distractor.radius
        outer = radius if is_gold else radius + HALF_MEMBRANE
        inner = -1.0 if is_gold else radius - HALF_MEMBRANE
        extent = outer + REACH * float(np.hypot(sigma, 0.0 if is_gold else HEAD_WIDTH))
        table = _radial_profile(np.arange(0.0, extent + TABLE_STEP, TABLE_STEP), distractor, sigma)
        render_sphere(
            np.array(distractor.centre_zyx) / voxel_size, voxel_size, table, extent,
            inner, outer, GOLD if is_gold else MEMBRANE, density, kinds,
        )  # fmt: skip
    return density, kinds


def choose_junk(
    kind: JunkKind,
    number: int,
    *,
    owners: Int[NDArray[Any], "z y x"],
    kinds: Int[NDArray[np.int8], "z y x"],
    distractors: tuple[Distractor, ...],
    voxel_size: float,
    box: int,
    generator: np.random.Generator,
) -> Float[NDArray[np.float64], "n 3"]:
    """Centres in voxels of at most ``number`` places for subtomograms of the class junk.

    Parameters
    ----------
    kind
        See :class:`Junk`.
    number
        How many are wanted; fewer are given where there are fewer.
    owners
        Of the field's voxels, 0 where there is no particle.
    kinds
        As :func:`render_distractors` gives them.
    distractors
        Of the field.
    voxel_size
        In Å.
    box
        Edge of a subtomogram in voxels.
    generator
        Chooses among the places.
    """
    if kind == "gold":
        beads = [bead.centre_zyx for bead in distractors if isinstance(bead, GoldBead)]
        places = np.array(beads, np.float64).reshape(-1, 3) / voxel_size
    elif kind == "membrane":
        places = np.argwhere(kinds == MEMBRANE).astype(np.float64)
    else:
        matter = (owners > 0) | (kinds > 0)
        central = maximum_filter(matter, size=2 * (box // 8) + 1, mode="wrap")
        places = np.argwhere(~central).astype(np.float64)
    chosen = generator.permutation(len(places))[:number]
    found: NDArray[np.float64] = places[chosen]
    return found


def _radial_profile(
    radii: NDArray[np.float64], sphere: Vesicle | GoldBead, sigma: float
) -> NDArray[np.float64]:
    """Blurred potential above ice at distances from the centre of a sphere."""
    if isinstance(sphere, GoldBead):
        return GOLD_EXCESS * _blurred_ball(radii, sphere.radius, sigma)
    half = TAIL_THICKNESS / 2
    outside = _blurred_ball(radii, sphere.radius + half, sigma)
    tails = outside - _blurred_ball(radii, sphere.radius - half, sigma)
    heads = sum(
        _blurred_shell(radii, sphere.radius + side * HEAD_DISTANCE / 2, np.hypot(sigma, HEAD_WIDTH))
        for side in (-1, 1)
    )
    return np.asarray(TAIL_EXCESS * tails + HEAD_EXCESS * heads, np.float64)


def _flat_bilayer(distances: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """Blurred potential above ice at distances from the middle of a flat bilayer."""
    half, root = TAIL_THICKNESS / 2, np.sqrt(2.0) * sigma
    tails = (erf((distances + half) / root) - erf((distances - half) / root)) / 2
    width = np.hypot(sigma, HEAD_WIDTH)
    heads = sum(
        np.exp(-0.5 * ((distances - side * HEAD_DISTANCE / 2) / width) ** 2) for side in (-1, 1)
    ) / (np.sqrt(2 * np.pi) * width)
    return np.asarray(TAIL_EXCESS * tails + HEAD_EXCESS * heads, np.float64)


def _blurred_ball(radii: NDArray[np.float64], radius: float, sigma: float) -> NDArray[np.float64]:
    """Unit ball of a radius, convolved with a three-dimensional Gaussian."""
    r = np.maximum(radii, 1e-3 * sigma)
    plus, minus = (radius + r) / sigma, (radius - r) / sigma
    edge = (erf(plus / np.sqrt(2)) + erf(minus / np.sqrt(2))) / 2
    rest = (np.exp(-(minus**2) / 2) - np.exp(-(plus**2) / 2)) * sigma / (np.sqrt(2 * np.pi) * r)
    return np.asarray(edge - rest, np.float64)


def _blurred_shell(radii: NDArray[np.float64], radius: float, sigma: float) -> NDArray[np.float64]:
    """Sphere of unit surface density, convolved with a three-dimensional Gaussian."""
    r = np.maximum(radii, 1e-3 * sigma)
    waves = np.exp(-(((radius - r) / sigma) ** 2) / 2) - np.exp(-(((radius + r) / sigma) ** 2) / 2)
    return np.asarray(waves * radius / (r * sigma * np.sqrt(2 * np.pi)), np.float64)


@lru_cache(maxsize=1)
def _directions() -> NDArray[np.int64]:
    """The 13 lattice directions through neighbours of a cell, one of each pair."""
    rows = [row for row in product((-1, 0, 1), repeat=3) if row > (0, 0, 0)]
    return np.array(rows, np.int64)


def _draw_sheet(
    undulation: float, edges: NDArray[np.float64], generator: np.random.Generator
) -> Sheet:
    directions = _directions()
    normal = directions[generator.integers(len(directions))]
    spacing = 1.0 / float(np.linalg.norm(normal / edges))
    # Heights of a membrane fall as the square of the wave number (Helfrich 1978).
    chosen = directions[generator.integers(len(directions), size=NUM_WAVES)]
    heights = generator.normal(size=NUM_WAVES) / ((chosen / edges) ** 2).sum(axis=1)
    rms = float(np.sqrt((heights**2).sum() / 2))
    amplitudes = heights / rms * undulation / spacing
    phases = generator.uniform(0.0, 2 * np.pi, NUM_WAVES)
    waves = tuple(
        (float(a), int(m[0]), int(m[1]), int(m[2]), float(phase))
        for a, m, phase in zip(amplitudes, chosen, phases, strict=True)
    )
    n = normal.tolist()
    return Sheet((n[0], n[1], n[2]), float(generator.random()), waves)


def _mark(
    distractor: Distractor,
    taken: NDArray[np.bool_],
    cell: NDArray[np.float64],
    margin: float,
    *,
    write: bool,
) -> bool:
    """Whether the cells of a distractor and its margin are free; they are marked if asked for."""
    if isinstance(distractor, Sheet):
        return bool(
            mark_sheet(
                np.array(distractor.normal, np.float64), distractor.offset,
                np.array(distractor.waves, np.float64).reshape(-1, 5), cell,
                HALF_MEMBRANE + margin, taken, write,
            )
        )  # fmt: skip
    half = HALF_MEMBRANE if isinstance(distractor, Vesicle) else 0.0
    inner = distractor.radius - half - margin if isinstance(distractor, Vesicle) else -1.0
    centre = np.array(distractor.centre_zyx)
    outer = distractor.radius + half + margin
    return bool(mark_sphere(centre, cell, inner, outer, taken, write))

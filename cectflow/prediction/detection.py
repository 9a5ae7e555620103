"""How well picks agree with the truth: one-to-one matching, and the scores of the field.

A pick hits a particle if it lies within half the particle's radius of it (the rule of the CZII
challenge, Kaggle 2024). Each particle is hit by one pick at most; pairs are chosen so that as many
as possible are matched and, among those choices, their distances are smallest (Hungarian method).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

__all__ = [
    "Agreement",
    "Found",
    "agree",
    "best_threshold",
    "compare_picks",
    "match",
    "near_faces",
]

REACH = 0.5
"""Of the radius: how far from a particle a pick still hits it."""
BETA = 4.0
"""How many times recall counts as much as precision in the challenge's score."""


@dataclass(frozen=True, eq=False)
class Found:
    """Particles of one tomogram: the true ones, or picks.

    Attributes
    ----------
    positions
        In Å.
    names
        Class of each; empty strings where it is not known.
    scores
        Of picks; None: not known.
    apart
        True for those that are neither hit nor missed, as near a face of the tomogram; None: none.
    """

    positions: Float[NDArray[np.float64], "n 3"]
    names: tuple[str, ...]
    scores: Float[NDArray[np.float64], " n"] | None = None
    apart: Bool[NDArray[np.bool_], " n"] | None = None

    def ignoring(self, names: Collection[str]) -> Bool[NDArray[np.bool_], " n"]:
        """True for those that do not count: of these classes, or apart."""
        ignored = np.array([name in names for name in self.names], bool)
        return ignored if self.apart is None else ignored | self.apart


@dataclass(frozen=True)
class Agreement:
    """Counts over tomograms, and what follows from them.

    Attributes
    ----------
    particles
        True ones.
    picks
        Those that count.
    hits
        Matched pairs.
    duplicates
        Picks that lie on a particle which another pick hits; they are false, too.
    """

    particles: int
    picks: int
    hits: int
    duplicates: int

    @property
    def precision(self) -> float:
        """Share of the picks that hit; 0 without picks."""
        return self.hits / self.picks if self.picks else 0.0

    @property
    def recall(self) -> float:
        """Share of the particles that are hit; 0 without particles."""
        return self.hits / self.particles if self.particles else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return self.f_beta(1.0)

    @property
    def f4(self) -> float:
        """F-beta of the CZII challenge, beta = 4: recall counts sixteen times in the mean."""
        return self.f_beta(BETA)

    def f_beta(self, beta: float) -> float:
        """(1 + beta²) hits over ((1 + beta²) hits + beta² misses + false picks); 0 without hits."""
        weighted = beta**2 * self.particles + self.picks
        return (1 + beta**2) * self.hits / weighted if weighted else 0.0

    def __add__(self, other: Agreement) -> Agreement:
        mine, theirs = asdict(self), asdict(other)
        return Agreement(**{name: mine[name] + theirs[name] for name in mine})

    def figures(self) -> dict[str, int | float]:
        """Counts and scores by name."""
        return asdict(self) | {
            "precision": self.precision, "recall": self.recall, "f1": self.f1, "f4": self.f4,
        }  # fmt: skip


def match(
    truth: Float[NDArray[np.float64], "particle 3"],
    picks: Float[NDArray[np.float64], "pick 3"],
    distance: float,
) -> Int[NDArray[np.int64], "pair 2"]:
    """One-to-one pairs (particle, pick) no farther apart than a distance.

    As many pairs as possible and, among such choices, the smallest sum of distances. Only
    particles and picks that are linked by short distances are weighed against each other, so
    tens of thousands are matched in seconds.

    Parameters
    ----------
    truth, picks
        In the unit of the distance.
    distance
        Largest distance of a pair.
    """
    if not len(truth) or not len(picks):
        return np.zeros((0, 2), np.int64)
    near = cKDTree(truth).sparse_distance_matrix(cKDTree(picks), distance, output_type="ndarray")
    rows, columns, distances = near["i"].astype(np.int64), near["j"].astype(np.int64), near["v"]
    size = len(truth) + len(picks)
    links = coo_array((np.ones(len(rows)), (rows, len(truth) + columns)), shape=(size, size))
    _, group = connected_components(links, directed=False)
    order = np.argsort(group[rows], kind="stable")
    ends = np.flatnonzero(np.diff(group[rows][order], append=-1)) + 1
    pairs = []
    for edges in np.split(order, ends[:-1]):
        if not len(edges):
            continue
        local_rows, row_index = np.unique(rows[edges], return_inverse=True)
        local_columns, column_index = np.unique(columns[edges], return_inverse=True)
        # A pair that is too far costs more than all allowed ones together.
        forbidden = (len(edges) + 1) * (distance + 1.0)
        cost = np.full((len(local_rows), len(local_columns)), forbidden)
        cost[row_index, column_index] = distances[edges]
        chosen = np.stack(linear_sum_assignment(cost), axis=1)
        chosen = chosen[cost[chosen[:, 0], chosen[:, 1]] < forbidden]
        pairs.append(np.stack([local_rows[chosen[:, 0]], local_columns[chosen[:, 1]]], axis=1))
    return np.concatenate(pairs) if pairs else np.zeros((0, 2), np.int64)


def near_faces(
    positions_zyx: Float[NDArray[np.float64], "n 3"], shape: tuple[int, int, int], width: float
) -> Bool[NDArray[np.bool_], " n"]:
    """True for positions closer to a face of a volume than a width, all in voxels."""
    to_face = np.minimum(positions_zyx, np.array(shape) - 1 - positions_zyx)
    return np.asarray(to_face.min(axis=1, initial=np.inf) < width)


def agree(truth: Found, picks: Found, radius: float, ignore: Collection[str] = ()) -> Agreement:
    """Agreement of picks with the particles of one tomogram, whatever their classes.

    Particles that are apart, or of an ignored class, are neither to be hit nor missed: they are
    left out, and with them every pick that hits no other particle and lies on one of them, or is
    itself apart or named so.

    Parameters
    ----------
    truth, picks
        Of one tomogram.
    radius
        Of a particle, in Å.
    ignore
        Classes.
    """
    distance = REACH * radius
    left_out = truth.ignoring(ignore)
    particles, ignored = truth.positions[~left_out], truth.positions[left_out]
    pairs = match(particles, picks.positions, distance)
    counts = np.ones(len(picks.positions), bool)
    if len(ignored) and len(counts):
        counts &= cKDTree(ignored).query(picks.positions)[0] > distance
    counts &= ~picks.ignoring(ignore)
    counts[pairs[:, 1]] = True
    extra = counts.copy()
    extra[pairs[:, 1]] = False
    hit = particles[pairs[:, 0]]
    duplicates = 0
    if len(hit) and extra.any():
        on_hit = cKDTree(hit).query(picks.positions[extra])[0] <= distance
        duplicates = int(np.count_nonzero(on_hit))
    return Agreement(len(particles), int(counts.sum()), len(pairs), duplicates)


def compare_picks(
    tomograms: Sequence[tuple[Found, Found]], radius: float, ignore: Collection[str] = ()
) -> dict[str, Agreement]:
    """Agreement summed over tomograms: of ``any`` class, and of each class by name.

    Within a class only picks of that class can hit. Ignored classes are not reported, nor is any
    class where picks and truth have no name in common, as where all picks are called ``particle``.

    Parameters
    ----------
    tomograms
        Truth and picks of each.
    radius
        Of a particle, in Å.
    ignore
        Classes that are neither to be hit nor missed.

    Raises
    ------
    ValueError
        If the radius is not positive, an ignored class is unknown, or nothing is left to find.
    """
    if not (np.isfinite(radius) and radius > 0):
        msg = f"--radius is a positive number of angstrom, given {radius:g}"
        raise ValueError(msg)
    true_names = {name for truth, _ in tomograms for name in truth.names}
    unknown = set(ignore) - true_names
    if unknown:
        msg = (
            f"--ignore {', '.join(sorted(unknown))}: expected classes of the truth: "
            f"{', '.join(sorted(true_names - {''})) or 'it names none'}"
        )
        raise ValueError(msg)
    if not true_names - set(ignore):
        msg = "no particle of the truth is left to find" + (
            ": ignore fewer classes" if ignore else ": it holds none"
        )
        raise ValueError(msg)
    result = {"any": _total([agree(truth, picks, radius, ignore) for truth, picks in tomograms])}
    picked_names = {name for _, picks in tomograms for name in picks.names}
    classes = sorted((true_names | picked_names) - set(ignore) - {""})
    if (picked_names & true_names) - {""}:
        for name in classes:
            result[name] = _total(
                [
                    agree(_of(truth, {name, *ignore}), _of(picks, {name}), radius, ignore)
                    for truth, picks in tomograms
                ]
            )
    return result


def best_threshold(
    tomograms: Sequence[tuple[Found, Found]], radius: float, ignore: Collection[str] = ()
) -> tuple[float, Agreement]:
    """Score from which on picks are kept for the highest F1, whatever their classes.

    To be taken from validation tomograms and given as ``--min-score`` for others.

    Parameters
    ----------
    tomograms, radius, ignore
        As of :func:`compare_picks`; the picks have scores.
    """
    scores = np.unique(np.concatenate([_scores(picks) for _, picks in tomograms] or [np.zeros(0)]))
    if len(scores) > 100:
        scores = np.quantile(scores, np.linspace(0, 1, 100), method="lower")
    found = [
        (
            float(score),
            _total(
                [
                    agree(truth, _select(picks, _scores(picks) >= score), radius, ignore)
                    for truth, picks in tomograms
                ]
            ),
        )
        for score in scores
    ]
    return max(found, key=lambda pair: pair[1].f1, default=(0.0, Agreement(0, 0, 0, 0)))


def _total(agreements: Sequence[Agreement]) -> Agreement:
    return sum(agreements, Agreement(0, 0, 0, 0))


def _scores(picks: Found) -> NDArray[np.float64]:
    assert picks.scores is not None
    return picks.scores


def _of(found: Found, names: Collection[str]) -> Found:
    return _select(found, np.array([name in names for name in found.names], bool))


def _select(found: Found, keep: NDArray[np.bool_]) -> Found:
    names = tuple(name for name, kept in zip(found.names, keep, strict=True) if kept)
    scores = None if found.scores is None else found.scores[keep]
    apart = None if found.apart is None else found.apart[keep]
    return Found(found.positions[keep], names, scores, apart)

"""Judgement of picks: files in, agreement with the truth out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cectflow.coordinates import PIXEL_SIZES
from cectflow.particles import ParticleTable, read_particles
from cectflow.placement import coordinates_zyx
from cectflow.prediction.detection import (
    Agreement,
    Found,
    best_threshold,
    compare_picks,
    near_faces,
)
from cectflow.volume import read_volume

__all__ = ["PickEvaluation", "evaluate_picks"]

CLASS_COLUMNS = ("cectflowTrueClass", "cectflowClassName")
SCORE_COLUMNS = ("cectflowScore", "rlnAutopickFigureOfMerit")


@dataclass(frozen=True)
class PickEvaluation:
    """Outcome of a comparison.

    Attributes
    ----------
    agreements
        ``any`` class first, then each class by name.
    threshold
        Score from which on picks are kept for the highest F1, and that F1; None without scores.
    """

    agreements: dict[str, Agreement]
    threshold: tuple[float, float] | None


def evaluate_picks(
    truth: Path,
    picks: Path,
    radius: float,
    *,
    ignore: Collection[str] = (),
    border: float = 0.0,
    tomogram: Path | None = None,
    voxel_size: float | None = None,
) -> PickEvaluation:
    """Precision, recall, F1 and CZII F-beta of picks against true particles.

    Parameters
    ----------
    truth, picks
        STAR or CSV. Of several tomograms those of the same name are compared; where each file
        holds one tomogram, names do not matter.
    radius
        Of a particle in Å: a pick within half of it is a hit.
    ignore
        Classes of the truth that are neither to be hit nor missed.
    border
        Å from the tomogram's faces within which particles are neither to be hit nor missed: the
        faces cut particles there, of which a truth may list those whose centre is inside.
    tomogram
        Its voxel size and shape hold for both files; needed for coordinates of RELION 5 and for a
        border.
    voxel_size
        In Å, of the voxels that both files count in, where neither says so.

    Raises
    ------
    ValueError
        If no voxel size is known, the tomograms' names do not agree, or as in
        :func:`cectflow.prediction.detection.compare_picks`.
    """
    if border and tomogram is None:
        msg = "--border is counted from the tomogram's faces: give --tomogram"
        raise ValueError(msg)
    tables = read_particles(truth), read_particles(picks)
    shape = None
    if tomogram is not None:
        volume = read_volume(tomogram, voxel_size=voxel_size)
        shape, voxel_size = volume.shape, volume.voxel_size
    sizes = [voxel_size or _stated(table) for table in tables]
    known = next((size for size in sizes if size is not None), None if len(tables[1]) else 1.0)
    if known is None:
        msg = (
            f"neither {truth} nor {picks} says how large the voxels are that it counts in: give "
            "--voxel-size in angstrom, or --tomogram"
        )
        raise ValueError(msg)
    pairs = [
        (
            _found(true, sizes[0] or known, shape, border),
            _found(picked, sizes[1] or known, shape, border),
        )
        for true, picked in _by_tomogram(*tables)
    ]
    agreements = compare_picks(pairs, radius, ignore)
    threshold = None
    if all(picked.scores is not None for _, picked in pairs):
        score, agreement = best_threshold(pairs, radius, ignore)
        threshold = score, agreement.f1
    return PickEvaluation(agreements, threshold)


def _stated(table: ParticleTable) -> float | None:
    """Voxel size that a table states of its coordinates."""
    for column in PIXEL_SIZES:
        if column in table.rows and len(table):
            return float(table.rows[column].iloc[0])
    return None


def _by_tomogram(
    truth: ParticleTable, picks: ParticleTable
) -> list[tuple[ParticleTable, ParticleTable]]:
    if len(truth.tomograms) < 2 and len(picks.tomograms) < 2:
        return [(truth, picks)]
    strangers = [name for name in picks.tomograms if name not in truth.tomograms]
    if strangers:
        msg = (
            f"picks are in tomogram {strangers[0]!r}, of which there is no truth: it has "
            f"{', '.join(truth.tomograms)}"
        )
        raise ValueError(msg)
    nowhere = picks.select(np.zeros(len(picks), bool))
    return [
        (truth.in_tomogram(name), picks.in_tomogram(name) if name in picks.tomograms else nowhere)
        for name in truth.tomograms
    ]


def _found(
    table: ParticleTable, voxel_size: float, shape: tuple[int, int, int] | None, border: float
) -> Found:
    """Positions in Å, classes and scores of a table."""
    if not len(table):
        return Found(np.zeros((0, 3)), (), np.zeros(0))
    # Without the tomogram its faces are not known: positions from its corner need none.
    anywhere = (1 << 40, 1 << 40, 1 << 40)
    centred = "rlnCenteredCoordinateXAngst" in table.rows
    if centred and shape is None and "rlnTomoSizeX" not in table.rows:
        msg = "coordinates from the tomogram's centre (RELION 5) need its size: give --tomogram"
        raise ValueError(msg)
    positions = coordinates_zyx(
        table, voxel_size=voxel_size, shape=shape or anywhere,
        coords_voxel_size=None,
    )  # fmt: skip
    column = next((name for name in CLASS_COLUMNS if name in table.rows), None)
    names = ("",) * len(table) if column is None else tuple(map(str, table.rows[column]))
    score = next((name for name in SCORE_COLUMNS if name in table.rows), None)
    scores = None if score is None else table.rows[score].to_numpy(np.float64)
    apart = None
    if border and shape is not None:
        apart = near_faces(positions, shape, border / voxel_size)
    return Found(positions * voxel_size, names, scores, apart)

"""Sources: where prediction reads subtomograms from, one interface for stacks and tomograms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy.typing import NDArray

from cectflow.coordinates import coordinates_zyx
from cectflow.model_card import ModelCard
from cectflow.particles import ParticleTable, particles_from, read_particles
from cectflow.prediction.contract import InputOptions, bring_to_card, report_changes, source_box
from cectflow.subtomogram import cut
from cectflow.volume import Volume, find_stacks, read_stack, read_volume

__all__ = ["CubeSource", "InputFiles", "StackSource", "TomogramSource"]


@runtime_checkable
class CubeSource(Protocol):
    """Subtomograms of known particles, brought to a card's contract."""

    @property
    def table(self) -> ParticleTable:
        """One row per subtomogram, in the order in which they are read."""
        ...

    @property
    def num_batches(self) -> int:
        """How many batches there are."""
        ...

    def batches(self) -> Iterator[Float[NDArray[np.float32], "n 1 box box box"]]:
        """Cubes in the order of the rows."""
        ...


@dataclass(frozen=True, eq=False)
class StackSource:
    """Subtomograms in MRC stacks or single volumes; one file is open at a time."""

    table: ParticleTable
    paths: tuple[Path, ...]
    counts: tuple[int, ...]
    """Subtomograms of each file."""
    card: ModelCard
    options: InputOptions

    @property
    def num_batches(self) -> int:
        """How many batches there are; a batch never spans two files."""
        return sum(-(-count // self.options.batch_size) for count in self.counts)

    def batches(self) -> Iterator[Float[NDArray[np.float32], "n 1 box box box"]]:
        """Cubes in the order of the rows."""
        for path in self.paths:
            cubes, voxel_size = read_stack(path, voxel_size=self.options.voxel_size)
            for start in range(0, len(cubes), self.options.batch_size):
                piece = np.asarray(cubes[start : start + self.options.batch_size])
                _refuse_not_finite(piece, start, f"{path}: subtomogram")
                yield bring_to_card(piece, voxel_size, self.card, self.options)


class TomogramSource:
    """Subtomograms cut on the fly about the particles of a tomogram; nothing is stored.

    Parameters
    ----------
    tomogram, particles
        MRC volume, and STAR or CSV.
    card, options
        The contract and what the user says of the input.
    coords_voxel_size
        Å per unit of the file's coordinates, where they are of another binning.
    report
        Told what is done to the input.

    Raises
    ------
    ValueError
        If the voxel size is not the card's and rescaling was not asked for, or coordinates are
        missing or outside the tomogram.
    """

    def __init__(
        self,
        tomogram: Path,
        particles: Path,
        card: ModelCard,
        options: InputOptions,
        *,
        coords_voxel_size: float | None = None,
        report: Callable[[str], None],
    ) -> None:
        self.volume: Volume = read_volume(tomogram, voxel_size=options.voxel_size)
        self.table = read_particles(particles)
        if not len(self.table):
            msg = f"{particles} holds no particles: expected at least one"
            raise ValueError(msg)
        self.card = card
        self.options = options
        depth, height, width = self.volume.data.shape
        self.centres_zyx = coordinates_zyx(
            self.table,
            voxel_size=self.volume.voxel_size,
            shape=(depth, height, width),
            coords_voxel_size=coords_voxel_size,
        )
        self.box = source_box(card, self.volume.voxel_size, options, report)
        if options.contrast != card.contrast:
            report(f"contrast: input is {options.contrast}, {card.contrast} is expected: flipped")
        reach = np.round(self.centres_zyx) - self.box // 2
        incomplete = (reach < 0) | (reach + self.box > np.array(self.volume.data.shape))
        if incomplete.any():
            report(
                f"{int(incomplete.any(axis=1).sum())} of {len(self.centres_zyx)} subtomograms "
                f"reach over the border: what is missing is filled with their mean"
            )

    @property
    def num_batches(self) -> int:
        """How many batches there are."""
        return -(-len(self.centres_zyx) // self.options.batch_size)

    def batches(self) -> Iterator[Float[NDArray[np.float32], "n 1 box box box"]]:
        """Cubes in the order of the rows."""
        for start in range(0, len(self.centres_zyx), self.options.batch_size):
            centres = self.centres_zyx[start : start + self.options.batch_size]
            cubes = cut(self.volume.data, centres, self.box, periodic=False)
            _refuse_not_finite(cubes, start, "the subtomogram of particle")
            yield bring_to_card(cubes, self.volume.voxel_size, self.card, self.options)


@dataclass(frozen=True)
class InputFiles:
    """Where the particles are: in stacks, or in a tomogram with its picks.

    Attributes
    ----------
    subtomograms
        Stack, folder or glob; or
    tomogram, particles
        a volume and its picks, STAR or CSV; a semantic segmenter takes the volume alone.
    coords_voxel_size
        Å per unit of the picks' coordinates, where they are of another binning.

    Raises
    ------
    ValueError
        If it is neither stacks nor a tomogram with picks, or both.
    """

    subtomograms: str | None = None
    tomogram: Path | None = None
    particles: Path | None = None
    coords_voxel_size: float | None = None

    def __post_init__(self) -> None:
        given = self.subtomograms is not None, self.tomogram is not None, self.particles is not None
        if given not in {(True, False, False), (False, True, True), (False, True, False)}:
            msg = (
                "expected either --subtomograms, or --tomogram together with --particles, or "
                "--tomogram alone for a semantic segmenter"
            )
            raise ValueError(msg)

    @property
    def volumes(self) -> tuple[Path, ...]:
        """Files of the voxels."""
        if self.tomogram is not None:
            return (self.tomogram,)
        return find_stacks(self.subtomograms) if self.subtomograms is not None else ()

    def open(
        self, card: ModelCard, options: InputOptions, report: Callable[[str], None]
    ) -> StackSource | TomogramSource:
        """Source of the subtomograms; what cannot be brought to the card is refused here.

        Raises
        ------
        ValueError
            Among others if the particles of a tomogram are missing.
        """
        if self.tomogram is not None and self.particles is not None:
            return TomogramSource(
                self.tomogram, self.particles, card, options,
                coords_voxel_size=self.coords_voxel_size, report=report,
            )  # fmt: skip
        if self.subtomograms is None:
            what = "outlines" if card.task == "target" else "names"
            msg = (
                f"a {card.role} for the task {card.task!r} {what} particles at known positions: "
                "give --particles PICKS.star; to find them in a whole tomogram use `cectflow "
                "predict segment --model cectflow-tomogram-segmenter@production --picks PICKS.star`"
            )
            raise ValueError(msg)
        return _open_stacks(self.subtomograms, card, options, report)


def _refuse_not_finite(cubes: NDArray[Any], start: int, what: str) -> None:
    """Refuse cubes with NaN or infinity, of which a network makes nothing."""
    wrong = np.flatnonzero(~np.isfinite(cubes).all(axis=(1, 2, 3)))
    if wrong.size:
        msg = f"{what} {start + wrong[0] + 1} holds values that are not finite: leave it out"
        raise ValueError(msg)


def _open_stacks(
    pattern: str, card: ModelCard, options: InputOptions, report: Callable[[str], None]
) -> StackSource:
    """Source over a stack, a folder or a glob; every file's header is checked before work starts.

    The rows name each cube the way RELION does (``000001@stack.mrcs``).

    Raises
    ------
    ValueError
        If a file is not a readable MRC, or not of the card's box and voxel size.
    """
    paths = find_stacks(pattern)
    names: list[str] = []
    counts: list[int] = []
    told: set[tuple[int, float]] = set()
    for path in paths:
        cubes, voxel_size = read_stack(path, voxel_size=options.voxel_size)
        try:
            bring_to_card(np.asarray(cubes[:1]), voxel_size, card, options)
        except ValueError as error:
            msg = f"{path}: {error}"
            raise ValueError(msg) from None
        if (cubes.shape[1], voxel_size) not in told:
            told.add((cubes.shape[1], voxel_size))
            report_changes(card, cubes.shape[1], voxel_size, options, report)
        counts.append(len(cubes))
        names += [f"{index + 1:06d}@{path}" for index in range(len(cubes))]
    table = particles_from(pd.DataFrame({"rlnImageName": names}))
    return StackSource(table, paths, tuple(counts), card, options)

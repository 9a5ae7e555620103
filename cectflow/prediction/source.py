"""Sources: the subtomograms that prediction reads, in blocks that any process can read alone.

A source is a particle table and, for each file of voxels, which rows are read from it and where:
:func:`open_stacks` and :func:`open_listed` for subtomograms, :func:`open_tomograms` for particles
that are cut from tomograms on the fly. What cannot be read is a fault of its rows, not of the rest.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Num
from numpy.typing import NDArray

from cectflow.coordinates import look_up
from cectflow.model_card import ModelCard
from cectflow.particles import ParticleTable, particles_from
from cectflow.placement import place_particles
from cectflow.prediction.contract import InputOptions, bring_to_card, report_changes, source_box
from cectflow.spectrum import apply_gain
from cectflow.subtomogram import are_finite, cut, inside, to_float32
from cectflow.tomogram_table import TomogramInfo
from cectflow.volume import is_volume, read_stack, read_volume

__all__ = [
    "Block",
    "Border",
    "CubeBatch",
    "CubeSource",
    "open_listed",
    "open_stacks",
    "open_tomograms",
    "read_block",
    "read_blocks",
]

Border = Literal["fill", "fail"]
"""Of cubes that reach over a face of their tomogram: fill them with their mean, or leave them."""
IMAGE_COLUMN = "rlnImageName"
REMEDY_2D = (
    "cut the particles from their tomograms with --tomogram tomograms.star --particles "
    "particles.star, or extract 3D subtomograms"
)
"""For tables and files of 2D image stacks, an image for each tilt, which hold no subtomograms."""
LONGEST_NUMBER = 18
"""Digits of a place in a stack."""

Report = Callable[[str], None]


@dataclass(frozen=True, eq=False, slots=True)
class Block:
    """Particles of one file, which any process can read alone.

    Attributes
    ----------
    path
        A stack of subtomograms, or a tomogram.
    rows
        Of the source's table.
    places
        Of a stack ``(n,)``: which subtomograms, from 0. Of a tomogram ``(n, 3)``: centres in
        voxels, ``z y x``.
    box
        Edge of the cubes in voxels of the file.
    gain
        Of each shell of their spectrum, as the network sees them
        (:func:`cectflow.spectrum.apply_gain`); None: they are not filtered.
    """

    path: Path
    rows: Int[NDArray[np.int64], " n"]
    places: Num[NDArray[Any], "n *zyx"]
    box: int
    gain: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def of_stack(self) -> bool:
        """Whether the file holds subtomograms, and not a tomogram that they are cut from."""
        return self.places.ndim == 1

    def part(self, start: int, stop: int) -> Block:
        """The particles from one place to before another."""
        return replace(self, rows=self.rows[start:stop], places=self.places[start:stop])


@dataclass(frozen=True, eq=False)
class CubeBatch:
    """Some cubes of a block, or of several, as the network expects them.

    Attributes
    ----------
    cubes
        Those that can be predicted.
    kept
        Their places in the block; in several blocks places are counted on from one to the next.
    faults
        Place → why that one cannot be predicted.
    """

    cubes: Float[NDArray[np.float32], "n 1 box box box"]
    kept: Int[NDArray[np.int64], " n"]
    faults: dict[int, str]

    def __len__(self) -> int:
        return len(self.kept)

    def moved(self, places: int) -> CubeBatch:
        """The same cubes, so many places further on."""
        if not places:
            return self
        faults = {place + places: why for place, why in self.faults.items()}
        return CubeBatch(self.cubes, self.kept + places, faults)


@dataclass(frozen=True, eq=False)
class CubeSource:
    """Subtomograms of known particles, and what a card and the user say of them.

    Attributes
    ----------
    table
        One row per particle, in the order of the output.
    files
        What is read: a block for each file, or for each filter of its cubes.
    card, options
        The contract, and what the user says of the input.
    faults
        Row → why nothing can be read for it.
    """

    table: ParticleTable
    files: tuple[Block, ...]
    card: ModelCard
    options: InputOptions
    faults: dict[int, str] = field(default_factory=dict)

    @property
    def particles_per_file(self) -> dict[Path, int]:
        """File → how many particles are read of it."""
        counts: dict[Path, int] = {}
        for block in self.files:
            counts[block.path] = counts.get(block.path, 0) + len(block)
        return counts

    @property
    def num_batches(self) -> int:
        """How many batches there are; a batch never spans two files."""
        return sum(-(-len(block) // self.options.batch_size) for block in self.files)

    def batches(self) -> Iterator[Float[NDArray[np.float32], "n 1 box box box"]]:
        """All cubes, file by file.

        Raises
        ------
        ValueError
            If one of them cannot be read; the message names it.
        """
        for reason in self.faults.values():
            raise ValueError(reason)
        for block in self.files:
            for batch in read_block(block, self.card, self.options):
                for reason in batch.faults.values():
                    raise ValueError(reason)
                yield batch.cubes


def read_block(block: Block, card: ModelCard, options: InputOptions) -> Iterator[CubeBatch]:
    """Cubes of a block, a batch at a time; the file is memory-mapped unless it is compressed.

    Raises
    ------
    ValueError, OSError
        If the file cannot be read, or no longer holds what it did when it was opened.
    """
    voxels, voxel_size = _load_quietly(block, options)
    if block.of_stack and block.places.max(initial=-1) >= len(voxels):
        msg = f"{block.path} holds {len(voxels)} subtomograms now: it was changed meanwhile"
        raise ValueError(msg)
    for start in range(0, len(block), options.batch_size):
        places = block.places[start : start + options.batch_size]
        if block.of_stack:
            cubes = voxels[_as_slice(places)]
        else:
            cubes = cut(voxels, places, block.box, periodic=False, dtype=np.float32)
        cubes = to_float32(cubes)
        sound = are_finite(cubes)
        faults = {
            start + int(place): f"{block.path}: {_describe(block, start + int(place))} holds "
            "values that are not finite: leave it out"
            for place in np.flatnonzero(~sound)
        }
        brought = bring_to_card(cubes if not faults else cubes[sound], voxel_size, card, options)
        if block.gain is not None:
            brought = apply_gain(brought, block.gain)
        yield CubeBatch(brought, start + np.flatnonzero(sound), faults)


def read_blocks(
    blocks: Iterable[Block], card: ModelCard, options: InputOptions
) -> Iterator[CubeBatch]:
    """Cubes of several blocks in batches that small files share.

    A file that cannot be read is a fault of its particles.
    """
    waiting: list[CubeBatch] = []
    for batch in _read_each(blocks, card, options):
        if waiting and sum(map(len, waiting)) + len(batch) > options.batch_size:
            yield _join(waiting)
            waiting = []
        waiting.append(batch)
    if waiting:
        yield _join(waiting)


def _read_each(
    blocks: Iterable[Block], card: ModelCard, options: InputOptions
) -> Iterator[CubeBatch]:
    start = 0
    for block in blocks:
        done = 0
        try:
            for batch in read_block(block, card, options):
                yield batch.moved(start)
                done += len(batch) + len(batch.faults)
        except (OSError, ValueError) as error:
            why = str(error) if str(block.path) in str(error) else f"{block.path}: {error}"
            faults = dict.fromkeys(range(start + done, start + len(block)), why)
            nothing = np.empty((0, 1, *[card.box] * 3), np.float32)
            yield CubeBatch(nothing, np.empty(0, np.int64), faults)
        start += len(block)


def _join(batches: Sequence[CubeBatch]) -> CubeBatch:
    if len(batches) == 1:
        return batches[0]
    faults = {place: why for batch in batches for place, why in batch.faults.items()}
    return CubeBatch(
        np.concatenate([batch.cubes for batch in batches]),
        np.concatenate([batch.kept for batch in batches]),
        faults,
    )


def open_stacks(
    paths: Sequence[Path], card: ModelCard, options: InputOptions, report: Report
) -> CubeSource:
    """Source over all subtomograms of some stacks or single volumes.

    The rows name each cube the way RELION does (``000001@stack.mrcs``). A file that cannot be read
    is one row.

    Raises
    ------
    ValueError, OSError
        If none of the files can be read: why the first cannot.
    """
    names: list[str] = []
    blocks: list[Block] = []
    opened = _Opened(card, options, report)
    for path in paths:
        count = opened.count(path)
        if count is None:
            opened.faults[len(names)] = opened.failed[path]
            names.append(f"{path}")
            continue
        rows = np.arange(len(names), len(names) + count)
        blocks.append(Block(path, rows, np.arange(count), opened.box(path)))
        names += [f"{index + 1:06d}@{path}" for index in range(count)]
    opened.refuse_nothing(blocks)
    table = particles_from(pd.DataFrame({IMAGE_COLUMN: names}))
    return CubeSource(table, tuple(blocks), card, options, opened.faults)


def open_listed(
    table: ParticleTable, folder: Path, card: ModelCard, options: InputOptions, report: Report
) -> CubeSource:
    """Source over the subtomograms that a table names in ``rlnImageName``.

    Parameters
    ----------
    table
        ``3@stack.mrcs``, counted from 1, or the path of a single volume.
    folder
        Of the table. Paths are RELION's, from where it is run; one that is not there is looked
        for from this folder.
    card, options, report
        As of :func:`open_stacks`.

    Raises
    ------
    ValueError, OSError
        If the table names no subtomograms, or none can be read.
    """
    if IMAGE_COLUMN not in table.rows:
        msg = (
            f"the table has no column {IMAGE_COLUMN}: expected one with the subtomograms' files, "
            "or --tomogram, which particles at coordinates are cut from"
        )
        raise ValueError(msg)
    _refuse_2d(table)
    opened = _Opened(card, options, report)
    names, numbers, files = _named_places(table, opened.faults)
    blocks = []
    for name, rows in zip(names, _grouped(files, len(names)), strict=True):
        path = Path(name) if is_volume(Path(name)) else folder / name
        count = opened.count(path)
        if count is None:
            opened.faults |= dict.fromkeys(rows.tolist(), opened.failed[path])
            continue
        there = numbers[rows] < count
        opened.faults |= {
            row: f"{path} holds {count} subtomograms: there is no number {numbers[row] + 1}"
            for row in rows[~there].tolist()
        }
        if there.any():
            blocks.append(Block(path, rows[there], numbers[rows[there]], opened.box(path)))
    opened.refuse_nothing(blocks)
    return CubeSource(table, tuple(blocks), card, options, opened.faults)


def open_tomograms(
    table: ParticleTable,
    tomograms: Mapping[str, Path | str],
    card: ModelCard,
    options: InputOptions,
    report: Report,
    *,
    coords_voxel_size: float | None = None,
    infos: Mapping[str, TomogramInfo] | None = None,
    border: Border = "fill",
) -> CubeSource:
    """Source over particles that are cut from tomograms on the fly; nothing is stored.

    Parameters
    ----------
    table
        Of particles in one or many tomograms.
    tomograms
        Name in the table → its file, or why there is none. The name is empty where the table names
        no tomograms.
    card, options, report
        As of :func:`open_stacks`.
    coords_voxel_size
        Å per unit of the table's coordinates, where they are of another binning.
    infos
        Name → the tomogram's row in RELION's table of tomograms.
    border
        What becomes of cubes that reach over a face.

    Raises
    ------
    ValueError, OSError
        If no particle can be read: why the first cannot.
    """
    if not len(table):
        msg = "the table holds no particles: expected at least one"
        raise ValueError(msg)
    opened = _Opened(card, options, report)
    blocks: list[Block] = []
    beyond = 0
    for name, rows in table.rows_by_tomogram().items():
        path = tomograms[name]
        try:
            if isinstance(path, str):
                raise ValueError(path)
            voxels, voxel_size = _load(path, options.voxel_size, of_stack=False)
            shape = voxels.shape
            box = source_box(card, voxel_size, options, opened.report_once)
            centres, misplaced = place_particles(
                table.take(rows), voxel_size=voxel_size, shape=shape,
                coords_voxel_size=coords_voxel_size, info=(infos or {}).get(name),
            )  # fmt: skip
        except (ValueError, OSError) as error:
            opened.fail(rows, error)
            continue
        if misplaced:
            opened.faults |= {int(rows[at]): f"{path}: {why}" for at, why in misplaced.items()}
            placed = ~np.isnan(centres).any(axis=1)
            rows, centres = rows[placed], centres[placed]
        complete = inside(centres, shape, box)
        if border == "fail":
            reason = f"{path}: the cube of {box} voxels reaches over the border"
            opened.faults |= dict.fromkeys(rows[~complete].tolist(), reason)
            rows, centres = rows[complete], centres[complete]
        beyond += int((~complete).sum())
        if len(rows):
            # Neighbours after one another: most of a cube is then in a cache, or just read.
            order = np.lexsort((centres // box).T[::-1])
            blocks.append(Block(path, rows[order], centres[order], box))
    opened.refuse_nothing(blocks)
    if options.contrast != card.contrast:
        report(f"contrast: input is {options.contrast}, {card.contrast} is expected: flipped")
    if beyond:
        done = "left out" if border == "fail" else "what is missing is filled with their mean"
        report(f"{beyond} of {len(table)} subtomograms reach over the border: {done}")
    return CubeSource(table, tuple(blocks), card, options, opened.faults)


class _Opened:
    """Headers of files that were looked at, and what was wrong with them."""

    def __init__(self, card: ModelCard, options: InputOptions, report: Report) -> None:
        self.card = card
        self.options = options
        self.report = report
        self.faults: dict[int, str] = {}
        self.failed: dict[Path, str] = {}
        self._boxes: dict[Path, int] = {}
        self._first: Exception | None = None
        self._told: set[object] = set()

    def count(self, path: Path) -> int | None:
        """Subtomograms of a stack; None if it cannot be used."""
        try:
            cubes, voxel_size = _load(path, self.options.voxel_size, of_stack=True)
            self._check(path, cubes, voxel_size)
        except (ValueError, OSError) as error:
            self._first = self._first or error
            self.failed[path] = str(error)
            return None
        self._boxes[path] = cubes.shape[1]
        return len(cubes)

    def _check(self, path: Path, cubes: NDArray[Any], voxel_size: float) -> None:
        """Refuse cubes that cannot be brought to the card; say once what is done to others."""
        shape = cubes.shape[1:]
        if (shape, voxel_size) in self._told:
            return
        if len(set(shape)) > 1:
            msg = (
                f"{path} measures {' x '.join(map(str, shape[::-1]))} voxels (x, y, z): expected "
                f"subtomograms of {self.card.box}³; if it is a tomogram, give it as --tomogram "
                f"with --particles; if it is a stack of 2D images, {REMEDY_2D}"
            )
            raise ValueError(msg)
        try:
            bring_to_card(np.asarray(cubes[:1]), voxel_size, self.card, self.options)
        except ValueError as error:
            msg = f"{path}: {error}"
            raise ValueError(msg) from None
        self._told.add((shape, voxel_size))
        report_changes(self.card, shape[0], voxel_size, self.options, self.report)

    def box(self, path: Path) -> int:
        """Edge of the cubes of a stack that was counted."""
        return self._boxes[path]

    def report_once(self, line: str) -> None:
        """Report what holds for many tomograms alike."""
        if line not in self._told:
            self._told.add(line)
            self.report(line)

    def fail(self, rows: NDArray[np.int64], error: Exception) -> None:
        """Note why rows cannot be predicted."""
        self._first = self._first or error
        self.faults |= dict.fromkeys(rows.tolist(), str(error))

    def refuse_nothing(self, blocks: Sequence[Block]) -> None:
        """Raise the first fault where nothing at all can be read."""
        if blocks:
            return
        if self._first is not None:
            raise self._first
        msg = next(iter(self.faults.values()), "there are no particles to predict")
        raise ValueError(msg)


_loading = threading.Lock()


def _load_quietly(block: Block, options: InputOptions) -> tuple[NDArray[Any], float]:
    """What there is to say of the file was said when it was opened.

    One thread at a time: a file is loaded once, and filters of warnings are the process's.
    """
    with _loading, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return _load(block.path, options.voxel_size, of_stack=block.of_stack)


def _load(path: Path, voxel_size: float | None, *, of_stack: bool) -> tuple[NDArray[Any], float]:
    """Voxels of a stack or tomogram and their size."""
    stat = path.stat() if path.exists() else None  # what is absent is refused by the reader
    stamp = None if stat is None else (stat.st_size, stat.st_mtime_ns)
    return _load_once(path, voxel_size, of_stack, stamp)


@lru_cache(maxsize=1)  # a compressed tomogram would be read anew for every block of its particles
def _load_once(
    path: Path, voxel_size: float | None, of_stack: bool, stamp: object
) -> tuple[NDArray[Any], float]:
    if of_stack:
        return read_stack(path, voxel_size=voxel_size)
    volume = read_volume(path, voxel_size=voxel_size)
    return volume.data, volume.voxel_size


def _named_places(
    table: ParticleTable, faults: dict[int, str]
) -> tuple[list[str], Int[NDArray[np.int64], " n"], Int[NDArray[np.int64], " n"]]:
    """Files that a table names; place of each particle in its file, from 0; which file, or -1."""
    known: dict[str, int] = {}
    numbers = np.zeros(len(table), np.int64)
    files = np.full(len(table), -1, np.int64)
    for row, name in enumerate(table.rows[IMAGE_COLUMN].astype(str)):
        number, at, path = name.partition("@")
        if not (at and number.isdecimal()):
            number, path = "1", name  # a single volume
        if not path or len(number) > LONGEST_NUMBER or int(number) == 0:
            faults[row] = f"{name!r} names no subtomogram: expected 3@stack.mrcs, counted from 1"
            continue
        numbers[row] = int(number) - 1
        files[row] = known.setdefault(path, len(known))
    return list(known), numbers, files


def _grouped(groups: Int[NDArray[np.int64], " n"], count: int) -> list[NDArray[np.int64]]:
    """Rows of each of so many groups, in order; a group below 0 is none."""
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], np.arange(count + 1))
    return [order[a:b] for a, b in pairwise(starts)]


def _refuse_2d(table: ParticleTable) -> None:
    for column, of_images in (("rlnTomoSubTomosAre2DStacks", 1), ("rlnImageDimensionality", 2)):
        try:
            values = look_up(table, column)
        except ValueError:  # a table that does not say it of every particle
            continue
        if values is not None and (values == of_images).any():
            msg = (
                f"{column} {of_images} says that {IMAGE_COLUMN} names stacks of 2D images, one for "
                f"each tilt, which hold no subtomograms: {REMEDY_2D}"
            )
            raise ValueError(msg)


def _as_slice(places: NDArray[Any]) -> Any:
    """The same places as a slice where they follow one another, which reads without a copy."""
    if len(places) and (np.diff(places) == 1).all():
        return slice(int(places[0]), int(places[-1]) + 1)
    return places


def _describe(block: Block, place: int) -> str:
    """What a user calls one of a block's particles: counted from 1 in its file or table."""
    if block.of_stack:
        return f"subtomogram {int(block.places[place]) + 1}"
    return f"the subtomogram of particle {int(block.rows[place]) + 1}"

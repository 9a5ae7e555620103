"""Sources: the subtomograms that prediction reads, in blocks that any process can read alone.

A source is a particle table and, for each file of voxels, which rows are read from it and where:
:func:`open_stacks` and :func:`open_listed` for subtomograms, :func:`open_tomograms` for particles
that are cut from tomograms on the fly. What cannot be read is a fault of its rows, not of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Num
from numpy.typing import NDArray

from cectflow.coordinates import coordinates_zyx
from cectflow.model_card import ModelCard
from cectflow.particles import ParticleTable, particles_from
from cectflow.prediction.contract import InputOptions, bring_to_card, report_changes, source_box
from cectflow.subtomogram import cut, inside
from cectflow.tomogram_table import TomogramInfo
from cectflow.volume import read_stack, read_volume

__all__ = [
    "Block",
    "Border",
    "CubeBatch",
    "CubeSource",
    "open_listed",
    "open_stacks",
    "open_tomograms",
    "read_block",
]

Border = Literal["fill", "fail"]
"""Of cubes that reach over a face of their tomogram: fill them with their mean, or leave them."""
IMAGE_COLUMN = "rlnImageName"

Report = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Block:
    """Particles of one file that are read, predicted and recorded together.

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
    """

    path: Path
    rows: Int[NDArray[np.int64], " n"]
    places: Num[NDArray[Any], "n *zyx"]
    box: int

    def __len__(self) -> int:
        return len(self.rows)

    def split(self, size: int) -> Iterator[Block]:
        """Blocks of at most so many particles, in order."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield replace(self, rows=self.rows[part], places=self.places[part])


@dataclass(frozen=True, eq=False)
class CubeBatch:
    """Some cubes of a block as the network expects them.

    Attributes
    ----------
    cubes
        Those that can be predicted.
    kept
        Their places in the block.
    faults
        Place in the block → why that one cannot be predicted.
    """

    cubes: Float[NDArray[np.float32], "n 1 box box box"]
    kept: Int[NDArray[np.int64], " n"]
    faults: dict[int, str]


@dataclass(frozen=True, eq=False)
class CubeSource:
    """Subtomograms of known particles, and what a card and the user say of them.

    Attributes
    ----------
    table
        One row per particle, in the order of the output.
    files
        What is read, a block for each file.
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
        If the file cannot be read.
    """
    if block.places.ndim == 1:
        stack, voxel_size = read_stack(block.path, voxel_size=options.voxel_size)
    else:
        volume = read_volume(block.path, voxel_size=options.voxel_size)
        voxel_size = volume.voxel_size
    for start in range(0, len(block), options.batch_size):
        places = block.places[start : start + options.batch_size]
        if block.places.ndim == 1:
            cubes = stack[_as_slice(places)]
        else:
            cubes = cut(volume.data, places, block.box, periodic=False, dtype=np.float32)
        cubes = np.asarray(cubes, np.float32)
        # A sum is finite only if all of its terms are, and takes a third of the time.
        sound = np.isfinite(cubes.sum(axis=(1, 2, 3), dtype=np.float64))
        what = "subtomogram" if block.places.ndim == 1 else "the subtomogram of particle"
        faults = {
            start + int(place): f"{block.path}: {what} {_number(block, start + int(place))} holds "
            "values that are not finite: leave it out"
            for place in np.flatnonzero(~sound)
        }
        brought = bring_to_card(cubes if not faults else cubes[sound], voxel_size, card, options)
        yield CubeBatch(brought, start + np.flatnonzero(sound), faults)


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
    opened = _Opened(card, options, report)
    places: dict[str, tuple[list[int], list[int]]] = {}
    for row, name in enumerate(table.rows[IMAGE_COLUMN].astype(str)):
        number, _, path = name.rpartition("@")
        if number and not number.isdecimal():
            opened.faults[row] = f"{name!r} names no subtomogram: expected 3@stack.mrcs"
            continue
        rows, numbers = places.setdefault(path, ([], []))
        rows.append(row)
        numbers.append(int(number or 1) - 1)
    blocks = []
    for given, (rows, numbers) in places.items():
        file = Path(given) if Path(given).is_file() else folder / given
        count = opened.count(file)
        if count is None:
            opened.faults |= dict.fromkeys(rows, opened.failed[file])
            continue
        wrong = {row: at for row, at in zip(rows, numbers, strict=True) if not 0 <= at < count}
        opened.faults |= {
            row: f"{file} holds {count} subtomograms: there is no number {at + 1}"
            for row, at in wrong.items()
        }
        kept = np.array([row for row in rows if row not in wrong], np.int64)
        chosen = np.array([at for at in numbers if 0 <= at < count], np.int64)
        if len(kept):
            blocks.append(Block(file, kept, chosen, opened.box(file)))
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
            volume = read_volume(path, voxel_size=options.voxel_size)
            shape = volume.shape
            box = source_box(card, volume.voxel_size, options, opened.report_once)
            centres = coordinates_zyx(
                table.take(rows), voxel_size=volume.voxel_size, shape=shape,
                coords_voxel_size=coords_voxel_size, info=(infos or {}).get(name),
            )  # fmt: skip
        except (ValueError, OSError) as error:
            opened.fail(rows, error)
            continue
        complete = inside(centres, shape, box)
        if border == "fail":
            reason = f"{path}: the cube of {box} voxels reaches over the border"
            opened.faults |= dict.fromkeys(rows[~complete].tolist(), reason)
            rows, centres = rows[complete], centres[complete]
        beyond += int((~complete).sum())
        if len(rows):
            blocks.append(Block(path, rows, centres, box))
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
            cubes, voxel_size = read_stack(path, voxel_size=self.options.voxel_size)
            try:
                bring_to_card(np.asarray(cubes[:1]), voxel_size, self.card, self.options)
            except ValueError as error:
                msg = f"{path}: {error}"
                raise ValueError(msg) from None
        except (ValueError, OSError) as error:
            self._first = self._first or error
            self.failed[path] = str(error)
            return None
        self._boxes[path] = box = cubes.shape[1]
        if (box, voxel_size) not in self._told:
            self._told.add((box, voxel_size))
            report_changes(self.card, box, voxel_size, self.options, self.report)
        return len(cubes)

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


def _as_slice(places: NDArray[Any]) -> Any:
    """The same places as a slice where they follow one another, which reads without a copy."""
    if len(places) and (np.diff(places) == 1).all():
        return slice(int(places[0]), int(places[-1]) + 1)
    return places


def _number(block: Block, place: int) -> int:
    """What a user calls one of a block's particles: counted from 1 in its file or table."""
    of_file = block.places[place] if block.places.ndim == 1 else block.rows[place]
    return int(of_file) + 1

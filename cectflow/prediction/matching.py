"""Matching: cubes are filtered so that their spectrum is that of the training data, if asked for.

Where it is not asked for, a sample is looked at, and a warning tells where it would be of use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cectflow.model_card import ModelCard
from cectflow.prediction.journal import Journal
from cectflow.prediction.source import Block, CubeSource, read_blocks
from cectflow.progress import track
from cectflow.spectrum import PowerSum

__all__ = [
    "FEW_CUBES",
    "JUDGED_CUBES",
    "SAMPLED_CUBES",
    "group_by_spectrum",
    "match_spectra",
    "require_spectrum",
    "settle_spectrum",
    "tell_gains",
    "warn_of_other",
    "with_gains",
]

SAMPLED_CUBES = 128
"""Of which a spectrum is measured: its power per shell is then known to a percent or two."""
FEW_CUBES = 8
"""Below it a spectrum is that of its particles more than that of the tomogram."""
JUDGED_CUBES = 32
"""Of a file, or of small ones together, of which it is judged whether a filter is of use."""
JUDGED_FILES = 4
"""At most, evenly spread over all."""
BAND = (0.05, 0.45)
"""Cycles per voxel of which the gain is told."""
LIKE = 1.7
"""Largest over smallest gain in the band, up to which spectra count as alike. Between the two
tomograms of EMPIAR-10499 in shared/data and cubes simulated like them it is 1.2 and 1.4, between
each and cubes simulated like the other 2.2; ten simulated cubes have 1.1 to 1.2."""

NOTE = "spectra"
"""Of a journal: gains, so that a rerun filters as the first run did."""


@dataclass(frozen=True)
class SpectrumGroup:
    """Particles that share a filter.

    Attributes
    ----------
    name
        Of their tomogram or file.
    parts
        Which file of the source, and which places of its block.
    """

    name: str
    parts: tuple[tuple[int, NDArray[np.int64]], ...]

    def __len__(self) -> int:
        return sum(len(places) for _, places in self.parts)


def require_spectrum(card: ModelCard, label: str) -> NDArray[np.float64]:
    """Power per shell of the training data.

    Raises
    ------
    ValueError
        If the card does not state it.
    """
    if card.spectrum is None:
        msg = (
            f"the card of {label} does not state the spectrum of its training data: train it again "
            "with this cectflow, or leave --match-spectrum out"
        )
        raise ValueError(msg)
    return np.asarray(card.spectrum)


def settle_spectrum(
    source: CubeSource,
    label: str,
    report: Callable[[str], None],
    journal: Journal | None = None,
) -> CubeSource:
    """The source, its cubes filtered if the user asked for it; if not, a warning where it matters.

    Parameters
    ----------
    source, label, report, journal
        As of :func:`match_spectra`.
    """
    if source.options.match_spectrum:
        return match_spectra(source, label, report, journal)
    if source.card.spectrum is not None and source.files:
        wanted = np.asarray(source.card.spectrum)
        groups = _first_of_some(source)
        measured = _measure(source, groups, JUDGED_CUBES)
        judged = [(_unlikeness(sums, wanted), sums, group.name)
                  for sums, group in zip(measured, groups, strict=True)]  # fmt: skip
        _, sums, name = max(judged, key=lambda each: each[0])
        warn_of_other(sums, wanted, name, report)
    return source


def match_spectra(
    source: CubeSource,
    label: str,
    report: Callable[[str], None],
    journal: Journal | None = None,
) -> CubeSource:
    """The source with a filter for each tomogram, measured on a sample of its particles.

    Particles share a filter if their table says that they are of one tomogram; where it names none,
    if they are of one file. Groups of fewer than :data:`FEW_CUBES` particles have one filter
    together. The sample is the same however the particles are stored, read, and split into blocks.

    Parameters
    ----------
    source
        What is read without filters.
    label
        Of the network, for messages.
    report
        Told how many filters there are, and what they do.
    journal
        Keeps the filters, and has them where an earlier run has measured them.

    Raises
    ------
    ValueError
        If the card does not state the spectrum of the training data.
    """
    wanted = require_spectrum(source.card, label)
    groups = group_by_spectrum(source)
    gains = _noted(journal, groups, len(wanted))
    missing = [place for place, gain in enumerate(gains) if gain is None]
    if missing:
        measured = _measure_gains(source, [groups[place] for place in missing], wanted)
        for place, gain in zip(missing, measured, strict=True):
            gains[place] = gain
        if journal is not None:
            journal.note(NOTE, gains)
    few = sum(len(group) < FEW_CUBES for group in groups)
    tell_gains([gain for gain in gains if gain is not None], source.card.box, report, few=few)
    unknown = [
        group.name for group, gain in zip(groups, gains, strict=True)
        if gain is None
    ]  # fmt: skip
    if unknown:
        report(
            f"warning: {len(unknown)} of {len(groups)} spectra cannot be measured, of which the "
            f"first is that of {unknown[0]}: no cube there can be read and varies"
        )
    return with_gains(source, groups, gains)


def group_by_spectrum(source: CubeSource) -> list[SpectrumGroup]:
    """Particles that share a filter, as :func:`match_spectra` says."""
    names = np.zeros(len(source.table), np.int64)
    by_name = source.table.rows_by_tomogram()
    for number, rows in enumerate(by_name.values()):
        names[rows] = number
    is_named = [*by_name] != [""]
    titles = [*by_name]
    found: dict[str, list[tuple[int, NDArray[np.int64]]]] = {}
    for number, block in enumerate(source.files):
        if not is_named:
            found.setdefault(str(block.path), []).append((number, np.arange(len(block))))
            continue
        of_block = names[block.rows]
        order = np.argsort(of_block, kind="stable")
        numbers, starts = np.unique(of_block[order], return_index=True)
        for name, places in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
            found.setdefault(titles[name], []).append((number, places))
    groups = [SpectrumGroup(name, tuple(parts)) for name, parts in found.items()]
    small = [group for group in groups if len(group) < FEW_CUBES]
    if len(small) < 2:
        return groups
    pooled = tuple(part for group in small for part in group.parts)
    name = f"{small[0].name} and {len(small) - 1} more of fewer than {FEW_CUBES} particles"
    large = [group for group in groups if len(group) >= FEW_CUBES]
    return [*large, SpectrumGroup(name, pooled)]


def with_gains(
    source: CubeSource,
    groups: Sequence[SpectrumGroup],
    gains: Sequence[tuple[float, ...] | None],
) -> CubeSource:
    """The source, split into blocks of one filter each.

    Parameters
    ----------
    source
        What is read without filters.
    groups
        Of all its particles.
    gains
        Of each group; None: its cubes stay as they are.
    """
    blocks: dict[int, list[Block]] = {number: [] for number in range(len(source.files))}
    for group, gain in zip(groups, gains, strict=True):
        for number, places in group.parts:
            block = source.files[number]
            taken = replace(block, rows=block.rows[places], places=block.places[places], gain=gain)
            blocks[number].append(taken)
    files = tuple(block for number in blocks for block in blocks[number])
    return replace(source, files=files)


def _noted(
    journal: Journal | None, groups: Sequence[SpectrumGroup], shells: int
) -> list[tuple[float, ...] | None]:
    """Gain of each group that an earlier run has measured; None: it has not, or could not."""
    content = None if journal is None else journal.noted(NOTE)
    unknown: list[tuple[float, ...] | None] = [None] * len(groups)
    if not isinstance(content, list) or len(content) != len(groups):
        return unknown
    try:
        gains = [None if gain is None else tuple(map(float, gain)) for gain in content]
    except (TypeError, ValueError):
        return unknown
    if not all(gain is None or _is_gain(gain, shells) for gain in gains):
        return unknown
    return gains


def _is_gain(gain: tuple[float, ...], shells: int) -> bool:
    return len(gain) == shells and all(0 <= each < math.inf for each in gain)


def _measure_gains(
    source: CubeSource, groups: Sequence[SpectrumGroup], wanted: NDArray[np.float64]
) -> list[tuple[float, ...] | None]:
    """Gain of each group; None: no cube of it can be read and varies."""
    measured = _measure(source, groups, SAMPLED_CUBES)
    # Of these nothing in the sample could be used; there may be others.
    empty = [place for place, sums in enumerate(measured) if not sums.num_cubes]
    again = _measure(source, [groups[place] for place in empty], len(source.table))
    for place, sums in zip(empty, again, strict=True):
        measured[place] = sums
    return [sums.gain_to(wanted) if sums.num_cubes else None for sums in measured]


def _first_of_some(source: CubeSource) -> list[SpectrumGroup]:
    """First particles of a few files, as many as are judged, of small files several together."""
    count = len(source.files)
    starts = np.unique(np.linspace(0, count - 1, min(count, JUDGED_FILES)).round().astype(int))
    groups = []
    for start in starts.tolist():
        parts, missing = [], JUDGED_CUBES
        for number in range(start, count):
            places = np.arange(min(len(source.files[number]), missing))
            parts.append((number, places))
            missing -= len(places)
            if not missing:
                break
        groups.append(SpectrumGroup(str(source.files[start].path), tuple(parts)))
    return groups


def _measure(source: CubeSource, groups: Sequence[SpectrumGroup], most: int) -> list[PowerSum]:
    """Power of so many particles at most of each group, evenly spread over its rows."""
    measured = [PowerSum(source.card.box) for _ in groups]
    # File after file: a compressed one is read once, whatever is in it.
    wanted: dict[int, list[tuple[int, Block]]] = {}
    for place, group in enumerate(groups):
        rows = np.sort(np.concatenate([source.files[n].rows[places] for n, places in group.parts]))
        chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(int)]
        for number, places in group.parts:
            block = source.files[number]
            kept = places[np.isin(block.rows[places], chosen)]
            if len(kept):
                kept = kept[np.argsort(block.rows[kept])]  # sums then do not depend on their order
                part = replace(block, rows=block.rows[kept], places=block.places[kept])
                wanted.setdefault(number, []).append((place, part))
    for number in track(sorted(wanted), total=len(wanted), title="measuring spectra"):
        for place, part in wanted[number]:
            for batch in read_blocks([part], source.card, source.options):
                measured[place].add(batch.cubes)
    return measured


def warn_of_other(
    measured: PowerSum,
    wanted: NDArray[np.float64],
    what: str,
    report: Callable[[str], None],
) -> None:
    """Tell where spectra differ by so much that a filter is of use.

    Parameters
    ----------
    measured, wanted
        Of the user's cubes, if there are enough to tell, and of the training data.
    what
        Whose spectrum it is.
    report
        Told.
    """
    if _unlikeness(measured, wanted) > LIKE:
        gain = _in_band([measured.gain_to(wanted)], measured.box)
        largest = f"{1 / gain.min():.2f}" if gain.min() > 1e-3 else "more than 1000"
        report(
            f"warning: the power spectrum of {what} is not that of the training data (amplitudes "
            f"differ by factors of {1 / gain.max():.2f} to {largest} between {BAND[0]} "
            f"and {BAND[1]} cycles per voxel, {measured.num_cubes} cubes): give --match-spectrum, "
            "or calibrate the recipe on these data"
        )


def _unlikeness(measured: PowerSum, wanted: NDArray[np.float64]) -> float:
    """Largest over smallest gain in the band; 1 where there are too few cubes to tell."""
    if measured.num_cubes < FEW_CUBES:
        return 1.0
    gain = _in_band([measured.gain_to(wanted)], measured.box)
    smallest = float(gain.min())
    return float(gain.max()) / smallest if smallest > 0 else np.inf


def tell_gains(
    gains: list[tuple[float, ...]], box: int, report: Callable[[str], None], *, few: int = 0
) -> None:
    """Tell what filters do.

    Parameters
    ----------
    gains, box
        Of each shell of cubes of this edge, a filter each.
    report
        Told.
    few
        How many of them are of fewer than :data:`FEW_CUBES` cubes.
    """
    if not gains:
        return
    inner = _in_band(gains, box)
    report(
        f"spectrum: filtered to that of the training data, filters: {len(gains)}; gain "
        f"{inner.min():.2f} to {inner.max():.2f} between {BAND[0]} and {BAND[1]} cycles per voxel"
    )
    if few:
        report(
            f"warning: {few} of {len(gains)} spectra are of fewer than {FEW_CUBES} cubes, "
            "whose own structure is then filtered too"
        )


def _in_band(gains: Sequence[tuple[float, ...]], box: int) -> NDArray[np.float64]:
    """Gains between the band's ends. Their scale says nothing: each cube is normalised later."""
    low, high = (round(edge * box) for edge in BAND)
    inner = np.array(gains)[:, max(1, low) : high + 1]
    return np.asarray(inner / np.sqrt((inner**2).mean(axis=1, keepdims=True)))

"""Matching: cubes are filtered so that their spectrum is that of the training data, if asked for.

Where it is not asked for, a sample is looked at, and a warning tells where it would be of use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from cectflow.model_card import ModelCard
from cectflow.prediction.source import Block, CubeSource, read_blocks
from cectflow.progress import track
from cectflow.spectrum import PowerSum

__all__ = ["match_spectra", "require_spectrum", "settle_spectrum"]

SAMPLED_CUBES = 128
"""Of which a spectrum is measured: its power per shell is then known to a percent or two."""
FEW_CUBES = 8
"""Below it a spectrum is that of its particles more than that of the tomogram."""
JUDGED_CUBES = 32
"""Of the first file or files, of which it is judged whether a filter is of use."""
BAND = (0.05, 0.45)
"""Cycles per voxel of which the gain is told."""
LIKE = 1.7
"""Largest over smallest gain in the band, up to which spectra count as alike. Between the two
tomograms of EMPIAR-10499 in shared/data and cubes simulated like them it is 1.2 and 1.4, between
each and cubes simulated like the other 2.2; ten simulated cubes have 1.1 to 1.2."""

Group = list[tuple[int, NDArray[np.int64]]]
"""Of particles that share a spectrum: which file, and which places of its block."""


def require_spectrum(card: ModelCard, label: str) -> NDArray[np.float64]:
    """Power per shell of the training data.

    Raises
    ------
    ValueError
        If the card does not state it.
    """
    if card.spectrum is None:
        why = (
            "semantic segmenters see whole tomograms, whose spectrum is not matched: leave "
            "--match-spectrum out"
            if card.task == "semantic"
            else "train it again with this cectflow, or leave --match-spectrum out"
        )
        msg = f"the card of {label} does not state the spectrum of its training data: {why}"
        raise ValueError(msg)
    return np.asarray(card.spectrum)


def settle_spectrum(source: CubeSource, label: str, report: Callable[[str], None]) -> CubeSource:
    """The source, its cubes filtered if the user asked for it; if not, a warning where it matters.

    Parameters
    ----------
    source, label, report
        As of :func:`match_spectra`.
    """
    if source.options.match_spectrum:
        return match_spectra(source, label, report)
    if source.card.spectrum is not None and source.files:
        measured = _measure(source, _first(source), JUDGED_CUBES)
        if measured.num_cubes >= FEW_CUBES:
            gain = _in_band([measured.gain_to(np.asarray(source.card.spectrum))], source.card.box)
            if gain.max() > LIKE * gain.min():
                report(
                    f"warning: the power spectrum of these cubes is not that of the training data "
                    f"(amplitudes differ by factors of {1 / gain.max():.2f} to "
                    f"{1 / gain.min():.2f} between {BAND[0]} and {BAND[1]} cycles per voxel, "
                    f"{measured.num_cubes} cubes): give --match-spectrum, or calibrate the "
                    "recipe on these data"
                )
    return source


def match_spectra(source: CubeSource, label: str, report: Callable[[str], None]) -> CubeSource:
    """The source with a filter for each tomogram, measured on a sample of its particles.

    Particles share a filter if their table says that they are of one tomogram. Where it names none,
    each file has its own, and those of fewer than :data:`FEW_CUBES` particles have one together.
    The sample is the same however the particles are stored, read, and split into blocks.

    Parameters
    ----------
    source
        What is read without filters.
    label
        Of the network, for messages.
    report
        Told how many filters there are, and what they do.

    Raises
    ------
    ValueError
        If the card does not state the spectrum of the training data.
    """
    wanted = require_spectrum(source.card, label)
    blocks: dict[int, list[Block]] = {number: [] for number in range(len(source.files))}
    gains: list[tuple[float, ...]] = []
    few = 0
    groups = _groups(source)
    for group in track(groups, total=len(groups), title="measuring spectra"):
        measured = _measure(source, group, SAMPLED_CUBES)
        gain = None
        if measured.num_cubes:  # else they are faults, and are so again when all are read
            gain = measured.gain_to(wanted)
            gains.append(gain)
            few += measured.num_cubes < FEW_CUBES
        for number, places in group:
            block = source.files[number]
            taken = replace(block, rows=block.rows[places], places=block.places[places], gain=gain)
            blocks[number].append(taken)
    _tell(gains, few, source.card.box, report)
    files = tuple(block for number in blocks for block in blocks[number])
    return replace(source, files=files)


def _groups(source: CubeSource) -> list[Group]:
    """Particles that share a spectrum."""
    names = np.zeros(len(source.table), np.int64)
    by_name = source.table.rows_by_tomogram()
    for number, rows in enumerate(by_name.values()):
        names[rows] = number
    is_named = list(by_name) != [""]
    groups: dict[tuple[str, int], Group] = {}
    for number, block in enumerate(source.files):
        if is_named:
            of_block = names[block.rows]
            order = np.argsort(of_block, kind="stable")
            found, starts = np.unique(of_block[order], return_index=True)
            for name, places in zip(found.tolist(), np.split(order, starts[1:]), strict=True):
                groups.setdefault(("tomogram", name), []).append((number, places))
            continue
        key = ("file", number) if len(block) >= FEW_CUBES else ("small files", 0)
        groups.setdefault(key, []).append((number, np.arange(len(block))))
    return list(groups.values())


def _first(source: CubeSource) -> Group:
    """The first files, of at least as many particles as are judged, if there are so many."""
    group: Group = []
    for number, block in enumerate(source.files):
        group.append((number, np.arange(len(block))))
        if sum(len(places) for _, places in group) >= JUDGED_CUBES:
            break
    return group


def _measure(source: CubeSource, group: Group, most: int) -> PowerSum:
    """Power of so many particles of a group at most, evenly spread over its rows."""
    rows = np.sort(np.concatenate([source.files[number].rows[places] for number, places in group]))
    chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).round().astype(int)]
    total = PowerSum(source.card.box)
    for batch in read_blocks(_sampled(source, group, chosen), source.card, source.options):
        total.add(batch.cubes)
    return total


def _sampled(source: CubeSource, group: Group, chosen: NDArray[np.int64]) -> Iterator[Block]:
    for number, places in group:
        block = source.files[number]
        kept = places[np.isin(block.rows[places], chosen)]
        if len(kept):
            kept = kept[np.argsort(block.rows[kept])]  # sums then do not depend on the order read
            yield replace(block, rows=block.rows[kept], places=block.places[kept])


def _tell(
    gains: list[tuple[float, ...]], few: int, box: int, report: Callable[[str], None]
) -> None:
    if not gains:
        return
    inner = _in_band(gains, box)
    report(
        f"spectrum: filtered to that of the training data, filters: {len(gains)}; gain "
        f"{inner.min():.2f} to {inner.max():.2f} between {BAND[0]} and {BAND[1]} cycles per voxel"
    )
    if few:
        report(
            f"warning: {few} of {len(gains)} spectra are of fewer than {FEW_CUBES} particles, "
            "whose own structure is then filtered too"
        )


def _in_band(gains: Sequence[tuple[float, ...]], box: int) -> NDArray[np.float64]:
    """Gains between the band's ends. Their scale says nothing: each cube is normalised later."""
    low, high = (round(edge * box) for edge in BAND)
    inner = np.array(gains)[:, max(1, low) : high + 1]
    return np.asarray(inner / np.sqrt((inner**2).mean(axis=1, keepdims=True)))

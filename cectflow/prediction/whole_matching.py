"""Matching of whole tomograms: a tomogram is filtered to the spectrum of the training data.

The filter is one for the whole tomogram, measured on cubes spread over it, so what the network
finds still does not depend on the windows. Particles or not makes little difference: in a
simulated tomogram (occupancy 5 %, SNR 0.1) the amplitudes of cubes at particles and of cubes
anywhere are within 8 % of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from cectflow.model_card import ModelCard
from cectflow.prediction.matching import (
    FEW_CUBES,
    JUDGED_CUBES,
    SAMPLED_CUBES,
    require_spectrum,
    tell_gains,
    warn_of_other,
)
from cectflow.prediction.tomogram import (
    SLAB_VOXELS,
    WholeTomogram,
    remeasured,
    require_room,
    slabs,
    unmatchable,
)
from cectflow.prediction.windows import Region
from cectflow.progress import track
from cectflow.spectrum import PowerSum, gain_at
from cectflow.volume_writer import create_scratch

__all__ = ["filter_tomogram", "match_tomogram", "settle_tomogram"]


def settle_tomogram(
    tomogram: WholeTomogram,
    card: ModelCard,
    label: str,
    folder: Path,
    report: Callable[[str], None],
    *,
    match_spectrum: bool,
) -> WholeTomogram:
    """The tomogram, filtered if the user asked for it; if not, a warning where it matters.

    Parameters
    ----------
    tomogram, card, label, folder, report
        As of :func:`match_tomogram`.
    match_spectrum
        Whether the user asked for it.
    """
    if match_spectrum:
        return match_tomogram(tomogram, card, label, folder, report)
    if card.spectrum is not None and card.box <= min(tomogram.shape):
        measured = _measure(tomogram, card.box, JUDGED_CUBES)
        warn_of_other(measured, np.asarray(card.spectrum), "this tomogram", report)
    return tomogram


def match_tomogram(
    tomogram: WholeTomogram,
    card: ModelCard,
    label: str,
    folder: Path,
    report: Callable[[str], None],
) -> WholeTomogram:
    """The tomogram with the power spectrum of the data that a network was trained on.

    Parameters
    ----------
    tomogram
        At the card's voxel size.
    card, label
        Of the network; the label is for messages.
    folder
        For the filtered copy, which has 4 bytes a voxel.
    report
        Told what the filter does.

    Raises
    ------
    ValueError
        If the card does not state the spectrum of the training data.
    TomogramError
        If no cube of the card's box fits beside the padding and varies, or there is no room for the
        copy.
    """
    wanted = require_spectrum(card, label)
    measured = _measure(tomogram, card.box, SAMPLED_CUBES)
    if not measured.num_cubes:
        raise unmatchable(tomogram.path, tomogram.shape, card.box)
    gain = measured.gain_to(wanted)
    tell_gains([gain], card.box, report, few=int(measured.num_cubes < FEW_CUBES))
    filtered = filter_tomogram(tomogram, gain, card.box, folder)
    return remeasured(replace(tomogram, sign=1.0), filtered)


def filter_tomogram(
    tomogram: WholeTomogram, gain: tuple[float, ...], box: int, folder: Path
) -> Float[NDArray[np.float32], "z y x"]:
    """Tomogram each of whose frequencies is multiplied by its gain, memory-mapped.

    The cosine series of each axis (the Fourier series of the volume continued by its mirror image,
    so that opposite faces do not mix) is computed, weighted and summed again. One slab is in
    memory.

    Parameters
    ----------
    tomogram
        What is filtered as :meth:`~cectflow.prediction.tomogram.WholeTomogram.read` gives it.
    gain, box
        Of each shell of cubes of this edge; between shells it is interpolated.
    folder
        For the result.

    Raises
    ------
    TomogramError
        If the disk has no room for it.
    """
    from scipy import fft  # 0.1 s to import, which few need

    shape = tomogram.shape
    depth, height, width = shape
    require_room(folder, 4 * depth * height * width, f"filtered, {tomogram.path}")
    result = create_scratch(folder / "filtered.raw", shape, np.float32)
    sections = [region[0] for region in slabs(shape)]
    rows = max(1, SLAB_VOXELS // (depth * width))
    strips = [slice(start, start + rows) for start in range(0, height, rows)]
    # Coefficient k of a series over n voxels has k / (2 n) cycles per voxel.
    along_z, along_y, along_x = (np.arange(n) * (0.5 * box / n) for n in shape)

    def steps() -> Iterator[None]:
        for section in sections:
            voxels = tomogram.read((section, slice(0, height), slice(0, width)))
            result[section] = fft.dctn(voxels, axes=(1, 2), norm="ortho")
            yield
        for strip in strips:
            squared = along_z[:, None, None] ** 2 + along_y[strip, None] ** 2 + along_x**2
            series = fft.dct(result[:, strip], axis=0, norm="ortho")
            series *= gain_at(gain, np.sqrt(squared))
            result[:, strip] = fft.idct(series, axis=0, norm="ortho")
            yield
        for section in sections:
            result[section] = fft.idctn(result[section], axes=(1, 2), norm="ortho")
            yield

    for _ in track(steps(), total=2 * len(sections) + len(strips), title="filtering"):
        pass
    return result


def _measure(tomogram: WholeTomogram, box: int, most: int) -> PowerSum:
    """Power of so many cubes at most, evenly spread from face to face, that hold no padding."""
    total = PowerSum(box)
    if min(tomogram.shape) < box:
        return total
    starts = [
        np.linspace(0, length - box, -(-length // box)).round().astype(int).tolist()
        for length in tomogram.shape
    ]
    regions = [_cube(start, box) for start in product(*starts)]
    if tomogram.padding is not None:
        regions = [region for region in regions if not tomogram.padding.mask(region).any()]
    if regions:
        chosen = np.linspace(0, len(regions) - 1, min(len(regions), most)).round().astype(int)
        for place in chosen.tolist():
            total.add(tomogram.read(regions[place])[None])
    return total


def _cube(start: tuple[int, ...], box: int) -> Region:
    z, y, x = (slice(place, place + box) for place in start)
    return z, y, x

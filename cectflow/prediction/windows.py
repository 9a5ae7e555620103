"""Windows: a volume of any size through a network, in pieces that memory holds.

A convolutional network computes each logit from the voxels within its reach. :func:`run_windows`
keeps of each window only the voxels that have at least so many others around them, or the face of
the volume itself where the network would pad anyway, and starts every window at a multiple of the
network's stride: what comes out is that of one pass over the whole volume. :func:`blend_windows`
averages overlapping windows instead, at a smaller overlap and without that promise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from cectflow.progress import track
from cectflow.runtime import Infer
from cectflow.turns import HALF_TURNS
from cectflow.volume_writer import create_scratch

__all__ = ["Region", "Stretch", "WindowPlan", "blend_windows", "plan_windows", "run_windows"]

Region = tuple[slice, slice, slice]
"""Along z, y and x."""
Read = Callable[[Region], Float[NDArray[np.float32], "z y x"]]
"""Normalised voxels of a region that may reach over the volume's far faces."""
Piece = tuple[Region, Float[NDArray[np.float32], "outputs z y x"]]
"""A region of the volume and the probability of each output in it."""

BLEND_SIGMA = 0.125
"""Of a window's Gaussian weight, per edge; that of nnU-Net (Isensee et al. 2021)."""
SMALLEST_WEIGHT = 1e-3
"""Of a window's corner, so that a voxel that one window alone sees is never divided by zero."""
SLAB_VOXELS = 2**22


@dataclass(frozen=True)
class Stretch:
    """One window along one axis, in voxels of the volume."""

    start: int
    stop: int
    keep_start: int
    keep_stop: int
    """First and last-plus-one voxel that this window answers for."""


@dataclass(frozen=True)
class WindowPlan:
    """Windows of one size that cover a volume.

    Attributes
    ----------
    shape
        Of the volume, ``(z, y, x)``.
    window
        Of every window.
    axes
        Windows along z, y and x.
    """

    shape: tuple[int, int, int]
    window: tuple[int, int, int]
    axes: tuple[tuple[Stretch, ...], tuple[Stretch, ...], tuple[Stretch, ...]]

    def __len__(self) -> int:
        return math.prod(len(axis) for axis in self.axes)

    def __iter__(self) -> Iterator[tuple[Stretch, Stretch, Stretch]]:
        """Windows, x fastest."""
        return iter(product(*self.axes))

    @property
    def computed_over_kept(self) -> float:
        """Voxels that the network computes for each voxel of the volume."""
        return len(self) * math.prod(self.window) / math.prod(self.shape)


def plan_windows(
    shape: tuple[int, int, int],
    *,
    stride: int,
    halo: int,
    smallest: int = 1,
    edge: int | None = None,
    voxels: int = 2**22,
) -> WindowPlan:
    """Windows that cover a volume with the fewest computed voxels.

    Parameters
    ----------
    shape
        Of the volume, ``(z, y, x)``.
    stride
        Of the network: windows start at multiples of it and are multiples of it long. A volume
        that is no multiple is taken to be longer at its far faces.
    halo
        Voxels on each side of a window that its neighbour answers for; rounded up to the stride.
    smallest
        Shortest edge that the network takes; a smaller volume is taken to be longer.
    edge
        Largest edge of a window.
    voxels
        Most voxels of a window where no edge is given; more only if the halo leaves no choice.

    Raises
    ------
    ValueError
        If the windows would be all halo; the message names the smallest useful edge.
    """
    halo = -(-halo // stride) * stride
    padded = [-(-max(length, smallest) // stride) * stride for length in shape]
    least = 2 * halo + stride
    if edge is not None and edge < min(least, max(padded)):
        msg = (
            f"a window of {edge} voxels is too small: {halo} on each side are shared with its "
            f"neighbours, so expected at least {least}"
        )
        raise ValueError(msg)
    # Per axis, every number of windows of equal length: (computed voxels, length).
    choices: list[list[tuple[int, int]]] = []
    for length in padded:
        fewest: dict[int, int] = {}
        for number in range(1, max(1, (length - 2 * halo) // stride) + 1):
            window = _length(length, number, halo, stride)
            if number == 1 or window >= least:
                fewest[window] = len(_stretches(length, window, halo)) * window
        lengths = [(total, window) for window, total in fewest.items()]
        if edge is not None:
            lengths = [min(choice for choice in lengths if choice[1] <= edge)]
        choices.append(lengths)

    def cost(combination: tuple[tuple[int, int], ...]) -> tuple[int, int]:
        size = math.prod(window for _, window in combination)
        return max(0, size - voxels), math.prod(total for total, _ in combination)

    best = min(product(*choices), key=cost)
    axes = [
        _stretches(length, window, halo) for length, (_, window) in zip(padded, best, strict=True)
    ]
    return WindowPlan(shape, (best[0][1], best[1][1], best[2][1]), (axes[0], axes[1], axes[2]))


def run_windows(
    infer: Infer, read: Read, plan: WindowPlan, turns: tuple[str, ...] = ("identity",)
) -> Iterator[Piece]:
    """Probabilities of a whole volume, in pieces that tile it.

    Parameters
    ----------
    infer
        A segmenter without a sense of where the volume's centre is.
    read
        Gives normalised voxels.
    plan
        With a halo of at least the network's reach.
    turns
        Half turns to average over (:func:`cectflow.turns.allowed_turns`).
    """
    for window in track(plan, total=len(plan), title="segmenting"):
        inside = _region(
            (place.keep_start - place.start, place.keep_stop - place.start) for place in window
        )
        found = _probabilities(infer, read(_whole(window)), inside, turns)
        region = _region((place.keep_start, place.keep_stop) for place in window)
        yield from _within(region, found, plan.shape)


def blend_windows(
    infer: Infer,
    read: Read,
    plan: WindowPlan,
    folder: Path,
    turns: tuple[str, ...] = ("identity",),
) -> Iterator[Piece]:
    """Probabilities as the mean over overlapping windows, each weighted by a Gaussian.

    Parameters
    ----------
    infer, read, turns
        As of :func:`run_windows`.
    plan
        With any halo; neighbours overlap by twice the halo.
    folder
        For the sums, one float32 volume for each output.
    """
    weights = [_gaussian(length) for length in plan.window]
    weight = np.multiply.outer(np.multiply.outer(weights[0], weights[1]), weights[2])
    lengths = [axis[-1].stop for axis in plan.axes]
    # The windows form a grid, so their summed weight is a product over the axes.
    totals = [np.zeros(length, np.float32) for length in lengths]
    for total, axis, along in zip(totals, plan.axes, weights, strict=True):
        for place in axis:
            total[place.start : place.stop] += along
    sums: NDArray[np.float32] | None = None
    everything = _region((0, length) for length in plan.window)
    for window in track(plan, total=len(plan), title="segmenting"):
        found = _probabilities(infer, read(_whole(window)), everything, turns)
        if sums is None:
            shape = (len(found), *lengths)
            sums = create_scratch(folder / "sums.raw", shape, np.float32)
        sums[(slice(None), *_whole(window))] += found * weight
    assert sums is not None
    depth = max(1, SLAB_VOXELS // (lengths[1] * lengths[2]))
    across = np.multiply.outer(totals[1], totals[2])
    for start in range(0, lengths[0], depth):
        region = (slice(start, min(start + depth, lengths[0])), slice(0, lengths[1]),
                  slice(0, lengths[2]))  # fmt: skip
        slab = sums[:, region[0]] / (totals[0][region[0], None, None] * across)
        yield from _within(region, slab, plan.shape)


def _length(length: int, number: int, halo: int, stride: int) -> int:
    """Edge of so many windows that overlap by two halos and cover the length."""
    needed = -(-(length + (number - 1) * 2 * halo) // number)
    return -(-needed // stride) * stride


def _stretches(length: int, window: int, halo: int) -> tuple[Stretch, ...]:
    stretches: list[Stretch] = []
    kept = 0
    while kept < length:
        # The last window is moved back so that it ends with the volume.
        start = min(kept - halo if stretches else 0, length - window)
        stop = start + window
        keep_stop = length if stop == length else stop - halo
        stretches.append(Stretch(start, stop, kept, keep_stop))
        kept = keep_stop
    return tuple(stretches)


def _probabilities(
    infer: Infer,
    block: Float[NDArray[np.float32], "z y x"],
    inside: Region,
    turns: tuple[str, ...],
) -> Float[NDArray[np.float32], "outputs kept_z kept_y kept_x"]:
    """Probability of each output in the inner part of a window, averaged over turns."""
    total: NDArray[np.float32] | None = None
    for turn in turns:
        axes = HALF_TURNS[turn]
        logits = infer(np.ascontiguousarray(np.flip(block, axes))[None, None])[0]
        found = np.array(np.flip(logits, axes)[(slice(None), *inside)], np.float32)
        # Softmax in place: with many labels a window's logits are its largest array.
        found -= found.max(axis=0)
        np.exp(found, out=found)
        found /= found.sum(axis=0) * np.float32(len(turns))
        if total is None:
            total = found
        else:
            total += found
    assert total is not None
    return total


def _within(
    region: Region, found: Float[NDArray[np.float32], "outputs z y x"], shape: tuple[int, int, int]
) -> Iterator[Piece]:
    """The piece without what lies beyond the volume's far faces."""
    stops = [min(part.stop, length) for part, length in zip(region, shape, strict=True)]
    if all(stop > part.start for stop, part in zip(stops, region, strict=True)):
        kept = _region((part.start, stop) for part, stop in zip(region, stops, strict=True))
        sizes = (slice(0, part.stop - part.start) for part in kept)
        yield kept, found[(slice(None), *sizes)]


def _whole(window: tuple[Stretch, Stretch, Stretch]) -> Region:
    return _region((place.start, place.stop) for place in window)


def _region(bounds: Iterator[tuple[int, int]]) -> Region:
    along_z, along_y, along_x = (slice(start, stop) for start, stop in bounds)
    return along_z, along_y, along_x


def _gaussian(length: int) -> NDArray[np.float32]:
    places = (np.arange(length) - (length - 1) / 2) / (BLEND_SIGMA * length)
    return np.asarray(np.maximum(np.exp(-0.5 * np.square(places)), SMALLEST_WEIGHT), np.float32)

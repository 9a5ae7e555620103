"""WholeTomogram: a tomogram as a semantic segmenter wants it, read piece by piece.

It is checked, its padding found and its robust statistics measured in one pass over slabs; then
any region can be read, normalised. Where the voxel size is not the card's it is first resampled,
axis by axis, into a file beside the output.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import NDArray

from cectflow.model_card import ModelCard
from cectflow.prediction.contract import InputOptions, require_rescale, same_voxel_size
from cectflow.prediction.windows import Region
from cectflow.progress import track
from cectflow.subtomogram import robust_statistics
from cectflow.volume import read_header, read_volume
from cectflow.volume_writer import create_scratch

__all__ = [
    "Padding",
    "TomogramError",
    "WholeTomogram",
    "check_tomogram",
    "costs_itself",
    "open_tomogram",
    "remeasured",
    "require_room",
    "resample",
    "slabs",
    "unmatchable",
]

SLAB_VOXELS = 2**22
"""Read at a time; 16 MB of float32."""
SAMPLE_VOXELS = 2**22
"""Of which median and deviation are taken: their standard error is then below 0.001 deviations."""
SHORTEST_PADDING = 8
"""Equal values in a row, from a face inwards, that are padding: noise does not repeat so often."""


class TomogramError(ValueError):
    """A tomogram that cannot be read, or cannot be brought to the card; others may well be."""


@dataclass(frozen=True, eq=False)
class Padding:
    """Constant voxels at the ends of lines, such as tilting and alignment leave behind.

    Attributes
    ----------
    along_x
        ``(2, z, y)``: how many equal voxels begin and how many end the line along x; 0 where
        there are too few to be padding.
    along_y
        ``(2, z, x)``, likewise.
    shape
        Of the volume.
    """

    along_x: Int[NDArray[np.int32], "2 z y"]
    along_y: Int[NDArray[np.int32], "2 z x"]
    shape: tuple[int, int, int]

    def scaled(self, shape: tuple[int, int, int]) -> Padding:
        """Padding of the same volume resampled to another shape."""
        (old_z, old_y, old_x), (z, y, x) = self.shape, shape
        rows, columns, depths = (
            np.arange(new) * old // new for new, old in ((y, old_y), (x, old_x), (z, old_z))
        )
        along_x = self.along_x[:, depths[:, None], rows] * (x / old_x)
        along_y = self.along_y[:, depths[:, None], columns] * (y / old_y)
        return Padding(np.ceil(along_x).astype(np.int32), np.ceil(along_y).astype(np.int32), shape)

    def mask(self, region: Region) -> Bool[NDArray[np.bool_], "z y x"]:
        """True in the padded voxels of a region."""
        z, y, x = region
        _, height, width = self.shape
        along_x, along_y = self.along_x[:, z, y, None], self.along_y[:, z, None, x]
        rows, columns = np.arange(y.start, y.stop)[:, None], np.arange(x.start, x.stop)
        return np.asarray(
            (columns < along_x[0])
            | (columns >= width - along_x[1])
            | (rows < along_y[0])
            | (rows >= height - along_y[1])
        )


@dataclass(frozen=True, eq=False)
class WholeTomogram:
    """A tomogram at a card's voxel size, with what normalises it.

    Attributes
    ----------
    data
        ``(z, y, x)``, memory-mapped.
    voxel_size
        In Å.
    median, deviation
        Of all voxels that are no padding; the deviation is robust.
    sign
        -1 where contrast is to be flipped.
    padding
        None: there is none.
    source_shape, source_voxel_size
        Of the file, where this was resampled from it.
    path
        Of the file.
    """

    data: Shaped[NDArray[Any], "z y x"]
    voxel_size: float
    median: float
    deviation: float
    sign: float
    padding: Padding | None
    source_shape: tuple[int, int, int]
    source_voxel_size: float
    path: Path

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along z, y and x."""
        depth, height, width = self.data.shape
        return depth, height, width

    @property
    def is_resampled(self) -> bool:
        """Whether the voxels are not those of the file."""
        return self.voxel_size != self.source_voxel_size

    def read(self, region: Region) -> Float[NDArray[np.float32], "z y x"]:
        """Normalised voxels; padding, and what lies beyond the far faces, is 0, the median."""
        inside = _clip(region, self.shape)
        block = np.zeros([part.stop - part.start for part in region], np.float32)
        scale = np.float32(self.sign / self.deviation)
        with np.errstate(over="ignore"):  # an answer that is no number is found out
            voxels = (self.data[inside].astype(np.float32) - np.float32(self.median)) * scale
        if self.padding is not None:
            voxels[self.padding.mask(inside)] = 0.0
        block[tuple(slice(0, size) for size in voxels.shape)] = voxels
        return block

    def is_padding(self, region: Region) -> Bool[NDArray[np.bool_], "z y x"] | None:
        """True in padded voxels of a region inside the volume; None: there are none."""
        return None if self.padding is None else self.padding.mask(region)


def open_tomogram(
    path: Path,
    card: ModelCard,
    options: InputOptions,
    folder: Path,
    report: Callable[[str], None],
) -> WholeTomogram:
    """Tomogram as a card's network expects it.

    Parameters
    ----------
    path
        MRC volume.
    card, options
        The contract, and what the user says of the input.
    folder
        For a resampled copy, which has 4 bytes a voxel.
    report
        Told what is done to the input.

    Raises
    ------
    TomogramError
        If it cannot be read, the voxel size is not the card's and rescaling was not asked for, a
        voxel is not finite, the tomogram is constant, or there is no room for a resampled copy.
    """
    with costs_itself(path):
        volume = read_volume(path, voxel_size=options.voxel_size)
        source_shape, source_size = volume.shape, volume.voxel_size
        resamples = not same_voxel_size(source_size, card.voxel_size)
        if resamples:
            require_rescale(source_size, card, options)
        median, deviation, padding = _examine(volume.data, path)
    if options.contrast != card.contrast:
        report(f"contrast: input is {options.contrast}, {card.contrast} is expected: flipped")
    sign = 1.0 if options.contrast == card.contrast else -1.0
    if padding is not None:
        share = _padded_share(padding)
        report(f"padding: {share:.1%} of the voxels are constant towards a face: left out")
    filled = WholeTomogram(
        volume.data, source_size, median, deviation, 1.0, padding, source_shape, source_size, path
    )
    if not resamples:
        return replace(filled, sign=sign)
    shape = _resampled_shape(source_shape, source_size, card.voxel_size)
    report(
        f"rescale: {_times(source_shape)} voxels (z, y, x) at {source_size:g} Å, "
        f"Fourier-resampled to {_times(shape)} at {card.voxel_size:g} Å"
    )
    finest = 2 * source_size
    if source_size > card.voxel_size:
        report(
            f"warning: the network expects {card.voxel_size:g} Å; nothing finer than "
            f"{finest:.0f} Å exists in this tomogram"
        )
    resampled = resample(filled, shape, card.voxel_size, folder)
    padding = None if padding is None else padding.scaled(shape)
    return remeasured(
        replace(filled, voxel_size=card.voxel_size, sign=sign, padding=padding), resampled
    )


def remeasured(tomogram: WholeTomogram, data: Float[NDArray[np.float32], "z y x"]) -> WholeTomogram:
    """The tomogram with other voxels, normalised by their own statistics.

    Parameters
    ----------
    tomogram
        Whose padding is of the shape of the data.
    data
        What its voxels have become.

    Raises
    ------
    TomogramError
        If they are constant or not finite.
    """
    with costs_itself(tomogram.path):
        median, deviation, _ = _examine(data, tomogram.path, tomogram.padding)
    return replace(tomogram, data=data, median=median, deviation=deviation)


def require_room(folder: Path, needed: int, what: str) -> None:
    """Refuse a copy that the disk has no room for.

    Parameters
    ----------
    folder
        Where it would be.
    needed
        Bytes.
    what
        What takes them, for the message.

    Raises
    ------
    TomogramError
        If they are not free: a smaller tomogram may fit.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        msg = (
            f"{what} takes {needed / 1e9:.1f} GB beside the output, {free / 1e9:.1f} GB are free: "
            "give an --out elsewhere, or bin it first"
        )
        raise TomogramError(msg)


def check_tomogram(path: Path, card: ModelCard, options: InputOptions) -> tuple[int, int, int]:
    """Shape ``(z, y, x)`` at which a card's network will see a tomogram, by its header alone.

    Raises
    ------
    TomogramError
        If it cannot be read, the voxel size is not the card's and rescaling was not asked for, or
        it is too thin for the filter that was.
    """
    with costs_itself(path):
        shape, voxel_size = read_header(path, voxel_size=options.voxel_size)
        if not same_voxel_size(voxel_size, card.voxel_size):
            require_rescale(voxel_size, card, options)
            shape = _resampled_shape(shape, voxel_size, card.voxel_size)
        if options.match_spectrum and min(shape) < card.box:
            raise unmatchable(path, shape, card.box)
        return shape


def unmatchable(path: Path, shape: tuple[int, int, int], box: int) -> TomogramError:
    """What is said where no cube can be taken from a tomogram to measure its spectrum.

    Parameters
    ----------
    path
        Of the tomogram.
    shape, box
        Of the tomogram ``(z, y, x)`` at the card's voxel size, and edge of the cubes, in voxels.
    """
    return TomogramError(
        f"{path}: a spectrum is measured on cubes of {box} voxels that vary and hold no padding, "
        f"of which there is none in {_times(shape)} voxels (z, y, x): segment it without "
        "--match-spectrum, to another --out"
    )


@contextmanager
def costs_itself(path: Path) -> Iterator[None]:
    """Makes what is wrong with the file a fault of this tomogram."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        msg = str(error) if str(path) in reason else f"{path} cannot be read: {reason}"
        raise TomogramError(msg) from error
    except ValueError as error:
        raise TomogramError(str(error)) from error


def resample(
    tomogram: WholeTomogram, shape: tuple[int, int, int], voxel_size: float, folder: Path
) -> Float[NDArray[np.float32], "z y x"]:
    """Tomogram at another voxel size, memory-mapped, in units of its deviation.

    The cosine series of each axis (the Fourier series of the volume continued by its mirror image,
    so that opposite faces do not mix) is evaluated at the new voxels, without what lies above the
    new Nyquist frequency. Faces of first voxels coincide. One slab of either grid is in memory.

    Parameters
    ----------
    tomogram
        What is resampled, padding filled with the median.
    shape, voxel_size
        New ones.
    folder
        For the result and one intermediate; both have 4 bytes a voxel.

    Raises
    ------
    TomogramError
        If the disk has no room for it: a smaller one may fit.
    """
    ratio = voxel_size / tomogram.voxel_size
    depth = tomogram.shape[0]
    needed = 4 * shape[1] * shape[2] * (depth + shape[0])
    require_room(folder, needed, f"resampled to {_times(shape)} voxels the tomogram")
    along_z, along_y, along_x = (
        _cosine_resampling(length, ratio, new)
        for length, new in zip(tomogram.shape, shape, strict=True)
    )
    across = (depth, *shape[1:])
    between = create_scratch(folder / "between.raw", across, np.float32)
    result = create_scratch(folder / "resampled.raw", shape, np.float32)
    pieces = list(slabs(tomogram.shape))
    for region in track(pieces, total=len(pieces), title="resampling"):
        between[region[0]] = along_y @ (tomogram.read(region) @ along_x.T)
    rows = max(1, SLAB_VOXELS // (max(depth, shape[0]) * shape[2]))
    for start in range(0, shape[1], rows):
        part = between[:, start : start + rows]
        flat = along_z @ part.reshape(depth, -1)
        result[:, start : start + rows] = flat.reshape(shape[0], *part.shape[1:])
    return result


def _examine(
    data: NDArray[Any], path: Path, known: Padding | None = None
) -> tuple[float, float, Padding | None]:
    """Median, robust deviation and padding; what no network can use is refused."""
    depth, height, width = data.shape
    padding = known or Padding(
        np.zeros((2, depth, height), np.int32),
        np.zeros((2, depth, width), np.int32),
        (depth, height, width),
    )
    step = max(1, -(-data.size // SAMPLE_VOXELS))
    sample: list[NDArray[np.float32]] = []
    bad, seen = 0, 0
    first_bad: tuple[int, ...] | None = None
    pieces = list(slabs((depth, height, width)))
    for region in track(pieces, total=len(pieces), title="measuring"):
        slab = data[region].astype(np.float32)
        wrong = ~np.isfinite(slab)
        if wrong.any():
            if first_bad is None:
                z, y, x = np.argwhere(wrong)[0].tolist()
                first_bad = (z + region[0].start, y, x)
            bad += int(wrong.sum())
            continue
        if known is None:
            padding.along_x[:, region[0]] = _runs(slab)
            padding.along_y[:, region[0]] = _runs(slab.swapaxes(1, 2))
        valid = slab[~padding.mask(region)]
        sample.append(valid[(-seen) % step :: step])
        seen += valid.size
    if first_bad is not None:
        msg = (
            f"{path}: {bad} of {data.size} voxels are not finite, the first at {first_bad} "
            f"(z, y, x): reconstruct it again, or replace them"
        )
        raise ValueError(msg)
    if seen == 0:
        msg = f"{path} is constant (every voxel is {float(data.flat[0]):g}): there is nothing in it"
        raise ValueError(msg)
    median, deviation = robust_statistics(np.concatenate(sample))
    if deviation == 0:
        msg = (
            f"{path} is constant but for a few voxels (more than half are {median:g}): "
            "it cannot be normalised"
        )
        raise ValueError(msg)
    found = padding.along_x.any() or padding.along_y.any()
    return median, deviation, padding if found else None


def _runs(lines: NDArray[np.float32]) -> NDArray[np.int32]:
    """Equal values at both ends of the last axis, ``(2, ...)``; 0 if too few to be padding."""
    runs = []
    for ends in (lines, lines[..., ::-1]):
        differs = ends != ends[..., :1]
        run = np.where(differs.any(axis=-1), differs.argmax(axis=-1), lines.shape[-1])
        runs.append(np.where(run < SHORTEST_PADDING, 0, run))
    return np.array(runs, np.int32)


def _padded_share(padding: Padding) -> float:
    padded = sum(int(padding.mask(region).sum()) for region in slabs(padding.shape))
    return padded / float(np.prod(padding.shape))


def slabs(shape: tuple[int, int, int]) -> Iterator[Region]:
    """Regions of whole sections that tile a volume, each small enough to be held in memory."""
    depth = max(1, SLAB_VOXELS // (shape[1] * shape[2]))
    for start in range(0, shape[0], depth):
        yield slice(start, min(start + depth, shape[0])), slice(0, shape[1]), slice(0, shape[2])


def _clip(region: Region, shape: tuple[int, int, int]) -> Region:
    z, y, x = (
        slice(min(part.start, length), min(part.stop, length))
        for part, length in zip(region, shape, strict=True)
    )
    return z, y, x


def _resampled_shape(
    shape: tuple[int, int, int], voxel_size: float, target: float
) -> tuple[int, int, int]:
    depth, height, width = (max(1, round(length * voxel_size / target)) for length in shape)
    return depth, height, width


def _cosine_resampling(num: int, ratio: float, new: int) -> NDArray[np.float32]:
    """Matrix ``(new, num)`` from voxels to their cosine series at the centres of new voxels."""
    kept = np.arange(min(num, int(np.ceil(num / ratio))))
    series = np.cos(np.pi / num * np.outer(kept, np.arange(num) + 0.5)) * (2 / num)
    series[0] /= 2
    places = (np.arange(new) + 0.5) * ratio
    return np.asarray(np.cos(np.pi / num * np.outer(places, kept)) @ series, np.float32)


def _times(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))

"""Subtomograms: cubes cut around particles, their contrast, normalisation and voxel size.

:func:`cut` takes cubes out of a tomogram or a periodic field, :func:`rescale` brings them to the
voxel size and box that a network expects. The centre of a box of n is voxel n//2 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Num, Shaped
from numpy.typing import DTypeLike, NDArray

from cectflow.volume import all_finite

__all__ = [
    "DEVIATION_PER_MAD",
    "are_finite",
    "cut",
    "flip_contrast",
    "inside",
    "normalise",
    "resampling_matrix",
    "rescale",
    "robust_statistics",
    "to_float32",
]

# Voxel sizes closer than this are one and the same: headers hold them in float32.
SAME_VOXEL_SIZE = 1e-4
# Sign, exponent and mantissa of a float16 whose sign was extended and that was shifted by 13 bits.
_FLOAT16_BITS = np.array(0x8FFFE000, np.uint32).view(np.int32)
DEVIATION_PER_MAD = 1.4826
"""Standard deviation of normal values over their median absolute deviation (Hampel 1974)."""


def cut(
    volume_data: Shaped[NDArray[Any], "z y x"],
    centres_zyx: Num[NDArray[Any], "n 3"],
    box: int,
    *,
    periodic: bool,
    fill: float | int | None = None,
    dtype: DTypeLike | None = None,
) -> Shaped[NDArray[Any], "n {box} {box} {box}"]:
    """Cubes around centres, with the voxel nearest to each centre at index box//2.

    Parameters
    ----------
    volume_data
        May be memory-mapped; only the cubes are read.
    centres_zyx
        In voxels, 0-based; halves are rounded up.
    box
        Edge of the cubes in voxels.
    periodic
        True: cubes that leave the volume come in again on the other side, as in simulated fields.
        False: what is missing of them is filled.
    fill
        Value of missing voxels; None: the mean of the voxels that the cube has. Give 0 for labels.
    dtype
        Of the cubes; None: the volume's, in integers of which a mean is rounded.

    Returns
    -------
    NDArray
        ``(n, box, box, box)``.

    Raises
    ------
    ValueError
        If the box is below 1, larger than a periodic volume, or a cube has no voxel inside.
    """
    shape = volume_data.shape
    if box < 1 or (periodic and box > min(shape)):
        msg = f"a box of {box} cannot be cut from a volume of {shape} voxels (z, y, x)"
        raise ValueError(msg)
    corners = _corners(centres_zyx, box)
    cubes = np.empty((len(corners), box, box, box), dtype or volume_data.dtype)
    for row, (cube, corner) in enumerate(zip(cubes, corners, strict=True)):
        starts, stops = np.maximum(corner, 0), np.minimum(corner + box, shape)
        if (stops - starts == box).all():
            part = volume_data[_box(starts, stops)]
            cube[...] = to_float32(part) if cube.dtype == np.float32 else part
        elif periodic:
            for here, there in _periodic_blocks(corner, box, shape):
                cube[here] = volume_data[there]
        elif (stops > starts).all():
            part = volume_data[_box(starts, stops)]
            cube[...] = _as_type(part.mean(dtype=np.float64) if fill is None else fill, cube.dtype)
            cube[_box(starts - corner, stops - corner)] = part
        else:
            msg = (
                f"the cube of row {row}, centred at voxel {corner + box // 2} (z, y, x), has no "
                f"voxel inside the volume of {shape}: check the coordinates"
            )
            raise ValueError(msg)
    return cubes


def inside(
    centres_zyx: Num[NDArray[Any], "n 3"], shape: tuple[int, int, int], box: int
) -> Bool[NDArray[np.bool_], " n"]:
    """Whether the cube around each centre lies wholly inside a volume.

    Parameters
    ----------
    centres_zyx
        In voxels, 0-based.
    shape
        Of the volume, ``(z, y, x)``.
    box
        Edge of the cubes in voxels.
    """
    corners = _corners(centres_zyx, box)
    return np.asarray(((corners >= 0) & (corners + box <= np.array(shape))).all(axis=1))


def are_finite(cubes: Num[NDArray[Any], "n z y x"]) -> Bool[NDArray[np.bool_], " n"]:
    """Whether all values of each cube are finite."""
    if cubes.dtype.kind != "f":
        return np.ones(len(cubes), np.bool_)
    if cubes.dtype == np.float16:
        return np.array([all_finite(cube) for cube in cubes], np.bool_)
    # A sum is finite only if all of its terms are, and takes a third of the time.
    with np.errstate(all="ignore"):
        sound = np.isfinite(np.einsum("nzyx->n", cubes))
    for place in np.flatnonzero(~sound):  # or the terms were too large to be added
        sound[place] = all_finite(cubes[place])
    return np.asarray(sound)


def to_float32(cubes: Num[NDArray[Any], "..."]) -> Float[NDArray[np.float32], "..."]:
    """Cubes in float32; float16 in a third of the time that numpy takes, and the same values."""
    if cubes.dtype != np.float16:
        return np.asarray(cubes, np.float32)
    bits = np.ascontiguousarray(cubes).view(np.int16).astype(np.int32)
    bits <<= 13  # the mantissa to its place; the exponent is then short by 112
    bits &= _FLOAT16_BITS
    values = bits.view(np.float32)
    values *= np.float32(2.0**112)
    # What is not finite has the largest exponent, and would come out as these.
    if values.size and max(values.max(), -values.min()) >= 65536.0:
        return cubes.astype(np.float32)
    return values


def flip_contrast(cubes: Num[NDArray[Any], "..."]) -> Float[NDArray[Any], "..."]:
    """Cubes with the opposite sign: dark protein becomes light and light dark.

    Integers become float32, since an unsigned one has no opposite.
    """
    return -(cubes if cubes.dtype.kind == "f" else cubes.astype(np.float32))


def normalise(cubes: Num[NDArray[Any], "n z y x"]) -> Float[NDArray[np.float32], "n z y x"]:
    """Cubes of zero mean and unit variance each; a constant cube becomes zeros."""
    result = np.zeros(cubes.shape, np.float32)
    for normalised, cube in zip(result, cubes, strict=True):  # one at a time: it fits the cache
        mean = cube.mean(dtype=np.float64)
        centred = cube - mean
        deviation = np.sqrt(np.mean(np.square(centred)))
        # Below the resolution of float32 what is left of a constant is rounding.
        if deviation > 1e-7 * abs(mean):
            normalised[...] = centred / deviation
    return result


def robust_statistics(values: Num[NDArray[Any], "..."]) -> tuple[float, float]:
    """Median, and the standard deviation as the median absolute deviation tells it.

    Semantic segmenters are shown ``(value - median) / deviation`` of the whole field or tomogram.
    Unlike mean and standard deviation, these hardly move with a few gold beads.

    Parameters
    ----------
    values
        Of all voxels that count, in any shape; constant padding is the caller's to leave out.

    Returns
    -------
    tuple of float
        Median and 1.4826 times the median absolute deviation, in the units of the values; the
        latter is 0 where more than half of the values are equal.
    """
    flat = np.asarray(values, np.float32).ravel()
    median = float(np.median(flat))
    return median, DEVIATION_PER_MAD * float(np.median(np.abs(flat - np.float32(median))))


def rescale(
    cubes: Num[NDArray[Any], "n z y x"],
    voxel_size: float,
    target_voxel_size: float,
    box: int,
) -> Float[NDArray[np.float32], "n {box} {box} {box}"]:
    """Cubes at another voxel size, cropped about their centre voxel to a box.

    The trigonometric interpolation of each cube is evaluated at the new voxels, by one small
    matrix per axis: exact for any ratio, and voxel n//2 stays the centre. Towards coarser voxels
    all that lies above the new Nyquist frequency is left out. Cubes are taken as periodic, so up
    to a voxel at the faces mixes with the opposite face.

    Parameters
    ----------
    cubes
        ``(n, z, y, x)``.
    voxel_size, target_voxel_size
        In angstrom.
    box
        Edge in voxels of the target size.

    Raises
    ------
    ValueError
        If a voxel size or the box is not positive, or if the box reaches out of the cubes by more
        than half a voxel.
    """
    if min(voxel_size, target_voxel_size, box) <= 0:
        msg = f"voxel sizes and box are positive, given {voxel_size}, {target_voxel_size} and {box}"
        raise ValueError(msg)
    ratio = target_voxel_size / voxel_size
    if abs(ratio - 1) < SAME_VOXEL_SIZE:
        ratio = 1.0
    smallest = min(cubes.shape[1:])
    if box * ratio > smallest + 0.5:
        msg = (
            f"a box of {box} voxels of {target_voxel_size:g} angstrom measures "
            f"{box * target_voxel_size:.0f} angstrom, the cubes only {smallest} voxels of "
            f"{voxel_size:g} = {smallest * voxel_size:.0f}: cut them with a box of at least "
            f"{int(np.ceil(box * ratio))}"
        )
        raise ValueError(msg)
    if ratio == 1.0:
        starts = [n // 2 - box // 2 for n in cubes.shape[1:]]
        cropped = cubes[(slice(None), *(slice(start, start + box) for start in starts))]
        return np.array(cropped, np.float32)
    along_z, along_y, along_x = (resampling_matrix(n, ratio, box) for n in cubes.shape[1:])
    result = along_y @ (cubes.astype(np.float32) @ along_x.T)
    result = along_z @ result.reshape(len(cubes), cubes.shape[1], box * box)
    return result.reshape(len(cubes), box, box, box)


def _corners(centres_zyx: NDArray[Any], box: int) -> NDArray[np.int64]:
    return np.floor(np.asarray(centres_zyx, np.float64) + 0.5).astype(np.int64) - box // 2


def _box(starts: NDArray[np.int64], stops: NDArray[np.int64]) -> tuple[slice, ...]:
    return tuple(slice(int(a), int(b)) for a, b in zip(starts, stops, strict=True))


def _periodic_blocks(
    corner: NDArray[np.int64], box: int, shape: tuple[int, ...]
) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Blocks of a cube, and of the periodic volume where each of them is: eight at most."""
    stretches = []
    for first, size in zip((corner % shape).tolist(), shape, strict=True):
        inner = min(box, size - first)
        pairs = [(slice(0, inner), slice(first, first + inner))]
        if inner < box:
            pairs.append((slice(inner, box), slice(0, box - inner)))
        stretches.append(pairs)
    for block in product(*stretches):
        here, there = zip(*block, strict=True)
        yield here, there


def _as_type(value: float | int, dtype: np.dtype[Any]) -> Any:
    return dtype.type(value if dtype.kind == "f" else round(float(value)))


def resampling_matrix(num: int, ratio: float, box: int) -> Float[NDArray[np.float32], "box num"]:
    """Matrix from samples to their trigonometric interpolation at other places.

    Parameters
    ----------
    num
        Samples; number ``num // 2`` stays where it is.
    ratio
        Distance of the new places, in samples.
    box
        How many there are.
    """
    places = num // 2 + (np.arange(box) - box // 2) * ratio
    distances = places[:, None] - np.arange(num)
    frequencies = np.arange(num // 2 + 1)
    nyquist = num / 2 / max(1.0, ratio)
    # The wave at a Nyquist frequency stands for two, at either sign; half of it is kept for each.
    gains = (frequencies < nyquist - 1e-9) + 0.5 * (np.abs(frequencies - nyquist) <= 1e-9)
    gains[0] = 0.5
    waves = np.cos(2 * np.pi / num * frequencies * distances[..., None])
    return np.asarray(2 / num * (waves @ gains), np.float32)

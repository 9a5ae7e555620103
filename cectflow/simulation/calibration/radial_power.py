"""Power of subtomograms: under a taper, over directions, per shell.

The taper is needed because cubes differ at their faces: cut out of a tomogram they are not
periodic, and a plain periodogram leaks the power of strong frequencies into weak ones; cubes
reconstructed one by one in their own box (EMPIAR-10499's here) are periodic and do not leak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Num
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter

from cectflow.spectrum import shell_numbers

__all__ = [
    "BAND",
    "MIN_CUBES",
    "PowerRatio",
    "RadialPower",
    "TaperedCubes",
    "compare_power",
    "group_by_tomogram",
    "over_shells",
    "radial_power",
    "summarise",
]

MIN_CUBES = 4
"""Below it neither the power per shell nor its standard error can be told."""
BAND = (0.05, 0.45)
"""Cycles per voxel that judge SNR and agreement: below lies the mean, above the corners' cut."""
TOLERANCE = 0.15
"""Of the power in a shell, within which simulated and real cubes agree."""


@dataclass(frozen=True, eq=False)
class RadialPower:
    """Mean power of cubes per shell; the mean over all frequencies is 1.

    Attributes
    ----------
    frequencies
        Of the shells, cycles per voxel; shell i holds those that round to i / box.
    power
        Mean over cubes.
    standard_error
        Of the mean, from the spread over cubes.
    num_cubes
        Of which it is the mean.
    """

    frequencies: Float[NDArray[np.float64], " shell"]
    power: Float[NDArray[np.float64], " shell"]
    standard_error: Float[NDArray[np.float64], " shell"]
    num_cubes: int

    @property
    def in_band(self) -> Bool[NDArray[np.bool_], " shell"]:
        """Shells between 0.05 and 0.45 cycles per voxel."""
        return self.between(*BAND)

    def between(self, low: float, high: float) -> Bool[NDArray[np.bool_], " shell"]:
        """Shells between two frequencies, cycles per voxel."""
        return (self.frequencies >= low) & (self.frequencies <= high)


@dataclass(frozen=True, eq=False)
class PowerRatio:
    """Simulated over real radial power, between 0.05 and 0.45 cycles per voxel.

    Power has no scale: both have the same over all of this band. (Over all frequencies they would
    be compared by the corners of Fourier space, half of it, which no tilt image fills.)

    Attributes
    ----------
    frequencies
        Of the shells, cycles per voxel.
    ratio
        1 where they agree.
    standard_error
        That it has where they agree.
    scale
        Factor that the simulated power was given.
    """

    frequencies: Float[NDArray[np.float64], " shell"]
    ratio: Float[NDArray[np.float64], " shell"]
    standard_error: Float[NDArray[np.float64], " shell"]
    scale: float

    @property
    def agrees(self) -> Bool[NDArray[np.bool_], " shell"]:
        """Shells within 15 % or 2 standard errors."""
        bound = np.maximum(TOLERANCE, 2 * self.standard_error)
        return np.asarray(np.abs(self.ratio - 1.0) <= bound)


def compare_power(
    real: RadialPower, simulated: RadialPower, *, fitted: RadialPower | None = None
) -> PowerRatio:
    """Ratio of simulated to real radial power, of cubes of one edge.

    Parameters
    ----------
    real, simulated
        Up to the Nyquist frequency.
    fitted
        Of the cubes to which the recipe was fitted, where these are others than the real ones:
        their error is the recipe's own.
    """
    band = real.in_band
    powers = [power for power in (real, simulated, fitted) if power is not None]
    errors = [(power.standard_error / power.power)[band] for power in powers]
    of_real, of_simulated = real.power[band], simulated.power[band]
    weight = real.frequencies[band] ** 2  # a shell holds so many frequencies
    scale = float((of_real * weight).sum() / (of_simulated * weight).sum())
    ratio, error = scale * of_simulated / of_real, np.linalg.norm(errors, axis=0)
    return PowerRatio(real.frequencies[band], ratio, error, scale)


def radial_power(
    cubes: Num[NDArray[np.generic], "n box box box"], *, mask_radius: float | None = None
) -> RadialPower:
    """Radial power of cubes under a Hann taper along each axis.

    Each cube is brought to zero mean and unit variance first, so neither scale nor contrast
    matters. A mask that the cubes already have is recognised and taken as part of the taper.

    Parameters
    ----------
    cubes
        At least four.
    mask_radius
        In voxels: what lies within, softly over 3 voxels, is left out.

    Raises
    ------
    ValueError
        If there are too few cubes, one is constant or holds values that are not finite, or the
        mask leaves nothing.
    """
    return summarise(TaperedCubes.of(cubes, mask_radius))


@dataclass(frozen=True, eq=False)
class TaperedCubes:
    """Tapered cubes: their periodograms, and the window under which they were taken."""

    cubes: NDArray[np.float64]
    window: NDArray[np.float64]
    taper: NDArray[np.float64]
    periodograms: NDArray[np.float64]
    is_masked: bool

    @classmethod
    def of(cls, cubes: NDArray[np.generic], mask_radius: float | None) -> TaperedCubes:
        """Cubes at zero mean and unit variance, tapered; see :func:`radial_power`."""
        number, box = len(cubes), cubes.shape[-1]
        if number < MIN_CUBES:
            msg = f"{number} cubes: expected at least {MIN_CUBES}, better 10 or more"
            raise ValueError(msg)
        values = cubes.astype(np.float64)
        finite = np.array([bool(np.isfinite(cube).all()) for cube in values])
        varied = np.array(
            [bool(np.ptp(cube) > 0) for cube in np.where(finite[:, None, None, None], values, 0)]
        )
        if not varied.all():
            place = int(np.argmin(varied))
            state = "constant" if finite[place] else "not finite"
            msg = f"cube {place + 1} of {number} is {state}: leave it out with --particles"
            raise ValueError(msg)
        support, is_masked = _support(values)
        half = np.sin(np.pi * (np.arange(box) + 0.5) / box) ** 2
        taper = half[:, None, None] * half[None, :, None] * half
        if mask_radius is not None:
            taper = taper * _outside(box, mask_radius)
        window = taper * support
        if (window**2).sum() < 0.02 * box**3 * (3 / 8) ** 3:
            msg = (
                f"mask radius {mask_radius or 0:.1f} voxels: it leaves {(window > 0.1).sum()} "
                f"voxels of a cube of {box}³ to measure noise in: give a smaller --mask-radius"
            )
            raise ValueError(msg)
        axes = (1, 2, 3)
        if is_masked:
            outside = support < 0.05
            if outside.any():
                values = values - values[:, outside].mean(axis=1)[:, None, None, None]
        weight = window / window.sum()
        values = values - (values * weight).sum(axis=axes, keepdims=True) * (
            support if is_masked else 1.0
        )
        spread = np.sqrt((values**2 * weight).sum(axis=axes, keepdims=True))
        values = values / spread
        tapered = values * taper
        # The weighted mean is no information about the noise; it would leak into shells 1 and 2.
        tapered -= tapered.sum(axis=axes, keepdims=True) * weight
        periodograms = np.abs(fft.fftn(tapered, axes=axes)) ** 2 / (window**2).sum()
        periodograms /= periodograms.mean(axis=axes, keepdims=True)
        return cls(values, window, taper, periodograms, is_masked)

    @property
    def box(self) -> int:
        """Edge of the cubes in voxels."""
        return int(self.window.shape[0])

    def select(self, keep: NDArray[np.bool_]) -> TaperedCubes:
        """Some of the cubes, under the same window."""
        return replace(self, cubes=self.cubes[keep], periodograms=self.periodograms[keep])


def over_shells(periodogram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean per shell from 1 on, through the corners."""
    numbers = shell_numbers(periodogram.shape[-1]).ravel()
    sums = np.bincount(numbers, periodogram.ravel())
    return np.asarray((sums / np.bincount(numbers))[1:])


def summarise(sample: TaperedCubes, *, corners: bool = False) -> RadialPower:
    """Radial power of a sample, up to the Nyquist frequency or through the corners."""
    each = np.stack([over_shells(periodogram) for periodogram in sample.periodograms])
    if not corners:
        each = each[:, : sample.box // 2]
    frequencies = np.arange(1, each.shape[1] + 1) / sample.box
    error = each.std(axis=0, ddof=1) / np.sqrt(len(each))
    return RadialPower(frequencies, each.mean(axis=0), error, len(each))


def group_by_tomogram(
    sample: TaperedCubes, tomograms: Sequence[str] | None
) -> dict[str, RadialPower]:
    """Radial power of each tomogram; of all together where a tomogram has too few cubes."""
    number = len(sample.periodograms)
    names = np.array(["all"] * number if tomograms is None else list(tomograms))
    if len(names) != number:
        msg = f"{len(names)} tomogram names for {number} cubes: expected one for each"
        raise ValueError(msg)
    unique = list(dict.fromkeys(names.tolist()))
    if min(int((names == name).sum()) for name in unique) < MIN_CUBES:
        names, unique = np.array(["all"] * number), ["all"]
    return {name: summarise(sample.select(names == name), corners=True) for name in unique}


def _support(cubes: NDArray[np.float64]) -> tuple[NDArray[np.float64], bool]:
    """Amplitude of a mask that the cubes have, from where they vary; 1 all over if they do."""
    rough = np.zeros(cubes.shape[1:])
    for cube in cubes:
        detail = cube - gaussian_filter(cube, 1.5, mode="wrap")
        rough += detail**2 / max(float((detail**2).mean()), 1e-30)
    rough = gaussian_filter(rough, 1.0, mode="nearest")
    support = np.sqrt(np.minimum(rough / np.percentile(rough, 75), 1.0))
    if support.min() > 0.3:
        return np.ones_like(support), False
    return support, True


def _outside(box: int, radius: float) -> NDArray[np.float64]:
    """1 outside a sphere, 0 within, with a cosine edge of 3 voxels."""
    along = np.arange(box) - box // 2
    distance = np.sqrt(along[:, None, None] ** 2 + along[None, :, None] ** 2 + along**2)
    edge = np.clip((distance - radius) / 3.0, 0.0, 1.0)
    return np.asarray(0.5 - 0.5 * np.cos(np.pi * edge))

"""SNR of subtomograms that are not aligned: an interval, and why.

Both ends compare the cubes with noise-free cubes of the recipe's structures, normalised alike: each
cube to unit power. Where the signal is strong that changes the shape of the mean power, since
cubes about large particles then count no more than others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.optimize import brentq
from scipy.stats import norm

from cectflow.progress import track
from cectflow.simulation.calibration.expected_power import typical_optics
from cectflow.simulation.calibration.radial_power import (
    RadialPower,
    TaperedCubes,
    over_shells,
)
from cectflow.simulation.distractors import render_distractors
from cectflow.simulation.field import Specimen, simulate_field
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.spectrum import shell_numbers
from cectflow.subtomogram import cut

__all__ = ["SignalCubes", "SnrInterval", "bound_snr", "signal_cubes"]

LOWEST_SNR, HIGHEST_SNR = 1e-6, 30.0
"""Between which it is looked for. Above, noise has less of the power than :data:`SIGNAL_ERROR`;
the highest is the upper end when the measured power sets none."""
SIGNAL_ERROR = 0.1
"""Of the signal's power in a shell, that a recipe's structures, mix and crowding leave open."""
SIGNAL_FIELDS = 8
"""Fields whose particles give the power of the signal, and its error by their spread."""
SIGNAL_RESOLUTION = 60.0
"""Å: below it the mean of unaligned particles is looked for."""


@dataclass(frozen=True)
class SnrInterval:
    """Lowest and highest SNR that agree with the cubes, and why."""

    low: float
    high: float
    reasoning: str


@dataclass(frozen=True, eq=False)
class SignalCubes:
    """Noise-free cubes about a recipe's particles, for a unit of the variance the SNR counts.

    Attributes
    ----------
    powers
        ``(cube, shell)`` through the corners, as of :class:`TaperedCubes` but not normalised.
    totals
        Mean of each cube's power over all frequencies.
    amplitudes
        ``(cube, shell)``: see :func:`_mean_amplitudes`.
    fields
        Number of each cube's field: cubes of one overlap, so that fields are what is independent.
    """

    powers: NDArray[np.float64]
    totals: NDArray[np.float64]
    amplitudes: NDArray[np.float64]
    fields: NDArray[np.int64]

    def power(self, snr: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The signal's part of the mean power per shell of cubes normalised with their noise.

        Parameters
        ----------
        snr
            In the reconstruction.

        Returns
        -------
        tuple
            Power through the corners, and its standard error.
        """
        parts = self.powers / (self.totals + 1.0 / snr)[:, None]
        return self._over_fields(lambda kept: parts[kept].mean(axis=0))

    def share_of_mean(self, snr: float) -> tuple[float, float]:
        """What :func:`_share_of_mean` of such cubes is at an SNR, and its standard error."""
        parts = self.amplitudes / np.sqrt(self.totals + 1.0 / snr)[:, None]
        share, error = self._over_fields(lambda kept: np.asarray(_share_of_mean(parts[kept])))
        return float(share), float(error)

    def _over_fields(
        self, estimate: Callable[[NDArray[np.bool_]], NDArray[np.float64]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """An estimate of all cubes, and its standard error by the jackknife over fields."""
        numbers = np.unique(self.fields)
        left_out = np.stack([estimate(self.fields != number) for number in numbers])
        error = np.sqrt((len(numbers) - 1) * left_out.var(axis=0))
        return estimate(np.ones(len(self.fields), np.bool_)), np.asarray(error)


def signal_cubes(
    specimen: Specimen,
    recipe: SimulationRecipe,
    sample: TaperedCubes,
    defoci: Sequence[float],
    voxel_size: float,
) -> SignalCubes:
    """Noise-free cubes about the particles of a recipe, under the window of a sample.

    The cubes show membranes and gold, too; the variance in which the SNR counts is the particles'.

    Parameters
    ----------
    specimen
        Whose structures, occupancy and mix.
    recipe
        Its optics.
    sample
        The cubes to compare with.
    defoci
        In µm; fields take them in turn.
    voxel_size
        Å.
    """
    powers, totals, amplitudes, fields, variances = [], [], [], [], []
    weight = sample.window / sample.window.sum()
    for index in track(range(SIGNAL_FIELDS), total=SIGNAL_FIELDS, title="signal of the recipe"):
        field = simulate_field(specimen, "calibration", index)
        transfer = typical_optics(recipe, float(defoci[index % len(defoci)])).signal.cpu().numpy()
        everything = field.density.astype(np.float64)
        foreign, _ = render_distractors(
            field.scene.distractors,
            shape=recipe.field_shape,
            voxel_size=recipe.voxel_size,
            sigma=recipe.blur,
        )
        imaged, of_particles = (
            fft.irfftn(fft.rfftn(density) * transfer, s=recipe.field_shape)
            for density in (everything, everything - foreign)
        )
        variances.append(of_particles.var())
        centres = np.round(field.scene.positions_zyx)
        for cube in cut(imaged, centres, sample.box, periodic=True):
            spectrum = _spectrum(cube - (cube * weight).sum(), sample.window)
            power = np.abs(spectrum) ** 2
            powers.append(over_shells(power))
            totals.append(power.mean())
            amplitudes.append(_mean_amplitudes(spectrum, sample.box * voxel_size))
            fields.append(index)
    unit = float(np.mean(variances))
    return SignalCubes(
        np.array(powers) / unit,
        np.array(totals) / unit,
        np.array(amplitudes) / np.sqrt(unit),
        np.array(fields),
    )


def bound_snr(
    sample: TaperedCubes,
    power: RadialPower,
    signal: SignalCubes,
    snr: float | None,
    voxel_size: float,
) -> SnrInterval:
    """SNR in the reconstruction that agrees with the cubes; where one is given, that one.

    At most: the signal has nowhere more power than was measured, both with their errors; the level
    is that of one shell among all (Bonferroni), since any of them may set the bound by chance.
    At least: the mean of the cubes holds no more than that of as many noise-free ones about centred
    particles would; picks that are off their particle's centre only lower it.

    Parameters
    ----------
    sample
        The cubes.
    power
        Theirs, through the corners.
    signal
        Of the recipe, as :func:`signal_cubes` gives it.
    snr
        Given, or None.
    voxel_size
        Å.
    """
    if snr is not None:
        return SnrInterval(snr, snr, f"SNR {snr:g}, as given.")
    band = power.in_band
    level = float(norm.isf(0.025 / band.sum()))

    def excess(trial: float) -> NDArray[np.float64]:
        expected, error = signal.power(trial)
        allowed = level * np.hypot(error, power.standard_error) + SIGNAL_ERROR * expected
        return np.asarray((expected - power.power - allowed)[band])

    high = _where(lambda trial: float(excess(trial).max()))
    if high is None:
        high = HIGHEST_SNR
        upper = f"no upper bound, {high:g} is taken: the power might as well all be signal"
    else:
        tightest = power.frequencies[band][int(np.argmax(excess(high)))]
        upper = (
            f"at most {high:.2g}, since with more of it the signal of the recipe's structures "
            f"alone would exceed the power at {tightest:.3f} cycles/voxel"
        )
    held, error = _mean_of(sample, voxel_size)

    def deficit(trial: float) -> float:
        expected, of_expected = signal.share_of_mean(trial)
        return expected - held + 2 * float(np.hypot(error, of_expected))

    number = len(sample.cubes)
    seen = f"the mean of the {number} unaligned cubes holds {held:.2g} ± {error:.2g}"
    low = _where(deficit) if held > 2 * error else None
    if low is None:
        low, lower = high / 10, f"no lower bound, a tenth of it is taken: {seen} of their power"
    else:
        lower = f"at least {low:.2g}, since {seen} of their power"
    if low > high:
        low, high = high, low
        lower += "; the two disagree, so the structures are not those of the cubes"
    low, high = float(f"{low:.3g}"), float(f"{high:.3g}")
    reason = f"SNR {low:g} to {high:g}: {upper}; {lower}. Without alignment no more can be told."
    return SnrInterval(low, high, reason)


def _where(rising: Callable[[float], float]) -> float | None:
    """SNR at which a function that rises with it is 0; None if it does not get there."""
    if rising(LOWEST_SNR) >= 0 or rising(HIGHEST_SNR) <= 0:
        return None
    ends = np.log(LOWEST_SNR), np.log(HIGHEST_SNR)
    return float(np.exp(brentq(lambda log: rising(float(np.exp(log))), *ends, xtol=1e-4)))


def _spectrum(cube: NDArray[np.float64], taper: NDArray[np.float64]) -> NDArray[np.complex128]:
    """Of a tapered cube about its centre, so scaled that white noise has its variance."""
    return np.asarray(fft.fftn(fft.ifftshift(cube * taper)) / np.sqrt((taper**2).sum()))


def _mean_amplitudes(spectrum: NDArray[np.complex128], edge: float) -> NDArray[np.float64]:
    """Mean amplitude of a cube in shells below 60 Å, whose squares are shares of its power.

    Centred particles in any orientation have their spherical mean in common: a part of the signal.
    The mean of a shell's amplitudes squared, times their number, is no more than their power.

    Parameters
    ----------
    spectrum
        About the cube's centre.
    edge
        Of the cube in Å.
    """
    box = spectrum.shape[-1]
    numbers = shell_numbers(box).ravel()
    counts = np.bincount(numbers)
    shells = np.arange(len(counts))
    low = (shells > 0) & (shells * SIGNAL_RESOLUTION <= edge)
    sums = np.bincount(numbers, spectrum.real.ravel())
    return np.asarray(sums[low] / np.sqrt(counts[low] * box**3))


def _share_of_mean(amplitudes: NDArray[np.float64]) -> float:
    """Share of their power that cubes have in common; without the terms that a cube has alone."""
    number = len(amplitudes)
    together = (amplitudes.sum(axis=0) ** 2).sum() - (amplitudes**2).sum()
    return float(together / (number * (number - 1)))


def _mean_of(sample: TaperedCubes, voxel_size: float) -> tuple[float, float]:
    """Share of the power that cubes have in common about their centre, and its standard error."""
    amplitudes = []
    for cube in sample.cubes:
        spectrum = _spectrum(cube, sample.taper)
        of_cube = _mean_amplitudes(spectrum, sample.box * voxel_size)
        amplitudes.append(of_cube / np.sqrt((np.abs(spectrum) ** 2).mean()))
    values = np.array(amplitudes)
    number = len(values)
    left_out = [_share_of_mean(np.delete(values, i, axis=0)) for i in range(number)]
    return _share_of_mean(values), float(np.sqrt((number - 1) * np.var(left_out)))

"""SNR of subtomograms that are not aligned: an interval, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from cectflow.execution import track
from cectflow.simulation.calibration.expected_power import typical_optics
from cectflow.simulation.calibration.radial_power import (
    RadialPower,
    TaperedCubes,
    mean_power,
    over_shells,
    shell_numbers,
)
from cectflow.simulation.distractors import render_distractors
from cectflow.simulation.field import Specimen, simulate_field
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.subtomogram import cut

__all__ = ["SnrInterval", "bound_snr", "signal_power"]

HIGHEST_SNR = 10.0
"""Upper end of the interval when the measured power sets none."""
SIGNAL_FIELDS = 4
"""Fields whose particles give the power of the signal."""
SIGNAL_RESOLUTION = 60.0
"""Å: below it the mean of unaligned particles is looked for."""


@dataclass(frozen=True)
class SnrInterval:
    """Lowest and highest SNR that agree with the cubes, and why."""

    low: float
    high: float
    reasoning: str


def signal_power(
    specimen: Specimen, recipe: SimulationRecipe, sample: TaperedCubes, defoci: Sequence[float]
) -> NDArray[np.float64]:
    """Power per shell of noise-free cubes about particles, for a unit of the SNR's signal.

    The cubes show membranes and gold, too; the variance in which the SNR counts is the particles'.
    """
    powers, variances = [], []
    norm_of_taper = (sample.window**2).sum()
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
        cubes = cut(imaged, np.round(field.scene.positions_zyx), sample.box, periodic=True)
        weight = sample.window / sample.window.sum()
        means = (cubes * weight).sum(axis=(1, 2, 3))
        for cube, mean in zip(cubes, means, strict=True):
            tapered = np.abs(fft.fftn((cube - mean) * sample.window)) ** 2 / norm_of_taper
            powers.append(over_shells(tapered))
    return np.asarray(np.mean(powers, axis=0) / np.mean(variances))


def bound_snr(
    sample: TaperedCubes,
    power: RadialPower,
    signal: NDArray[np.float64],
    snr: float | None,
    voxel_size: float,
) -> SnrInterval:
    """SNR in the reconstruction that agrees with the cubes; where one is given, that one.

    Parameters
    ----------
    sample
        The cubes.
    power
        Theirs, through the corners.
    signal
        As :func:`signal_power` gives it.
    snr
        Given, or None.
    voxel_size
        Å.
    """
    if snr is not None:
        return SnrInterval(snr, snr, f"SNR {snr:g}, as given.")
    band = power.in_band
    room = (power.power + 2 * power.standard_error)[band] / signal[band]
    tightest = int(np.argmin(room))
    share = float(room[tightest])
    left = 1.0 - share * mean_power(signal, np.bincount(shell_numbers(sample.box).ravel())[1:])
    high = share / left if left > share / HIGHEST_SNR else HIGHEST_SNR
    upper = (
        f"at most {high:.2g}, since with more of it the signal of the recipe's structures alone "
        f"would exceed the power at {power.frequencies[band][tightest]:.3f} cycles/voxel"
        if high < HIGHEST_SNR
        else f"no upper bound, {high:g} is taken: the power might as well all be signal"
    )
    held, error = _power_of_mean(sample, voxel_size)
    number = len(sample.cubes)
    if held > 2 * error and held / (1 - held) < high:
        low = held / (1.0 - held)
        lower = f"at least {low:.2g}, which the mean of the {number} unaligned cubes holds"
    else:
        low = high / 10
        lower = (
            f"no lower bound, a tenth of it is taken: the mean of the {number} unaligned cubes "
            f"holds {held:.2g} ± {error:.2g}"
        )
    low, high = float(f"{low:.3g}"), float(f"{high:.3g}")
    reason = f"SNR {low:g} to {high:g}: {upper}; {lower}. Without alignment no more can be told."
    return SnrInterval(low, high, reason)


def _power_of_mean(sample: TaperedCubes, voxel_size: float) -> tuple[float, float]:
    """Share of the variance that cubes have in common about their centre below 60 Å; its error.

    Centred particles in any orientation have their spherical mean in common: a part of the signal.
    """
    number = len(sample.cubes)
    centred = fft.ifftshift(sample.cubes * sample.taper, axes=(1, 2, 3))
    spectra = fft.fftn(centred, axes=(1, 2, 3))
    spectra /= np.sqrt((np.abs(spectra) ** 2).sum(axis=(1, 2, 3), keepdims=True))
    numbers = shell_numbers(sample.box).ravel()
    counts = np.bincount(numbers)
    low = (np.arange(len(counts)) > 0) & (
        np.arange(len(counts)) * SIGNAL_RESOLUTION <= sample.box * voxel_size
    )
    # The mean of a shell's amplitudes squared, times their number, is no more than their power.
    amplitudes = [np.bincount(numbers, one.real.ravel()) for one in spectra]
    inside = np.stack(amplitudes)[:, low] / np.sqrt(counts[low])

    def share(values: NDArray[np.float64]) -> float:
        n = len(values)
        return float(((values.sum(axis=0) ** 2).sum() - (values**2).sum()) / (n * (n - 1)))

    left_out = np.array([share(np.delete(inside, i, axis=0)) for i in range(number)])
    return share(inside), float(np.sqrt((number - 1) * left_out.var()))

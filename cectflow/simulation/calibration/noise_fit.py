"""Noise spectrum of the tilt images, and their defocus, that explain the power of subtomograms.

The measured power is that of the tilt images' noise filtered by the tilts and, after a CTF
correction, by the CTF, and smeared by the taper. The spectrum is what makes the result of all that
equal to the measured power.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Num
from numpy.typing import NDArray
from scipy import fft
from scipy.optimize import nnls

from cectflow.progress import track
from cectflow.simulation.calibration.expected_power import (
    CubeWindow,
    defocus_range,
    middle_of,
    noise_power_of,
    normal_deviates,
)
from cectflow.simulation.calibration.radial_power import (
    RadialPower,
    TaperedCubes,
    over_shells,
    summarise,
)
from cectflow.simulation.microscope import NoiseSpectrum, contrast_transfer, single_number
from cectflow.simulation.optics import WIENER_CONSTANT
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.spectrum import shell_numbers

__all__ = [
    "PowerKernel",
    "estimate_defocus",
    "fit_defoci",
    "match_spectrum",
    "noise_shows_defocus",
]

DEFOCUS_MARGIN = 1.0
"""µm beyond the recipe's range in which defocus is looked for: over a wide range, several defoci
with a wavy spectrum each explain the same power."""
DEFOCUS_STEP = 0.05
"""µm."""
DEFOCUS_BAND = (0.12, 0.45)
"""Cycles per voxel that show the defocus: below, the power rises steeply for other reasons."""
MODEL_ERROR = 0.03
"""Of the power in a shell, that the optics leave unexplained."""
SMOOTHNESS = 1.0
"""Weight of the spectrum's second differences, in units of its median, against the data."""
MAX_ROUNDS = 12
AGREEMENT = 0.01
"""Of measured and expected power per shell, at which the rounds end."""


@dataclass(frozen=True, eq=False)
class PowerKernel:
    """Power per shell as a linear function of the noise power at radial frequencies.

    A slab is thin, so that the frequency within a tilt image is nearly that in the volume: CTF and
    spectrum are then functions of the radius, and any of them costs one small product.

    Attributes
    ----------
    frequencies
        Cycles per voxel at which the radial function is sampled; linear between.
    matrix
        ``(shell, frequency)``; what the tilts and the window make of each.
    nodes
        Cycles per voxel of the noise spectrum that is looked for: the shells from the second on
        (the first has lost power with the mean of each cube), and one beyond Nyquist for the
        corners of Fourier space.
    """

    recipe: SimulationRecipe
    frequencies: NDArray[np.float64]
    matrix: NDArray[np.float64]
    nodes: NDArray[np.float64]

    @classmethod
    def of(cls, recipe: SimulationRecipe, sample: TaperedCubes) -> PowerKernel:
        """Kernel of a recipe's tilts; its noise spectrum and CTF correction take no part."""
        optical = recipe.microscope.model_copy(update={"noise_spectrum": "white"})
        plain = recipe.model_copy(update={"microscope": optical, "ctf_correction": "none"})
        geometry = noise_power_of(plain, 0.0)
        depth, height, width = recipe.field_shape
        radius = np.sqrt(
            fft.fftfreq(depth)[:, None, None] ** 2
            + fft.fftfreq(height)[None, :, None] ** 2
            + fft.rfftfreq(width) ** 2
        )
        window = CubeWindow.of(recipe.field_shape, sample)
        spacing = 0.5 / sample.box
        frequencies = np.arange(0.0, np.sqrt(0.75) + spacing, spacing)
        columns = []
        for frequency in track(frequencies, total=len(frequencies), title="optics of each shell"):
            hat = np.maximum(0.0, 1.0 - np.abs(radius - frequency) / spacing)
            columns.append(over_shells(window.expected(geometry * hat)))
        nodes = np.append(np.arange(2, sample.box // 2 + 1) / sample.box, 0.6)
        return cls(recipe, frequencies, np.stack(columns, axis=1), nodes)

    def weights(self, defocus_um: float) -> NDArray[np.float64]:
        """What the CTF correction does to the noise power at :attr:`frequencies`."""
        if not noise_shows_defocus(self.recipe):
            return np.ones_like(self.frequencies)
        microscope = middle_of(self.recipe.microscope)
        squared = (self.frequencies / self.recipe.voxel_size) ** 2
        defoci = defocus_um + single_number(microscope, "defocus_spread_um") * normal_deviates(15)
        gain = np.stack([contrast_transfer(squared, float(d), microscope) ** 2 for d in defoci])
        if self.recipe.ctf_correction == "wiener":
            gain = gain / (gain + WIENER_CONSTANT) ** 2
        return np.asarray(gain.mean(axis=0))

    def response(self, defoci: Sequence[float], shares: Sequence[float]) -> NDArray[np.float64]:
        """``(shell, node)``: power per shell of a unit of the spectrum at each node.

        The shares, whose sum is 1, are those of the defoci among the cubes.
        """
        weights = np.average([self.weights(float(d)) for d in defoci], axis=0, weights=shares)
        hats = np.stack(
            [np.interp(self.frequencies, self.nodes, unit) for unit in np.eye(len(self.nodes))],
            axis=1,
        )
        return np.asarray((self.matrix * weights) @ hats)

    def solve(
        self, power: RadialPower, response: NDArray[np.float64], used: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], float]:
        """Smooth spectrum ≥ 0 at the nodes that explains the power in some shells; the misfit."""
        error = np.hypot(power.standard_error, MODEL_ERROR * power.power)[used]
        scale = np.median(power.power[used] / np.maximum(response[used].sum(axis=1), 1e-30))
        number = len(self.nodes)
        bends = np.diff(np.eye(number), 2, axis=0) * (SMOOTHNESS / scale)
        rows = np.concatenate([response[used] / error[:, None], bends])
        values = np.concatenate([power.power[used] / error, np.zeros(number - 2)])
        spectrum, misfit = nnls(rows, values)
        return np.asarray(spectrum), float(misfit**2)


def noise_shows_defocus(recipe: SimulationRecipe) -> bool:
    """Whether the recipe's CTF correction puts the CTF on the noise."""
    return recipe.ctf_correction in {"premultiplied", "wiener"}


def _defoci_to_try(recipe: SimulationRecipe) -> NDArray[np.float64]:
    low, high = defocus_range(recipe)
    low, high = max(low - DEFOCUS_MARGIN, 0.2), high + DEFOCUS_MARGIN
    return np.linspace(low, high, round((high - low) / DEFOCUS_STEP) + 1)


def fit_defoci(
    recipe: SimulationRecipe, kernel: PowerKernel, groups: dict[str, RadialPower]
) -> dict[str, float]:
    """Defocus of each tomogram for which a smooth spectrum explains its power best."""
    tried = _defoci_to_try(recipe)
    responses = [kernel.response([float(defocus)], [1.0]) for defocus in tried]
    defoci = {}
    for name, power in track(groups.items(), total=len(groups), title="defocus"):
        used = power.between(*DEFOCUS_BAND)
        misfits = [kernel.solve(power, response, used)[1] for response in responses]
        defoci[name] = float(round(tried[int(np.argmin(misfits))], 2))
    return defoci


def estimate_defocus(
    recipe: SimulationRecipe, cubes: Num[NDArray[np.generic], "n box box box"]
) -> float:
    """Defocus in µm of one more tomogram of a calibrated recipe, from the noise of its cubes.

    The noise spectrum is the microscope's and stays; the defocus is the tomogram's own.

    Parameters
    ----------
    recipe
        With a measured noise spectrum, and a ``ctf_correction`` that acts on the noise.
    cubes
        At least four, of the recipe's voxel size.

    Raises
    ------
    ValueError
        If the noise of this recipe does not show the defocus, or as :func:`radial_power`.
    """
    spectrum = recipe.microscope.noise_spectrum
    if isinstance(spectrum, str) or not noise_shows_defocus(recipe):
        msg = (
            f"noise_spectrum is {recipe.microscope.noise_spectrum_name} and ctf_correction "
            f"{recipe.ctf_correction}: expected a calibrated recipe, premultiplied or wiener"
        )
        raise ValueError(msg)
    sample = TaperedCubes.of(cubes, None)
    kernel = PowerKernel.of(recipe, sample)
    power = np.interp(kernel.frequencies / recipe.voxel_size, spectrum.frequencies, spectrum.power)
    pooled = summarise(sample, corners=True)
    error = np.hypot(pooled.standard_error, MODEL_ERROR * pooled.power)
    tried, misfits = _defoci_to_try(recipe), []
    for defocus in tried:
        expected = kernel.matrix @ (kernel.weights(float(defocus)) * power)
        weight = pooled.in_band / error**2
        scale = (weight * expected * pooled.power).sum() / (weight * expected**2).sum()
        misfits.append(float((weight * (scale * expected - pooled.power) ** 2).sum()))
    return float(round(tried[int(np.argmin(misfits))], 2))


def match_spectrum(
    recipe: SimulationRecipe,
    sample: TaperedCubes,
    target: RadialPower,
    nodes: NDArray[np.float64],
    start: NDArray[np.float64],
    signal: NDArray[np.float64],
    defoci: Sequence[float],
    shares: Sequence[float],
) -> tuple[NoiseSpectrum, NDArray[np.float64], tuple[float, ...]]:
    """Spectrum whose expected power is the target's, that power, and shells where it cannot be.

    The signal is its part of the target's power, per shell.
    """
    window = CubeWindow.of(recipe.field_shape, sample)
    counts = np.bincount(shell_numbers(sample.box).ravel())[1:]
    wanted = target.power - signal
    least = 0.02 * target.power
    band = target.in_band
    missed = tuple(target.frequencies[band & (wanted < least)].tolist())
    wanted = np.maximum(wanted, least)
    power = np.maximum(start, 1e-4 * start.max())
    shells = len(nodes) - 1
    for _ in track(range(MAX_ROUNDS), total=MAX_ROUNDS, title="matching the noise spectrum"):
        values = tuple(float(f"{value:.4g}") for value in power / power.max())
        frequencies = tuple(float(f"{node / recipe.voxel_size:.6g}") for node in nodes)
        spectrum = NoiseSpectrum(frequencies=frequencies, power=values)
        optical = recipe.microscope.model_copy(update={"noise_spectrum": spectrum})
        made = recipe.model_copy(update={"microscope": optical})
        each = [window.expected(noise_power_of(made, float(defocus))) for defocus in defoci]
        periodogram = np.average(each, axis=0, weights=shares)
        noise = over_shells(periodogram)
        noise *= (wanted * counts)[band].sum() / (noise * counts)[band].sum()
        ratio = wanted / np.maximum(noise, 1e-30)
        if np.abs(ratio[band] - 1.0).max() < AGREEMENT:
            break
        update = np.append(ratio[1 : shells + 1], ratio[shells + 1 :].mean())
        # The taper mixes neighbouring shells: undoing that would amplify noise from node to node.
        update = np.convolve(np.pad(update, 1, mode="edge"), (0.25, 0.5, 0.25), mode="valid")
        power = power * np.clip(update, 0.5, 2.0)
    return spectrum, signal + noise, missed

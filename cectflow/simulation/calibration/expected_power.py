"""Power that cubes of a recipe's noise show: its typical optics, and the window of the cubes.

All of it is computed forwards with the optics that simulate, so that nothing has to be drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.stats import norm

from cectflow.simulation.calibration.radial_power import TaperedCubes
from cectflow.simulation.microscope import Microscope, TiltScheme, single_number
from cectflow.simulation.optics import Optics, optics_of
from cectflow.simulation.recipe import SimulationRecipe

__all__ = [
    "CubeWindow",
    "defocus_range",
    "middle_of",
    "noise_power_of",
    "normal_deviates",
    "typical_optics",
]

ConfigT = TypeVar("ConfigT", Microscope, TiltScheme)


@dataclass(frozen=True, eq=False)
class CubeWindow:
    """Expected periodogram of cubes cut from a periodic field of known power.

    The field's autocovariance times the window's autocorrelation, transformed: exact, so nothing
    has to be drawn.
    """

    shape: tuple[int, int, int]
    box: int
    autocorrelation: NDArray[np.float64]

    @classmethod
    def of(cls, shape: tuple[int, int, int], sample: TaperedCubes) -> CubeWindow:
        """Window of cubes in a periodic field of a shape (z, y, x) in voxels."""
        box = sample.box
        padded = fft.rfftn(sample.window, s=(2 * box,) * 3)
        correlation = fft.irfftn(np.abs(padded) ** 2, s=(2 * box,) * 3)
        return cls(shape, box, correlation / (sample.window**2).sum())

    def expected(self, power: NDArray[np.float64]) -> NDArray[np.float64]:
        """Periodogram ``(box, box, box)`` for a half power spectrum of the field."""
        box = self.box
        covariance = fft.irfftn(power, s=self.shape)
        lags = (np.arange(2 * box) + box) % (2 * box) - box
        near = covariance[np.ix_(*(lags % n for n in self.shape))] * self.autocorrelation
        folded = near.reshape(2, box, 2, box, 2, box).sum(axis=(0, 2, 4))
        return np.asarray(fft.fftn(folded).real)


def middle_of(config: ConfigT) -> ConfigT:
    """With the middle of every range."""
    values = {name: getattr(config, name) for name in config.drawn}
    ranges = {name: 0.5 * sum(value) for name, value in values.items() if isinstance(value, tuple)}
    return config.model_copy(update=ranges)


def defocus_range(recipe: SimulationRecipe) -> tuple[float, float]:
    """Lowest and highest defocus of a recipe, in µm; the same where it is one number."""
    given = recipe.microscope.defocus_um
    return given if isinstance(given, tuple) else (given, given)


def typical_optics(recipe: SimulationRecipe, defocus_um: float) -> Optics:
    """Optics of a typical field of this defocus: the middle of every other range."""
    microscope, tilts = middle_of(recipe.microscope), middle_of(recipe.tilts)
    spread = single_number(microscope, "defocus_spread_um")
    defoci = defocus_um + spread * normal_deviates(len(tilts.angles))
    return optics_of(
        recipe.field_shape,
        recipe.voxel_size,
        microscope,
        tilts,
        tuple(defoci.tolist()),
        recipe.ctf_correction,
    )


def normal_deviates(number: int) -> NDArray[np.float64]:
    """Standard normal quantiles in an order that has nothing to do with the tilt angle."""
    quantiles = norm.ppf((np.arange(number) + 0.5) / number)
    return np.asarray(np.random.default_rng(0).permutation(quantiles))


def noise_power_of(recipe: SimulationRecipe, defocus_um: float) -> NDArray[np.float64]:
    """Half power spectrum of the noise in a typical field of this defocus, without its mean."""
    power = typical_optics(recipe, defocus_um).noise.cpu().numpy().astype(np.float64) ** 2
    power[0, 0, 0] = 0.0
    return power

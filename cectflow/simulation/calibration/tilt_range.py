"""Tilt range of subtomograms, from the edges of their power over the angle in the k_x k_z plane."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter1d

from cectflow.simulation.calibration.expected_power import CubeWindow, noise_power_of
from cectflow.simulation.calibration.radial_power import TaperedCubes, over_shells
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.spectrum import shell_numbers

__all__ = ["TiltRange", "measure_tilts"]

EMPTY = 0.3
"""Mean power in the emptiest directions over that in all, below which there is a wedge."""


@dataclass(frozen=True)
class TiltRange:
    """Tilt angles about y, in degrees, between which there is power.

    Attributes
    ----------
    lowest, highest
        Of the tilts.
    lowest_error, highest_error
        The angular resolution of the cubes, and the standard error over cubes added in quadrature.
        The resolution is one voxel of the cube's Fourier transform seen at the Nyquist radius,
        2 / box rad: 7.2° of 16 voxels, 3.6° of 32. Within it an edge may be displaced alike in all
        cubes: by signal, whose spectrum the correction for the taper does not know, by the slabs'
        width and by steps between them.
    """

    lowest: float
    highest: float
    lowest_error: float
    highest_error: float


def measure_tilts(
    recipe: SimulationRecipe, sample: TaperedCubes
) -> tuple[TiltRange | None, tuple[str, ...]]:
    """Tilt range of cubes, None where no wedge is visible, and notes for the user.

    Raises
    ------
    ValueError
        If the wedge is about x, or the power is not about a tilt of 0°.
    """
    mean = sample.periodograms.mean(axis=0)
    power = _power_of_angle(mean)
    found = _find_edges(power)
    if found is None:
        if _find_edges(_power_of_angle(mean, axis="x")) is not None:
            msg = (
                "the cubes have their missing wedge about x: expected the tilt axis along y: "
                "turn them by 90° about z first"
            )
            raise ValueError(msg)
        least = np.array([np.roll(power, -i) for i in range(-4, 5)]).mean(axis=0)
        share = 100 * least.min() / power.mean()
        note = (
            f"No missing wedge is visible: the emptiest 9° have {share:.0f} % of the mean power, "
            f"expected below {100 * EMPTY:.0f} %. The tilts stay as they were."
        )
        return None, (note,)
    if not found[0] < -10 < 10 < found[1]:
        msg = (
            f"the power of the cubes is between {found[0]:.0f}° and {found[1]:.0f}° of tilt about "
            "y: expected a range about 0°: the beam has to be along z, turn the cubes first"
        )
        raise ValueError(msg)
    # Taper and slab width move the edges outwards: by as much as they move those of the optics.
    lowest, highest = found
    window = CubeWindow.of(recipe.field_shape, sample)
    for _ in range(3):
        optical = recipe.microscope.model_copy(update={"noise_spectrum": "white"})
        tilts = recipe.tilts.model_copy(
            update={
                "lowest": max(lowest, -89.0),
                "highest": min(highest, 89.0),
                "explicit": None,
            }
        )
        white = recipe.model_copy(
            update={"microscope": optical, "tilts": tilts, "ctf_correction": "none"}
        )
        seen = _find_edges(_power_of_angle(window.expected(noise_power_of(white, 0.0))))
        if seen is None:
            break
        # The last tilt is up to one step short of the highest angle asked for.
        last = float(tilts.angles[-1])
        lowest, highest = tilts.lowest + found[0] - seen[0], last + found[1] - seen[1]
    errors = _edge_errors(sample)
    return TiltRange(lowest, highest, *errors), ()


def _power_of_angle(periodogram: NDArray[np.float64], *, axis: str = "y") -> NDArray[np.float64]:
    """Mean power of directions at -90°, -89° … 89° of tilt about y (or x), every shell alike.

    A tilt by t fills the plane k_z cos t + k_x sin t = 0, whose direction is -k_z / k_x = tan t.
    """
    box = periodogram.shape[-1]
    numbers = shell_numbers(box)
    profile = np.concatenate([[1.0], np.maximum(over_shells(periodogram), 1e-30)])
    along = fft.fftfreq(box) * box
    kz, ky, kx = np.meshgrid(along, along, along, indexing="ij")
    across, within = (kx, ky) if axis == "y" else (ky, kx)
    radius = np.hypot(kz, across)
    # Far out an angle is well defined; along the axis it is not.
    used = (numbers >= box // 6) & (numbers < box // 2) & (radius > np.abs(within))
    angle = np.rad2deg(np.arctan2(-kz, across))[used]
    relative = (periodogram / profile[numbers])[used]
    bins = np.floor(angle + 0.5).astype(np.int64) % 180
    sums = np.bincount(bins, relative, minlength=180)
    counts = np.bincount(bins, minlength=180)
    smooth = gaussian_filter1d(sums, 1.5, mode="wrap") / np.maximum(
        gaussian_filter1d(counts.astype(np.float64), 1.5, mode="wrap"), 1e-9
    )
    return np.asarray(np.roll(smooth, 90))


def _find_edges(power: NDArray[np.float64]) -> tuple[float, float] | None:
    """Lowest and highest angle with power; None if it has no gap.

    An edge is where the power first reaches half of what it is 3 to 13 degrees further in: dose
    weighting lets it fall to a tenth towards high tilts, so the mean over all is no measure.
    """
    mean = power.mean()
    wide = np.array([np.roll(power, -i) for i in range(-4, 5)]).mean(axis=0)
    gap = int(np.argmin(wide))
    if wide[gap] > EMPTY * mean:
        return None
    edges = []
    for step in (1, -1):
        walk = power[(gap + step * np.arange(-10, 180)) % 180]
        inner = np.array([walk[i + 3 : i + 14].mean() for i in range(150)])
        floor = walk[10]
        above = (walk[:150] - floor >= 0.5 * (inner - floor)) & (inner - floor > 0.15 * mean)
        place = 10 + int(np.argmax(above[10:]))
        before, after = walk[place - 1], walk[place]
        level = floor + 0.5 * (inner[place] - floor)
        part = np.clip((level - before) / (after - before), 0, 1) if after > before else 1.0
        edges.append(step * (place - 11 + float(part)))
    # From the gap upwards the first power is the lowest tilt's, downwards the highest's.
    lowest, highest = ((gap + edge) % 180.0 - 90.0 for edge in edges)
    return lowest, highest


def _edge_errors(sample: TaperedCubes) -> tuple[float, float]:
    """Errors of the two edges in degrees: resolution, and spread by the jackknife over cubes."""
    number = len(sample.periodograms)
    total = sample.periodograms.sum(axis=0)
    edges = [_find_edges(_power_of_angle(total - one)) for one in sample.periodograms]
    kept = np.array([edge for edge in edges if edge is not None])
    if len(kept) < 2:
        return 90.0, 90.0
    resolution = np.rad2deg(2.0 / sample.box)
    low, high = np.hypot(resolution, np.sqrt((number - 1) * kept.var(axis=0)))
    return float(low), float(high)

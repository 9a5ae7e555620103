"""Calibration: noise spectrum, tilt range, defocus and SNR of a recipe, from real subtomograms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Num
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from cectflow.model_card import Contrast
from cectflow.simulation.calibration.expected_power import defocus_range
from cectflow.simulation.calibration.noise_fit import (
    PowerKernel,
    fit_defoci,
    match_spectrum,
    noise_shows_defocus,
)
from cectflow.simulation.calibration.radial_power import (
    BAND,
    RadialPower,
    TaperedCubes,
    group_by_tomogram,
    summarise,
)
from cectflow.simulation.calibration.snr_bounds import SnrInterval, bound_snr, signal_cubes
from cectflow.simulation.calibration.tilt_range import TiltRange, measure_tilts
from cectflow.simulation.field import Specimen
from cectflow.simulation.recipe import SimulationRecipe

__all__ = ["Calibration", "calibrate"]


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the cubes told, and the recipe that has it.

    Attributes
    ----------
    recipe
        The given one with noise spectrum, tilt range, SNR and (where it shows) defocus replaced.
    measured
        Radial power of the cubes.
    expected
        That of simulated cubes by the optics of :attr:`recipe`, per shell of :attr:`measured`.
    tilt_range
        None when no wedge is visible: the tilts are then the given recipe's.
    defoci
        In µm, of each tomogram by name; empty where the noise does not show them.
    snr
        The one given, or the interval that was found.
    notes
        What else the user should know, one sentence each.
    """

    recipe: SimulationRecipe
    measured: RadialPower
    expected: Float[NDArray[np.float64], " shell"]
    tilt_range: TiltRange | None
    defoci: dict[str, float]
    snr: SnrInterval
    notes: tuple[str, ...]


def calibrate(
    specimen: Specimen,
    cubes: Num[NDArray[np.generic], "n box box box"],
    voxel_size: float,
    *,
    tomograms: Sequence[str] | None = None,
    mask_radius: float | None = None,
    snr: float | None = None,
    contrast: Contrast | None = None,
    fit_defocus: bool = True,
) -> Calibration:
    """Recipe of a specimen with the noise, wedge and SNR of real subtomograms.

    1. Tilt range: edges of the power over the angle in the k_x k_z plane; the bias of taper and
       slab width is taken off by measuring the expected power in the same way.
    2. Defocus, where ``ctf_correction`` puts the CTF on the noise: the value of each tomogram at
       which a smooth spectrum explains its power.
    3. Noise spectrum: the power per shell less the signal's share, divided by what the optics
       make of white noise, in rounds until the expected power per shell is the measured one.
    4. SNR: as given; else at least what the recipe's structures need for the mean of the unaligned
       cubes, and at most what the measured power per shell leaves room for with them.

    Parameters
    ----------
    specimen
        Of the recipe to calibrate: structures give the shape of the signal's power.
    cubes
        At least four, tilt axis y, beam z; of any scale.
    voxel_size
        Of the cubes in Å; the recipe's, within 1 %.
    tomograms
        Name of each cube's tomogram; None: all are of one.
    mask_radius
        Å: leave out what lies within, where the particles are.
    snr
        In the reconstruction, full band; None: find an interval.
    contrast
        Of the cubes; None: unknown. Only checked against the mean cube: power has no sign.
    fit_defocus
        False: the recipe's defocus range is kept.

    Raises
    ------
    ValueError
        If the cubes are too few, of another voxel size, larger than the recipe's field, or have
        their wedge about another axis than y; if the SNR is not above 0.
    """
    recipe = specimen.recipe
    _check_request(recipe, voxel_size, cubes.shape[-1], snr)
    sample = TaperedCubes.of(cubes, None if mask_radius is None else mask_radius / voxel_size)
    notes = list(_judge_contrast(sample, contrast))
    if sample.is_masked:
        notes.append("The cubes are masked or padded: only what varies in them is measured.")
    tilt_range, note = measure_tilts(recipe, sample)
    notes += note
    tilts = recipe.tilts
    if tilts.explicit is not None:
        notes.append("The recipe lists its tilt angles: they stay as they are.")
    elif tilt_range is not None:
        step = tilts.step
        lowest = max(round(2 * tilt_range.lowest) / 2, -89.5)
        highest = min(tilt_range.highest, 89.5 - 0.5 * step)
        number = max(1, round((highest - lowest) / step))
        tilts = tilts.model_copy(update={"lowest": lowest, "highest": lowest + number * step})
    recipe = recipe.model_copy(update={"tilts": tilts})
    groups = group_by_tomogram(sample, tomograms)
    kernel = PowerKernel.of(recipe, sample)
    shown = noise_shows_defocus(recipe)
    if shown and fit_defocus:
        defoci = fit_defoci(recipe, kernel, groups)
        values = tuple(defoci.values())
        shares = tuple(group.num_cubes / len(cubes) for group in groups.values())
        optical = recipe.microscope.model_copy(update={"defocus_um": (min(values), max(values))})
        recipe = recipe.model_copy(update={"microscope": optical})
    else:
        defoci, shares = {}, ()
        values = tuple(np.linspace(*defocus_range(recipe), 5).tolist()) if shown else ()
    values = values or (float(np.mean(defocus_range(recipe))),)
    shares = shares or (1.0 / len(values),) * len(values)
    pooled = summarise(sample, corners=True)
    start = kernel.solve(pooled, kernel.response(values, shares), pooled.between(BAND[0], 0.5))[0]
    signal = signal_cubes(specimen, recipe, sample, values, voxel_size)
    interval = bound_snr(sample, pooled, signal, snr, voxel_size)
    middle = float(np.sqrt(interval.low * interval.high))
    spectrum, expected, missed = match_spectrum(
        recipe, sample, pooled, kernel.nodes, start, signal.power(middle)[0], values, shares
    )
    if missed:
        shells = ", ".join(f"{frequency:.3f}" for frequency in missed)
        notes.append(
            f"At an SNR of {middle:.3g} the signal alone has all the power that was measured at "
            f"{shells} cycles/voxel: the noise there is not known. The SNR may be too high for "
            "these structures, or the cubes too few to tell."
        )
    optical = recipe.microscope.model_copy(update={"noise_spectrum": spectrum})
    recipe = recipe.model_copy(update={"microscope": optical, "snr": (interval.low, interval.high)})
    recipe = SimulationRecipe.model_validate(recipe.model_dump())
    measured = summarise(sample)
    return Calibration(
        recipe, measured, expected[: len(measured.power)], tilt_range, defoci, interval,
        tuple(notes),
    )  # fmt: skip


def _check_request(
    recipe: SimulationRecipe, voxel_size: float, box: int, snr: float | None
) -> None:
    if abs(voxel_size / recipe.voxel_size - 1.0) > 0.01:
        msg = (
            f"the cubes have {voxel_size:g} Å per voxel, the recipe {recipe.voxel_size:g}: set "
            f"voxel_size: {voxel_size:g} in the recipe (and a blur of at least "
            f"{0.68 * voxel_size:.2f}), or cut the cubes at {recipe.voxel_size:g} Å"
        )
        raise ValueError(msg)
    if box > min(recipe.field_shape):
        msg = (
            f"the cubes have {box} voxels along an edge, more than the recipe's field_shape "
            f"{recipe.field_shape}: enlarge the field to at least {box}"
        )
        raise ValueError(msg)
    if recipe.snr_stage != "reconstruction":
        msg = (
            f"snr_stage is {recipe.snr_stage}: cubes show the SNR of the reconstruction only: set "
            "snr_stage: reconstruction in the recipe"
        )
        raise ValueError(msg)
    if snr is not None and not (np.isfinite(snr) and snr > 0):
        msg = f"snr is {snr:g}: expected a finite value above 0"
        raise ValueError(msg)


def _judge_contrast(sample: TaperedCubes, contrast: Contrast | None) -> tuple[str, ...]:
    """A sentence if the mean cube's centre has the other sign than the contrast said."""
    if contrast is None:
        return ()
    middle = sample.box // 2
    centres = np.array([gaussian_filter(cube, 0.1 * sample.box)[(middle,) * 3]
                        for cube in sample.cubes])  # fmt: skip
    score = centres.mean() / (centres.std(ddof=1) / np.sqrt(len(centres)))
    if score * (1 if contrast == "light" else -1) > -3:
        return ()
    return (
        f"The mean cube is {'dark' if score < 0 else 'light'} at its centre ({abs(score):.0f} "
        f"standard errors), against the contrast given, {contrast}.",
    )

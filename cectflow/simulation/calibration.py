"""Calibration: noise spectrum, tilt range, defocus and SNR of a recipe, from real subtomograms.

The periodogram of tapered cubes shows the power of their tomogram smeared by the taper, filtered
by the tilts and, after a CTF correction of the tilt images, by the CTF. All of it is computed
forwards with the optics that simulate; the noise spectrum of the tilt images is what makes the
result equal to the measured power.

The taper is needed because cubes differ at their faces: cut out of a tomogram they are not
periodic, and a plain periodogram leaks the power of strong frequencies into weak ones; cubes
reconstructed one by one in their own box (EMPIAR-10499's here) are periodic and do not leak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float, Num
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from scipy.optimize import nnls
from scipy.stats import norm

from cectflow.execution import track
from cectflow.model_card import Contrast
from cectflow.simulation.field import Specimen, simulate_field
from cectflow.simulation.imaging import WIENER_CONSTANT, Optics, optics_of
from cectflow.simulation.microscope import (
    Microscope,
    NoiseSpectrum,
    TiltScheme,
    contrast_transfer,
    single_number,
)
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.subtomogram import cut

__all__ = [
    "Calibration",
    "RadialPower",
    "SnrInterval",
    "TiltRange",
    "calibrate",
    "estimate_defocus",
    "radial_power",
]

MIN_CUBES = 4
"""Below it neither the power per shell nor its standard error can be told."""
BAND = (0.05, 0.45)
"""Cycles per voxel that judge SNR and agreement: below lies the mean, above the corners' cut."""
EMPTY = 0.3
"""Mean power in the emptiest directions over that in all, below which there is a wedge."""
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
HIGHEST_SNR = 10.0
"""Upper end of the interval when the measured power sets none."""
SIGNAL_FIELDS = 4
"""Fields whose particles give the power of the signal."""
SIGNAL_RESOLUTION = 60.0
"""Å: below it the mean of unaligned particles is looked for."""


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


@dataclass(frozen=True)
class TiltRange:
    """Tilt angles about y, in degrees, between which there is power, with standard errors."""

    lowest: float
    highest: float
    lowest_error: float
    highest_error: float


@dataclass(frozen=True)
class SnrInterval:
    """Lowest and highest SNR that agree with the cubes, and why."""

    low: float
    high: float
    reasoning: str


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
    return _summarise(_Sample.of(cubes, mask_radius))


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
    4. SNR: as given; else at least what the mean of the unaligned cubes holds, and at most what
       the measured power per shell leaves room for with the recipe's structures.

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
    sample = _Sample.of(cubes, None if mask_radius is None else mask_radius / voxel_size)
    notes = list(_judge_contrast(sample, contrast))
    if sample.is_masked:
        notes.append("The cubes are masked or padded: only what varies in them is measured.")
    tilt_range, note = _measure_tilts(recipe, sample)
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
    groups = _group(sample, tomograms)
    kernel = _Kernel.of(recipe, sample)
    shown = recipe.ctf_correction in {"premultiplied", "wiener"}
    if shown and fit_defocus:
        defoci = _fit_defoci(recipe, kernel, groups)
        values = tuple(defoci.values())
        shares = tuple(group.num_cubes / len(cubes) for group in groups.values())
        optical = recipe.microscope.model_copy(update={"defocus_um": (min(values), max(values))})
        recipe = recipe.model_copy(update={"microscope": optical})
    else:
        defoci, shares = {}, ()
        values = tuple(np.linspace(*_defocus_range(recipe), 5).tolist()) if shown else ()
    values = values or (float(np.mean(_defocus_range(recipe))),)
    shares = shares or (1.0 / len(values),) * len(values)
    pooled = _summarise(sample, corners=True)
    start = kernel.solve(pooled, kernel.response(values, shares), pooled.between(BAND[0], 0.5))[0]
    signal = _signal_power(specimen, recipe, sample, values)
    interval = _bound_snr(sample, pooled, signal, snr, voxel_size)
    middle = float(np.sqrt(interval.low * interval.high))
    spectrum, expected, missed = _match(
        recipe, sample, pooled, kernel.nodes, start, signal, values, shares, middle
    )
    if missed:
        shells = ", ".join(f"{frequency:.3f}" for frequency in missed)
        notes.append(
            f"At an SNR of {middle:.3g} the signal alone has more power than was measured at "
            f"{shells} cycles/voxel: the SNR is too high for these structures, or the cubes are "
            "too few to tell."
        )
    optical = recipe.microscope.model_copy(update={"noise_spectrum": spectrum})
    recipe = recipe.model_copy(update={"microscope": optical, "snr": (interval.low, interval.high)})
    recipe = SimulationRecipe.model_validate(recipe.model_dump())
    measured = _summarise(sample)
    return Calibration(
        recipe, measured, expected[: len(measured.power)], tilt_range, defoci, interval,
        tuple(notes),
    )  # fmt: skip


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
    if isinstance(spectrum, str) or recipe.ctf_correction not in {"premultiplied", "wiener"}:
        msg = (
            f"noise_spectrum is {recipe.microscope.noise_spectrum_name} and ctf_correction "
            f"{recipe.ctf_correction}: expected a calibrated recipe, premultiplied or wiener"
        )
        raise ValueError(msg)
    sample = _Sample.of(cubes, None)
    kernel = _Kernel.of(recipe, sample)
    power = np.interp(kernel.frequencies / recipe.voxel_size, spectrum.frequencies, spectrum.power)
    pooled = _summarise(sample, corners=True)
    error = np.hypot(pooled.standard_error, MODEL_ERROR * pooled.power)
    tried, misfits = _defoci_to_try(recipe), []
    for defocus in tried:
        expected = kernel.matrix @ (kernel.weights(float(defocus)) * power)
        weight = pooled.in_band / error**2
        scale = (weight * expected * pooled.power).sum() / (weight * expected**2).sum()
        misfits.append(float((weight * (scale * expected - pooled.power) ** 2).sum()))
    return float(round(tried[int(np.argmin(misfits))], 2))


# --- what the cubes show --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Sample:
    """Tapered cubes: their periodograms, and the window under which they were taken."""

    cubes: NDArray[np.float64]
    window: NDArray[np.float64]
    taper: NDArray[np.float64]
    periodograms: NDArray[np.float64]
    is_masked: bool

    @classmethod
    def of(cls, cubes: NDArray[np.generic], mask_radius: float | None) -> _Sample:
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
        return int(self.window.shape[0])

    def select(self, keep: NDArray[np.bool_]) -> _Sample:
        return replace(self, cubes=self.cubes[keep], periodograms=self.periodograms[keep])


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


def _shell_numbers(box: int) -> NDArray[np.int64]:
    along = fft.fftfreq(box) * box
    radius = np.sqrt(along[:, None, None] ** 2 + along[None, :, None] ** 2 + along**2)
    return np.floor(radius + 0.5).astype(np.int64)


def _over_shells(periodogram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean per shell from 1 on, through the corners."""
    numbers = _shell_numbers(periodogram.shape[-1]).ravel()
    sums = np.bincount(numbers, periodogram.ravel())
    return np.asarray((sums / np.bincount(numbers))[1:])


def _mean(power: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    """Over all frequencies, of power per shell; there is none at k = 0."""
    return float((power * counts).sum() / (counts.sum() + 1))


def _summarise(sample: _Sample, *, corners: bool = False) -> RadialPower:
    each = np.stack([_over_shells(periodogram) for periodogram in sample.periodograms])
    if not corners:
        each = each[:, : sample.box // 2]
    frequencies = np.arange(1, each.shape[1] + 1) / sample.box
    error = each.std(axis=0, ddof=1) / np.sqrt(len(each))
    return RadialPower(frequencies, each.mean(axis=0), error, len(each))


def _group(sample: _Sample, tomograms: Sequence[str] | None) -> dict[str, RadialPower]:
    """Radial power of each tomogram; of all together where a tomogram has too few cubes."""
    number = len(sample.periodograms)
    names = np.array(["all"] * number if tomograms is None else list(tomograms))
    if len(names) != number:
        msg = f"{len(names)} tomogram names for {number} cubes: expected one for each"
        raise ValueError(msg)
    unique = list(dict.fromkeys(names.tolist()))
    if min(int((names == name).sum()) for name in unique) < MIN_CUBES:
        names, unique = np.array(["all"] * number), ["all"]
    return {name: _summarise(sample.select(names == name), corners=True) for name in unique}


def _judge_contrast(sample: _Sample, contrast: Contrast | None) -> tuple[str, ...]:
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


# --- tilt range -----------------------------------------------------------------------------------


def _power_of_angle(periodogram: NDArray[np.float64], *, axis: str = "y") -> NDArray[np.float64]:
    """Mean power of directions at -90°, -89° … 89° of tilt about y (or x), every shell alike.

    A tilt by t fills the plane k_z cos t + k_x sin t = 0, whose direction is -k_z / k_x = tan t.
    """
    box = periodogram.shape[-1]
    numbers = _shell_numbers(box)
    profile = np.concatenate([[1.0], np.maximum(_over_shells(periodogram), 1e-30)])
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


def _measure_tilts(
    recipe: SimulationRecipe, sample: _Sample
) -> tuple[TiltRange | None, tuple[str, ...]]:
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
    window = _Window.of(recipe.field_shape, sample)
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
        seen = _find_edges(_power_of_angle(window.expected(_noise_power(white, 0.0))))
        if seen is None:
            break
        # The last tilt is up to one step short of the highest angle asked for.
        last = float(tilts.angles[-1])
        lowest, highest = tilts.lowest + found[0] - seen[0], last + found[1] - seen[1]
    errors = _edge_errors(sample)
    return TiltRange(lowest, highest, *errors), ()


def _edge_errors(sample: _Sample) -> tuple[float, float]:
    """Standard errors of the two edges in degrees, by the jackknife over cubes."""
    number = len(sample.periodograms)
    total = sample.periodograms.sum(axis=0)
    edges = [_find_edges(_power_of_angle(total - one)) for one in sample.periodograms]
    kept = np.array([edge for edge in edges if edge is not None])
    if len(kept) < 2:
        return 90.0, 90.0
    low, high = np.sqrt((number - 1) * kept.var(axis=0))
    return float(low), float(high)


# --- what the optics make of a spectrum -----------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Window:
    """Expected periodogram of cubes cut from a periodic field of known power.

    The field's autocovariance times the window's autocorrelation, transformed: exact, so nothing
    has to be drawn.
    """

    shape: tuple[int, int, int]
    box: int
    autocorrelation: NDArray[np.float64]

    @classmethod
    def of(cls, shape: tuple[int, int, int], sample: _Sample) -> _Window:
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


ConfigT = TypeVar("ConfigT", Microscope, TiltScheme)


def _middle(config: ConfigT) -> ConfigT:
    """With the middle of every range."""
    values = {name: getattr(config, name) for name in config.drawn}
    ranges = {name: 0.5 * sum(value) for name, value in values.items() if isinstance(value, tuple)}
    return config.model_copy(update=ranges)


def _defocus_range(recipe: SimulationRecipe) -> tuple[float, float]:
    given = recipe.microscope.defocus_um
    return given if isinstance(given, tuple) else (given, given)


def _optics(recipe: SimulationRecipe, defocus_um: float) -> Optics:
    """Optics of a typical field of this defocus: the middle of every other range."""
    microscope, tilts = _middle(recipe.microscope), _middle(recipe.tilts)
    spread = single_number(microscope, "defocus_spread_um")
    defoci = defocus_um + spread * _deviates(len(tilts.angles))
    return optics_of(
        recipe.field_shape,
        recipe.voxel_size,
        microscope,
        tilts,
        tuple(defoci.tolist()),
        recipe.ctf_correction,
    )


def _deviates(number: int) -> NDArray[np.float64]:
    """Standard normal quantiles in an order that has nothing to do with the tilt angle."""
    quantiles = norm.ppf((np.arange(number) + 0.5) / number)
    return np.asarray(np.random.default_rng(0).permutation(quantiles))


def _noise_power(recipe: SimulationRecipe, defocus_um: float) -> NDArray[np.float64]:
    power = _optics(recipe, defocus_um).noise.cpu().numpy().astype(np.float64) ** 2
    power[0, 0, 0] = 0.0
    return power


@dataclass(frozen=True, eq=False)
class _Kernel:
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
    def of(cls, recipe: SimulationRecipe, sample: _Sample) -> _Kernel:
        optical = recipe.microscope.model_copy(update={"noise_spectrum": "white"})
        plain = recipe.model_copy(update={"microscope": optical, "ctf_correction": "none"})
        geometry = _noise_power(plain, 0.0)
        depth, height, width = recipe.field_shape
        radius = np.sqrt(
            fft.fftfreq(depth)[:, None, None] ** 2
            + fft.fftfreq(height)[None, :, None] ** 2
            + fft.rfftfreq(width) ** 2
        )
        window = _Window.of(recipe.field_shape, sample)
        spacing = 0.5 / sample.box
        frequencies = np.arange(0.0, np.sqrt(0.75) + spacing, spacing)
        columns = []
        for frequency in track(frequencies, total=len(frequencies), title="optics of each shell"):
            hat = np.maximum(0.0, 1.0 - np.abs(radius - frequency) / spacing)
            columns.append(_over_shells(window.expected(geometry * hat)))
        nodes = np.append(np.arange(2, sample.box // 2 + 1) / sample.box, 0.6)
        return cls(recipe, frequencies, np.stack(columns, axis=1), nodes)

    def weights(self, defocus_um: float) -> NDArray[np.float64]:
        """What the CTF correction does to the noise power at :attr:`frequencies`."""
        if self.recipe.ctf_correction not in {"premultiplied", "wiener"}:
            return np.ones_like(self.frequencies)
        microscope = _middle(self.recipe.microscope)
        squared = (self.frequencies / self.recipe.voxel_size) ** 2
        defoci = defocus_um + single_number(microscope, "defocus_spread_um") * _deviates(15)
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


def _defoci_to_try(recipe: SimulationRecipe) -> NDArray[np.float64]:
    low, high = _defocus_range(recipe)
    low, high = max(low - DEFOCUS_MARGIN, 0.2), high + DEFOCUS_MARGIN
    return np.linspace(low, high, round((high - low) / DEFOCUS_STEP) + 1)


def _fit_defoci(
    recipe: SimulationRecipe, kernel: _Kernel, groups: dict[str, RadialPower]
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


def _match(
    recipe: SimulationRecipe,
    sample: _Sample,
    target: RadialPower,
    nodes: NDArray[np.float64],
    start: NDArray[np.float64],
    signal: NDArray[np.float64],
    defoci: Sequence[float],
    shares: Sequence[float],
    snr: float,
) -> tuple[NoiseSpectrum, NDArray[np.float64], tuple[float, ...]]:
    """Spectrum whose expected power is the target's, that power, and shells where it cannot be."""
    window = _Window.of(recipe.field_shape, sample)
    counts = np.bincount(_shell_numbers(sample.box).ravel())[1:]
    share = snr / (1.0 + snr * _mean(signal, counts))
    wanted = target.power - share * signal
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
        each = [window.expected(_noise_power(made, float(defocus))) for defocus in defoci]
        periodogram = np.average(each, axis=0, weights=shares)
        noise = _over_shells(periodogram)
        noise *= (wanted * counts)[band].sum() / (noise * counts)[band].sum()
        ratio = wanted / np.maximum(noise, 1e-30)
        if np.abs(ratio[band] - 1.0).max() < AGREEMENT:
            break
        update = np.append(ratio[1 : shells + 1], ratio[shells + 1 :].mean())
        # The taper mixes neighbouring shells: undoing that would amplify noise from node to node.
        update = np.convolve(np.pad(update, 1, mode="edge"), (0.25, 0.5, 0.25), mode="valid")
        power = power * np.clip(update, 0.5, 2.0)
    return spectrum, share * signal + noise, missed


# --- SNR ------------------------------------------------------------------------------------------


def _signal_power(
    specimen: Specimen, recipe: SimulationRecipe, sample: _Sample, defoci: Sequence[float]
) -> NDArray[np.float64]:
    """Power per shell of noise-free cubes about particles, for a unit variance of their fields."""
    powers, variances = [], []
    norm_of_taper = (sample.window**2).sum()
    for index in track(range(SIGNAL_FIELDS), total=SIGNAL_FIELDS, title="signal of the recipe"):
        field = simulate_field(specimen, "calibration", index)
        transfer = _optics(recipe, float(defoci[index % len(defoci)])).signal.cpu().numpy()
        spectrum = fft.rfftn(np.asarray(field.density, np.float64)) * transfer
        spectrum[0, 0, 0] = 0.0
        imaged = fft.irfftn(spectrum, s=recipe.field_shape)
        variances.append(imaged.var())
        cubes = cut(imaged, np.round(field.scene.positions_zyx), sample.box, periodic=True)
        weight = sample.window / sample.window.sum()
        means = (cubes * weight).sum(axis=(1, 2, 3))
        for cube, mean in zip(cubes, means, strict=True):
            tapered = np.abs(fft.fftn((cube - mean) * sample.window)) ** 2 / norm_of_taper
            powers.append(_over_shells(tapered))
    return np.asarray(np.mean(powers, axis=0) / np.mean(variances))


def _bound_snr(
    sample: _Sample,
    power: RadialPower,
    signal: NDArray[np.float64],
    snr: float | None,
    voxel_size: float,
) -> SnrInterval:
    if snr is not None:
        return SnrInterval(snr, snr, f"SNR {snr:g}, as given.")
    band = power.in_band
    room = (power.power + 2 * power.standard_error)[band] / signal[band]
    tightest = int(np.argmin(room))
    share = float(room[tightest])
    left = 1.0 - share * _mean(signal, np.bincount(_shell_numbers(sample.box).ravel())[1:])
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


def _power_of_mean(sample: _Sample, voxel_size: float) -> tuple[float, float]:
    """Share of the variance that cubes have in common about their centre below 60 Å; its error.

    Centred particles in any orientation have their spherical mean in common: a part of the signal.
    """
    number = len(sample.cubes)
    centred = fft.ifftshift(sample.cubes * sample.taper, axes=(1, 2, 3))
    spectra = fft.fftn(centred, axes=(1, 2, 3))
    spectra /= np.sqrt((np.abs(spectra) ** 2).sum(axis=(1, 2, 3), keepdims=True))
    numbers = _shell_numbers(sample.box).ravel()
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

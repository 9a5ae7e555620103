"""Microscope and TiltScheme: what the electrons and the stage do to a specimen.

Both are configurations: a quantity given as ``[low, high]`` is drawn uniformly for each field.
:func:`draw_optics` makes that draw, and with it what differs from tilt to tilt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from cectflow.config import Config

__all__ = [
    "Microscope",
    "NoiseSpectrum",
    "OpticsDraw",
    "TiltScheme",
    "astigmatic_defocus",
    "contrast_transfer",
    "contrast_zeros",
    "dose_filter",
    "draw_optics",
    "electron_wavelength",
    "noise_power",
    "noise_transfer",
    "signal_transfer",
    "single_number",
]

NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Contrast = Annotated[float, Field(ge=0, lt=1)]

# The same formulas serve a field's optics (torch, on its device) and single curves (numpy).
Array = TypeVar("Array", Float[NDArray[np.float64], "..."], Float[Tensor, "..."])


class NoiseSpectrum(Config):
    """Measured power of the noise in a tilt image: linear between the frequencies, constant beyond.

    ``cectflow simulate calibrate`` writes one. The scale is of no account: the SNR sets it.
    """

    frequencies: tuple[float, ...] = Field(min_length=2)
    """Å⁻¹, ascending."""
    power: tuple[float, ...] = Field(min_length=2)
    """Relative power at each frequency, 0 or more."""

    @model_validator(mode="after")
    def _check(self) -> NoiseSpectrum:
        frequencies, power = np.array(self.frequencies), np.array(self.power)
        if len(frequencies) != len(power):
            msg = (
                f"{len(frequencies)} frequencies and {len(power)} values of power: expected as "
                f"many of each"
            )
            raise ValueError(msg)
        if not (frequencies[0] >= 0 and np.isfinite(frequencies[-1])):
            msg = (
                f"frequencies run from {frequencies[0]:g} to {frequencies[-1]:g} Å⁻¹: expected "
                f"finite ones from 0 on"
            )
            raise ValueError(msg)
        if not (np.diff(frequencies) > 0).all():
            place = int(np.argmin(np.diff(frequencies) > 0)) + 1
            msg = (
                f"frequency {place + 1} is {frequencies[place]:g} Å⁻¹ after "
                f"{frequencies[place - 1]:g}: expected them ascending"
            )
            raise ValueError(msg)
        if not (np.isfinite(power).all() and power.min() >= 0 and power.max() > 0):
            msg = (
                f"power runs from {power.min():g} to {power.max():g}: expected finite values, "
                f"none below 0 and one above it"
            )
            raise ValueError(msg)
        return self


class Microscope(Config):
    """Optics and detector. ``[low, high]`` in place of a number is drawn for each field."""

    drawn: ClassVar[tuple[str, ...]] = (
        "amplitude_contrast",
        "defocus_um",
        "defocus_spread_um",
        "astigmatism_um",
        "astigmatism_angle",
        "mtf",
        "dqe",
    )
    """What may be a range."""

    voltage_kv: float = Field(300.0, gt=0)
    spherical_aberration_mm: float = Field(2.7, ge=0)
    amplitude_contrast: Contrast | tuple[Contrast, Contrast] = 0.07
    defocus_um: float | tuple[float, float] = 4.0
    """Mean over the tilt series and over directions; positive is underfocus."""
    defocus_spread_um: NonNegative | tuple[NonNegative, NonNegative] = 0.0
    """Standard deviation over a series of a tilt's defocus about the field's (autofocus)."""
    astigmatism_um: NonNegative | tuple[NonNegative, NonNegative] = 0.0
    """Largest minus smallest defocus over the directions of the tilt image (DefocusU - V)."""
    astigmatism_angle: float | tuple[float, float] = 0.0
    """Direction of the largest defocus, in degrees from x towards y of the tilt image."""
    mtf: Fraction | tuple[Fraction, Fraction] = 0.6
    """Detector's modulation transfer at the Nyquist frequency of the volume; Gaussian in k."""
    dqe: Fraction | tuple[Fraction, Fraction] | None = None
    """Detective quantum efficiency at that frequency, 1 at k = 0; Gaussian in k. The detector's
    noise power is MTF²/DQE. null: MTF², the white noise of an ideal counting detector."""
    noise_spectrum: Literal["white", "blue"] | NoiseSpectrum = "white"
    """Power of the noise in each tilt image: flat; rising as k² above a floor of 5 %, as the
    spectra of CTF-premultiplied subtomograms do (EMPIAR-10499, notes/simulation.md); measured."""

    @model_validator(mode="after")
    def _check_order(self) -> Microscope:
        _refuse_upside_down(self)
        return self

    @property
    def noise_spectrum_name(self) -> str:
        """``white``, ``blue`` or ``measured``, for manifest and card."""
        return self.noise_spectrum if isinstance(self.noise_spectrum, str) else "measured"


class TiltScheme(Config):
    """Tilt angles about y and the electron dose; ``[low, high]`` is drawn for each field."""

    drawn: ClassVar[tuple[str, ...]] = ("thickness", "alignment_jitter")
    """What may be a range."""

    lowest: float = Field(-60.0, gt=-90, lt=90)
    highest: float = Field(60.0, gt=-90, lt=90)
    step: float = Field(3.0, gt=0)
    explicit: tuple[Annotated[float, Field(gt=-90, lt=90)], ...] | None = None
    """Tilt angles in degrees, ascending, in place of lowest, highest and step."""
    order: Literal["dose_symmetric", "bidirectional", "continuous"] = "dose_symmetric"
    """In which the angles are recorded: by their distance from zero (Hagen et al. 2017), from zero
    up and then from zero down, or from the lowest up."""
    dose_per_tilt: float = Field(3.0, ge=0)
    """e⁻/Å²."""
    thickness: NonNegative | tuple[NonNegative, NonNegative] = 1500.0
    """Of the specimen in Å: a beam tilted by t crosses thickness / cos t."""
    alignment_jitter: NonNegative | tuple[NonNegative, NonNegative] = 0.0
    """Å: standard deviation, along either axis of its image, of a tilt's error in alignment."""

    @model_validator(mode="after")
    def _check_range(self) -> TiltScheme:
        _refuse_upside_down(self)
        if self.explicit is not None:
            if len(self.explicit) < 2 or (np.diff(self.explicit) <= 0).any():
                msg = (
                    f"explicit holds {len(self.explicit)} angle(s), {self.explicit}: expected at "
                    f"least two angles, ascending and each of them once"
                )
                raise ValueError(msg)
        elif self.highest - self.lowest < self.step:
            msg = (
                f"tilts run from {self.lowest:g}° to {self.highest:g}° in steps of {self.step:g}°: "
                f"expected at least two angles"
            )
            raise ValueError(msg)
        return self

    @property
    def angles(self) -> Float[NDArray[np.float64], " tilt"]:
        """Angles in degrees, ascending."""
        if self.explicit is not None:
            return np.array(self.explicit, np.float64)
        number = int(np.floor((self.highest - self.lowest) / self.step + 1e-9)) + 1
        return self.lowest + self.step * np.arange(number, dtype=np.float64)

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest angle in degrees."""
        if self.explicit is not None:
            return self.explicit[0], self.explicit[-1]
        return self.lowest, self.highest

    @property
    def spacings(self) -> Float[NDArray[np.float64], " tilt"]:
        """Degrees for which each angle stands: half the way to its neighbours on either side."""
        gaps = np.diff(self.angles)
        return 0.5 * (np.append(gaps, gaps[-1]) + np.insert(gaps, 0, gaps[0]))

    @property
    def exposures(self) -> Float[NDArray[np.float64], " tilt"]:
        """Dose in e⁻/Å² that each of :attr:`angles` has seen by its middle, by :attr:`order`."""
        angles = self.angles
        if self.order == "continuous":
            sequence = np.arange(len(angles))
        elif self.order == "dose_symmetric":
            sequence = np.argsort(np.abs(angles), kind="stable")
        else:
            start = int(np.argmin(np.abs(angles)))
            sequence = np.r_[start : len(angles), np.arange(start)[::-1]]
        rank = np.argsort(sequence, kind="stable")
        return (rank.astype(np.float64) + 0.5) * self.dose_per_tilt


ConfigT = TypeVar("ConfigT", Microscope, TiltScheme)


@dataclass(frozen=True)
class OpticsDraw:
    """Optics of one tilt series: every range settled on a number, every tilt on its own.

    Attributes
    ----------
    microscope, tilts
        With single numbers only.
    defoci_um
        Of each tilt, mean over directions; positive is underfocus.
    shifts
        Å by which each aligned tilt image is still off along its (x, y).
    """

    microscope: Microscope
    tilts: TiltScheme
    defoci_um: tuple[float, ...]
    shifts: tuple[tuple[float, float], ...]

    def numbers(self) -> dict[str, float]:
        """Name and value of everything that could have been given as a range."""
        values = {
            name: getattr(config, name)
            for config in (self.microscope, self.tilts)
            for name in config.drawn
        }
        return {name: float(value) for name, value in values.items() if value is not None}


def draw_optics(
    microscope: Microscope, tilts: TiltScheme, generator: np.random.Generator
) -> OpticsDraw:
    """Optics of one tilt series drawn from ranges, all of them uniform.

    Parameters
    ----------
    microscope, tilts
        With ranges or single numbers.
    generator
        Source of the draw; always asked for as many numbers, whatever the ranges are.
    """
    microscope, tilts = _settle(microscope, generator), _settle(tilts, generator)
    deviations = generator.standard_normal((3, len(tilts.angles)))
    mean, spread = (single_number(microscope, f"defocus{name}_um") for name in ("", "_spread"))
    shifts = single_number(tilts, "alignment_jitter") * deviations[1:].T
    return OpticsDraw(
        microscope,
        tilts,
        tuple((mean + spread * deviations[0]).tolist()),
        tuple((float(x), float(y)) for x, y in shifts),
    )


def electron_wavelength(voltage_kv: float) -> float:
    """Relativistic wavelength of the electron in Å: 0.0197 Å at 300 kV."""
    volts = voltage_kv * 1e3
    return float(12.2642596 / np.sqrt(volts * (1.0 + 0.978475598e-6 * volts)))


def contrast_transfer(k_squared: Array, defocus_um: Array | float, microscope: Microscope) -> Array:
    """Contrast transfer function, positive for bright protein at k = 0.

    ``CTF = sin(pi lambda k² (dz - Cs lambda² k² / 2) + asin(A))``

    Parameters
    ----------
    k_squared
        Squared spatial frequency within the tilt image, Å⁻².
    defocus_um
        µm, positive is underfocus; an array where it depends on the direction.
    microscope
        Voltage, Cs and amplitude contrast A, which must be a single number.
    """
    wavelength = electron_wavelength(microscope.voltage_kv)
    linear = np.pi * wavelength * 1e4
    quadratic = 0.5 * np.pi * microscope.spherical_aberration_mm * 1e7 * wavelength**3
    offset = float(np.arcsin(single_number(microscope, "amplitude_contrast")))
    return _sin(k_squared * (linear * defocus_um - quadratic * k_squared) + offset)


def contrast_zeros(
    defocus_um: float, microscope: Microscope, highest: float
) -> Float[NDArray[np.float64], " zero"]:
    """Frequencies in Å⁻¹ at which the CTF is zero, ascending, up to ``highest``.

    Roots of ``pi lambda k² (dz - Cs lambda² k² / 2) + asin(A) = n pi``, the phase of
    :func:`contrast_transfer`.

    Parameters
    ----------
    defocus_um
        Positive is underfocus.
    microscope
        Its amplitude contrast must be a single number.
    highest
        Å⁻¹.
    """
    wavelength = electron_wavelength(microscope.voltage_kv)
    linear = np.pi * wavelength * 1e4 * defocus_um
    quadratic = 0.5 * np.pi * microscope.spherical_aberration_mm * 1e7 * wavelength**3
    offset = float(np.arcsin(single_number(microscope, "amplitude_contrast")))
    most = abs(linear) * highest**2 + quadratic * highest**4 + abs(offset)
    orders = np.arange(-np.ceil(most / np.pi), np.ceil(most / np.pi) + 1) * np.pi - offset
    if quadratic == 0:
        squares = orders / linear if linear else np.zeros(0)
    else:
        inner = linear**2 - 4 * quadratic * orders
        roots = np.sqrt(inner[inner >= 0])
        squares = np.concatenate([linear - roots, linear + roots]) / (2 * quadratic)
    zeros: NDArray[np.float64] = np.sqrt(squares[(squares > 0) & (squares <= highest**2)])
    return np.unique(zeros)


def astigmatic_defocus(
    kx: Array, ky: Array, defocus_um: Array | float, microscope: Microscope
) -> Array | float:
    """Defocus in µm in each direction of a tilt image: ``dz + D/2 cos(2 (a - a0))``.

    D is the microscope's astigmatism and a0 its angle, a the direction of (kx, ky); Rohou and
    Grigorieff 2015 (J. Struct. Biol. 192, 216), equation 5.

    Parameters
    ----------
    kx, ky
        Spatial frequency in the tilt image, Å⁻¹, broadcast against one another.
    defocus_um
        Mean over directions.
    microscope
        Its astigmatism, which must be single numbers.
    """
    half = 0.5 * single_number(microscope, "astigmatism_um")
    if half == 0:
        return defocus_um
    angle = 2 * np.deg2rad(single_number(microscope, "astigmatism_angle"))
    x_squared, y_squared = kx * kx, ky * ky
    # cos 2a and sin 2a; at k = 0, which has no direction, both vanish.
    cosine = float(np.cos(angle)) * (x_squared - y_squared)
    sine = float(2 * np.sin(angle)) * kx * ky
    return defocus_um + half * (cosine + sine) / (x_squared + y_squared + 1e-15)


def dose_filter(k_squared: Array, exposure: Array | float) -> Array:
    """Amplitude left after radiation damage: ``exp(-N / (2 Ne(k)))``.

    The critical exposure ``Ne(k) = 0.245 k^-1.665 + 2.81`` e⁻/Å² is that of Grant and
    Grigorieff 2015 (eLife 4:e06980), equation 3, at 300 kV.

    Parameters
    ----------
    k_squared
        Å⁻².
    exposure
        Accumulated dose N in e⁻/Å².
    """
    critical = 0.245 * _exp(-1.665 / 2 * _log(k_squared.clip(1e-10))) + 2.81
    return _exp(-0.5 * exposure / critical)


def signal_transfer(k_squared: Array, nyquist: float, microscope: Microscope) -> Array:
    """Detector's modulation transfer: ``mtf^(k²/k_N²)``.

    Parameters
    ----------
    k_squared
        Å⁻².
    nyquist
        Nyquist frequency k_N of the volume, Å⁻¹.
    microscope
        Its ``mtf``, which must be a single number.
    """
    return _exp(float(np.log(single_number(microscope, "mtf"))) / nyquist**2 * k_squared)


def noise_transfer(k_squared: Array, nyquist: float, microscope: Microscope) -> Array | float:
    """Power spectrum of the detector's noise, 1 at k = 0: ``MTF²/DQE``; 1 without a DQE.

    DQE = signal-to-noise power out over in (McMullan et al. 2009, Ultramicroscopy 109, 1126), so
    that the noise of a flat field has the power MTF²/DQE.

    Parameters
    ----------
    k_squared, nyquist
        As of :func:`signal_transfer`.
    microscope
        Its ``mtf`` and ``dqe``, which must be single numbers.
    """
    if microscope.dqe is None:
        return 1.0
    mtf, dqe = (single_number(microscope, name) for name in ("mtf", "dqe"))
    exponent = 2 * np.log(mtf) - np.log(dqe)
    return _exp(float(exponent) / nyquist**2 * k_squared)


def noise_power(k_squared: Array, nyquist: float, microscope: Microscope) -> Array | float:
    """Relative power of the noise in a tilt image, before any CTF correction.

    The ``noise_spectrum`` times the detector's part, :func:`noise_transfer`.

    Parameters
    ----------
    k_squared
        Squared spatial frequency within the tilt image, Å⁻².
    nyquist
        Nyquist frequency of the volume, Å⁻¹, to which the blue spectrum refers.
    microscope
        Its ``mtf`` and ``dqe`` must be single numbers.
    """
    spectrum, detector = microscope.noise_spectrum, noise_transfer(k_squared, nyquist, microscope)
    if spectrum == "white":
        return detector
    if spectrum == "blue":
        return detector * (0.05 + k_squared / nyquist**2)
    return detector * _interpolate(k_squared.clip(0.0) ** 0.5, spectrum)


def _refuse_upside_down(config: Microscope | TiltScheme) -> None:
    for name in config.drawn:
        value = getattr(config, name)
        if isinstance(value, tuple) and value[0] > value[1]:
            msg = f"{name} is ({value[0]:g}, {value[1]:g}): expected the lower value first"
            raise ValueError(msg)


def _settle(config: ConfigT, generator: np.random.Generator) -> ConfigT:
    """The configuration with a number drawn for each range."""
    changes: dict[str, Any] = {}
    for name in config.drawn:
        value, share = getattr(config, name), float(generator.random())
        if isinstance(value, tuple):
            changes[name] = value[0] + share * (value[1] - value[0])
    return config.model_copy(update=changes)


def single_number(config: Microscope | TiltScheme, name: str) -> float:
    """Value of a quantity; refused with a ValueError while it is a range."""
    value = getattr(config, name)
    if isinstance(value, tuple):
        msg = f"{name} is the range {value}: expected a single number; draw one with draw_optics"
        raise ValueError(msg)
    return float(value)


def _interpolate(k: Array, spectrum: NoiseSpectrum) -> Array:
    if not isinstance(k, Tensor):
        return np.asarray(np.interp(k, spectrum.frequencies, spectrum.power), np.float64)
    frequencies, power = k.new_tensor(spectrum.frequencies), k.new_tensor(spectrum.power)
    left = torch.bucketize(k, frequencies[1:-1])
    share = (k - frequencies[left]) / (frequencies[left + 1] - frequencies[left])
    return torch.lerp(power[left], power[left + 1], share.clamp(0.0, 1.0))


def _sin(values: Array) -> Array:
    return torch.sin(values) if isinstance(values, Tensor) else np.sin(values)


def _log(values: Array) -> Array:
    return torch.log(values) if isinstance(values, Tensor) else np.log(values)


def _exp(values: Array) -> Array:
    return torch.exp(values) if isinstance(values, Tensor) else np.exp(values)

"""Microscope and TiltScheme: what the electrons and the stage do to a specimen."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from pydantic import Field, model_validator

from cectflow.config import Config

__all__ = [
    "Microscope",
    "NoiseSpectrum",
    "TiltScheme",
    "contrast_transfer",
    "dose_filter",
    "electron_wavelength",
    "noise_power",
]


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
    """Optics and detector; constant over a simulation but for the defocus, drawn per field."""

    voltage_kv: float = Field(300.0, gt=0)
    spherical_aberration_mm: float = Field(2.7, ge=0)
    amplitude_contrast: float = Field(0.07, ge=0, lt=1)
    defocus_um: tuple[float, float] = (4.0, 4.0)
    """Lowest and highest defocus; positive is underfocus. One value is drawn per field."""
    mtf: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Detector's modulation transfer at the Nyquist frequency of the volume; Gaussian in k."""
    noise_spectrum: Literal["white", "blue"] | NoiseSpectrum = "white"
    """Power of the noise in each tilt image: flat; rising as k² above a floor of 5 %, as the
    spectra of CTF-premultiplied subtomograms do (EMPIAR-10499, notes/simulation.md); or measured."""

    @model_validator(mode="after")
    def _check_order(self) -> Microscope:
        low, high = self.defocus_um
        if low > high:
            msg = f"defocus_um is ({low:g}, {high:g}): expected the lower value first"
            raise ValueError(msg)
        return self

    @property
    def noise_spectrum_name(self) -> str:
        """``white``, ``blue`` or ``measured``, for manifest and card."""
        return self.noise_spectrum if isinstance(self.noise_spectrum, str) else "measured"


class TiltScheme(Config):
    """Tilt angles about y and the electron dose; the first tilt is the one nearest to zero."""

    lowest: float = Field(-60.0, gt=-90, lt=90)
    highest: float = Field(60.0, gt=-90, lt=90)
    step: float = Field(3.0, gt=0)
    dose_per_tilt: float = Field(3.0, ge=0)
    """e⁻/Å²."""
    thickness: float = Field(1500.0, ge=0)
    """Of the specimen in Å: a beam tilted by t crosses thickness / cos t."""

    @model_validator(mode="after")
    def _check_range(self) -> TiltScheme:
        if self.highest - self.lowest < self.step:
            msg = (
                f"tilts run from {self.lowest:g}° to {self.highest:g}° in steps of {self.step:g}°: "
                f"expected at least two angles"
            )
            raise ValueError(msg)
        return self

    @property
    def angles(self) -> Float[NDArray[np.float64], " tilt"]:
        """Angles in degrees, ascending."""
        number = int(np.floor((self.highest - self.lowest) / self.step + 1e-9)) + 1
        return self.lowest + self.step * np.arange(number, dtype=np.float64)

    @property
    def exposures(self) -> Float[NDArray[np.float64], " tilt"]:
        """Dose in e⁻/Å² that each of :attr:`angles` has seen by its middle (dose-symmetric)."""
        rank = np.argsort(np.argsort(np.abs(self.angles), kind="stable"), kind="stable")
        return (rank.astype(np.float64) + 0.5) * self.dose_per_tilt


def electron_wavelength(voltage_kv: float) -> float:
    """Relativistic wavelength of the electron in Å: 0.0197 Å at 300 kV."""
    volts = voltage_kv * 1e3
    return float(12.2642596 / np.sqrt(volts * (1.0 + 0.978475598e-6 * volts)))


def contrast_transfer(
    k_squared: Float[NDArray[np.float64], "..."], defocus_um: float, microscope: Microscope
) -> Float[NDArray[np.float64], "..."]:
    """Contrast transfer function, positive for bright protein at k = 0.

    ``CTF = sin(pi lambda k² (dz - Cs lambda² k² / 2) + asin(A))``

    Parameters
    ----------
    k_squared
        Squared spatial frequency within the tilt image, Å⁻².
    defocus_um
        µm, positive is underfocus.
    microscope
        Voltage, Cs and amplitude contrast A.
    """
    wavelength = electron_wavelength(microscope.voltage_kv)
    aberration = microscope.spherical_aberration_mm * 1e7
    defocus = defocus_um * 1e4
    phase = (
        np.pi * wavelength * k_squared * (defocus - 0.5 * aberration * wavelength**2 * k_squared)
    )
    transfer: NDArray[np.float64] = np.sin(phase + np.arcsin(microscope.amplitude_contrast))
    return transfer


def dose_filter(
    k_squared: Float[NDArray[np.float64], "..."], exposure: float
) -> Float[NDArray[np.float64], "..."]:
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
    critical = 0.245 * np.maximum(k_squared, 1e-10) ** (-1.665 / 2) + 2.81
    survived: NDArray[np.float64] = np.exp(-0.5 * exposure / critical)
    return survived


def noise_power(
    k_squared: Float[NDArray[np.float64], "..."], microscope: Microscope, nyquist: float
) -> Float[NDArray[np.float64], "..."]:
    """Relative power of the noise in a tilt image, before any CTF correction.

    Parameters
    ----------
    k_squared
        Squared spatial frequency within the tilt image, Å⁻².
    microscope
        Its noise spectrum is taken.
    nyquist
        Nyquist frequency of the volume in Å⁻¹, to which the blue spectrum refers.
    """
    spectrum = microscope.noise_spectrum
    if spectrum == "white":
        return np.ones_like(k_squared)
    if spectrum == "blue":
        return np.asarray(0.05 + k_squared / nyquist**2)
    measured = np.interp(np.sqrt(k_squared), spectrum.frequencies, spectrum.power)
    return np.asarray(measured, np.float64)

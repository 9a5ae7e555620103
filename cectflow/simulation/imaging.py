"""Imaging: the step scene → tomogram, its noise as strong as is asked for, its SNR measured.

The filters of :mod:`cectflow.simulation.optics` image a volume in one forward and one inverse
transform, on the device of the density.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from cectflow.simulation.half_spectrum import (
    Variance,
    draw_white,
    frequencies,
    sections,
    squared,
    volume_of,
)
from cectflow.simulation.optics import Optics

__all__ = ["MeasuredSnr", "image_and_measure", "image_field", "image_spectrum", "noise_scale"]

SNR_RESOLUTION = 60.0
"""Å: the low-pass for the second, comparable SNR figure of each field."""


@dataclass(frozen=True)
class MeasuredSnr:
    """Variance of signal over variance of noise in one field, k = 0 excluded, and the noise.

    Attributes
    ----------
    stage
        Where the recipe defines it, its ``snr_stage``.
    reconstruction, low_passed
        In the reconstruction, full band and low-passed to 60 Å.
    noise_std
        Standard deviation of the noise in the reconstruction.
    """

    stage: float
    reconstruction: float
    low_passed: float
    noise_std: float


def noise_scale(
    expected_power: Float[Tensor, "z y kx"], optics: Optics, snr: float | None, *, width: int
) -> float:
    """Factor of unit white noise before N(k) that gives the requested SNR on average.

    It depends on the optics, the SNR and the power expected over the recipe's scenes, never on
    the field being made: scaling by the field itself would tell a network how crowded it is.

    Parameters
    ----------
    expected_power
        Mean power spectrum of the recipe's scenes.
    optics
        Of the draw; they know the stage at which the SNR is defined.
    snr
        Variance of signal over variance of noise at that stage; None: noise-free.
    width
        Voxels of the field along x.
    """
    if snr is None:
        return 0.0
    shape = (*expected_power.shape[:2], width)
    signal, noise = Variance(shape), Variance(shape)
    for part in sections(expected_power):
        gains = optics.snr_gains(part)
        signal.add(expected_power[part] * gains[0])
        noise.add(gains[1])
    return float(np.sqrt(signal.total / (noise.total * np.prod(shape)) / snr))


def image_field(
    density: Float[Tensor, "z y x"],
    optics: Optics,
    noise_factor: float,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "z y x"], Float[Tensor, "z y x"]]:
    """Imaged signal and noise of a periodic field; their sum is the tomogram, protein dark.

    Parameters
    ----------
    density
        Potential above ice, bright protein.
    optics
        Of the draw.
    noise_factor
        As :func:`noise_scale` gives it.
    generator
        Source of the noise; density and optics must be on its device.
    """
    shape = density.shape
    signal = torch.fft.irfftn(torch.fft.rfftn(density).mul_(optics.signal), s=shape)
    if noise_factor == 0:
        return signal, torch.zeros_like(signal)
    noise = draw_white(density.shape, generator).mul_(optics.noise * noise_factor)
    return signal, torch.fft.irfftn(noise, s=shape)


def image_and_measure(
    density: Float[Tensor, "z y x"],
    optics: Optics,
    noise_factor: float,
    generator: torch.Generator,
    voxel_size: float,
) -> tuple[Float[Tensor, "z y x"], MeasuredSnr | None]:
    """Tomogram of a periodic field and its measured SNR; None when noise-free.

    The sum of what :func:`image_field` gives, in two transforms: the noise is drawn in Fourier
    space, and what is measured is measured there (Parseval).

    Parameters
    ----------
    density, optics, noise_factor, generator
        As of :func:`image_field`.
    voxel_size
        In Å.
    """
    depth, height, width = density.shape
    shape, spectrum = (depth, height, width), torch.fft.rfftn(density)
    measured = image_spectrum(spectrum, shape, optics, noise_factor, generator, voxel_size)
    return volume_of(spectrum, shape), measured


def image_spectrum(
    spectrum: Inexact[Tensor, "z y kx"],
    shape: tuple[int, int, int],
    optics: Optics,
    noise_factor: float,
    generator: torch.Generator,
    voxel_size: float,
) -> MeasuredSnr | None:
    """Turn the spectrum of a density into that of its tomogram, as :func:`image_and_measure`.

    Beside it and the optics no more than the noise is in memory.

    Parameters
    ----------
    spectrum
        ``rfftn`` of the density; overwritten.
    shape
        Of the density.
    optics, noise_factor, generator, voxel_size
        As of :func:`image_and_measure`.

    Returns
    -------
    MeasuredSnr | None
        None when noise-free.
    """
    if noise_factor == 0:
        spectrum.mul_(optics.signal)
        return None
    noise = draw_white(shape, generator)
    at_stage = Variance(shape), Variance(shape)
    full = Variance(shape), Variance(shape)
    low = Variance(shape), Variance(shape)
    for part in sections(spectrum):
        spectra = spectrum[part], noise[part]
        if optics.at_stage is not None:
            gains = optics.snr_gains(part)
            for variance, values, gain in zip(at_stage, spectra, gains, strict=True):
                variance.add(squared(values) * gain)
        # In place: a real tensor times a complex one is many times slower into a new one.
        spectra[0].mul_(optics.signal[part])
        spectra[1].mul_(optics.noise[part] * noise_factor)
        inside = _sphere(shape, part.start, part.stop, voxel_size, str(spectrum.device))
        for whole, inner, values in zip(full, low, spectra, strict=True):
            power = squared(values)
            whole.add(power)
            inner.add(power * inside)
    spectrum.add_(noise)
    reconstruction = stage = full[0].total / full[1].total
    if optics.at_stage is not None:
        stage = at_stage[0].total / (at_stage[1].total * noise_factor**2)
    low_passed = low[0].total / low[1].total
    return MeasuredSnr(stage, reconstruction, low_passed, float(np.sqrt(full[1].total)))


@lru_cache(maxsize=4)
def _sphere(
    shape: tuple[int, ...], start: int, stop: int, voxel_size: float, device: str
) -> Float[Tensor, "part y kx"]:
    """1 up to the frequency 1 / 60 Å, 0 beyond; of the sections kz from start to stop."""
    kz, ky, kx = frequencies(shape, voxel_size, device)
    radius = (kz[start:stop] ** 2 + ky**2 + kx**2).sqrt().to(torch.float32)
    return (radius <= 1.0 / SNR_RESOLUTION).to(torch.float32)

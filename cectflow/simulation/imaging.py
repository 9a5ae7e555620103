"""Imaging: the transfer function H(k), the noise amplitude N(k), and the step scene → tomogram.

A tilt series reconstructed by weighted back-projection acts on the specimen as one linear filter.
Each tilt fills a slab of Fourier space about its central plane; H(k) and N(k) are sums over the
slabs, so that per-tilt CTF, dose, thickness and detector cost nothing when a volume is imaged:
one forward and one inverse transform.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from cectflow.model_card import CtfCorrection
from cectflow.simulation.microscope import (
    Microscope,
    TiltScheme,
    contrast_transfer,
    dose_filter,
    noise_power,
)

__all__ = [
    "Optics",
    "SnrStage",
    "image_field",
    "low_pass_variance",
    "measure_snr",
    "noise_scale",
    "optics_of",
    "power_spectrum",
    "signal_variance",
]

SnrStage = Literal["reconstruction"]

INELASTIC_MEAN_FREE_PATH = 3800.0
"""Å, of 300 kV electrons in vitreous ice (cryo-TomoSim's value; 3000 to 4000 are published)."""
WIENER_CONSTANT = 0.1
"""Added to CTF² in the denominator of the Wiener correction."""
SNR_RESOLUTION = 60.0
"""Å: the low-pass for the second, comparable SNR figure of each field."""


@dataclass(frozen=True, eq=False)
class Optics:
    """Fourier filters of one optics draw on a field's half spectrum (``rfftn`` layout).

    Attributes
    ----------
    signal
        H(k): multiplies the specimen's spectrum. Negative where protein comes out dark.
    noise
        N(k) ≥ 0: multiplies the spectrum of white noise.
    """

    signal: Float[Tensor, "z y kx"]
    noise: Float[Tensor, "z y kx"]


@lru_cache(maxsize=4)
def optics_of(
    shape: tuple[int, int, int],
    voxel_size: float,
    microscope: Microscope,
    tilts: TiltScheme,
    defocus_um: float,
    ctf_correction: CtfCorrection,
) -> Optics:
    """Optics of a tilt series for a field.

    With the slab weight ``w_t = max(0, 1 - L |k · n_t|)`` of tilt t (L: the field's extent across
    the tilt axis, n_t its beam direction), ``H = ramp · Σ w C q`` and
    ``N = √(Σ w² s²) / max(Σ w, 1)``: the ramp keeps the signal out of the missing wedge at low k,
    the normalised form gives the noise spectrum of a back-projection (notes/simulation.md, iv).

    Parameters
    ----------
    shape
        Of the field in voxels.
    voxel_size
        In Å.
    microscope, tilts
        See there.
    defocus_um
        The value drawn for this field; positive is underfocus.
    ctf_correction
        Applied to each tilt's signal and noise alike.

    Returns
    -------
    Optics
        Protein comes out dark.
    """
    kz, ky, kx = _frequencies(shape, voxel_size)
    nyquist = 0.5 / voxel_size
    length = voxel_size * max(shape[0], shape[2])
    full = np.broadcast_shapes(kz.shape, ky.shape, kx.shape)
    signal, squared_noise, weight_sum = np.zeros(full), np.zeros(full), np.zeros(full)
    for angle, exposure in zip(np.deg2rad(tilts.angles), tilts.exposures, strict=True):
        # Beam direction of the tilt in specimen coordinates; rotation about y.
        along_beam = kz * np.cos(angle) + kx * np.sin(angle)
        weight = np.maximum(0.0, 1.0 - length * np.abs(along_beam))
        slab = np.nonzero(weight[:, 0, :])
        in_plane = (kz * np.cos(angle + np.pi / 2) + kx * np.sin(angle + np.pi / 2)) ** 2
        k_squared = in_plane[slab[0], 0, slab[1]][:, None] + ky[0, :, 0] ** 2
        transfer = contrast_transfer(k_squared, defocus_um, microscope)
        filtered, noise = _correct(transfer, ctf_correction)
        # Electrons scattered inelastically are lost to the image in proportion to the path.
        path = tilts.thickness * (1.0 / np.cos(angle) - 1.0)
        seen = np.exp(-path / INELASTIC_MEAN_FREE_PATH) * dose_filter(k_squared, exposure)
        blur = microscope.mtf ** (k_squared / nyquist**2)
        weights = weight[slab[0], 0, slab[1]][:, None]
        signal[slab[0], :, slab[1]] += weights * filtered * seen * blur
        spectrum = noise_power(k_squared, microscope, nyquist)
        squared_noise[slab[0], :, slab[1]] += (weights * noise) ** 2 * spectrum
        weight_sum[slab[0], :, slab[1]] += weights
    radius = np.sqrt(kz**2 + kx**2)
    # Density of slabs: where they overlap, r L Δθ < 1; the ramp's value at 0 is that of the
    # discrete filter (a quarter of the first sample; Kak and Slaney 1988, section 3.3).
    ramp = np.minimum(1.0, np.maximum(radius * length, 0.25) * np.deg2rad(tilts.step))
    return Optics(
        signal=torch.from_numpy((-ramp * signal).astype(np.float32)),
        noise=torch.from_numpy(
            (np.sqrt(squared_noise) / np.maximum(weight_sum, 1.0)).astype(np.float32)
        ),
    )


def power_spectrum(density: Float[Tensor, "z y x"]) -> Float[Tensor, "z y kx"]:
    """Squared modulus of a field's half spectrum."""
    power: Tensor = torch.fft.rfftn(density).abs() ** 2
    return power


def signal_variance(power: Float[Tensor, "z y kx"], optics: Optics, *, width: int) -> float:
    """Variance of the imaged signal of a field with this power spectrum, k = 0 excluded.

    Parameters
    ----------
    power
        Of the density, as :func:`power_spectrum` gives it.
    optics
        Of the draw.
    width
        Voxels of the field along x.
    """
    return _variance(power * optics.signal**2, width)


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
        Of the draw.
    snr
        Variance of signal over variance of noise in the reconstruction; None: noise-free.
    width
        Voxels of the field along x.
    """
    if snr is None:
        return 0.0
    unit_noise = _variance(
        torch.full_like(expected_power, expected_power[..., 0].numel() * width) * optics.noise**2,
        width,
    )
    return float(np.sqrt(signal_variance(expected_power, optics, width=width) / unit_noise / snr))


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
        Source of the noise.
    """
    shape = density.shape
    signal = torch.fft.irfftn(torch.fft.rfftn(density) * optics.signal, s=shape)
    white = torch.randn(shape, generator=generator)
    noise = torch.fft.irfftn(torch.fft.rfftn(white) * optics.noise, s=shape) * noise_factor
    return signal, noise


def low_pass_variance(
    volume: Float[Tensor, "z y x"], voxel_size: float, resolution: float = SNR_RESOLUTION
) -> float:
    """Variance of a volume after a sharp low-pass, k = 0 excluded.

    Parameters
    ----------
    volume
        Any units.
    voxel_size, resolution
        In Å; a resolution of 0 keeps the full band.
    """
    kz, ky, kx = _frequencies(tuple(volume.shape), voxel_size)
    power = power_spectrum(volume)
    if resolution > 0:
        inside = kz**2 + ky**2 + kx**2 <= resolution**-2
        power = power * torch.from_numpy(inside)
    return _variance(power, volume.shape[2])


def measure_snr(
    signal: Float[Tensor, "z y x"], noise: Float[Tensor, "z y x"], voxel_size: float
) -> tuple[float, float] | None:
    """Measured SNR of a field, full band and low-passed to 60 Å; None when noise-free."""
    if not bool(noise.any()):
        return None
    full = low_pass_variance(signal, voxel_size, 0.0) / low_pass_variance(noise, voxel_size, 0.0)
    return full, low_pass_variance(signal, voxel_size) / low_pass_variance(noise, voxel_size)


def _frequencies(
    shape: tuple[int, ...], voxel_size: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Spatial frequencies in Å⁻¹ of the half spectrum, ready to broadcast."""
    depth, height, width = shape
    return (
        np.fft.fftfreq(depth, voxel_size).astype(np.float64)[:, None, None],
        np.fft.fftfreq(height, voxel_size).astype(np.float64)[None, :, None],
        np.fft.rfftfreq(width, voxel_size).astype(np.float64)[None, None, :],
    )


def _correct(
    transfer: NDArray[np.float64], correction: CtfCorrection
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """CTF after correction, and what the correction did to the noise."""
    if correction == "none":
        return transfer, np.ones_like(transfer)
    if correction == "phase_flip":
        return np.abs(transfer), np.ones_like(transfer)
    if correction == "premultiplied":
        return transfer**2, np.abs(transfer)
    wiener = np.abs(transfer) / (transfer**2 + WIENER_CONSTANT)
    return np.abs(transfer) * wiener, wiener


def _variance(power: Float[Tensor, "z y kx"], width: int) -> float:
    """Variance of the real volume with this half power spectrum (Parseval), k = 0 excluded."""
    twice = torch.full((power.shape[2],), 2.0, dtype=torch.float64)
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    total = (power.to(torch.float64) * twice).sum() - power[0, 0, 0].to(torch.float64)
    num_voxels = power.shape[0] * power.shape[1] * width
    return float(total) / num_voxels**2

"""Optics: the transfer function H(k) and the noise amplitude N(k) of a tilt series.

A tilt series reconstructed by weighted back-projection acts on the specimen as one linear filter.
Each tilt fills a slab of Fourier space about its central plane; H(k) and N(k) are sums over the
slabs, so that per-tilt CTF, dose, thickness, alignment and detector cost nothing when a volume is
imaged (:mod:`cectflow.simulation.imaging`).

The field repeats along x and y and is one period Z thick along z, as in
:mod:`cectflow.simulation.tilt_series`. So an image of tilt t holds, of each column k_x of the
field's spectrum, what is at ``k_z = -k_x tan t``, at the frequency ``k_x / cos t`` of the image;
being Z thick, the field spreads that over 1/Z along k_z.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from cectflow.model_card import CtfCorrection
from cectflow.simulation.half_spectrum import CHUNK, frequencies, multiplicity, squared
from cectflow.simulation.microscope import (
    Microscope,
    TiltScheme,
    astigmatic_defocus,
    contrast_transfer,
    dose_filter,
    noise_power,
    signal_transfer,
    single_number,
)

__all__ = ["Optics", "SnrStage", "optics_of"]

SnrStage = Literal["reconstruction", "projection", "aitom"]

INELASTIC_MEAN_FREE_PATH = 3800.0
"""Å, of 300 kV electrons in vitreous ice (cryo-TomoSim's value; 3000 to 4000 are published)."""
WIENER_CONSTANT = 0.1
"""Added to CTF² in the denominator of the Wiener correction."""
AITOM_LOW_PASS = 0.2
"""Cycles per voxel: of the Gaussian exp(-(k/k0)²) on the noise that comes after the CTF."""
AITOM_BAND = 0.25
"""Cycles per voxel where the final band-pass ends, half the Nyquist frequency."""
AITOM_BAND_EDGE = 2 / 64
"""Cycles per voxel of the Gaussian edge exp(-(dk/edge)²) beyond it: 2 samples of a 64³ box."""
CACHED_BYTES = 256_000_000
"""Of optics kept for later fields, per process; larger ones are not kept."""


@dataclass(frozen=True, eq=False)
class Optics:
    """Fourier filters of one optics draw on a field's half spectrum (``rfftn`` layout).

    Attributes
    ----------
    signal
        H(k): multiplies the specimen's spectrum. Negative where protein comes out dark; complex
        where tilts are misaligned.
    noise
        N(k) ≥ 0: multiplies the spectrum of white noise.
    snr_stage
        Where the SNR is defined.
    at_stage
        What the power spectra of the specimen and of unit white noise are multiplied by to give
        signal and noise at that stage; None: |H|² and N², those of the reconstruction.
    """

    signal: Inexact[Tensor, "z y kx"]
    noise: Float[Tensor, "z y kx"]
    snr_stage: SnrStage = "reconstruction"
    at_stage: tuple[Float[Tensor, "z y kx"], Float[Tensor, "z y kx"]] | None = None

    def snr_gains(
        self, part: slice
    ) -> tuple[Float[Tensor, "part y kx"], Float[Tensor, "part y kx"]]:
        """Gains of signal and noise power at the SNR's stage, of some sections kz."""
        if self.at_stage is None:
            return squared(self.signal[part]), self.noise[part] ** 2
        return self.at_stage[0][part], self.at_stage[1][part]


_cached: OrderedDict[Any, Optics] = OrderedDict()


def optics_of(
    shape: tuple[int, int, int],
    voxel_size: float,
    microscope: Microscope,
    tilts: TiltScheme,
    defocus_um: float | tuple[float, ...],
    ctf_correction: CtfCorrection,
    *,
    shifts: tuple[tuple[float, float], ...] = (),
    snr_stage: SnrStage = "reconstruction",
    device: str = "cpu",
) -> Optics:
    """Optics of a tilt series for a field; those of the last fields are kept, per device.

    With the image's frequency ``u_t = k_x / cos t`` across the tilt axis and the distance
    ``d_t = k_z + k_x tan t`` from its plane, the slab of tilt t has the weight
    ``w_t = max(0, 1 - Z |d_t|)``, and

    - ``H = Σ r_t w_t C_t q_t`` with the ramp ``r_t = |u_t| Z Δθ_t / cos t``: the distance along k_z
      between the planes of two tilts, over 1/Z. Where slabs overlap they add up to 1.
    - ``N² = Σ r_t² v_t s_t² e_t cos t``. The noise is not periodic along x as the specimen is, so
      its slab is wider: ``v_t = max(0, 1 - Z e_t |d_t|)`` and ``1 / e_t² = 1 + (Z tan t / X)²``;
      the last factors keep its power.

    CTF, dose, detector and noise spectrum are those at (u_t, k_y); beyond the image's Nyquist
    frequency there is nothing. An image shifted by d has the phase ``exp(-2πi k·d)`` in q_t. Both
    forms are held against back-projection in real space (tests/simulation/test_tilt_series.py).

    The SNR's stages: ``reconstruction``. ``projection``: of a tilt image as the camera takes it,
    before any correction, the mean over tilts; its spectra are those on the tilt's slab, by the
    projection theorem. ``aitom``, the recipe of the papers' laboratory
    (aitom/simulation/reconstruction): white noise whose variance, had all of it passed H, would
    give the SNR; half of it is added to the density before H, half after H, low-passed and outside
    the missing wedge; and at last everything is cut off at half the Nyquist frequency, which is
    not part of the SNR. (The Gaussian envelope that goes with it is an ``mtf`` of 0.002.)

    Parameters
    ----------
    shape
        Of the field in voxels.
    voxel_size
        In Å.
    microscope, tilts
        With single numbers only, as :func:`~cectflow.simulation.microscope.draw_optics` gives them.
    defocus_um
        Of all tilts or of each; positive is underfocus.
    ctf_correction
        Applied to each tilt's signal and noise alike.
    shifts
        Of each tilt's image along its (x, y) in Å; none: all are aligned.
    snr_stage
        Where the SNR is defined.
    device
        Of the filters.

    Returns
    -------
    Optics
        Protein comes out dark.

    Raises
    ------
    ValueError
        If defoci or shifts are not as many as tilts, or a quantity is still a range.
    """
    number = len(tilts.angles)
    defoci = defocus_um if isinstance(defocus_um, tuple) else (defocus_um,) * number
    if len(defoci) != number or len(shifts) not in (0, number):
        msg = f"{len(defoci)} defoci and {len(shifts)} shifts for {number} tilts: expected as many"
        raise ValueError(msg)
    shifts = shifts if np.any(shifts) else ()
    key = (shape, voxel_size, microscope, tilts, defoci, ctf_correction, shifts, snr_stage, device)
    if key in _cached:
        _cached.move_to_end(key)
        return _cached[key]
    optics = _build_optics(*key)
    _cached[key] = optics
    while sum(map(_count_bytes, _cached.values())) > CACHED_BYTES:
        _cached.popitem(last=False)
    return optics


def _build_optics(
    shape: tuple[int, int, int],
    voxel_size: float,
    microscope: Microscope,
    tilts: TiltScheme,
    defoci_um: tuple[float, ...],
    ctf_correction: CtfCorrection,
    shifts: tuple[tuple[float, float], ...],
    snr_stage: SnrStage,
    device: str,
) -> Optics:
    angles = tuple(tilts.angles.tolist())
    slabs = _slabs_of(shape, voxel_size, angles, tuple(tilts.spacings.tolist()), device)
    depth, height, width = shape[0], shape[1], shape[2] // 2 + 1
    nyquist = 0.5 / voxel_size
    # Electrons scattered inelastically are lost to the image in proportion to the path.
    path = single_number(tilts, "thickness") * (1.0 / np.cos(np.deg2rad(angles)) - 1.0)
    transmission = np.exp(-path / INELASTIC_MEAN_FREE_PATH)
    per_tilt = np.stack([defoci_um, tilts.exposures, transmission, *np.transpose(shifts)])
    columns = torch.from_numpy(per_tilt).to(device, torch.float32)[..., None]
    defoci, exposures, transmissions, *offsets = columns
    # Where k and its mirror across the x-z plane are imaged alike, half of the rows are enough.
    mirrored = not shifts and single_number(microscope, "astigmatism_um") == 0
    ky = torch.fft.fftfreq(height, voxel_size, device=device)
    ky = ky[: height // 2 + 1].abs() if mirrored else ky
    size = (depth, width, len(ky))
    signal = torch.empty(size, dtype=torch.complex64 if shifts else torch.float32, device=device)
    squared_noise = torch.empty(size, device=device)
    per_image = snr_stage == "projection"
    snr_signal, snr_noise = torch.empty((2, *(size if per_image else (0, 0, 0))), device=device)
    shares = _share_of_images(slabs, ky, shape, nyquist, microscope) if per_image else slabs.weights
    step = max(1, CHUNK // (len(angles) * len(ky)))
    for start in range(0, width, step):
        chosen = slice(start, start + step)
        kx = slabs.in_plane[chosen, :, None]
        k_squared = kx * kx + ky * ky
        defocus = astigmatic_defocus(kx, ky, defoci, microscope)
        transfer = contrast_transfer(k_squared, defocus, microscope)
        filtered, noise = _correct(transfer, ctf_correction)
        seen = dose_filter(k_squared, exposures) * transmissions
        seen = seen * signal_transfer(k_squared, nyquist, microscope)
        spectrum = noise_power(k_squared, nyquist, microscope) * torch.ones_like(k_squared)
        image = filtered * seen
        if shifts:
            image = image * (_phase(kx * offsets[0]) * _phase(ky * offsets[1]))
        signal[:, chosen] = _spread(slabs.signal_gains[chosen], image)
        squared_noise[:, chosen] = _spread(slabs.noise_gains[chosen], noise**2 * spectrum)
        if per_image:
            snr_signal[:, chosen] = _spread(shares[chosen], (transfer * seen) ** 2)
            snr_noise[:, chosen] = _spread(shares[chosen], spectrum)

    def unfold(sums: Tensor) -> Tensor:
        """From (kz, kx, ky) to the layout of a half spectrum."""
        whole = torch.empty((depth, height, width), dtype=sums.dtype, device=device)
        whole[:, : len(ky)] = sums.transpose(1, 2)
        if mirrored:
            whole[:, len(ky) :] = whole[:, 1 : (height + 1) // 2].flip(1)
        return whole

    transfer, amplitude = unfold(signal.neg_()), unfold(squared_noise.sqrt_())
    if snr_stage == "projection":
        at_stage = unfold(snr_signal), unfold(snr_noise)
        return Optics(transfer, amplitude, snr_stage, at_stage)
    if snr_stage == "reconstruction":
        return Optics(transfer, amplitude)
    gain = squared(transfer)
    k = _radius(shape, 1.0, device)
    outside_wedge = slabs.weights.sum(dim=-1).clamp(max=1.0).T[:, None]
    after = torch.exp(-((k / AITOM_LOW_PASS) ** 2)) * outside_wedge
    band = torch.exp(-(((k - AITOM_BAND).clamp(min=0.0) / AITOM_BAND_EDGE) ** 2))
    noise = (0.5 * (gain + after**2)).sqrt() * band
    return Optics(transfer * band, noise, snr_stage, (gain, gain))


@dataclass(frozen=True, eq=False)
class _Slabs:
    """What each tilt's image adds to each (kz, kx); along ky all samples are alike.

    Attributes
    ----------
    in_plane
        Frequency across the tilt axis of the image that holds a column kx, Å⁻¹.
    weights
        ``w_t`` of :func:`optics_of`.
    signal_gains, noise_gains
        ``r_t w_t`` and ``r_t² v_t e_t cos t``.
    """

    in_plane: Float[Tensor, "kx tilt"]
    weights: Float[Tensor, "kx z tilt"]
    signal_gains: Float[Tensor, "kx z tilt"]
    noise_gains: Float[Tensor, "kx z tilt"]


@lru_cache(maxsize=2)
def _slabs_of(
    shape: tuple[int, int, int],
    voxel_size: float,
    angles: tuple[float, ...],
    spacings: tuple[float, ...],
    device: str,
) -> _Slabs:
    kz, _, kx = frequencies(shape, voxel_size, device)
    kz, kx = kz[None, :, :, 0], kx.reshape(-1, 1, 1)
    tilts = torch.tensor(angles, dtype=torch.float64, device=device).deg2rad()
    steps = torch.tensor(spacings, dtype=torch.float64, device=device).deg2rad()
    cosines, tangents = tilts.cos(), tilts.tan()
    thickness, extent = voxel_size * shape[0], voxel_size * shape[2]
    in_plane = kx / cosines
    # An image holds no frequencies beyond its own Nyquist frequency; a volume's corners do.
    held = in_plane <= 0.5 / voxel_size * (1.0 + 1e-9)
    # The ramp's value at 0 is that of the discrete filter, a quarter of the first sample (Kak and
    # Slaney 1988, section 3.3).
    ramps = in_plane.clamp(min=0.25 / extent) * thickness * steps / cosines * held
    distances = thickness * (kz + kx * tangents).abs()
    widening = 1.0 / (1.0 + (thickness / extent * tangents) ** 2).sqrt()
    weights = (1.0 - distances).clamp(min=0.0) * held
    noise_weights = (1.0 - distances * widening).clamp(min=0.0)
    noise_gains = ramps**2 * noise_weights * widening * cosines
    return _Slabs(
        in_plane[:, 0].to(torch.float32),
        weights.to(torch.float32),
        (ramps * weights).to(torch.float32),
        noise_gains.to(torch.float32),
    )


def _spread(
    gains: Float[Tensor, "kx z tilt"], images: Inexact[Tensor, "kx tilt y"]
) -> Inexact[Tensor, "z kx y"]:
    """Sum over tilts of what their images add to each kz."""
    if not images.is_complex():
        return torch.bmm(gains, images).transpose(0, 1)
    parts = torch.bmm(gains, torch.view_as_real(images).flatten(-2))
    return torch.view_as_complex(parts.view(*parts.shape[:2], -1, 2)).transpose(0, 1)


def _share_of_images(
    slabs: _Slabs,
    ky: Float[Tensor, " row"],
    shape: tuple[int, int, int],
    nyquist: float,
    microscope: Microscope,
) -> Float[Tensor, "kx z tilt"]:
    """Weights of the slabs for which the noise power of every image adds up to 1 / their number."""
    k_squared = slabs.in_plane[..., None] ** 2 + ky**2
    power = noise_power(k_squared, nyquist, microscope) * torch.ones_like(k_squared)
    rows = torch.ones_like(ky)
    if len(ky) < shape[1]:  # only ky >= 0
        rows = multiplicity(shape[1], str(ky.device)).to(torch.float32)
    columns = multiplicity(shape[2], str(ky.device)).to(torch.float32)
    counted = power @ rows * slabs.weights.sum(dim=1) * columns[:, None]
    totals = counted.sum(dim=0) - power[0, :, 0] * slabs.weights[0, 0]
    return slabs.weights / (totals * len(totals))


def _radius(shape: tuple[int, ...], voxel_size: float, device: str) -> Float[Tensor, "z y kx"]:
    kz, ky, kx = frequencies(shape, voxel_size, device)
    return (kz**2 + ky**2 + kx**2).sqrt().to(torch.float32)


def _phase(turns: Float[Tensor, "..."]) -> Inexact[Tensor, "..."]:
    """exp(-2πi x)."""
    return torch.polar(torch.ones_like(turns), -2 * np.pi * turns)


def _correct(
    transfer: Float[Tensor, "..."], correction: CtfCorrection
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """CTF after correction, and what the correction did to the noise."""
    if correction == "none":
        return transfer, torch.ones_like(transfer)
    if correction == "phase_flip":
        return transfer.abs(), torch.ones_like(transfer)
    if correction == "premultiplied":
        return transfer**2, transfer.abs()
    wiener = transfer.abs() / (transfer**2 + WIENER_CONSTANT)
    return transfer.abs() * wiener, wiener


def _count_bytes(optics: Optics) -> int:
    tensors = (optics.signal, optics.noise, *(optics.at_stage or ()))
    return sum(tensor.nbytes for tensor in tensors)

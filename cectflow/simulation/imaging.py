"""Imaging: the transfer function H(k), the noise amplitude N(k), and the step scene → tomogram.

A tilt series reconstructed by weighted back-projection acts on the specimen as one linear filter.
Each tilt fills a slab of Fourier space about its central plane; H(k) and N(k) are sums over the
slabs, so that per-tilt CTF, dose, thickness, alignment and detector cost nothing when a volume is
imaged: one forward and one inverse transform. All of it runs on the device of the density.

The field repeats along x and y and is one period Z thick along z, as in
:mod:`cectflow.simulation.tilt_series`. So an image of tilt t holds, of each column k_x of the
field's spectrum, what is at ``k_z = -k_x tan t``, at the frequency ``k_x / cos t`` of the image;
being Z thick, the field spreads that over 1/Z along k_z.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from cectflow.model_card import CtfCorrection
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

__all__ = [
    "MeasuredSnr",
    "Optics",
    "SnrStage",
    "image_and_measure",
    "image_field",
    "image_spectrum",
    "noise_scale",
    "optics_of",
    "power_spectrum",
    "volume_of",
]

SnrStage = Literal["reconstruction", "projection", "aitom"]

INELASTIC_MEAN_FREE_PATH = 3800.0
"""Å, of 300 kV electrons in vitreous ice (cryo-TomoSim's value; 3000 to 4000 are published)."""
WIENER_CONSTANT = 0.1
"""Added to CTF² in the denominator of the Wiener correction."""
SNR_RESOLUTION = 60.0
"""Å: the low-pass for the second, comparable SNR figure of each field."""
AITOM_LOW_PASS = 0.2
"""Cycles per voxel: of the Gaussian exp(-(k/k0)²) on the noise that comes after the CTF."""
AITOM_BAND = 0.25
"""Cycles per voxel where the final band-pass ends, half the Nyquist frequency."""
AITOM_BAND_EDGE = 2 / 64
"""Cycles per voxel of the Gaussian edge exp(-(dk/edge)²) beyond it: 2 samples of a 64³ box."""
CHUNK = 2**20
"""Values over which a step of building optics works at once: few enough for a CPU's cache."""
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
            return _squared(self.signal[part]), self.noise[part] ** 2
        return self.at_stage[0][part], self.at_stage[1][part]


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
    gain = _squared(transfer)
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
    kz, _, kx = _frequencies(shape, voxel_size, device)
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
        rows = _multiplicity(shape[1], str(ky.device)).to(torch.float32)
    columns = _multiplicity(shape[2], str(ky.device)).to(torch.float32)
    counted = power @ rows * slabs.weights.sum(dim=1) * columns[:, None]
    totals = counted.sum(dim=0) - power[0, :, 0] * slabs.weights[0, 0]
    return slabs.weights / (totals * len(totals))


def power_spectrum(density: Float[Tensor, "z y x"]) -> Float[Tensor, "z y kx"]:
    """Squared modulus of a field's half spectrum."""
    return _squared(torch.fft.rfftn(density))


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
    signal, noise = _Variance(shape), _Variance(shape)
    for part in _sections(expected_power):
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
    noise = _draw_white(density.shape, generator).mul_(optics.noise * noise_factor)
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
    noise = _draw_white(shape, generator)
    at_stage = _Variance(shape), _Variance(shape)
    full = _Variance(shape), _Variance(shape)
    low = _Variance(shape), _Variance(shape)
    for part in _sections(spectrum):
        spectra = spectrum[part], noise[part]
        if optics.at_stage is not None:
            gains = optics.snr_gains(part)
            for variance, values, gain in zip(at_stage, spectra, gains, strict=True):
                variance.add(_squared(values) * gain)
        # In place: a real tensor times a complex one is many times slower into a new one.
        spectra[0].mul_(optics.signal[part])
        spectra[1].mul_(optics.noise[part] * noise_factor)
        inside = _sphere(shape, part.start, part.stop, voxel_size, str(spectrum.device))
        for whole, inner, values in zip(full, low, spectra, strict=True):
            power = _squared(values)
            whole.add(power)
            inner.add(power * inside)
    spectrum.add_(noise)
    reconstruction = stage = full[0].total / full[1].total
    if optics.at_stage is not None:
        stage = at_stage[0].total / (at_stage[1].total * noise_factor**2)
    low_passed = low[0].total / low[1].total
    return MeasuredSnr(stage, reconstruction, low_passed, float(np.sqrt(full[1].total)))


def volume_of(
    spectrum: Inexact[Tensor, "z y kx"], shape: tuple[int, int, int]
) -> Float[Tensor, "z y x"]:
    """Volume of a half spectrum; a large one is overwritten, so that no copy of it is needed."""
    if spectrum.numel() <= CHUNK:
        small: Tensor = torch.fft.irfftn(spectrum, s=shape)
        return small
    for rows in _sections(spectrum.transpose(0, 1)):
        spectrum[:, rows] = torch.fft.ifft(spectrum[:, rows], dim=0)
    volume = torch.empty(shape, device=spectrum.device)
    for part in _sections(spectrum):
        volume[part] = torch.fft.irfftn(spectrum[part], s=shape[1:], dim=(1, 2))
    return volume


def _draw_white(shape: Sequence[int], generator: torch.Generator) -> Inexact[Tensor, "z y kx"]:
    """Half spectrum of unit white noise, drawn in Fourier space on the generator's device."""
    depth, height, width = shape
    size = (depth, height, width // 2 + 1)
    white = torch.randn((*size, 2), generator=generator, device=generator.device)
    spectrum = torch.view_as_complex(white.mul_(np.sqrt(0.5 * depth * height * width)))
    # These planes hold both k and -k, and a real volume has conjugate values there.
    for plane in {0, width // 2} if width % 2 == 0 else {0}:
        values = spectrum[:, :, plane]
        mirror = values.flip(0, 1).roll((1, 1), (0, 1)).conj()
        spectrum[:, :, plane] = (values + mirror) / np.sqrt(2.0)
    return spectrum


def _frequencies(
    shape: tuple[int, ...], voxel_size: float, device: str
) -> tuple[Float[Tensor, "z 1 1"], Float[Tensor, "1 y 1"], Float[Tensor, "1 1 kx"]]:
    """Spatial frequencies in Å⁻¹ of the half spectrum, ready to broadcast."""
    depth, height, width = shape
    kind: Any = {"dtype": torch.float64, "device": device}
    return (
        torch.fft.fftfreq(depth, voxel_size, **kind)[:, None, None],
        torch.fft.fftfreq(height, voxel_size, **kind)[None, :, None],
        torch.fft.rfftfreq(width, voxel_size, **kind)[None, None, :],
    )


def _radius(shape: tuple[int, ...], voxel_size: float, device: str) -> Float[Tensor, "z y kx"]:
    kz, ky, kx = _frequencies(shape, voxel_size, device)
    return (kz**2 + ky**2 + kx**2).sqrt().to(torch.float32)


@lru_cache(maxsize=4)
def _sphere(
    shape: tuple[int, ...], start: int, stop: int, voxel_size: float, device: str
) -> Float[Tensor, "part y kx"]:
    """1 up to the frequency 1 / 60 Å, 0 beyond; of the sections kz from start to stop."""
    kz, ky, kx = _frequencies(shape, voxel_size, device)
    radius = (kz[start:stop] ** 2 + ky**2 + kx**2).sqrt().to(torch.float32)
    return (radius <= 1.0 / SNR_RESOLUTION).to(torch.float32)


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


def _squared(spectrum: Inexact[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    if spectrum.is_complex():
        parts = torch.view_as_real(spectrum)
        return parts[..., 0] ** 2 + parts[..., 1] ** 2
    return spectrum**2


def _multiplicity(width: int, device: str) -> Float[Tensor, " kx"]:
    """How many samples of the full spectrum each kx of the half spectrum stands for."""
    twice = torch.full((width // 2 + 1,), 2.0, dtype=torch.float64, device=device)
    twice[0] = 1.0
    if width % 2 == 0:
        twice[-1] = 1.0
    return twice


class _Variance:
    """Variance of a real volume, k = 0 excluded, from parts of its half power spectrum (Parseval).

    Attributes
    ----------
    total
        Of the parts added until now, of which the first must begin at k = 0.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._num_voxels = float(np.prod(shape, dtype=np.float64))
        self._width = shape[2]
        self._columns: Tensor | None = None

    def add(self, power: Float[Tensor, "part y kx"]) -> None:
        """Add the next sections kz of the power spectrum."""
        columns = power.sum(dim=(0, 1)).to(torch.float64)
        if self._columns is None:
            columns[0] -= power[0, 0, 0]
            self._columns = columns
        else:
            self._columns += columns

    @property
    def total(self) -> float:
        assert self._columns is not None
        multiplicity = _multiplicity(self._width, str(self._columns.device))
        return float(self._columns @ multiplicity) / self._num_voxels**2


def _sections(spectrum: Tensor) -> Iterator[slice]:
    """Slices along the first axis, each of at most ``CHUNK`` values or of one index."""
    length = len(spectrum)
    step = max(CHUNK // max(spectrum[0].numel(), 1), 1)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _count_bytes(optics: Optics) -> int:
    tensors = (optics.signal, optics.noise, *(optics.at_stage or ()))
    return sum(tensor.nbytes for tensor in tensors)

"""Tilt series: projections recorded one by one and reconstructed by weighted back-projection.

The literal path, in real space, that the one filter of :mod:`cectflow.simulation.optics` is held
against; it also writes what a microscope would: aligned projections beside the reconstruction.

Geometry: the beam runs along z, the tilt axis is y. At tilt t the point (z, x), counted from the
centre voxel, is recorded at ``u = x cos t - z sin t``; so positive tilts carry +z towards -u.

Specimen: the field repeats without end along x and y, so that a tilted ray enters and leaves it
through its faces and never through its sides. Along z it is cut at the field's own faces, with
bare ice beyond: one period thick, as a lamella is. What the periodic field holds across those
faces is cut in two, and that, within a structure's length of them, is where the literal and the
fast path may differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.interpolate import BSpline
from scipy.ndimage import spline_filter1d
from scipy.signal import fftconvolve, resample
from scipy.sparse import csr_array

from cectflow.model_card import CtfCorrection
from cectflow.simulation.microscope import (
    OpticsDraw,
    astigmatic_defocus,
    contrast_transfer,
    dose_filter,
    electron_wavelength,
    noise_power,
    signal_transfer,
    single_number,
)
from cectflow.simulation.optics import INELASTIC_MEAN_FREE_PATH, WIENER_CONSTANT

__all__ = [
    "TiltSeries",
    "back_project",
    "detector_width",
    "project_field",
    "projection_noise",
    "record_tilt_series",
]

SPLINE: Final = 5
"""Order of the B-splines that interpolate: 99.9 % of the amplitude is left at half the Nyquist
frequency (98.7 % with cubic ones), Unser 1999, IEEE Signal Process. Mag. 16:22."""
EDGE = 12
"""Voxels of ice above and below, in which the spline of the specimen's faces dies away."""
RAMP_MARGIN = 32
"""Pixels beyond the field's shadow for the tails of the ramp filter, which fall as 1/u²."""
FINER = 2
"""Samples to a pixel, by Fourier interpolation, in the lines that are back-projected."""
PIXELS_AT_A_TIME, SLICES_AT_A_TIME = 64, 8
"""Matrices are made for so much of a detector line, or of a volume, to bound the memory."""


@dataclass(frozen=True, eq=False)
class TiltSeries:
    """Aligned projections of one field.

    Attributes
    ----------
    projections
        Recorded signal and noise after the CTF correction, protein dark; the centre of the field
        is at pixel ``(height // 2, width // 2)``.
    angles
        Degrees, in the order of the projections.
    pixel_size
        Å.
    """

    projections: Float[NDArray[np.float32], "tilt y u"]
    angles: Float[NDArray[np.float64], " tilt"]
    pixel_size: float


def detector_width(shape: tuple[int, int, int], voxel_size: float, draw: OpticsDraw) -> int:
    """Pixels across the tilt axis that a reconstruction of this shape draws upon.

    Its shadow at any tilt, the tails of the ramp filter, and on either side the distance
    ``lambda dz k`` by which the CTF displaces the highest frequency.
    """
    wavelength = electron_wavelength(draw.microscope.voltage_kv)
    displacement = wavelength * float(np.abs(draw.defoci_um).max()) * 1e4
    spread = displacement * 0.5 / voxel_size / voxel_size
    return 2 * int(np.ceil(np.hypot(shape[0], shape[2]) / 2 + spread + RAMP_MARGIN))


def project_field(
    density: Float[NDArray[np.float32], "z y x"],
    angles: Float[NDArray[np.float64], " tilt"],
    width: int,
) -> Float[NDArray[np.float32], "tilt y {width}"]:
    """Sums of a field's density along the beam at each tilt, a voxel's step apart.

    The rotation is about y, so that one matrix for each tilt takes the (z, x) plane, in B-spline
    coefficients, to a line of the detector, at every y alike.

    Parameters
    ----------
    density
        Periodic along x and y, one period thick along z.
    angles
        Degrees.
    width
        Pixels of the detector along u.
    """
    padded = np.pad(density, ((EDGE, EDGE), (0, 0), (0, 0)))
    padded = spline_filter1d(padded, SPLINE, 0, output=np.float32, mode="mirror")
    padded = spline_filter1d(padded, SPLINE, 2, output=np.float32, mode="grid-wrap")
    depth, height, length = padded.shape
    plane = padded.transpose(0, 2, 1).reshape(depth * length, height)
    projections = np.empty((len(angles), height, width), np.float32)
    for projection, angle in zip(projections, np.deg2rad(angles), strict=True):
        for start in range(0, width, PIXELS_AT_A_TIME):
            u = np.arange(start, min(start + PIXELS_AT_A_TIME, width)) - width // 2
            rays = _projector(float(angle), u, depth, length)
            projection[:, start : start + len(u)] = (rays @ plane).T
    return projections


def record_tilt_series(
    density: Float[NDArray[np.float32], "z y x"],
    voxel_size: float,
    draw: OpticsDraw,
    ctf_correction: CtfCorrection,
    noise_factor: float,
    generator: np.random.Generator,
) -> TiltSeries:
    """Tilt series of a field, CTF-corrected tilt by tilt.

    Each projection is attenuated by dose, inelastic loss and detector, turned over by the CTF and
    displaced by what its alignment is off; noise of the microscope's spectrum is added; then
    signal and noise are corrected.

    Parameters
    ----------
    density
        Potential above ice, bright protein; periodic along x and y.
    voxel_size
        In Å.
    draw
        Microscope, tilts, and each tilt's defocus and shift.
    ctf_correction
        Applied to each projection.
    noise_factor
        Standard deviation of the white noise in a pixel before it takes its spectrum, in the
        projections' units (V times voxel): :func:`projection_noise`.
    generator
        Source of the noise.
    """
    tilts = draw.tilts
    width = detector_width((density.shape[0], density.shape[1], density.shape[2]), voxel_size, draw)
    projections = project_field(density, tilts.angles, width)
    shape = (density.shape[1], width)
    ky, ku = _frequencies(shape, voxel_size)
    k_squared, nyquist = ky**2 + ku**2, 0.5 / voxel_size
    grain = np.sqrt(_noise_power(shape, voxel_size, draw))
    detected = signal_transfer(k_squared, nyquist, draw.microscope)
    shifts = draw.shifts or ((0.0, 0.0),) * len(projections)
    for index, projection in enumerate(projections):
        tilt, (along_u, along_y) = np.deg2rad(tilts.angles[index]), shifts[index]
        path = single_number(tilts, "thickness") * (1.0 / np.cos(tilt) - 1.0)
        seen = np.exp(-path / INELASTIC_MEAN_FREE_PATH)
        seen = seen * dose_filter(k_squared, float(tilts.exposures[index])) * detected
        transfer = _transfer(shape, voxel_size, draw, index)
        image = -transfer * seen * np.fft.rfft2(projection)
        image *= np.exp(-2j * np.pi * (ku * along_u + ky * along_y))
        if noise_factor > 0:
            white = generator.standard_normal(projection.shape, np.float32)
            image += noise_factor * grain * np.fft.rfft2(white)
        corrected = _correction(transfer, ctf_correction) * image
        projection[...] = np.fft.irfft2(corrected, s=projection.shape)
    return TiltSeries(projections, tilts.angles, voxel_size)


def projection_noise(
    variance: float, voxel_size: float, draw: OpticsDraw, ctf_correction: CtfCorrection
) -> float:
    """Factor for :func:`record_tilt_series` at which the reconstructed noise has a variance.

    Back-projection adds the tilts' filtered noise, ``Var = Σ_t (Δθ)² ∫ |u|² s² g²`` over the
    band of the detector (ramp u in cycles per pixel, spectrum s², correction g).

    Parameters
    ----------
    variance
        Of the noise in the reconstruction, V².
    voxel_size, draw, ctf_correction
        As for :func:`record_tilt_series`.
    """
    shape = (256, 256)
    _, ku = _frequencies(shape, voxel_size)
    ramped = (ku * voxel_size) ** 2 * _noise_power(shape, voxel_size, draw)
    ramped *= np.where((ku == 0) | (ku == ku.max()), 1.0, 2.0) / np.prod(shape)
    unit = 0.0
    for index, spacing in enumerate(_angular_spacing(draw.tilts.angles)):
        gain = _correction(_transfer(shape, voxel_size, draw, index), ctf_correction)
        unit += float(spacing**2 * (ramped * gain**2).sum())
    return float(np.sqrt(variance / unit))


def back_project(
    series: TiltSeries, shape: tuple[int, int, int]
) -> Float[NDArray[np.float32], "z y x"]:
    """Weighted back-projection of a tilt series about the field's centre.

    ``f(z, x) = Σ_t Δθ_t (p_t * h)(x cos t - z sin t)`` with the ramp filter h in real space
    (Kak and Slaney 1988, equations 3.30 and 3.61): its values are 1/4 at 0, -1/(πn)² at odd n and
    0 at even n. A projection's mean is left out, as is the ice it stands for.

    Parameters
    ----------
    series
        Aligned projections.
    shape
        Of the reconstruction ``(z, y, x)``; it lies about the centre of the projections.

    Returns
    -------
    NDArray
        In the units of the projected density: V.

    Raises
    ------
    ValueError
        If the volume is higher than the projections, or wider.
    """
    num_tilts, height, width = series.projections.shape
    reach = float(np.hypot(shape[0], shape[2]))
    if shape[1] > height or reach > width - SPLINE:
        msg = (
            f"a volume of {shape} voxels (z, y, x) needs projections of at least "
            f"{shape[1]} x {int(np.ceil(reach)) + SPLINE} pixels (y, x), given {height} x {width}"
        )
        raise ValueError(msg)
    first = height // 2 - shape[1] // 2
    columns = np.stack(
        [_line_coefficients(image[first : first + shape[1]]).T for image in series.projections]
    )
    angles, spacing = np.deg2rad(series.angles), _angular_spacing(series.angles)
    volume = np.empty(shape, np.float32)
    z, x = (np.arange(n) - n // 2 for n in (shape[0], shape[2]))
    for start in range(0, shape[0], SLICES_AT_A_TIME):
        slices = z[start : start + SLICES_AT_A_TIME, None]
        total = np.zeros((slices.size * shape[2], shape[1]), np.float32)
        for tilt in range(num_tilts):
            u = (x * np.cos(angles[tilt]) - slices * np.sin(angles[tilt])).ravel() + width // 2
            sampler = _sampler(u * FINER, width * FINER)
            total += np.float32(spacing[tilt]) * (sampler @ columns[tilt])
        block = total.reshape(slices.size, shape[2], shape[1])
        volume[start : start + SLICES_AT_A_TIME] = block.transpose(0, 2, 1)
    return volume


def _projector(angle: float, u: NDArray[np.int64], depth: int, length: int) -> csr_array:
    """Matrix from spline coefficients of the (z, x) plane to pixels u of one tilt's line."""
    steps = int(np.ceil(depth / np.cos(angle))) + 2
    # Along the beam, a voxel's step apart, about where the ray crosses the middle of the slab.
    s = np.round(u * np.tan(angle))[:, None] + np.arange(steps) - steps // 2
    z = s * np.cos(angle) - u[:, None] * np.sin(angle) + depth // 2
    x = s * np.sin(angle) + u[:, None] * np.cos(angle) + length // 2
    z_index, z_weight = _spline_taps(z)
    x_index, x_weight = _spline_taps(x)
    weight = z_weight[..., :, None] * x_weight[..., None, :]
    weight *= ((z_index >= 0) & (z_index < depth))[..., None]
    column = np.clip(z_index, 0, depth - 1)[..., None] * length + (x_index % length)[..., None, :]
    starts = np.arange(len(u) + 1) * (column.size // len(u))
    matrix: csr_array = csr_array(
        (weight.ravel(), column.astype(np.int32).ravel(), starts),
        shape=(len(u), depth * length),
    )
    matrix.sum_duplicates()
    return matrix


def _sampler(positions: NDArray[np.float64], width: int) -> csr_array:
    """Matrix from spline coefficients of a detector line to its values at positions."""
    index, weight = _spline_taps(positions)
    starts = np.arange(0, index.size + 1, SPLINE + 1)
    matrix: csr_array = csr_array(
        (weight.ravel(), np.clip(index, 0, width - 1).ravel(), starts),
        shape=(len(positions), width),
    )
    return matrix


def _spline_taps(positions: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Indices of the coefficients about each position, on a new last axis, and their weights."""
    index = np.floor(positions).astype(np.int64)[..., None] + np.arange(SPLINE + 1) - SPLINE // 2
    knots = np.arange(SPLINE + 2) - (SPLINE + 1) / 2
    bump = BSpline.basis_element(knots, extrapolate=False)
    weight = np.nan_to_num(bump(positions[..., None] - index)).astype(np.float32)
    return index, weight


def _line_coefficients(
    projection: Float[NDArray[np.float32], "y u"],
) -> Float[NDArray[np.float32], "y finer_u"]:
    """Spline coefficients of a ramp-filtered projection, sampled finer along u."""
    width = projection.shape[1]
    n = np.arange(-width, width + 1)
    kernel = np.zeros(n.size, np.float32)
    odd = n % 2 == 1
    kernel[odd] = -1.0 / (np.pi * n[odd]) ** 2
    kernel[width] = 0.25
    filtered = fftconvolve(projection - projection.mean(), kernel[None], "same", axes=1)
    # A spline takes half the noise at the Nyquist frequency, where the ramp has put most of it.
    finer: NDArray[np.float32] = resample(filtered, FINER * width, axis=1)
    return spline_filter1d(finer, SPLINE, 1, output=np.float32, mode="grid-wrap")


def _transfer(
    shape: tuple[int, int], pixel_size: float, draw: OpticsDraw, index: int
) -> NDArray[np.float64]:
    """CTF of one tilt on the half spectrum of its image."""
    ky, ku = _frequencies(shape, pixel_size)
    defocus = astigmatic_defocus(ku, ky, draw.defoci_um[index], draw.microscope)
    transfer: NDArray[np.float64] = contrast_transfer(ky**2 + ku**2, defocus, draw.microscope)
    return transfer


def _noise_power(
    shape: tuple[int, int], pixel_size: float, draw: OpticsDraw
) -> NDArray[np.float64]:
    """Power spectrum of the noise that the camera adds, 1 for white noise."""
    ky, ku = _frequencies(shape, pixel_size)
    k_squared, nyquist = ky**2 + ku**2, 0.5 / pixel_size
    return np.ones_like(k_squared) * noise_power(k_squared, nyquist, draw.microscope)


def _correction(
    transfer: NDArray[np.float64], ctf_correction: CtfCorrection
) -> NDArray[np.float64]:
    """What a recorded image is multiplied by in Fourier space."""
    if ctf_correction == "none":
        return np.ones_like(transfer)
    if ctf_correction == "phase_flip":
        return np.where(transfer < 0, -1.0, 1.0)
    if ctf_correction == "premultiplied":
        return transfer
    wiener: NDArray[np.float64] = transfer / (transfer**2 + WIENER_CONSTANT)
    return wiener


def _frequencies(
    shape: tuple[int, ...], pixel_size: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Å⁻¹ of the half spectrum of an image, ready to broadcast."""
    ky = np.fft.fftfreq(shape[0], pixel_size).astype(np.float64)[:, None]
    return ky, np.fft.rfftfreq(shape[1], pixel_size).astype(np.float64)[None, :]


def _angular_spacing(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """Radians that each tilt stands for: half the distance between its neighbours."""
    spacing: NDArray[np.float64] = np.gradient(np.deg2rad(angles))
    return spacing

"""Imaging: the wedge is empty, protein is dark, and the noise is as strong as was asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cectflow.model_card import CtfCorrection
from cectflow.simulation.imaging import (
    Optics,
    image_field,
    low_pass_variance,
    measure_snr,
    noise_scale,
    optics_of,
    power_spectrum,
    signal_variance,
)
from cectflow.simulation.microscope import Microscope, TiltScheme, contrast_transfer

VOXEL_SIZE = 10.0
DEFOCUS_UM = 4.0
SHAPE = (32, 32, 32)
# Nothing is lost in this one: no aberration, no damage, no inelastic scattering, a flat detector.
PERFECT = Microscope(
    spherical_aberration_mm=0.0, amplitude_contrast=0.999, defocus_um=(0.0, 0.0), mtf=1.0
)
HARMLESS = TiltScheme(dose_per_tilt=0.0, thickness=0.0)


def make_optics(
    *,
    shape: tuple[int, int, int] = SHAPE,
    microscope: Microscope | None = None,
    tilts: TiltScheme | None = None,
    defocus_um: float = DEFOCUS_UM,
    ctf_correction: CtfCorrection = "none",
) -> Optics:
    return optics_of(
        shape,
        VOXEL_SIZE,
        microscope or Microscope(),
        tilts or TiltScheme(),
        defocus_um,
        ctf_correction,
    )


def draw(seed: int, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(density: Tensor, optics: Optics, factor: float = 0.0, seed: int = 0) -> Any:
    return image_field(density, optics, factor, torch.Generator().manual_seed(seed))


def frequencies(shape: tuple[int, ...]) -> tuple[NDArray[np.float64], ...]:
    """Frequencies kz, ky, kx in Å⁻¹ of the full spectrum."""
    kz, ky, kx = (np.fft.fftfreq(size, VOXEL_SIZE) for size in shape)
    grid = np.meshgrid(kz, ky, kx, indexing="ij")
    return grid[0], grid[1], grid[2]


def energy(volume: Tensor) -> NDArray[np.float64]:
    """Power over the full spectrum."""
    return np.asarray(np.abs(np.fft.fftn(volume.numpy().astype(np.float64))) ** 2)


def missing_wedge(shape: tuple[int, ...], tilts: TiltScheme) -> NDArray[np.bool_]:
    """Frequencies whose direction in the x-z plane no tilt of the range reaches.

    A tilt of t degrees records the plane through the tilt axis y and the direction
    ``(kx, kz) = (cos t, -sin t)``.
    """
    kz, _, kx = frequencies(shape)
    direction = np.rad2deg(np.arctan2(-kz, kx))
    direction = np.where(direction > 90, direction - 180, direction)
    direction = np.where(direction <= -90, direction + 180, direction)
    angles = tilts.angles
    return np.asarray((direction < angles[0] - 1e-6) | (direction > angles[-1] + 1e-6))


# --- the missing wedge ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32, 32), (16, 24, 32)])
@pytest.mark.parametrize("range_", [(-60.0, 60.0), (-50.0, 50.0), (-40.0, 60.0)])
def test_the_missing_wedge_holds_less_than_a_hundredth_of_the_signal(
    shape: tuple[int, int, int], range_: tuple[float, float]
) -> None:
    tilts = TiltScheme(lowest=range_[0], highest=range_[1])
    signal, _ = image(draw(0, shape), make_optics(shape=shape, tilts=tilts))
    power = energy(signal)
    wedge = missing_wedge(shape, tilts)
    # No margin: the halves of the outermost slabs that lie beyond the range are counted.
    assert power[wedge].sum() < 0.01 * power.sum()
    assert wedge.mean() > 0.25


def test_beyond_the_outermost_slabs_there_is_neither_signal_nor_noise() -> None:
    tilts = TiltScheme()
    signal, noise = image(draw(0), make_optics(tilts=tilts), factor=1.0)
    kz, _, kx = frequencies(SHAPE)
    # The slab of a tilt is one frequency sample wide on either side of its plane.
    width, outermost = 1 / (max(SHAPE) * VOXEL_SIZE), np.deg2rad(tilts.angles[[0, -1]])
    beyond = missing_wedge(SHAPE, tilts) & np.all(
        [np.abs(kz * np.cos(t) + kx * np.sin(t)) > width * (1 + 1e-9) for t in outermost], axis=0
    )
    assert beyond.mean() > 0.2
    for volume in (signal, noise):
        power = energy(volume)
        assert power[beyond].sum() < 1e-9 * power.sum()


def test_an_asymmetric_range_records_one_side_only() -> None:
    tilts = TiltScheme(lowest=-20.0, highest=60.0)
    mirrored = TiltScheme(lowest=-60.0, highest=20.0)
    kz, _, kx = frequencies(SHAPE)
    at_forty = np.abs(np.rad2deg(np.arctan2(-kz, kx)) - 40) < 5
    at_minus_forty = np.abs(np.rad2deg(np.arctan2(-kz, kx)) + 40) < 5
    power = energy(image(draw(0), make_optics(tilts=tilts))[0])
    assert power[at_minus_forty].sum() < 0.1 * power[at_forty].sum()
    power = energy(image(draw(0), make_optics(tilts=mirrored))[0])
    assert power[at_forty].sum() < 0.1 * power[at_minus_forty].sum()


def test_perfect_optics_give_the_negative_specimen_outside_the_wedge() -> None:
    optics = make_optics(microscope=PERFECT, tilts=HARMLESS, defocus_um=0.0)
    kz, _, kx = (k[:, :, : SHAPE[2] // 2 + 1] for k in frequencies(SHAPE))
    # Where slabs overlap, and well inside the range.
    radius = np.hypot(kz, kx) * SHAPE[0] * VOXEL_SIZE
    inner = (radius > 4) & (radius < 1 / np.deg2rad(3)) & (kx > 0)
    inner &= np.abs(np.rad2deg(np.arctan2(kz, kx))) < 45
    transfer = optics.signal.numpy()[inner]
    assert transfer.mean() == pytest.approx(-1, abs=0.02)
    # Triangular slabs add up to one within an eighth.
    np.testing.assert_allclose(transfer, -1, atol=0.15)


# --- the filters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lowest", [-60.0, -40.0])
def test_imaging_is_a_real_and_point_symmetric_filter(lowest: float) -> None:
    optics = make_optics(tilts=TiltScheme(lowest=lowest))
    assert not optics.signal.is_complex()
    assert not optics.noise.is_complex()
    point = torch.zeros(SHAPE)
    point[0, 0, 0] = 1
    spread, _ = image(point, optics)
    reversed_ = spread.flip(0, 1, 2).roll((1, 1, 1), (0, 1, 2))
    torch.testing.assert_close(spread, reversed_, atol=1e-6, rtol=0)
    # The plane kx = 0 holds both k and -k.
    for plane in (optics.signal[:, :, 0], optics.noise[:, :, 0]):
        torch.testing.assert_close(plane[1:, 1:], plane[1:, 1:].flip(0, 1), atol=1e-6, rtol=0)


def test_signal_is_linear_in_the_density() -> None:
    optics, first, second = make_optics(), draw(1), draw(2)
    together, _ = image(2 * first - 3 * second, optics)
    apart = 2 * image(first, optics)[0] - 3 * image(second, optics)[0]
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_signal_moves_with_the_density() -> None:
    optics, density = make_optics(), draw(1)
    moved, _ = image(density.roll((3, -5, 7), (0, 1, 2)), optics)
    torch.testing.assert_close(
        moved, image(density, optics)[0].roll((3, -5, 7), (0, 1, 2)), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("ctf_correction", ["none", "phase_flip", "premultiplied", "wiener"])
@pytest.mark.parametrize("defocus_um", [2.0, 4.0, 6.0])
def test_protein_is_dark(ctf_correction: CtfCorrection, defocus_um: float) -> None:
    kz, ky, kx = np.indices(SHAPE) - 16
    blob = torch.from_numpy(np.exp(-(kz**2 + ky**2 + kx**2) / (2 * 3.0**2)).astype(np.float32))
    signal, _ = image(blob, make_optics(defocus_um=defocus_um, ctf_correction=ctf_correction))
    assert np.corrcoef(signal.ravel(), blob.ravel())[0, 1] < -0.4
    assert signal[16, 16, 16] < 0


@pytest.mark.parametrize("ctf_correction", ["phase_flip", "premultiplied", "wiener"])
def test_corrected_signal_has_one_sign_at_all_frequencies(ctf_correction: CtfCorrection) -> None:
    assert float(make_optics(ctf_correction=ctf_correction).signal.max()) <= 0
    assert float(make_optics(ctf_correction="none").signal.max()) > 0.1


def test_correction_never_makes_the_signal_stronger_than_the_specimen() -> None:
    for ctf_correction in ("none", "phase_flip", "premultiplied", "wiener"):
        assert float(make_optics(ctf_correction=ctf_correction).signal.abs().max()) < 1.1


# --- noise ----------------------------------------------------------------------------------------


def test_premultiplied_noise_has_the_spectrum_of_the_ctf() -> None:
    plain, multiplied = make_optics(), make_optics(ctf_correction="premultiplied")
    k = np.fft.fftfreq(SHAPE[1], VOXEL_SIZE)
    transfer = np.abs(contrast_transfer(k**2, DEFOCUS_UM, Microscope()))
    # Along the tilt axis every tilt records the same frequency.
    ratio = multiplied.noise[0, :, 0] / plain.noise[0, :, 0]
    np.testing.assert_allclose(ratio, transfer, atol=1e-5)
    # Elsewhere a sample lies up to a slab's width from the plane whose CTF it takes.
    kz, ky, kx = (f[:, :, : SHAPE[2] // 2 + 1] for f in frequencies(SHAPE))
    seen = plain.noise.numpy() > 0
    transfer = np.abs(contrast_transfer(kz**2 + ky**2 + kx**2, DEFOCUS_UM, Microscope()))
    ratio = multiplied.noise.numpy()[seen] / plain.noise.numpy()[seen]
    assert np.corrcoef(ratio, transfer[seen])[0, 1] > 0.95
    # So it is in the noise itself: 16 fields' power along the tilt axis.
    nothing = torch.zeros(SHAPE)
    power = np.mean(
        [energy(image(nothing, multiplied, 1.0, seed)[1])[0, :, 0] for seed in range(16)], axis=0
    )
    strong = contrast_transfer(k**2, DEFOCUS_UM, Microscope()) ** 2
    assert np.corrcoef(power, strong)[0, 1] > 0.9


def test_blue_noise_rises_with_the_square_of_the_frequency() -> None:
    white = make_optics()
    blue = make_optics(microscope=Microscope(noise_spectrum="blue"))
    share = np.fft.fftfreq(SHAPE[1]) / 0.5
    ratio = blue.noise[0, :, 0] ** 2 / white.noise[0, :, 0] ** 2
    np.testing.assert_allclose(ratio, 0.05 + share**2, rtol=1e-4)


@pytest.mark.parametrize("ctf_correction", ["none", "phase_flip", "premultiplied", "wiener"])
@pytest.mark.parametrize("snr", [0.05, 1.0])
def test_snr_is_the_variance_of_the_signal_over_that_of_the_noise(
    ctf_correction: CtfCorrection, snr: float
) -> None:
    optics = make_optics(ctf_correction=ctf_correction)
    measured = []
    for seed in range(12):
        density = draw(seed)
        factor = noise_scale(power_spectrum(density), optics, snr, width=SHAPE[2])
        signal, noise = image(density, optics, factor, seed + 100)
        own = float(signal.var(correction=0) / noise.var(correction=0))
        reported = measure_snr(signal, noise, VOXEL_SIZE)
        assert reported is not None
        # They leave out k = 0, which is little here.
        assert reported[0] == pytest.approx(own, rel=1e-3)
        measured.append(reported[0])
    assert np.mean(measured) == pytest.approx(snr, rel=0.05)


def test_without_an_snr_there_is_no_noise() -> None:
    optics, density = make_optics(), draw(0)
    factor = noise_scale(power_spectrum(density), optics, None, width=SHAPE[2])
    signal, noise = image(density, optics, factor)
    assert factor == 0
    assert not noise.any()
    assert measure_snr(signal, noise, VOXEL_SIZE) is None


def test_the_same_generator_gives_the_same_noise() -> None:
    optics, density = make_optics(), draw(0)
    first, again, other = (image(density, optics, 1.0, seed)[1] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- variances ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16, 16), (12, 14, 15)])
def test_variances_in_fourier_space_are_those_of_the_voxels(shape: tuple[int, int, int]) -> None:
    optics, density = make_optics(shape=shape), draw(3, shape) + 5
    signal, _ = image(density, optics)
    from_power = signal_variance(power_spectrum(density), optics, width=shape[2])
    assert from_power == pytest.approx(float(signal.var(correction=0)), rel=1e-2)
    assert low_pass_variance(density, VOXEL_SIZE, 0.0) == pytest.approx(
        float(density.var(correction=0)), rel=1e-4
    )


def test_a_low_pass_keeps_its_share_of_white_noise() -> None:
    volume = draw(4)
    kz, ky, kx = frequencies(SHAPE)
    inside = (kz**2 + ky**2 + kx**2 <= 60.0**-2).mean()
    assert low_pass_variance(volume, VOXEL_SIZE) == pytest.approx(inside, rel=0.1)

"""Imaging: the wedge is empty, protein is dark, and the noise is as strong as was asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from cectflow.model_card import CtfCorrection
from cectflow.simulation.half_spectrum import power_spectrum
from cectflow.simulation.imaging import image_and_measure, image_field, noise_scale
from cectflow.simulation.microscope import (
    Microscope,
    TiltScheme,
    contrast_transfer,
    electron_wavelength,
    signal_transfer,
)
from cectflow.simulation.optics import CACHED_BYTES, Optics, SnrStage, optics_of

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
    defocus_um: float | tuple[float, ...] = DEFOCUS_UM,
    ctf_correction: CtfCorrection = "none",
    **options: Any,
) -> Optics:
    return optics_of(
        shape,
        VOXEL_SIZE,
        microscope or Microscope(),
        tilts or TiltScheme(),
        defocus_um,
        ctf_correction,
        **options,
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


# --- the missing wedge ---------------------------------------------------------------------------


# The slabs of a thinner field are thicker: one of 16 voxels has up to 1.2 % there.
@pytest.mark.parametrize("shape", [(32, 32, 32), (32, 24, 48)])
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
    inner &= np.hypot(kz, kx) < 0.45 / VOXEL_SIZE  # images end at 0.5
    transfer = optics.signal.numpy()[inner]
    assert transfer.mean() == pytest.approx(-1, abs=0.02)
    # Triangular slabs add up to one within an eighth.
    np.testing.assert_allclose(transfer, -1, atol=0.15)


# --- the filters ---------------------------------------------------------------------------------


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


# --- what differs from tilt to tilt --------------------------------------------------------------


NYQUIST = 0.5 / VOXEL_SIZE


def find_zeros(transfer: NDArray[np.float64], k: NDArray[np.float64]) -> NDArray[np.float64]:
    """Frequencies at which a curve changes its sign, by linear interpolation."""
    at = np.flatnonzero(np.sign(transfer[:-1]) * np.sign(transfer[1:]) < 0)
    share = transfer[at] / (transfer[at] - transfer[at + 1])
    zeros = k[at] + share * (k[at + 1] - k[at])
    return np.asarray(zeros[zeros < 0.98 * NYQUIST])


def zeros_of_theory(defocus_um: float) -> NDArray[np.float64]:
    """pi lambda dz s - pi Cs lambda^3 s^2 / 2 = n pi - asin A, solved for s = k²."""
    microscope = Microscope()
    wavelength = electron_wavelength(microscope.voltage_kv)
    half = 0.5 * microscope.spherical_aberration_mm * 1e7 * wavelength**3
    linear = wavelength * defocus_um * 1e4
    right = np.arange(1, 30) - np.arcsin(0.07) / np.pi
    squared = (linear - np.sqrt(linear**2 - 4 * half * right)) / (2 * half)
    k = np.sqrt(squared)
    return np.asarray(k[k < 0.98 * NYQUIST])


@pytest.mark.parametrize("defocus_um", [2.0, 4.0, 8.0])
def test_the_signal_has_the_zeros_of_theory(defocus_um: float) -> None:
    # Along the tilt axis every tilt records the same frequency.
    number = 512
    optics = make_optics(shape=(8, number, 8), defocus_um=defocus_um)
    k = np.arange(number // 2) / (number * VOXEL_SIZE)
    found = find_zeros(optics.signal[0, : number // 2, 0].numpy().astype(float), k)
    np.testing.assert_allclose(found, zeros_of_theory(defocus_um), rtol=2e-3)
    # Across it, between planes, only near them; on the plane of the untilted image again.
    untilted = TiltScheme(explicit=(0.0, 45.0))
    optics = make_optics(shape=(8, 8, number), tilts=untilted, defocus_um=defocus_um)
    found = find_zeros(optics.signal[0, 0, : number // 2].numpy().astype(float), k)
    np.testing.assert_allclose(found, zeros_of_theory(defocus_um), rtol=5e-3)


def test_astigmatism_moves_the_zeros_by_direction() -> None:
    number, tilts = 256, TiltScheme(explicit=(0.0, 60.0))
    k = np.arange(number // 2) / (number * VOXEL_SIZE)
    for angle, (along_x, along_y) in ((0.0, (4.5, 3.5)), (90.0, (3.5, 4.5))):
        microscope = Microscope(astigmatism_um=1.0, astigmatism_angle=angle)
        signal = make_optics(shape=(8, number, number), microscope=microscope, tilts=tilts).signal
        for row, defocus_um in ((signal[0, 0], along_x), (signal[0, :, 0], along_y)):
            found = find_zeros(row[: number // 2].numpy().astype(float), k)
            np.testing.assert_allclose(found, zeros_of_theory(defocus_um), rtol=2e-2)
    # An oblique angle tells the hand: larger defocus, more rings, where x and y have one sign.
    oblique = Microscope(astigmatism_um=2.0, astigmatism_angle=45.0)
    signal = make_optics(shape=(8, number, number), microscope=oblique, tilts=tilts).signal[0]
    same = torch.diagonal(signal[:128, :128])
    opposite = torch.diagonal(signal[1:].flip(0)[:127, 1:128])
    assert (same.diff().sign().diff() != 0).sum() > (opposite.diff().sign().diff() != 0).sum()


def test_each_tilt_takes_its_own_defocus() -> None:
    number, tilts = 256, TiltScheme(explicit=(-60.0, 0.0, 60.0))
    k = np.arange(number // 2) / (number * VOXEL_SIZE)
    shape = (8, 8, number)
    row = make_optics(shape=shape, tilts=tilts, defocus_um=(9.0, 3.0, 6.0)).signal[0, 0]
    found = find_zeros(row[: number // 2].numpy().astype(float), k)
    np.testing.assert_allclose(found, zeros_of_theory(3.0), rtol=5e-3)
    with pytest.raises(ValueError, match="2 defoci and 0 shifts for 3 tilts"):
        make_optics(tilts=tilts, defocus_um=(1.0, 2.0))


def test_a_common_shift_of_all_images_along_the_axis_shifts_the_tomogram() -> None:
    optics = make_optics(tilts=HARMLESS)
    shifted = make_optics(tilts=HARMLESS, shifts=((0.0, 2 * VOXEL_SIZE),) * 41)
    density = draw(5)
    moved, expected = (image(density, o)[0] for o in (shifted, optics))
    # The Nyquist frequency has no phase.
    assert torch.allclose(moved, expected.roll(2, 1), atol=1e-3 * float(expected.std()))


def test_a_shift_across_the_axis_moves_what_its_tilt_sees() -> None:
    tilts = TiltScheme(explicit=(0.0, 60.0))
    still = make_optics(tilts=tilts)
    moved = make_optics(tilts=tilts, shifts=((3 * VOXEL_SIZE, 0.0), (0.0, 0.0)))
    point = torch.zeros(SHAPE)
    point[16, 16, 16] = 1.0
    # The projection along z is the untilted image alone: the plane kz = 0.
    before, after = (image(point, optics)[0].sum(dim=0) for optics in (still, moved))
    torch.testing.assert_close(
        after, before.roll(3, 1), atol=2e-2 * float(before.abs().max()), rtol=0
    )


def test_misalignment_blurs_as_its_debye_waller_factor() -> None:
    # On average over shifts of sigma s the amplitude falls as exp(-2 pi² s² k²).
    sigma, generator = 8.0, np.random.default_rng(0)
    total = torch.zeros(())
    for _ in range(60):
        shifts = tuple((float(x), float(y)) for x, y in generator.normal(0, sigma, (41, 2)))
        total = total + make_optics(tilts=HARMLESS, shifts=shifts).signal
    still = make_optics(tilts=HARMLESS).signal
    ratio = (total / 60 / still)[0, :, 0].real.numpy()
    k = np.fft.fftfreq(SHAPE[1], VOXEL_SIZE)
    strong = np.abs(still[0, :, 0].numpy()) > 0.1 * np.abs(still[0, :, 0].numpy()).max()
    expected = np.exp(-2 * np.pi**2 * sigma**2 * k**2)
    np.testing.assert_allclose(ratio[strong], expected[strong], atol=0.04)


def test_the_detector_dims_the_signal_and_colours_the_noise() -> None:
    perfect, real = Microscope(mtf=1.0), Microscope(mtf=0.5, dqe=0.1)
    plain, seen = (make_optics(microscope=microscope) for microscope in (perfect, real))
    k_squared = np.fft.fftfreq(SHAPE[1], VOXEL_SIZE) ** 2
    ratio = (seen.signal / plain.signal)[0, :, 0].numpy()
    np.testing.assert_allclose(ratio, signal_transfer(k_squared, 0.05, real), rtol=1e-4)
    ratio = (seen.noise / plain.noise)[0, :, 0].numpy() ** 2
    np.testing.assert_allclose(ratio, (0.5**2 / 0.1) ** (k_squared / 0.05**2), rtol=1e-4)


def test_a_thicker_specimen_loses_signal_at_high_tilt() -> None:
    thin, thick = (
        make_optics(tilts=TiltScheme(explicit=(0.0, 60.0), thickness=thickness)).signal.abs()
        for thickness in (0.0, 3800.0)
    )
    kz, _, kx = (f[:, :, : SHAPE[2] // 2 + 1] for f in frequencies(SHAPE))
    at_sixty = (np.abs(kz * 0.5 + kx * np.sqrt(0.75)) < 1e-3) & (kx > 0.02)
    # At 60° the beam crosses twice the thickness, one mean free path more.
    assert float(thick[at_sixty].sum() / thin[at_sixty].sum()) == pytest.approx(
        np.exp(-1), rel=1e-3
    )
    assert float(thick[0, :, 10].sum() / thin[0, :, 10].sum()) == pytest.approx(1)


def test_unequal_steps_keep_the_specimen_as_strong() -> None:
    # Twice as many tilts on one side: the ramp counts each for half.
    sparse, dense = np.arange(-60.0, 0.0, 4.0), np.arange(0.0, 61.0, 2.0)
    tilts = TiltScheme(
        explicit=tuple(np.r_[sparse, dense].tolist()), dose_per_tilt=0.0, thickness=0.0
    )
    signal = make_optics(microscope=PERFECT, tilts=tilts, defocus_um=0.0).signal.numpy()
    kz, _, kx = (k[:, :, : SHAPE[2] // 2 + 1] for k in frequencies(SHAPE))
    radius, direction = np.hypot(kz, kx) * 320, np.rad2deg(np.arctan2(-kz, kx))
    inner = (radius > 3) & (radius < 10) & (np.abs(direction) < 50)
    for side in (direction > 5, direction < -5):
        assert signal[inner & side].mean() == pytest.approx(-1, abs=0.03)


# --- the edges of the field ----------------------------------------------------------------------


def test_what_wraps_around_the_field_does_not_reach_the_box() -> None:
    """Energy at the far edge of a 40³ box, target 12 voxels off its centre, as in a 3× larger.

    It is 0.1 % of the box's; that of the box alone, eight times as much.
    """

    def far_energy(number: int) -> float:
        centre = number // 2
        axes = [np.arange(number) - centre - offset for offset in (0, 0, 12)]
        blob = [np.exp(-(axis**2) / (2 * 1.5**2)) for axis in axes]
        density = torch.from_numpy(np.einsum("i,j,k->ijk", *blob).astype(np.float32))
        signal, _ = image(density, make_optics(shape=(number,) * 3))
        box = signal[tuple(slice(centre - 20, centre + 20) for _ in range(3))]
        return float((box[..., :8] ** 2).sum())

    apart = far_energy(120)
    assert 0.8 * apart < far_energy(64) < 1.3 * apart
    # What the field is there to prevent: in the box alone the target comes in again.
    assert far_energy(40) > 5 * apart


# --- devices and the cache -----------------------------------------------------------------------


@pytest.mark.parametrize("snr_stage", ["reconstruction", "projection", "aitom"])
def test_optics_and_image_stay_on_their_device(
    snr_stage: SnrStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a device other than the host would do: no tensor is made on, or moved to, the CPU."""
    optics = make_optics(shape=(16, 16, 16), snr_stage=snr_stage)
    density, generator = draw(0, (16, 16, 16)), torch.Generator().manual_seed(0)
    moved: list[str] = []
    for name in ("cpu", "numpy", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: moved.append(name))
    tomogram, measured = image_and_measure(density, optics, 1.0, generator, VOXEL_SIZE)
    assert not moved
    assert tomogram.device == density.device
    assert measured is not None
    on_meta = density.to("meta")
    assert power_spectrum(on_meta).device.type == "meta"


def test_optics_are_made_once_per_draw_and_kept_within_a_budget() -> None:
    first = make_optics(shape=(64, 64, 64))
    assert make_optics(shape=(64, 64, 64)) is first
    each = sum(tensor.nbytes for tensor in (first.signal, first.noise))
    for index in range(CACHED_BYTES // each + 1):
        make_optics(shape=(64, 64, 64), defocus_um=10.0 + index / 100)
    assert make_optics(shape=(64, 64, 64)) is not first


# --- noise ---------------------------------------------------------------------------------------


def test_premultiplied_noise_has_the_spectrum_of_the_ctf() -> None:
    plain, multiplied = make_optics(), make_optics(ctf_correction="premultiplied")
    k = np.fft.fftfreq(SHAPE[1], VOXEL_SIZE)
    transfer = np.abs(contrast_transfer(k**2, DEFOCUS_UM, Microscope()))
    # Along the tilt axis every tilt records the same frequency.
    ratio = multiplied.noise[0, :, 0] / plain.noise[0, :, 0]
    np.testing.assert_allclose(ratio, transfer, atol=1e-5)
    # Elsewhere a sample lies up to a slab's width from the plane whose CTF it takes.
    kz, ky, kx = (f[:, :, : SHAPE[2] // 2 + 1] for f in frequencies(SHAPE))
    seen = (plain.noise.numpy() > 0) & (np.abs(kz) <= np.tan(np.deg2rad(60)) * kx)
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
        generator = torch.Generator().manual_seed(seed + 100)
        _, reported = image_and_measure(density, optics, factor, generator, VOXEL_SIZE)
        assert reported is not None
        # It leaves out k = 0, which is little here.
        assert reported.reconstruction == pytest.approx(own, rel=1e-3)
        measured.append(reported.reconstruction)
    assert np.mean(measured) == pytest.approx(snr, rel=0.05)


def test_without_an_snr_there_is_no_noise() -> None:
    optics, density = make_optics(), draw(0)
    factor = noise_scale(power_spectrum(density), optics, None, width=SHAPE[2])
    _, noise = image(density, optics, factor)
    assert factor == 0
    assert not noise.any()


def test_the_same_generator_gives_the_same_noise() -> None:
    optics, density = make_optics(), draw(0)
    first, again, other = (image(density, optics, 1.0, seed)[1] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- stages of the SNR ---------------------------------------------------------------------------

Blobs = NDArray[np.float64]
BLOB_SIGMA = 1.2
"""Voxels."""


def scatter_blobs(seed: int) -> Blobs:
    """Centres (z, y, x) in voxels of some blobs about the centre of the field."""
    return np.random.default_rng(seed).uniform(-7, 7, (12, 3))


def render_blobs(blobs: Blobs) -> Tensor:
    axes = [np.arange(size) - size // 2 for size in SHAPE]
    rows = [
        np.exp(-((axis - blobs[:, [i]]) ** 2) / (2 * BLOB_SIGMA**2)) for i, axis in enumerate(axes)
    ]
    return torch.from_numpy(np.einsum("nz,ny,nx->zyx", *rows).astype(np.float32))


def project_blobs(blobs: Blobs, angle: float) -> NDArray[np.float64]:
    """Projection (y, x) of the blobs, exactly, along a beam tilted about y."""
    turned = blobs[:, 2] * np.cos(angle) - blobs[:, 0] * np.sin(angle)
    rows = [
        np.exp(-((np.arange(32) - 16 - centre[:, None]) ** 2) / (2 * BLOB_SIGMA**2))
        for centre in (blobs[:, 1], turned)
    ]
    return np.asarray(np.einsum("ny,nx->yx", *rows) * BLOB_SIGMA * np.sqrt(2 * np.pi))


NUM_FIELDS = 50


def expected_power() -> Tensor:
    return torch.stack(
        [power_spectrum(render_blobs(scatter_blobs(seed))) for seed in range(NUM_FIELDS)]
    ).mean(dim=0)


@pytest.mark.parametrize("noise_spectrum", ["white", "blue"])
@pytest.mark.parametrize("ctf_correction", ["none", "premultiplied"])
def test_snr_of_projections_is_that_of_the_tilt_images(
    noise_spectrum: Any, ctf_correction: CtfCorrection
) -> None:
    """Each tilt image is made by itself: exact projection, 2D filter, 2D noise."""
    microscope = Microscope(noise_spectrum=noise_spectrum)
    tilts = TiltScheme(step=10.0, dose_per_tilt=0.0, thickness=0.0)
    optics = make_optics(
        microscope=microscope,
        tilts=tilts,
        ctf_correction=ctf_correction,
        snr_stage="projection",
    )
    requested = 0.2
    factor = noise_scale(expected_power(), optics, requested, width=32)
    k = np.fft.fftfreq(32, VOXEL_SIZE)
    k_squared = k**2 + k[:, None] ** 2
    seen = contrast_transfer(k_squared, DEFOCUS_UM, microscope)
    seen *= signal_transfer(k_squared, NYQUIST, microscope)
    colour = np.ones(1) if noise_spectrum == "white" else 0.05 + k_squared / 0.05**2
    generator, literal, reported = np.random.default_rng(0), [], []
    for seed in range(NUM_FIELDS):
        blobs, images = scatter_blobs(seed), []
        for angle in np.deg2rad(tilts.angles):
            signal = np.fft.fft2(project_blobs(blobs, angle)) * seen
            # White noise of a volume's voxels, projected along 32 of them.
            white = generator.normal(0, factor * np.sqrt(32), (32, 32))
            noise = np.fft.fft2(white) * np.sqrt(colour)
            signal[0, 0] = noise[0, 0] = 0
            images.append((np.abs(signal) ** 2).sum() / (np.abs(noise) ** 2).sum())
        literal.append(np.mean(images))
        _, measured = image_and_measure(
            render_blobs(blobs), optics, factor, torch.Generator().manual_seed(seed), VOXEL_SIZE
        )
        assert measured is not None
        reported.append(measured.stage)
    assert np.mean(reported) == pytest.approx(requested, rel=0.05)
    assert np.mean(literal) == pytest.approx(requested, rel=0.05)
    assert np.corrcoef(literal, reported)[0, 1] > 0.9


def test_snr_of_aitom_is_that_of_noise_imaged_whole() -> None:
    """Step by step as aitom does: half of the noise before the CTF, half after, then the band."""
    plain, optics = make_optics(), make_optics(snr_stage="aitom")
    requested, k = 0.1, np.sqrt(sum(f**2 for f in frequencies(SHAPE))) * VOXEL_SIZE
    factor = noise_scale(expected_power(), optics, requested, width=32)
    low_pass = torch.from_numpy(np.exp(-((k / 0.2) ** 2)).astype(np.float32))
    wedge = torch.from_numpy(missing_wedge(SHAPE, TiltScheme()))
    band = torch.from_numpy(np.exp(-((np.maximum(k - 0.25, 0) * 32) ** 2)).astype(np.float32))
    reported, literal, powers = [], [], []
    for seed in range(NUM_FIELDS):
        density = render_blobs(scatter_blobs(seed))
        whole = image(factor * draw(seed), plain)[0]
        signal = image(density, plain)[0]
        literal.append(float(signal.var() / whole.var()))
        before = image(np.sqrt(0.5) * factor * draw(seed), plain)[0]
        after = torch.fft.fftn(np.sqrt(0.5) * factor * draw(seed + 1000)) * low_pass * ~wedge
        together = torch.fft.ifftn((torch.fft.fftn(before) + after) * band).real
        noise = image(density, optics, factor, seed)[1]
        powers.append((float(together.var()), float(noise.var())))
        _, measured = image_and_measure(
            density, optics, factor, torch.Generator().manual_seed(seed), VOXEL_SIZE
        )
        assert measured is not None
        reported.append(measured.stage)
    assert np.mean(literal) == pytest.approx(requested, rel=0.05)
    assert np.mean(reported) == pytest.approx(requested, rel=0.05)
    ours, theirs = np.mean(powers, axis=0)
    assert ours == pytest.approx(theirs, rel=0.1)
    # Beyond the band there is nothing.
    assert float(optics.signal.abs()[k[:, :, :17] > 0.34].max()) < 1e-3
    assert float(optics.noise[k[:, :, :17] > 0.34].max()) < 1e-3


def variance_up_to(frequency: float, volume: Tensor) -> float:
    """Of the voxels of a volume of no mean, low-passed; frequency in Å⁻¹."""
    kz, ky, kx = frequencies(tuple(volume.shape))
    spectrum = np.fft.fftn(volume.numpy().astype(np.float64))
    spectrum[np.sqrt(kz**2 + ky**2 + kx**2) > frequency] = 0
    return float(np.fft.ifftn(spectrum).real.var())


@pytest.mark.parametrize("snr_stage", ["reconstruction", "projection", "aitom"])
def test_the_tomogram_is_the_sum_of_its_parts_and_so_is_what_is_measured(
    snr_stage: SnrStage,
) -> None:
    for shape in (SHAPE, (15, 13, 17)):
        optics, density = make_optics(shape=shape, snr_stage=snr_stage), draw(3, shape)
        signal, noise = image(density, optics, 0.7, seed=9)
        generator = torch.Generator().manual_seed(9)
        tomogram, measured = image_and_measure(density, optics, 0.7, generator, VOXEL_SIZE)
        torch.testing.assert_close(tomogram, signal + noise, atol=1e-5, rtol=1e-5)
        assert measured is not None
        everywhere = np.inf
        own = [variance_up_to(k, signal) / variance_up_to(k, noise) for k in (everywhere, 1 / 60)]
        assert (measured.reconstruction, measured.low_passed) == pytest.approx(own, rel=1e-4)
        assert measured.noise_std == pytest.approx(variance_up_to(everywhere, noise) ** 0.5)
        if snr_stage == "reconstruction":
            assert measured.stage == pytest.approx(own[0], rel=1e-4)
        silent, nothing = image_and_measure(density, optics, 0.0, generator, VOXEL_SIZE)
        assert nothing is None
        torch.testing.assert_close(silent, signal, atol=1e-5, rtol=1e-5)


def test_noise_drawn_in_fourier_space_is_white_and_real() -> None:
    flat = Optics(torch.ones(8, 9, 6), torch.ones(8, 9, 6))
    nothing = torch.zeros(8, 9, 10)
    noises = torch.stack([image(nothing, flat, 1.0, seed)[1] for seed in range(200)])
    assert float(noises.mean()) == pytest.approx(0, abs=0.01)
    assert float(noises.var()) == pytest.approx(1, abs=0.02)
    power = (torch.fft.fftn(noises, dim=(1, 2, 3)).abs() ** 2).mean(dim=0) / 720
    # A mean over 200 of an exponential variable; of twice the variance where k = -k.
    assert float((power - 1).abs().max()) < 0.5
    assert float(power.std()) == pytest.approx(200**-0.5, rel=0.2)

"""The literal path, and the fast path held against it and against torch-fourier-slice."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch_ctf import calculate_ctf_2d
from torch_fourier_slice import backproject_2d_to_3d, project_3d_to_2d

from cectflow.model_card import CtfCorrection
from cectflow.simulation.beads import coarse_grain, render_field
from cectflow.simulation.imaging import image_field
from cectflow.simulation.microscope import (
    Microscope,
    OpticsDraw,
    TiltScheme,
    dose_filter,
    draw_optics,
)
from cectflow.simulation.optics import optics_of
from cectflow.simulation.scene import pack_scene
from cectflow.simulation.structure import StructureSource, load_structure
from cectflow.simulation.tilt_series import (
    TiltSeries,
    back_project,
    detector_width,
    project_field,
    projection_noise,
    record_tilt_series,
)

VOXEL_SIZE = 10.0
DEFOCUS_UM = 4.0
SHAPE = (64, 64, 64)
SHELLS = np.arange(0.0, 0.26, 0.05)
MICROSCOPE = Microscope(spherical_aberration_mm=2.7)
TILTS = TiltScheme()
# Nothing is lost in this one: no aberration, no damage, no inelastic scattering, a flat detector.
PERFECT = Microscope(spherical_aberration_mm=0.0, amplitude_contrast=0.999, defocus_um=0.0, mtf=1.0)
HARMLESS = TiltScheme(dose_per_tilt=0.0, thickness=0.0)

Field = NDArray[np.float32]


@cache
def crowded_field(shape: tuple[int, int, int] = SHAPE) -> Field:
    names = ("rod", "ring", "barrel")
    structures = [load_structure(StructureSource(name, None, "builtin")) for name in names]
    beads = tuple(coarse_grain(structure) for structure in structures)
    scene = pack_scene(
        beads, shape=shape, voxel_size=VOXEL_SIZE, occupancy=0.1,
        generator=np.random.default_rng(0),
    )  # fmt: skip
    density, _ = render_field(
        beads, scene.class_ids, scene.positions_zyx, scene.angles, shape=shape,
        voxel_size=VOXEL_SIZE, sigma=7.0, thresholds=np.full(3, np.inf),
    )  # fmt: skip
    return density


def drawn(
    microscope: Microscope, tilts: TiltScheme, defocus_um: float, seed: int = 0
) -> OpticsDraw:
    microscope = microscope.model_copy(update={"defocus_um": defocus_um})
    return draw_optics(microscope, tilts, np.random.default_rng(seed))


def record(
    density: Field,
    *,
    microscope: Microscope = MICROSCOPE,
    tilts: TiltScheme = TILTS,
    defocus_um: float = DEFOCUS_UM,
    ctf_correction: CtfCorrection = "none",
    noise_factor: float = 0.0,
    seed: int = 0,
) -> TiltSeries:
    return record_tilt_series(
        density, VOXEL_SIZE, drawn(microscope, tilts, defocus_um), ctf_correction, noise_factor,
        np.random.default_rng(seed),
    )  # fmt: skip


def fast(
    density: Field,
    *,
    microscope: Microscope = MICROSCOPE,
    tilts: TiltScheme = TILTS,
    defocus_um: float = DEFOCUS_UM,
    ctf_correction: CtfCorrection = "none",
) -> Field:
    draw = drawn(microscope, tilts, defocus_um)
    optics = optics_of(
        tuple(density.shape), VOXEL_SIZE, draw.microscope, draw.tilts, draw.defoci_um,
        ctf_correction, shifts=draw.shifts,
    )  # fmt: skip
    signal, _ = image_field(torch.from_numpy(density), optics, 0.0, torch.Generator())
    return np.asarray(signal.numpy(), np.float32)


def blob(
    centre: tuple[float, float, float], shape: tuple[int, int, int] = SHAPE, sigma: float = 1.0
) -> Field:
    """Gaussian about a place counted in voxels from the centre voxel."""
    grid = np.indices(shape) - np.reshape([n // 2 for n in shape], (3, 1, 1, 1))
    squares = ((grid - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(axis=0)
    return np.exp(-squares / (2 * sigma**2)).astype(np.float32)


def radii(shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Cycles per voxel over the full spectrum."""
    squares = np.meshgrid(*[np.fft.fftfreq(n) ** 2 for n in shape], indexing="ij")
    return np.asarray(np.sqrt(sum(squares)))


def shell_correlation(first: Field, second: Field) -> tuple[Float[NDArray, " shell"], ...]:
    """FSC, and amplitude of the first over the second, by shells below 0.25; k = 0 left out."""
    k = radii(first.shape)
    a, b = (np.fft.fftn(volume.astype(np.float64)) for volume in (first, second))
    correlation, ratio = [], []
    for low, high in pairwise(SHELLS):
        inside = (k > low) & (k <= high)
        powers = [float((np.abs(f[inside]) ** 2).sum()) for f in (a, b)]
        cross = float((a[inside] * b[inside].conj()).sum().real)
        correlation.append(cross / np.sqrt(powers[0] * powers[1]))
        ratio.append(np.sqrt(powers[0] / powers[1]))
    return np.array(correlation), np.array(ratio)


def brightest(volume: Field) -> NDArray[np.int64]:
    """Place of the largest value, counted from the centre voxel."""
    place = np.unravel_index(int(np.argmax(volume)), volume.shape)
    return np.array(place) - np.array([n // 2 for n in volume.shape])


# --- the projections themselves -------------------------------------------------------------------


@pytest.mark.parametrize("tilt", [-60.0, -35.0, 0.0, 20.0, 45.0, 60.0])
def test_a_gaussian_is_projected_to_where_and_what_theory_says(tilt: float) -> None:
    centre = (5.3, -7.7, 9.1)
    # Wide enough along x that no repetition of the field falls on the detector.
    density = blob(centre, (48, 32, 192))
    image = project_field(density, np.array([tilt]), 48)[0]
    turned = centre[2] * np.cos(np.deg2rad(tilt)) - centre[0] * np.sin(np.deg2rad(tilt))
    y, u = np.arange(32) - 16, np.arange(48) - 24
    squares = (y[:, None] - centre[1]) ** 2 + (u[None, :] - turned) ** 2
    np.testing.assert_allclose(image, np.sqrt(2 * np.pi) * np.exp(-squares / 2), atol=0.01)


def test_the_field_repeats_along_x_so_that_no_ray_misses_it() -> None:
    ones = np.ones((16, 8, 24), np.float32)
    for tilt in (0.0, 30.0, -60.0):
        image = project_field(ones, np.array([tilt]), 128)
        # The path through a slab of 16 voxels, at every pixel alike but for the steps of one voxel.
        path = 16 / np.cos(np.deg2rad(tilt))
        assert float(image.mean()) == pytest.approx(path, rel=0.01)
        np.testing.assert_allclose(image, path, rtol=0.08)


def test_the_period_shrinks_with_the_cosine() -> None:
    density = crowded_field((32, 32, 32))
    image = project_field(density, np.array([60.0]), 96)[0]
    np.testing.assert_allclose(image[:, :80], image[:, 16:], atol=2e-3 * float(image.max()))


def test_the_tilts_agree_with_torch_fourier_slice() -> None:
    _, wide = isolated()
    ours = project_field(wide, TILTS.angles[::5], SHAPE[2])
    for image, oracle in zip(ours, oracle_projections()[::5], strict=True):
        assert np.corrcoef(image.ravel(), oracle.ravel())[0, 1] > 0.999


# --- geometry of the reconstruction ---------------------------------------------------------------


@pytest.mark.parametrize("place", [(6, -9, 11), (-8, 4, 5), (0, 0, 0)])
@pytest.mark.parametrize("shape", [(32, 48, 48), (33, 41, 47)])
def test_a_point_is_reconstructed_dark_and_at_its_place(
    place: tuple[int, int, int], shape: tuple[int, int, int]
) -> None:
    density = blob(place, shape)
    series = record(density, microscope=PERFECT, tilts=HARMLESS, defocus_um=0.0)
    volume = back_project(series, shape)
    np.testing.assert_array_equal(brightest(-volume), place)
    np.testing.assert_array_equal(
        brightest(-fast(density, microscope=PERFECT, tilts=HARMLESS, defocus_um=0.0)), place
    )


def test_an_object_without_symmetry_tells_the_sign_of_the_tilt_axis() -> None:
    # A wedge that is open on one side, and a body that lies off the axis.
    tilts = TiltScheme(lowest=-20.0, highest=60.0)
    shape = (48, 24, 48)
    density = (
        blob((7, 2, 9), shape) + 0.6 * blob((-5, -3, 12), shape) + 0.8 * blob((3, 5, -8), shape)
    )
    series = record(density, tilts=tilts)
    volume, quick = back_project(series, shape), fast(density, tilts=tilts)
    turned = TiltSeries(series.projections, -series.angles, VOXEL_SIZE)
    mirrored = back_project(turned, shape)
    assert np.corrcoef(volume.ravel(), quick.ravel())[0, 1] > 0.95
    # With the sign turned over it is the specimen's mirror image, wedge and all.
    assert np.corrcoef(mirrored.ravel(), quick.ravel())[0, 1] < 0.6
    np.testing.assert_array_equal(brightest(-volume), (7, 2, 9))
    assert brightest(-mirrored)[0] == -7


def test_a_smaller_volume_is_the_middle_of_a_larger_one() -> None:
    shape = (24, 32, 40)
    series = record(crowded_field((32, 32, 48)), tilts=TiltScheme(step=10.0))
    whole, middle = back_project(series, (32, 32, 48)), back_project(series, shape)
    np.testing.assert_allclose(middle, whole[4:28, :, 4:44], atol=1e-5)


def test_a_volume_that_the_projections_do_not_cover_is_refused() -> None:
    series = TiltSeries(np.zeros((2, 16, 40), np.float32), np.array([0.0, 3.0]), VOXEL_SIZE)
    with pytest.raises(ValueError, match="needs projections of at least 20 x"):
        back_project(series, (8, 20, 8))
    with pytest.raises(ValueError, match="needs projections of at least 16 x 5"):
        back_project(series, (32, 16, 32))


def test_the_detector_grows_with_the_defocus() -> None:
    near, far = (detector_width(SHAPE, 4.0, drawn(MICROSCOPE, TILTS, d)) for d in (1.0, 8.0))
    assert far - near == pytest.approx(2 * 0.0197 * 7e4 / 8 / 4, abs=4)


# --- fast path against literal path ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("ctf_correction", "shape"),
    [
        ("none", SHAPE),
        ("premultiplied", SHAPE),
        ("phase_flip", (40, 40, 40)),
        ("wiener", (40, 40, 40)),
        ("none", (32, 40, 64)),
        ("none", (20, 32, 120)),
    ],
)
def test_the_fast_path_is_the_literal_one(
    ctf_correction: CtfCorrection, shape: tuple[int, int, int]
) -> None:
    density = crowded_field(shape)
    quick = fast(density, ctf_correction=ctf_correction)
    literal = back_project(record(density, ctf_correction=ctf_correction), shape)
    correlation, ratio = shell_correlation(quick, literal)
    # Over the whole periodic field, the faces that cut particles in two included.
    assert correlation.min() >= 0.97, correlation
    # At the lowest frequencies the faces tell, the more the thinner the field.
    np.testing.assert_allclose(ratio[1:], 1.0, atol=0.06)
    assert ratio[0] == pytest.approx(1.0, abs=0.17)
    for volume in (quick, literal):
        assert np.corrcoef(volume.ravel(), density.ravel())[0, 1] < -0.3, "protein is dark"


def test_the_fast_path_is_the_literal_one_with_all_that_a_microscope_does() -> None:
    microscope = Microscope(
        defocus_spread_um=0.8, astigmatism_um=2.0, astigmatism_angle=30.0, mtf=0.5, dqe=0.4
    )
    tilts = TiltScheme(lowest=-48.0, highest=60.0, order="bidirectional", alignment_jitter=1.5)
    density = crowded_field()
    quick = fast(density, microscope=microscope, tilts=tilts)
    literal = back_project(record(density, microscope=microscope, tilts=tilts), SHAPE)
    correlation, ratio = shell_correlation(quick, literal)
    assert correlation.min() >= 0.97, correlation
    np.testing.assert_allclose(ratio, 1.0, atol=0.12)
    # A larger misalignment (6 Å: 0.90 at 0.25) no single filter can describe: where neighbouring
    # tilts' phases differ at random, what leaks from one sample to the next is not averaged away.
    # Each of them tells: without it the two differ.
    for without in ("defocus_spread_um", "astigmatism_um"):
        other = fast(density, microscope=microscope.model_copy(update={without: 0.0}), tilts=tilts)
        assert shell_correlation(other, literal)[0][-1] < correlation[-1] - 0.001, without
    still = tilts.model_copy(update={"alignment_jitter": 0.0})
    other = fast(density, microscope=microscope, tilts=still)
    assert shell_correlation(other, literal)[0][-1] < correlation[-1] - 0.001


def test_the_wedge_of_both_is_empty() -> None:
    # A specimen that ends within the field, so that no cut at its faces spreads into the wedge.
    density = crowded_field() * ball(26.0, 6.0)
    kz, kx = np.fft.fftfreq(64)[:, None, None], np.fft.fftfreq(64)[None, None, :]
    direction = np.rad2deg(np.arctan2(np.abs(kz), np.abs(kx)))
    wedge = np.broadcast_to((direction > 60 + 1e-6) & (np.hypot(kz, kx) < 0.5), SHAPE)
    assert wedge.mean() > 0.2
    whole = back_project(record(density), SHAPE)
    for volume in (whole, fast(density)):
        power = np.abs(np.fft.fftn(volume.astype(np.float64))) ** 2
        power[0, 0, 0] = 0.0
        assert power[wedge].sum() < 0.01 * power.sum()


def test_both_agree_with_torch_fourier_slice_and_torch_ctf() -> None:
    _, wide = isolated()
    reconstruction = back_project(record(wide), SHAPE)
    quick = fast(wide)[:, :, 96:-96]
    oracle = oracle_reconstruction()
    for volume in (quick, reconstruction):
        # Weights differ (torch-fourier-slice divides by the number of slices), so only the FSC.
        correlation, _ = shell_correlation(volume, oracle)
        assert correlation.min() >= 0.97, correlation
    # Where no face cuts anything, the two paths are one.
    correlation, ratio = shell_correlation(quick, reconstruction)
    assert correlation.min() >= 0.999, correlation
    np.testing.assert_allclose(ratio, 1.0, atol=0.02)


# --- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, (20, 64, 120)])
def test_the_fast_noise_has_the_spectrum_of_back_projected_noise(
    shape: tuple[int, int, int],
) -> None:
    width = detector_width(shape, VOXEL_SIZE, drawn(MICROSCOPE, TILTS, DEFOCUS_UM))
    generator = np.random.default_rng(0)
    power = np.zeros((shape[0], shape[1], shape[2] // 2 + 1))
    for _ in range(3):
        white = generator.standard_normal((TILTS.angles.size, shape[1], width)).astype(np.float32)
        volume = back_project(TiltSeries(white, TILTS.angles, VOXEL_SIZE), shape)
        power += np.abs(np.fft.rfftn(volume)) ** 2
    optics = optics_of(shape, VOXEL_SIZE, MICROSCOPE, TILTS, DEFOCUS_UM, "none")
    kz, kx = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[2])[None, :]
    # Averaged along the tilt axis, over which white noise does not change.
    inside = (np.hypot(kz, kx) < 0.5) & (kx > 0)
    maps = [m.mean(axis=1)[inside] for m in (optics.noise.numpy() ** 2, power)]
    assert np.corrcoef(maps[0], maps[1])[0, 1] >= 0.94


@pytest.mark.parametrize("ctf_correction", ["none", "phase_flip", "premultiplied", "wiener"])
def test_the_noise_has_the_variance_asked_for(ctf_correction: CtfCorrection) -> None:
    spectrum = "blue" if ctf_correction == "premultiplied" else "white"
    microscope = MICROSCOPE.model_copy(update={"noise_spectrum": spectrum})
    shape, tilts = (32, 32, 32), TiltScheme(step=6.0)
    draw = drawn(microscope, tilts, DEFOCUS_UM)
    factor = projection_noise(4.0, VOXEL_SIZE, draw, ctf_correction)
    variances = []
    for seed in range(2):
        series = record(
            np.zeros(shape, np.float32), microscope=microscope, tilts=tilts,
            ctf_correction=ctf_correction, noise_factor=factor, seed=seed,
        )  # fmt: skip
        variances.append(float(back_project(series, shape).var()))
    assert np.mean(variances) == pytest.approx(4.0, rel=0.05)


def test_the_same_generator_gives_the_same_series() -> None:
    density, tilts = crowded_field((32, 32, 32)), TiltScheme(step=30.0)
    first, again, other = (
        record(density, tilts=tilts, noise_factor=1.0, seed=seed).projections for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


# --- the oracle -----------------------------------------------------------------------------------


def ball(radius: float, edge: float) -> Field:
    """1 inside a radius about the centre voxel, 0 outside, with a soft edge within it."""
    grid = np.indices(SHAPE) - 32
    inside = np.clip((radius - np.sqrt((grid**2).sum(axis=0))) / edge, 0, 1)
    return np.asarray(0.5 - 0.5 * np.cos(np.pi * inside), np.float32)


@cache
def isolated() -> tuple[Field, Field]:
    """A crowd that ends within the field, in a cube and in a field so wide that it stands alone."""
    alone = np.asarray(crowded_field() * ball(28.0, 6.0), np.float32)
    return alone, np.pad(alone, ((0, 0), (0, 0), (96, 96)))


def rotations() -> torch.Tensor:
    """Matrices from the detector's x y z to the specimen's, as torch-fourier-slice takes them."""
    t = np.deg2rad(TILTS.angles)
    zero, one = np.zeros_like(t), np.ones_like(t)
    rows = [[np.cos(t), zero, np.sin(t)], [zero, one, zero], [-np.sin(t), zero, np.cos(t)]]
    return torch.from_numpy(np.array(rows).transpose(2, 0, 1).astype(np.float32))


@cache
def oracle_projections() -> Field:
    images = project_3d_to_2d(torch.from_numpy(isolated()[0]), rotations(), pad_factor=2.0)
    return np.asarray(images.numpy(), np.float32)


def oracle_reconstruction() -> Field:
    """Isolated crowd by libraries alone; dose, inelastic loss and MTF from their definitions."""
    transfer = calculate_ctf_2d(
        defocus=DEFOCUS_UM, astigmatism=0.0, astigmatism_angle=0.0, voltage=300.0,
        spherical_aberration=2.7, amplitude_contrast=0.07, phase_shift=0.0,
        pixel_size=VOXEL_SIZE, image_shape=(64, 64), rfft=True, fftshift=False,
    ).numpy()  # fmt: skip
    k_squared = np.fft.fftfreq(64, 10.0)[:, None] ** 2 + np.fft.rfftfreq(64, 10.0)[None, :] ** 2
    recorded = []
    tilts = zip(oracle_projections(), TILTS.angles, TILTS.exposures, strict=True)
    for image, angle, exposure in tilts:
        lost = np.exp(-1500.0 * (1 / np.cos(np.deg2rad(angle)) - 1) / 3800.0)
        kept = lost * dose_filter(k_squared, float(exposure)) * 0.6 ** (k_squared * 20.0**2)
        recorded.append(np.fft.irfft2(-transfer * kept * np.fft.rfft2(image), s=(64, 64)))
    images = torch.from_numpy(np.array(recorded, np.float32))
    return np.asarray(backproject_2d_to_3d(images, rotations(), pad_factor=2.0).numpy())

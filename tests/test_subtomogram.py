"""Cubes hold the right voxels, and rescaling keeps what it can hold and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cectflow.subtomogram import (
    are_finite,
    cut,
    flip_contrast,
    inside,
    normalise,
    rescale,
    robust_statistics,
    to_float32,
)
from cectflow.volume import read_stack, read_volume


def blob(num: int, voxel_size: float, sigma: float, offset_zyx: np.ndarray) -> np.ndarray:
    """Gaussian about the centre voxel plus an offset; all lengths in angstrom."""
    axis = (np.arange(num) - num // 2) * voxel_size
    grids = np.meshgrid(axis, axis, axis, indexing="ij")
    squared = sum((grid - c) ** 2 for grid, c in zip(grids, offset_zyx, strict=True))
    return np.exp(-squared / (2 * sigma**2)).astype(np.float32)[None]


@pytest.mark.parametrize("box", [1, 4, 5])
@pytest.mark.parametrize("periodic", [True, False])
def test_the_nearest_voxel_lands_at_half_the_box(box: int, periodic: bool) -> None:
    volume = np.arange(11 * 12 * 13, dtype=np.int16).reshape(11, 12, 13)
    centres = np.array([[5.4, 6.0, 6.5], [4.6, 5.2, 7.0]])
    cubes = cut(volume, centres, box, periodic=periodic)
    assert cubes.shape == (2, box, box, box)
    assert cubes.dtype == np.int16
    half = box // 2
    assert cubes[0, half, half, half] == volume[5, 6, 7]
    assert cubes[1, half, half, half] == volume[5, 5, 7]
    assert cubes[0, 0, 0, 0] == volume[5 - half, 6 - half, 7 - half]


@settings(max_examples=25, deadline=None)
@given(
    centre=st.tuples(*[st.integers(-20, 20)] * 3),
    box=st.integers(1, 6),
)
def test_a_periodic_cube_is_the_rolled_volume(centre: tuple[int, int, int], box: int) -> None:
    volume = np.arange(6 * 7 * 8).reshape(6, 7, 8)
    cube = cut(volume, np.array([centre]), box, periodic=True)[0]
    rolled = np.roll(volume, [box // 2 - c for c in centre], axis=(0, 1, 2))
    np.testing.assert_array_equal(cube, rolled[:box, :box, :box])


def test_missing_voxels_take_the_mean_of_the_cube_or_the_fill() -> None:
    volume = np.full((6, 6, 6), 2.0, np.float32)
    volume[0] = 4.0
    centres = np.array([[0.0, 3.0, 3.0]])
    cube = cut(volume, centres, 4, periodic=False)[0]
    np.testing.assert_array_equal(cube[:2], 3.0)
    np.testing.assert_array_equal(cube[2:], volume[:2, 1:5, 1:5])
    labels = cut((volume > 3).astype(np.int8), centres, 4, periodic=False, fill=0)[0]
    assert not labels[:2].any()
    assert labels[2].all()


def test_inside_tells_the_cubes_that_are_complete() -> None:
    centres = np.array([[2, 2, 2], [1, 2, 2], [4, 4, 4], [4, 4, 5], [2.4, 1.5, 2]])
    complete = inside(centres, (6, 6, 6), 4)
    assert complete.tolist() == [True, False, True, False, True]


def test_cut_refuses_boxes_and_centres_that_make_no_sense() -> None:
    volume = np.zeros((6, 6, 6), np.float32)
    with pytest.raises(ValueError, match=r"box of 7 cannot be cut.*\(6, 6, 6\)"):
        cut(volume, np.zeros((1, 3)), 7, periodic=True)
    with pytest.raises(ValueError, match="box of 0"):
        cut(volume, np.zeros((1, 3)), 0, periodic=False)
    with pytest.raises(ValueError, match=r"cube of row 1.*no voxel inside"):
        cut(volume, np.array([[3, 3, 3], [30, 3, 3]]), 4, periodic=False)
    assert cut(volume, np.zeros((0, 3)), 4, periodic=False).shape == (0, 4, 4, 4)


def test_cubes_are_cut_from_a_memory_mapped_real_tomogram(shared_data: Path) -> None:
    with pytest.warns(UserWarning, match="map string"):
        volume = read_volume(shared_data / "real" / "rec3D.rec")
    cubes = cut(volume.data, np.array([[40, 30, 16], [0, 0, 0]]), 16, periodic=False)
    np.testing.assert_array_equal(cubes[0], volume.data[32:48, 22:38, 8:24])
    assert abs(float(cubes[1].mean()) - float(volume.data[:8, :8, :8].mean())) < 0.5


def test_flipping_twice_is_the_identity_and_integers_do_not_wrap() -> None:
    cubes = np.array([-128, 0, 5], np.int8).reshape(3, 1, 1, 1)
    np.testing.assert_array_equal(flip_contrast(cubes).ravel(), [128, 0, -5])
    assert flip_contrast(np.ones((1, 1, 1, 1), np.float16)).dtype == np.float16
    np.testing.assert_array_equal(flip_contrast(flip_contrast(cubes)), cubes)


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8"])
def test_normalised_cubes_have_zero_mean_and_unit_variance(dtype: str) -> None:
    generator = np.random.default_rng(1)
    cubes = (generator.normal(100, 9, (3, 8, 8, 8))).astype(dtype)
    result = normalise(cubes)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result.mean(axis=(1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(result.std(axis=(1, 2, 3)), 1, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567])
def test_a_constant_cube_normalises_to_zeros(value: float) -> None:
    assert not normalise(np.full((1, 5, 5, 5), value, np.float32)).any()


def test_robust_statistics_are_those_of_normal_noise_and_do_not_see_a_few_gold_beads() -> None:
    generator = np.random.default_rng(0)
    noise = generator.normal(7.0, 2.0, (48, 48, 48)).astype(np.float32)
    median, deviation = robust_statistics(noise)
    assert median == pytest.approx(7.0, abs=0.02)
    assert deviation == pytest.approx(2.0, rel=0.01)
    noise[:5, :10, :10] = -500.0  # 0.5 % of the voxels; the standard deviation becomes 35
    with_gold = robust_statistics(noise)
    assert with_gold == pytest.approx((median, deviation), rel=0.02)


def test_robust_statistics_of_a_constant_have_no_deviation() -> None:
    assert robust_statistics(np.full((4, 4, 4), 3, np.int8)) == (3.0, 0.0)


def test_real_cubes_are_normalised_already(shared_data: Path) -> None:
    cubes, _ = read_stack(shared_data / "real" / "ribosome_70s" / "ribosome_70s.mrcs")
    np.testing.assert_allclose(normalise(cubes), cubes, atol=2e-3)


@pytest.mark.parametrize(
    ("num", "voxel_size", "target", "box"),
    [
        (48, 10.0, 13.7, 32),
        (48, 10.0, 13.7, 33),
        (47, 10.0, 12.0, 32),
        (32, 13.33, 10.0, 40),
        (33, 13.33, 10.0, 41),
        (40, 10.0, 10.0, 32),
    ],
)
def test_a_blob_stays_the_same_blob(num: int, voxel_size: float, target: float, box: int) -> None:
    offset = np.array([7.0, -13.0, 21.0])
    sigma = 1.2 * max(voxel_size, target)
    result = rescale(blob(num, voxel_size, sigma, offset), voxel_size, target, box)
    np.testing.assert_allclose(result, blob(box, target, sigma, offset), atol=2e-3)


@settings(max_examples=20, deadline=None)
@given(
    num=st.integers(12, 20),
    ratio=st.floats(0.6, 1.7),
    value=st.floats(-100, 100, width=32),
)
def test_a_constant_stays_constant(num: int, ratio: float, value: float) -> None:
    cubes = np.full((1, num, num, num), value, np.float32)
    box = int(num / ratio)
    result = rescale(cubes, 10.0, 10.0 * ratio, box)
    assert result.shape == (1, box, box, box)
    np.testing.assert_allclose(result, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num", [20, 21])
@pytest.mark.parametrize("target", [8.3, 12.9])
def test_the_centre_voxel_stays_the_centre(num: int, target: float) -> None:
    result = rescale(blob(num, 10.0, 18.0, np.zeros(3)), 10.0, target, 15)[0]
    assert np.unravel_index(result.argmax(), result.shape) == (7, 7, 7)
    assert result.max() == pytest.approx(1, abs=2e-3)
    # Voxel 7 of 15 is the middle: what is symmetric stays so.
    np.testing.assert_allclose(result, result[::-1, ::-1, ::-1], atol=1e-5)


def test_the_same_voxel_size_crops_exactly() -> None:
    cubes = np.random.default_rng(2).normal(size=(2, 9, 9, 9)).astype(np.float32)
    np.testing.assert_array_equal(rescale(cubes, 10.0, 10.0002, 4), cubes[:, 2:6, 2:6, 2:6])
    np.testing.assert_array_equal(rescale(cubes, 10.0, 10.0, 9), cubes)


def test_halving_the_sampling_is_fourier_cropping() -> None:
    num, box = 24, 12
    cubes = np.random.default_rng(3).normal(size=(1, num, num, num)).astype(np.float32)
    spectrum = np.fft.fftshift(np.fft.fftn(cubes[0]))[6:18, 6:18, 6:18]
    # A Nyquist plane is shared between both signs: compare without it.
    spectrum[0], spectrum[:, 0], spectrum[:, :, 0] = 0, 0, 0
    result = np.fft.fftshift(np.fft.fftn(rescale(cubes, 5.0, 10.0, box)[0])) * (num / box) ** 3
    result[0], result[:, 0], result[:, :, 0] = 0, 0, 0
    np.testing.assert_allclose(result, spectrum, atol=1e-2)


def test_nothing_above_the_new_nyquist_frequency_is_left() -> None:
    x = np.arange(40)
    wave = np.cos(2 * np.pi * 14 / 40 * x)  # period 2.86 voxels, below 2 voxels of the target
    cubes = np.broadcast_to(wave, (1, 40, 40, 40)).astype(np.float32)
    assert np.abs(rescale(cubes, 10.0, 15.0, 26)).max() < 1e-4
    assert np.abs(rescale(cubes, 10.0, 13.0, 30)).max() > 0.9


def test_refining_and_coarsening_again_is_the_identity() -> None:
    cubes = np.random.default_rng(4).normal(size=(1, 15, 15, 15)).astype(np.float32)
    fine = rescale(cubes, 10.0, 5.0, 30)
    # Voxel 15 of 30 and voxel 7 of 15 are the centres, and every second voxel is an old one.
    np.testing.assert_allclose(fine[0, 1::2, 1::2, 1::2], cubes[0], atol=1e-4)


def test_a_box_beyond_the_cube_is_refused_with_the_numbers() -> None:
    cubes = np.zeros((1, 32, 32, 32), np.float32)
    with pytest.raises(ValueError, match=r"box of 40 .* 480 angstrom.*32 voxels.*320.*at least 48"):
        rescale(cubes, 10.0, 12.0, 40)
    assert rescale(cubes, 10.0, 10.1, 32).shape == (1, 32, 32, 32)
    with pytest.raises(ValueError, match="positive"):
        rescale(cubes, 10.0, 0.0, 32)


def test_float16_becomes_what_numpy_makes_of_it() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    found = to_float32(finite)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), finite.astype(np.float32).view(np.uint32))
    for extreme in (np.inf, -np.inf, np.nan):
        values = np.array([1.0, extreme, -2.0], np.float16)
        np.testing.assert_array_equal(to_float32(values), values.astype(np.float32))
    np.testing.assert_array_equal(
        to_float32(finite[:100].reshape(10, 10)[:, ::2])[1], found[10:20:2]
    )
    np.testing.assert_array_equal(to_float32(np.arange(5, dtype=np.int8)), np.arange(5.0))


def test_one_value_that_is_not_finite_is_found_and_large_ones_are_not() -> None:
    cubes = np.zeros((5, 4, 4, 4), np.float32)
    cubes[0] = np.finfo(np.float32).max  # their sum is not finite
    cubes[1, 3, 3, 3] = np.nan
    cubes[2, 0, 0, 0] = np.inf
    cubes[3, 0, 0, :2] = np.inf, -np.inf
    np.testing.assert_array_equal(are_finite(cubes), [True, False, False, False, True])
    assert are_finite(np.zeros((2, 3, 3, 3), np.int16)).all()


def test_cubes_of_a_float16_volume_are_the_same_in_float32() -> None:
    volume = np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float16)
    centres = np.array([[10.0, 10, 10], [2, 10, 18]])
    found = cut(volume, centres, 8, periodic=False, dtype=np.float32)
    expected = cut(volume.astype(np.float32), centres, 8, periodic=False)
    np.testing.assert_array_equal(found, expected)

"""Power per shell, and the filter that brings one cube's spectrum to another's."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cectflow.spectrum import (
    LARGEST_GAIN,
    PowerSum,
    apply_gain,
    gain_at,
    num_shells,
    shell_numbers,
)


def noise(number: int, box: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(number, box, box, box)).astype(np.float32)


def power_of(cubes: np.ndarray) -> PowerSum:
    total = PowerSum(cubes.shape[-1])
    total.add(cubes)
    return total


@pytest.mark.parametrize("box", [15, 16])
def test_power_is_that_of_the_full_spectrum(box: int) -> None:
    cubes = noise(3, box) * 4.0 + 7.0
    normal = (cubes - cubes.mean((1, 2, 3), keepdims=True)) / cubes.std((1, 2, 3), keepdims=True)
    full = (np.abs(np.fft.fftn(normal, axes=(1, 2, 3))) ** 2).mean(axis=0) / box**3
    numbers = shell_numbers(box).ravel()
    expected = np.bincount(numbers, full.ravel()) / np.bincount(numbers)
    found = power_of(cubes).power
    assert found[0] == 0.0
    np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-4)
    # Parseval: unit variance is a mean power of one.
    counts = np.bincount(numbers)
    assert (found * counts).sum() / (counts.sum()) == pytest.approx(1.0, rel=1e-4)


def test_batches_and_channels_make_no_difference() -> None:
    cubes = noise(5, 12)
    total = PowerSum(12)
    total.add(cubes[:2, None])
    total.add(cubes[2:])
    np.testing.assert_array_equal(total.power, power_of(cubes).power)


def test_what_is_constant_has_no_spectrum() -> None:
    total = PowerSum(8)
    total.add(np.ones((2, 8, 8, 8), np.float32))
    with pytest.raises(ValueError, match="expected at least one"):
        _ = total.power
    total.add(noise(1, 8))
    assert total.num_cubes == 1


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.integers(8, 17), st.integers(0, 99))
def test_filtered_cubes_have_the_power_that_was_wanted(box: int, seed: int) -> None:
    cubes = noise(4, box, seed)
    shells = shell_numbers(box).max() + 1
    wanted = np.random.default_rng(seed).uniform(0.2, 5.0, shells)
    filtered = apply_gain(cubes, power_of(cubes).gain_to(wanted))
    # Before and after: over cubes as they are, which no normalisation has scaled.
    found = sum(np.abs(np.fft.fftn(cube / cubes[k].std())) ** 2 for k, cube in enumerate(filtered))
    numbers = shell_numbers(box).ravel()
    power = np.bincount(numbers, found.ravel()) / np.bincount(numbers) / (4 * box**3)
    np.testing.assert_allclose(power[1:], wanted[1:], rtol=1e-3)
    np.testing.assert_allclose(filtered.mean((1, 2, 3)), cubes.mean((1, 2, 3)), atol=1e-5)


def test_a_filter_keeps_phases_and_turns_with_the_cube() -> None:
    cubes = noise(2, 10)
    gain = tuple(np.linspace(0.5, 2.0, shell_numbers(10).max() + 1).tolist())
    before, after = (np.fft.fftn(c, axes=(1, 2, 3)) for c in (cubes, apply_gain(cubes, gain)))
    np.testing.assert_allclose(np.angle(after / before), 0.0, atol=1e-3)
    turned = apply_gain(np.ascontiguousarray(np.rot90(cubes, 1, (2, 3))), gain)
    np.testing.assert_allclose(turned, np.rot90(apply_gain(cubes, gain), 1, (2, 3)), atol=1e-5)


def test_empty_shells_are_not_filled() -> None:
    smooth = apply_gain(noise(2, 16), tuple(1.0 if shell < 7 else 0.0 for shell in range(15)))
    gain = power_of(smooth).gain_to(np.ones(15))
    held = np.array(gain[1:7])
    np.testing.assert_allclose(gain[8:], gain[8], rtol=1e-6)
    assert held.min() <= gain[8] / LARGEST_GAIN <= held.max() < 1.2 * held.min()
    assert gain[0] == 1.0


@pytest.mark.parametrize("strength", [10.0, 100.0])
def test_a_background_does_not_hide_what_is_to_be_matched(strength: float) -> None:
    cubes = noise(16, 16)
    slow = strength * np.sin(2 * np.pi * np.arange(16) / 16).astype(np.float32)
    matched = apply_gain(cubes + slow, power_of(cubes + slow).gain_to(power_of(cubes).power))
    np.testing.assert_allclose(power_of(matched).power[1:], power_of(cubes).power[1:], rtol=0.02)


@pytest.mark.parametrize("cut", [3, 5, 8])
def test_low_passed_training_data_are_matched_where_they_hold_something(cut: int) -> None:
    shells = np.arange(num_shells(16))
    falling = np.where(shells <= cut, np.maximum(shells, 1) ** -0.7, 0.0)
    wanted = power_of(apply_gain(noise(16, 16), tuple(falling.tolist()))).power
    given = noise(16, 16, seed=1)
    matched = power_of(apply_gain(given, power_of(given).gain_to(wanted))).power
    np.testing.assert_allclose(matched[1 : cut + 1], wanted[1 : cut + 1], rtol=0.01)
    np.testing.assert_allclose(matched[cut + 1 :], 0.0, atol=1e-6)


@pytest.mark.parametrize("value", [1e6, 1e20, 3e38])
def test_one_wild_voxel_costs_the_others_nothing(value: float) -> None:
    cubes = noise(32, 12)
    wild = cubes.copy()
    wild[3, 5, 5, 5] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, expected = power_of(wild).power, power_of(cubes).power
    # The cube counts as one point, which is white as the others are.
    np.testing.assert_allclose(found, expected, rtol=0.1)


def test_rounding_is_no_spectrum() -> None:
    constant = np.full((2, 8, 8, 8), 3.3, np.float32)
    constant[1, 2, 2, 2] = np.nextafter(np.float32(3.3), np.float32(4.0))
    total = power_of(np.concatenate([constant, noise(1, 8)]))
    assert total.num_cubes == 1


def test_between_shells_a_gain_is_interpolated() -> None:
    gain = (9.0, 2.0, 4.0, 1.0)
    radius = np.array([[0.0, 0.7, 1.0], [1.5, 2.0, 40.0]])
    np.testing.assert_allclose(gain_at(gain, radius), [[2.0, 2.0, 2.0], [3.0, 4.0, 1.0]])


@given(st.integers(2, 33))
def test_shells_are_counted_as_they_are_numbered(box: int) -> None:
    assert num_shells(box) == shell_numbers(box).max() + 1

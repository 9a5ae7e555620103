"""Microscope: wavelength, contrast transfer, dose and tilts agree with theory and an oracle."""

from __future__ import annotations

import numpy as np
import pytest
from torch_ctf import calculate_ctf_1d

from cectflow.simulation.microscope import (
    Microscope,
    TiltScheme,
    contrast_transfer,
    dose_filter,
    electron_wavelength,
)

# --- optics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("voltage_kv", "wavelength"), [(100.0, 0.0370), (200.0, 0.0251), (300.0, 0.0197)]
)
def test_wavelengths_are_those_of_the_tables(voltage_kv: float, wavelength: float) -> None:
    assert round(electron_wavelength(voltage_kv), 4) == wavelength


@pytest.mark.parametrize("defocus_um", [-1.0, 0.5, 2.0, 4.0, 7.5])
@pytest.mark.parametrize("voltage_kv", [200.0, 300.0])
def test_contrast_transfer_agrees_with_torch_ctf(defocus_um: float, voltage_kv: float) -> None:
    pixel_size, number = 4.0, 128
    oracle = calculate_ctf_1d(
        defocus=defocus_um,
        voltage=voltage_kv,
        spherical_aberration=2.7,
        amplitude_contrast=0.07,
        phase_shift=0.0,
        pixel_size=pixel_size,
        n_samples=number,
        oversampling_factor=1,
    ).numpy()
    k = np.linspace(0, 0.5, number) / pixel_size
    own = contrast_transfer(k**2, defocus_um, Microscope(voltage_kv=voltage_kv))
    # Some releases of torch-ctf have bright protein negative: the sign is theirs to choose.
    np.testing.assert_allclose(own, np.sign(oracle[0]) * oracle, atol=1e-4)


def test_contrast_transfer_at_zero_is_the_amplitude_contrast() -> None:
    at_zero = contrast_transfer(np.zeros(1), 4.0, Microscope(amplitude_contrast=0.1))
    assert at_zero[0] == pytest.approx(0.1)


@pytest.mark.parametrize("defocus_um", [2.0, 4.0])
def test_contrast_transfer_vanishes_where_theory_says(defocus_um: float) -> None:
    microscope = Microscope()
    wavelength = electron_wavelength(microscope.voltage_kv)
    # pi lambda dz s - pi Cs lambda^3 s^2 / 2 = n pi - asin A, solved for s = k².
    half_aberration = 0.5 * microscope.spherical_aberration_mm * 1e7 * wavelength**3
    linear = wavelength * defocus_um * 1e4
    right = np.arange(1, 6) - np.arcsin(microscope.amplitude_contrast) / np.pi
    zeros = (linear - np.sqrt(linear**2 - 4 * half_aberration * right)) / (2 * half_aberration)
    assert np.abs(contrast_transfer(zeros, defocus_um, microscope)).max() < 1e-9
    below = contrast_transfer(zeros * 0.99, defocus_um, microscope)
    above = contrast_transfer(zeros * 1.01, defocus_um, microscope)
    assert (np.sign(below) == -np.sign(above)).all()
    # First zero: 28 Å at 4 µm.
    assert zeros[0] ** -0.5 == pytest.approx(28.4 * np.sqrt(defocus_um / 4), rel=0.02)


def test_defocus_upside_down_is_refused() -> None:
    with pytest.raises(ValueError, match=r"defocus_um is \(5, 3\): expected the lower value first"):
        Microscope(defocus_um=(5.0, 3.0))


# --- dose -----------------------------------------------------------------------------------------


def test_damage_grows_with_dose_and_resolution() -> None:
    k_squared = np.linspace(0, 0.05, 50) ** 2
    left = np.stack([dose_filter(k_squared, exposure) for exposure in (0.0, 10.0, 60.0, 120.0)])
    assert (left[0] == 1).all()
    assert (np.diff(left[1:], axis=1) < 0).all()
    assert (np.diff(left[:, 1:], axis=0) < 0).all()
    assert ((left > 0) & (left <= 1)).all()
    # Grant and Grigorieff: 13.3 e⁻/Å² at 10 Å leave 1/e of the intensity.
    critical = 0.245 * 0.1**-1.665 + 2.81
    assert dose_filter(np.array([0.01]), critical)[0] ** 2 == pytest.approx(np.exp(-1))


def test_exposures_are_dose_symmetric() -> None:
    tilts = TiltScheme(lowest=-6.0, highest=6.0, step=3.0, dose_per_tilt=2.0)
    assert tilts.exposures.tolist() == [7.0, 3.0, 1.0, 5.0, 9.0]


def test_each_tilt_is_exposed_in_the_order_of_its_distance_from_zero() -> None:
    tilts = TiltScheme(lowest=-40.0, highest=60.0, step=2.5)
    order = np.argsort(tilts.exposures)
    assert (np.diff(np.abs(tilts.angles[order])) >= 0).all()
    np.testing.assert_allclose(np.sort(tilts.exposures), 3.0 * (np.arange(41) + 0.5))


# --- tilts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lowest", "highest", "step", "number", "last"),
    [(-60.0, 60.0, 3.0, 41, 60.0), (-40.0, 60.0, 3.0, 34, 59.0), (0.0, 0.3, 0.1, 4, 0.3)],
)
def test_tilts_run_from_the_lowest_in_steps(
    lowest: float, highest: float, step: float, number: int, last: float
) -> None:
    angles = TiltScheme(lowest=lowest, highest=highest, step=step).angles
    assert len(angles) == number
    assert angles[0] == lowest
    assert angles[-1] == pytest.approx(last)
    np.testing.assert_allclose(np.diff(angles), step)


@pytest.mark.parametrize(("lowest", "highest"), [(0.0, 0.0), (-1.0, 1.0), (30.0, -30.0)])
def test_a_scheme_of_one_angle_is_refused(lowest: float, highest: float) -> None:
    with pytest.raises(
        ValueError, match=rf"from {lowest:g}° to {highest:g}° .* at least two angles"
    ):
        TiltScheme(lowest=lowest, highest=highest)

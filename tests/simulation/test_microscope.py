"""Microscope: wavelength, contrast transfer, dose and tilts agree with theory and an oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch_ctf import calculate_ctf_1d, calculate_ctf_2d

from cectflow.simulation.microscope import (
    Microscope,
    OpticsDraw,
    TiltScheme,
    astigmatic_defocus,
    contrast_transfer,
    dose_filter,
    draw_optics,
    electron_wavelength,
    noise_transfer,
    signal_transfer,
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


@pytest.mark.parametrize("angle", [0.0, 30.0, 90.0, 135.0])
def test_astigmatic_contrast_transfer_agrees_with_torch_ctf(angle: float) -> None:
    pixel_size, number, defocus_um, difference = 4.0, 64, 3.0, 0.8
    oracle = calculate_ctf_2d(
        defocus=defocus_um,
        astigmatism=difference / 2,
        astigmatism_angle=angle,
        voltage=300.0,
        spherical_aberration=2.7,
        amplitude_contrast=0.07,
        phase_shift=0.0,
        pixel_size=pixel_size,
        image_shape=(number, number),
        rfft=False,
        fftshift=False,
    ).numpy()
    kx, ky = (np.fft.fftfreq(number, pixel_size).reshape(shape) for shape in ((1, -1), (-1, 1)))
    microscope = Microscope(astigmatism_um=difference, astigmatism_angle=angle)
    defocus = astigmatic_defocus(kx, ky, defocus_um, microscope)
    assert np.ptp(defocus[1:, 1:]) == pytest.approx(difference, rel=0.01)
    own = contrast_transfer(kx**2 + ky**2, defocus, microscope)
    np.testing.assert_allclose(own, np.sign(oracle[0, 0]) * oracle, atol=2e-3)


def test_the_largest_defocus_lies_in_the_direction_of_the_astigmatism() -> None:
    microscope = Microscope(astigmatism_um=1.0, astigmatism_angle=60.0)
    direction = np.deg2rad(np.arange(0.0, 180.0, 5.0))
    defocus = astigmatic_defocus(np.cos(direction), np.sin(direction), 4.0, microscope)
    assert np.rad2deg(direction[np.argmax(defocus)]) == pytest.approx(60.0)
    assert (defocus.max(), defocus.min()) == pytest.approx((4.5, 3.5))
    assert astigmatic_defocus(np.ones(1), np.ones(1), 4.0, Microscope()) == 4.0


def test_formulas_are_the_same_in_torch() -> None:
    microscope = Microscope(astigmatism_um=0.5, astigmatism_angle=20.0, dqe=0.3)
    kx, ky = np.linspace(-0.05, 0.05, 9)[:, None], np.linspace(0.0, 0.05, 7)
    results = []
    for x, y in ((kx, ky), (torch.from_numpy(kx), torch.from_numpy(ky))):
        squared: Any = x**2 + y**2
        defocus = astigmatic_defocus(x, y, 3.0, microscope)
        results.append(
            [
                contrast_transfer(squared, defocus, microscope),
                dose_filter(squared, 60.0),
                signal_transfer(squared, 0.05, microscope),
                noise_transfer(squared, 0.05, microscope),
            ]
        )
    for numpy_, torch_ in zip(*results, strict=True):
        np.testing.assert_allclose(torch_, numpy_, rtol=1e-12)


# --- detector -------------------------------------------------------------------------------------


def test_the_detector_has_its_mtf_and_dqe_at_the_nyquist_frequency() -> None:
    at = np.array([0.0, 0.05**2])
    microscope = Microscope(mtf=0.5, dqe=0.4)
    np.testing.assert_allclose(signal_transfer(at, 0.05, microscope), [1.0, 0.5])
    # Signal power over noise power is what DQE means.
    passed = signal_transfer(at, 0.05, microscope) ** 2 / noise_transfer(at, 0.05, microscope)
    np.testing.assert_allclose(passed, [1.0, 0.4])
    assert noise_transfer(at, 0.05, Microscope(mtf=0.5)) == 1.0


# --- draws ----------------------------------------------------------------------------------------

RANGES: dict[str, tuple[float, float]] = {
    "defocus_um": (3.0, 5.0),
    "amplitude_contrast": (0.05, 0.1),
    "mtf": (0.4, 0.8),
    "dqe": (0.2, 0.5),
    "defocus_spread_um": (0.1, 0.2),
    "astigmatism_um": (0.0, 0.3),
    "astigmatism_angle": (-90.0, 90.0),
}
TILT_RANGES: dict[str, tuple[float, float]] = {
    "thickness": (1000.0, 3000.0),
    "alignment_jitter": (2.0, 8.0),
}


def draw_many(number: int = 60) -> list[OpticsDraw]:
    microscope, tilts = Microscope(**RANGES), TiltScheme(**TILT_RANGES)
    return [draw_optics(microscope, tilts, np.random.default_rng(seed)) for seed in range(number)]


def test_every_range_is_drawn_from_end_to_end() -> None:
    draws = draw_many()
    for name, (low, high) in (RANGES | TILT_RANGES).items():
        values = np.array([draw.numbers()[name] for draw in draws])
        assert ((values >= low) & (values <= high)).all()
        assert np.ptp(values) > 0.8 * (high - low), name
        # Uniform: mean and spread within four standard errors.
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.15 * (high - low))
    assert set(draws[0].numbers()) == set(RANGES) | set(TILT_RANGES)


def test_each_tilt_has_its_own_defocus_and_shift() -> None:
    draws = draw_many()
    defocus = np.array([draw.defoci_um for draw in draws])
    numbers = [draw.numbers() for draw in draws]
    mean, spread = (np.array([n[f"defocus{s}_um"] for n in numbers]) for s in ("", "_spread"))
    deviations = (defocus - mean[:, None]) / spread[:, None]
    shifts = np.array([draw.shifts for draw in draws])
    errors = shifts / np.array([n["alignment_jitter"] for n in numbers])[:, None, None]
    assert shifts.shape == (60, 41, 2)
    for normal in (deviations, errors[..., 0], errors[..., 1]):
        assert normal.mean() == pytest.approx(0, abs=0.08)
        assert normal.std() == pytest.approx(1, abs=0.06)


def test_single_numbers_are_not_drawn_and_a_seed_gives_one_draw() -> None:
    plain = draw_optics(Microscope(), TiltScheme(), np.random.default_rng(0))
    assert (plain.microscope, plain.tilts) == (Microscope(), TiltScheme())
    assert set(plain.defoci_um) == {4.0}
    assert not np.any(plain.shifts)
    first, again, other = draw_many(1)[0], draw_many(1)[0], draw_many(2)[1]
    assert first == again != other
    assert hash(first) == hash(again)


@pytest.mark.parametrize("name", [*RANGES, *TILT_RANGES])
def test_a_range_upside_down_is_refused(name: str) -> None:
    config: Any = TiltScheme if name in TILT_RANGES else Microscope
    low, high = (RANGES | TILT_RANGES)[name]
    with pytest.raises(
        ValueError, match=rf"{name} is \({high:g}, {low:g}\): expected the lower value first"
    ):
        config(**{name: (high, low)})


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (Microscope, {"amplitude_contrast": (0.5, 1.0)}),
        (Microscope, {"mtf": (0.0, 0.5)}),
        (Microscope, {"astigmatism_um": -0.1}),
        (Microscope, {"defocus_um": (1.0, 2.0, 3.0)}),
        (TiltScheme, {"thickness": (-1.0, 100.0)}),
        (TiltScheme, {"explicit": (0.0, 90.0)}),
    ],
)
def test_values_that_cannot_be_are_refused_in_ranges_too(config: Any, values: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        config(**values)


def test_a_range_must_be_drawn_before_it_is_used() -> None:
    with pytest.raises(ValueError, match=r"amplitude_contrast is the range .* draw_optics"):
        contrast_transfer(np.zeros(1), 4.0, Microscope(amplitude_contrast=(0.05, 0.1)))


def test_ranges_come_from_yaml_and_go_back(tmp_path: Any) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("defocus_um: [3, 4.5]\nmtf: 0.5\n")
    microscope = Microscope.from_yaml(path)
    assert (microscope.defocus_um, microscope.mtf) == ((3.0, 4.5), 0.5)
    assert Microscope.from_json(microscope.to_json()) == microscope


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


def test_other_orders_expose_the_tilts_one_after_another() -> None:
    tilts = {"lowest": -6.0, "highest": 6.0, "step": 3.0, "dose_per_tilt": 2.0}
    assert TiltScheme(**tilts, order="continuous").exposures.tolist() == [1.0, 3.0, 5.0, 7.0, 9.0]
    up_then_down = TiltScheme(**tilts, order="bidirectional").exposures
    assert up_then_down.tolist() == [9.0, 7.0, 1.0, 3.0, 5.0]


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


def test_explicit_angles_stand_in_for_the_steps() -> None:
    tilts = TiltScheme(explicit=(-50.0, -10.0, 0.0, 20.0))
    assert tilts.angles.tolist() == [-50.0, -10.0, 0.0, 20.0]
    assert tilts.range == (-50.0, 20.0)
    assert tilts.spacings.tolist() == [40.0, 25.0, 15.0, 20.0]
    assert tilts.exposures.tolist() == [10.5, 4.5, 1.5, 7.5]
    np.testing.assert_allclose(TiltScheme(step=2.5).spacings, 2.5)


@pytest.mark.parametrize("angles", [(), (3.0,), (3.0, 0.0), (0.0, 0.0)])
def test_a_list_of_angles_needs_two_in_ascending_order(angles: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=rf"holds {len(angles)} angle\(s\).* at least two angles"):
        TiltScheme(explicit=angles)

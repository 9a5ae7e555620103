"""Calibration gives back what simulated cubes were made with, and fits real ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from cectflow.cli import main
from cectflow.flows.calibration import simulate_radial_power
from cectflow.flows.simulation import load_structures
from cectflow.particles import make_particle_rows, particles_from
from cectflow.recipe import load_recipe
from cectflow.simulation.calibration.calibrate import Calibration, calibrate
from cectflow.simulation.calibration.noise_fit import estimate_defocus
from cectflow.simulation.calibration.radial_power import (
    RadialPower,
    TaperedCubes,
    compare_power,
    radial_power,
    summarise,
)
from cectflow.simulation.calibration.snr_bounds import SignalCubes, bound_snr, signal_cubes
from cectflow.simulation.calibration.tilt_range import measure_tilts
from cectflow.simulation.distractors import Distractors
from cectflow.simulation.field import Specimen, prepare_specimen, simulate_field
from cectflow.simulation.microscope import Microscope, NoiseSpectrum, TiltScheme, noise_power
from cectflow.simulation.optics import optics_of
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.structure import Structure
from cectflow.subtomogram import cut
from cectflow.volume import read_stack
from cectflow.volume_writer import write_stack

Phantom = Callable[[str], Structure]
MakeRecipe = Callable[..., SimulationRecipe]

BOX, VOXEL_SIZE, DEFOCUS = 24, 12.0, 3.2
TRUTH = NoiseSpectrum(frequencies=(0.0, 0.01, 0.03, 0.05), power=(1.0, 0.4, 0.15, 0.1))
TILTS = TiltScheme(lowest=-51.0, highest=63.0)

NOISE_ONLY = 1e-4
"""An SNR at which the signal has no part in the power of a shell."""

Cubes = NDArray[np.float32]

# --- noise spectrum -------------------------------------------------------------------------------


def test_a_measured_spectrum_is_linear_between_and_constant_beyond() -> None:
    microscope = Microscope(
        noise_spectrum=NoiseSpectrum(frequencies=(0.01, 0.02, 0.04), power=(2.0, 1.0, 3.0))
    )
    k = np.array([0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.1])
    expected = [2.0, 2.0, 2.0, 1.5, 1.0, 2.0, 3.0, 3.0]
    np.testing.assert_allclose(noise_power(k**2, 0.05, microscope), expected)
    in_torch = noise_power(torch.from_numpy(k).to(torch.float32) ** 2, 0.05, microscope)
    np.testing.assert_allclose(in_torch, expected, rtol=1e-5)
    assert microscope.noise_spectrum_name == "measured"


@pytest.mark.parametrize(
    ("frequencies", "power", "message"),
    [
        ((0.01, 0.02), (1.0, 1.0, 1.0), "2 frequencies and 3 values of power"),
        ((0.02, 0.01), (1.0, 1.0), "frequency 2 is 0.01 Å⁻¹ after 0.02: expected them ascending"),
        ((-0.01, 0.01), (1.0, 1.0), "expected finite ones from 0 on"),
        ((0.01, 0.02), (1.0, -1.0), "power runs from -1 to 1"),
        ((0.01, 0.02), (0.0, 0.0), "none below 0 and one above it"),
    ],
)
def test_a_spectrum_that_makes_no_sense_is_refused(
    frequencies: tuple[float, ...], power: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        NoiseSpectrum(frequencies=frequencies, power=power)


# --- what is known comes back ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(make_recipe: MakeRecipe, phantom: Phantom) -> Specimen:
    """A specimen whose recipe knows neither spectrum nor tilt range nor the exact defocus."""
    recipe = make_recipe(
        box=BOX,
        voxel_size=VOXEL_SIZE,
        field_shape=(32, 48, 48),
        occupancy=0.05,
        snr=(0.01, 0.01),
        ctf_correction="premultiplied",
        microscope=Microscope(defocus_um=(2.8, 3.8)),
    )
    return prepare_specimen(recipe, [phantom("ring")])


def make_cubes(
    recipe: SimulationRecipe, number: int, *, tilts: TiltScheme = TILTS, **changes: Any
) -> Cubes:
    """Cubes of pure noise of known optics, from fields of their own, dark protein."""
    microscope = recipe.microscope.model_copy(
        update={"defocus_um": DEFOCUS, "noise_spectrum": TRUTH} | changes
    )
    optics = optics_of(
        recipe.field_shape, VOXEL_SIZE, microscope, tilts, microscope.defocus_um,
        recipe.ctf_correction,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    cubes = []
    for _ in range(number // 4):
        white = torch.randn(recipe.field_shape, generator=generator)
        noise = torch.fft.irfftn(torch.fft.rfftn(white) * optics.noise, s=recipe.field_shape)
        places = np.array([[16, y, x] for y in (12, 36) for x in (12, 36)])
        cubes.append(cut(noise.numpy(), places, BOX, periodic=True))
    return np.concatenate(cubes).astype(np.float32)


@pytest.fixture(scope="module")
def cubes(given: Specimen) -> Cubes:
    return make_cubes(given.recipe, 32)


@pytest.fixture(scope="module")
def found(given: Specimen, cubes: Cubes) -> Calibration:
    return calibrate(given, cubes, VOXEL_SIZE, snr=NOISE_ONLY)


def spectrum_error(found: Calibration) -> float:
    """Largest relative error of the spectrum from 0.1 to 0.45 cycles per voxel, scale aside."""
    spectrum = found.recipe.microscope.noise_spectrum
    assert isinstance(spectrum, NoiseSpectrum)
    k = np.linspace(0.1, 0.45, 15) / VOXEL_SIZE
    ratio = np.interp(k, spectrum.frequencies, spectrum.power) / np.interp(
        k, TRUTH.frequencies, TRUTH.power
    )
    return float(np.abs(ratio / np.exp(np.log(ratio).mean()) - 1.0).max())


def test_the_tilt_range_comes_back_within_one_step(found: Calibration) -> None:
    assert found.tilt_range is not None
    assert found.tilt_range.lowest == pytest.approx(TILTS.lowest, abs=3.0)
    assert found.tilt_range.highest == pytest.approx(TILTS.highest, abs=3.0)
    tilts = found.recipe.tilts
    assert tilts.angles[-1] == tilts.highest
    assert tilts.highest == pytest.approx(TILTS.highest, abs=3.0)


def of_particles(specimen: Specimen, snr: float, first: int, number: int) -> tuple[Cubes, float]:
    """Cubes about the particles of some fields, off by the recipe's jitter; their measured SNR."""
    jitter = specimen.recipe.jitter / specimen.recipe.voxel_size
    made = replace(specimen, recipe=specimen.recipe.model_copy(update={"snr": (snr, snr)}))
    generator = np.random.default_rng(first)
    stacks, measured = [], []
    for index in range(first, first + number):
        field = simulate_field(made, "train", index)
        exact = field.scene.positions_zyx
        centres = np.round(exact + generator.uniform(-jitter, jitter, exact.shape))
        stacks.append(cut(field.tomogram.numpy(), centres, made.recipe.box, periodic=True))
        measured.append(field.record.snr_reconstruction)
    return np.concatenate(stacks).astype(np.float32), float(np.mean(np.array(measured)))


RANGES = (
    (-60.0, 60.0, 3.0),
    (-60.0, 60.0, 6.0),
    (-45.0, 45.0, 3.0),
    (-40.0, 66.0, 2.0),
    (-66.0, 30.0, 3.0),
)


@pytest.mark.parametrize(("lowest", "highest", "step"), RANGES)
@pytest.mark.parametrize("snr", [None, 10.0], ids=["noise", "signal"])
def test_the_tilt_range_holds_the_truth_within_its_error(
    given: Specimen, tiny: Specimen, lowest: float, highest: float, step: float, snr: float | None
) -> None:
    """In 24 voxels of coloured noise and in 16 of little but signal; the error is not vacuous."""
    tilts = TiltScheme(lowest=lowest, highest=highest, step=step)
    if snr is None:
        recipe, cubes = given.recipe, make_cubes(given.recipe, 16, tilts=tilts)
    else:
        recipe = tiny.recipe
        made = replace(tiny, recipe=recipe.model_copy(update={"tilts": tilts}))
        cubes = of_particles(made, snr, 0, 1)[0]
    unknown = recipe.model_copy(update={"tilts": TiltScheme(step=step)})
    found, _ = measure_tilts(unknown, TaperedCubes.of(cubes, None))
    assert found is not None
    assert found.lowest == pytest.approx(lowest, abs=found.lowest_error)
    assert found.highest == pytest.approx(highest, abs=found.highest_error)
    resolution = np.rad2deg(2.0 / recipe.box)
    assert found.lowest_error >= resolution
    assert min(found.lowest_error, found.highest_error) < 1.5 * resolution


def test_the_defocus_comes_back_within_a_quarter_micrometre(found: Calibration) -> None:
    assert found.defoci["all"] == pytest.approx(DEFOCUS, abs=0.25)
    assert found.recipe.microscope.defocus_um == (found.defoci["all"],) * 2


def test_the_spectrum_comes_back_within_30_percent(found: Calibration) -> None:
    assert spectrum_error(found) < 0.3


def test_expected_and_measured_power_agree_within_5_percent(found: Calibration) -> None:
    band = found.measured.in_band
    ratio = found.expected[band] / found.measured.power[band]
    np.testing.assert_allclose(ratio, 1.0, atol=0.05)


def test_cubes_simulated_by_the_calibrated_recipe_have_the_measured_power(
    found: Calibration, phantom: Phantom
) -> None:
    simulated = simulate_radial_power(found.recipe, (phantom("ring"),), 30, BOX)
    real, band = found.measured, found.measured.in_band
    ratio = simulated.power / real.power
    error = np.hypot(simulated.standard_error / simulated.power, real.standard_error / real.power)
    assert (np.abs(ratio - 1) < np.maximum(0.15, 3 * error))[band].all()


def test_without_ctf_on_the_noise_the_defocus_range_stays(
    given: Specimen, phantom: Phantom
) -> None:
    plain = given.recipe.model_copy(update={"ctf_correction": "phase_flip"})
    specimen = prepare_specimen(plain, [phantom("ring")])
    found = calibrate(specimen, make_cubes(plain, 32), VOXEL_SIZE, snr=NOISE_ONLY)
    assert found.defoci == {}
    assert found.recipe.microscope.defocus_um == given.recipe.microscope.defocus_um
    assert spectrum_error(found) < 0.2


def test_tomograms_have_each_their_own_defocus(given: Specimen) -> None:
    both = [make_cubes(given.recipe, 16, defocus_um=value) for value in (2.8, 3.5)]
    names = ["first"] * 16 + ["second"] * 16
    found = calibrate(given, np.concatenate(both), VOXEL_SIZE, tomograms=names)
    assert found.defoci["first"] == pytest.approx(2.8, abs=0.3)
    assert found.defoci["second"] == pytest.approx(3.5, abs=0.3)
    assert found.recipe.microscope.defocus_um == tuple(sorted(found.defoci.values()))


def test_another_tomogram_differs_by_its_defocus_alone(given: Specimen, found: Calibration) -> None:
    other = make_cubes(given.recipe, 16, defocus_um=2.7)
    assert estimate_defocus(found.recipe, other) == pytest.approx(2.7, abs=0.2)


def test_neither_contrast_nor_scale_nor_offset_matters(
    given: Specimen, cubes: Cubes, found: Calibration
) -> None:
    scales = np.geomspace(0.1, 10, len(cubes)).astype(np.float32)[:, None, None, None]
    other = calibrate(given, -cubes * scales + 3.0, VOXEL_SIZE)
    np.testing.assert_allclose(other.measured.power, found.measured.power, rtol=1e-4)
    assert other.recipe.tilts == found.recipe.tilts
    assert other.defoci == found.defoci


def test_a_mask_that_the_cubes_have_is_recognised(given: Specimen, cubes: Cubes) -> None:
    along = np.arange(BOX) - BOX // 2
    radius = np.sqrt(along[:, None, None] ** 2 + along[None, :, None] ** 2 + along**2)
    mask = np.clip((11.5 - radius) / 3, 0, 1)
    masked = (cubes - cubes.mean(axis=(1, 2, 3), keepdims=True)) * mask + 2.0
    found = calibrate(given, masked, VOXEL_SIZE, snr=NOISE_ONLY)
    assert any("masked or padded" in note for note in found.notes)
    assert found.tilt_range is not None
    assert found.tilt_range.lowest == pytest.approx(TILTS.lowest, abs=4.0)
    assert spectrum_error(found) < 0.4


def test_a_mask_radius_leaves_the_particle_out(cubes: Cubes) -> None:
    blob = np.zeros((BOX,) * 3, np.float32)
    blob[(BOX // 2,) * 3] = 400.0
    with_blob = cubes + gaussian_filter(blob, 1.5) * cubes.std()
    clean = radial_power(cubes, mask_radius=6.0).power
    np.testing.assert_allclose(
        radial_power(with_blob, mask_radius=6.0).power, clean, rtol=0.1, atol=0.02
    )
    assert np.abs(radial_power(with_blob).power / radial_power(cubes).power - 1).max() > 0.5


# --- SNR ------------------------------------------------------------------------------------------


def test_the_snr_given_is_written(given: Specimen, cubes: Cubes) -> None:
    found = calibrate(given, cubes, VOXEL_SIZE, snr=0.002)
    assert found.recipe.snr == (0.002, 0.002)


def test_pure_noise_gives_no_lower_bound_and_says_so(given: Specimen, cubes: Cubes) -> None:
    found = calibrate(given, cubes, VOXEL_SIZE)
    assert found.recipe.snr == (found.snr.low, found.snr.high)
    assert found.snr.low < found.snr.high
    assert "no lower bound" in found.snr.reasoning
    assert "mean of the 32 unaligned cubes" in found.snr.reasoning


def test_the_interval_holds_the_true_snr(given: Specimen, cubes: Cubes, phantom: Phantom) -> None:
    """Cubes about particles simulated at 0.05, in the band that the interval is to hold."""
    truth = given.recipe.model_copy(
        update={
            "snr": (0.05, 0.05),
            "tilts": TILTS,
            "microscope": given.recipe.microscope.model_copy(
                update={"noise_spectrum": TRUTH, "defocus_um": DEFOCUS}
            ),
        }
    )
    specimen = prepare_specimen(truth, [phantom("ring")])
    stacks = []
    for index in range(3):
        field = simulate_field(specimen, "train", index)
        centres = np.round(field.scene.positions_zyx)
        stacks.append(cut(field.tomogram.numpy(), centres, BOX, periodic=True))
    found = calibrate(given, np.concatenate(stacks), VOXEL_SIZE)
    assert found.snr.low < 0.05 < found.snr.high


@pytest.fixture(scope="module")
def tiny(phantom: Phantom) -> Specimen:
    """The recipe tiny, whose SNR of 10 is more signal than noise."""
    recipe = load_recipe("tiny").simulation
    return prepare_specimen(recipe, [phantom(name) for name in recipe.include])


@pytest.fixture(scope="module", params=["tiny", "premultiplied"])
def known(request: pytest.FixtureRequest, tiny: Specimen, given: Specimen) -> Specimen:
    """Specimens whose SNR alone is unknown; one with white noise, one with a falling spectrum."""
    if request.param == "tiny":
        return tiny
    optical = given.recipe.microscope.model_copy(update={"noise_spectrum": TRUTH})
    return replace(given, recipe=given.recipe.model_copy(update={"microscope": optical}))


@pytest.fixture(scope="module")
def signal(known: Specimen) -> SignalCubes:
    sample = TaperedCubes.of(of_particles(known, 1.0, 0, 1)[0], None)
    defoci = np.linspace(2.8, 3.8, 5).tolist() if known.recipe.box == BOX else [4.0]
    return signal_cubes(known, known.recipe, sample, defoci, known.recipe.voxel_size)


@pytest.mark.parametrize("snr", [0.05, 0.2, 0.5, 1.0, 3.0, 10.0])
def test_the_interval_holds_the_measured_snr_and_is_no_wider_than_it_must(
    known: Specimen, signal: SignalCubes, snr: float
) -> None:
    """For each of four sets of cubes, of one field (of about 40) or of three."""
    for first, number in ((0, 1), (1, 1), (2, 3), (5, 3)):
        cubes, truth = of_particles(known, snr, first, number)
        sample = TaperedCubes.of(cubes, None)
        power = summarise(sample, corners=True)
        found = bound_snr(sample, power, signal, None, known.recipe.voxel_size)
        assert found.low <= truth <= found.high
        if snr <= 1:
            assert truth / 10 < found.low
            assert found.high < (3 if snr <= 0.2 else 8) * truth


def test_gold_adds_power_and_no_signal(given: Specimen, phantom: Phantom, cubes: Cubes) -> None:
    """Beads that outweigh the particles show in the cubes, and the SNR's unit stays theirs."""
    sample = TaperedCubes.of(cubes, None)
    crowd = Distractors(gold=12.0, gold_diameter=(60.0, 60.0))
    recipe = SimulationRecipe.model_validate(given.recipe.model_dump() | {"distractors": crowd})
    specimen = prepare_specimen(recipe, [phantom("ring")])
    particles, everything = (
        signal_cubes(one, recipe, sample, (DEFOCUS,), VOXEL_SIZE).powers.mean(axis=0).sum()
        for one in (given, specimen)
    )
    assert everything > 1.5 * particles  # how many beads lie in the cubes is drawn


# --- bad input ------------------------------------------------------------------------------------


def test_the_wrong_contrast_is_noticed(given: Specimen, cubes: Cubes) -> None:
    blob = np.zeros((BOX,) * 3, np.float32)
    blob[(BOX // 2,) * 3] = 300.0
    dark = cubes - gaussian_filter(blob, 2.0) * cubes.std()
    said = calibrate(given, dark, VOXEL_SIZE, contrast="light").notes
    assert any("against the contrast given, light" in note for note in said)
    assert calibrate(given, dark, VOXEL_SIZE, contrast="dark").notes == ()


def test_without_a_wedge_the_tilts_stay_and_the_user_is_told(given: Specimen) -> None:
    white = np.random.default_rng(0).standard_normal((12, BOX, BOX, BOX)).astype(np.float32)
    found = calibrate(given, white, VOXEL_SIZE)
    assert found.tilt_range is None
    assert found.recipe.tilts == given.recipe.tilts
    assert any("No missing wedge is visible" in note for note in found.notes)


def test_a_wedge_about_x_is_refused(given: Specimen, cubes: Cubes) -> None:
    with pytest.raises(ValueError, match="missing wedge about x: expected the tilt axis along y"):
        calibrate(given, np.ascontiguousarray(cubes.swapaxes(2, 3)), VOXEL_SIZE)


def test_a_beam_along_x_is_refused(given: Specimen, cubes: Cubes) -> None:
    with pytest.raises(ValueError, match="the beam has to be along z"):
        calibrate(given, np.ascontiguousarray(cubes.swapaxes(1, 3)), VOXEL_SIZE)


def test_cubes_that_cannot_calibrate_are_refused(given: Specimen, cubes: Cubes) -> None:
    broken = cubes.copy()
    broken[2, 0, 0, 0] = np.nan
    constant = cubes.copy()
    constant[1] = 1.0
    for content, message in (
        (cubes[:3], "3 cubes: expected at least 4"),
        (broken, "cube 3 of 32 is not finite"),
        (constant, "cube 2 of 32 is constant"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(given, content, VOXEL_SIZE)
    with pytest.raises(ValueError, match=r"have 10 Å per voxel, the recipe 12: set voxel_size: 10"):
        calibrate(given, cubes, 10.0)
    large = np.random.default_rng(0).standard_normal((4, 40, 40, 40)).astype(np.float32)
    with pytest.raises(ValueError, match=r"40 voxels along an edge.*enlarge the field"):
        calibrate(given, large, VOXEL_SIZE)
    with pytest.raises(ValueError, match="snr is -1: expected a finite value above 0"):
        calibrate(given, cubes, VOXEL_SIZE, snr=-1.0)
    with pytest.raises(ValueError, match="give a smaller --mask-radius"):
        calibrate(given, cubes, VOXEL_SIZE, mask_radius=240.0)
    with pytest.raises(ValueError, match="expected a calibrated recipe"):
        estimate_defocus(given.recipe, cubes)


# --- the command ----------------------------------------------------------------------------------


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0)


def test_the_command_writes_a_recipe_that_differs_only_where_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = load_recipe("tiny")
    recipe = given.simulation.model_copy(update={"snr": (0.01, 0.01)})
    optics = optics_of(recipe.field_shape, 16.0, recipe.microscope, TILTS, 4.0, "none")
    fields = torch.randn((2, *recipe.field_shape), generator=torch.Generator().manual_seed(1))
    noise = torch.fft.irfftn(
        torch.fft.rfftn(fields, dim=(1, 2, 3)) * optics.noise, s=recipe.field_shape, dim=(1, 2, 3)
    ).numpy()
    places = np.array([[z, y, x] for z in (8, 24) for y in (8, 24, 40) for x in (8, 24, 40)])
    cubes = np.concatenate([cut(field, places, 16, periodic=True) for field in noise])
    write_stack(Path("cubes.mrcs"), cubes, 16.0)
    rows = make_particle_rows(np.zeros((20, 3)), tomogram="one")
    rows["rlnImageName"] = [f"{i + 1:06d}@cubes.mrcs" for i in range(20)]
    particles_from(rows).write(Path("some.star"))
    command = ("simulate", "calibrate", "--from", "cubes.mrcs", "--particles", "some.star",
               "--recipe", "tiny", "--out", "fitted.yaml")  # fmt: skip
    assert call(*command, "--snr", "0.05") == 0
    told = capsys.readouterr().out
    for line in ("tilt range: ", "SNR 0.05, as given", "shells agree within 15 %"):
        assert line in told
    assert Path("fitted.png").stat().st_size > 5000
    fitted = load_recipe("fitted.yaml")
    simulation = fitted.simulation
    assert simulation.snr == (0.05, 0.05)
    assert simulation.tilts.lowest == pytest.approx(TILTS.lowest, abs=6.0)
    assert simulation.tilts.highest == pytest.approx(TILTS.highest, abs=6.0)
    assert simulation.microscope.noise_spectrum_name == "measured"
    undone = simulation.model_copy(
        update={
            "snr": given.simulation.snr,
            "tilts": given.simulation.tilts,
            "microscope": given.simulation.microscope,
        }
    )
    assert fitted.model_copy(update={"simulation": undone}) == given
    Path("again.yaml").write_text(fitted.to_yaml())
    assert load_recipe("again.yaml") == fitted
    before = Path("fitted.yaml").read_text()
    assert call(*command) == 2
    assert "replace it with --overwrite" in capsys.readouterr().err
    assert Path("fitted.yaml").read_text() == before
    assert call(*command, "--overwrite") == 0
    assert Path("fitted.yaml").read_text() != before
    assert call(*command[:-1], "fitted.txt") == 2
    assert "a name that ends in .yaml" in capsys.readouterr().err
    rows["rlnImageName"] = [f"{i + 1:06d}@others.mrcs" for i in range(20)]
    particles_from(rows).write(Path("some.star"), overwrite=True)
    assert call(*command, "--overwrite") == 2
    assert "expected N@cubes.mrcs" in capsys.readouterr().err


def test_a_tomogram_held_out_judges_and_does_not_calibrate(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: Specimen,
    cubes: Cubes,
) -> None:
    monkeypatch.chdir(tmp_path)
    other = make_cubes(given.recipe, 16, defocus_um=2.7)
    write_stack(Path("cubes.mrcs"), np.concatenate([cubes, other]), VOXEL_SIZE)
    rows = make_particle_rows(np.zeros((48, 3)), tomogram="")
    rows["rlnTomoName"] = ["first"] * 32 + ["second"] * 13 + ["third"] * 3
    particles_from(rows).write(Path("all.star"))
    simulation = given.recipe.model_dump(mode="json") | {"include": ["ring"]}
    whole = load_recipe("tiny").model_dump(mode="json") | {"simulation": simulation}
    Path("recipe.yaml").write_text(yaml.safe_dump(whole))
    command = ("simulate", "calibrate", "--from", "cubes.mrcs", "--particles", "all.star", "--snr",
               str(NOISE_ONLY), "--recipe", "recipe.yaml", "--out", "out.yaml")  # fmt: skip
    assert call(*command, "--hold-out", "second") == 0
    told = capsys.readouterr().out
    (defocus,) = re.findall(r"defocus of second, held out: (\S+) µm", told)
    assert float(defocus) == pytest.approx(2.7, abs=0.2)
    (agreeing, shells) = re.findall(r"(\d+) of (\d+) shells agree", told)[0]
    assert int(agreeing) >= int(shells) - 1
    fitted = load_recipe("out.yaml").simulation.microscope.defocus_um
    np.testing.assert_allclose(fitted, DEFOCUS, atol=0.25)
    for name, message in (
        ("fourth", "which are first, second, third"),
        ("third", "3 cubes are of third, 45 of others: expected at least 4 of each"),
    ):
        assert call(*command, "--overwrite", "--hold-out", name) == 2
        assert message in capsys.readouterr().err


# --- real data ------------------------------------------------------------------------------------


def tilts_of(shared_data: Path, tomogram: str) -> tuple[float, float]:
    """Lowest and highest tilt about y by the projection matrices, whose third row is the beam.

    The microscope tilted by -60 to 60 degrees; the tomogram is level, the specimen was not: they
    are -54.2 to 60.5 of Unt_050, -44.4 to 70.7 of Unt_076 (whose axis is up to 11 degrees off y).
    """
    text = (shared_data / "star" / "relion5_tomograms.star").read_text()
    block = text.split(f"data_{tomogram}.tomostar")[1].split("data_")[0]
    rows = [re.findall(r"\[([^]]*)\]", line) for line in block.splitlines() if "[" in line]
    beams = np.array([[float(value) for value in row[2].split(",")] for row in rows])
    angles = np.rad2deg(np.arctan2(beams[:, 0], beams[:, 2]))
    return float(angles.min()), float(angles.max())


def test_real_cubes_of_one_tomogram_predict_those_of_another(shared_data: Path) -> None:
    """Spectrum and tilts of Unt_050, with the defocus of Unt_076, give Unt_076's radial power.

    Within 15 % or 2 standard errors in 12 of the 13 shells. Without the defocus nothing could: the
    real tomograms differ from one another by 0.43 to 2.38, in 11 shells by more than that, because
    their defoci do, 3.00 and 2.55 µm by their metadata (the estimates are both 0.45 too high). At
    0.156 cycles/voxel (77 Å) the ratio is 1.30 ± 0.11: Unt_050 has more power there than its CTF
    and a spectrum common to both would give.
    """
    folder = shared_data / "real" / "ribosome_70s"
    real, voxel_size = read_stack(folder / "ribosome_70s.mrcs")
    recipe = load_recipe("real").simulation.model_copy(
        update={"structures": (str(shared_data / "maps" / "4v4r.mrc.gz"),), "include": ("4v4r",)}
    )
    structures = load_structures(recipe)
    first, second = np.array(real[:10]), np.array(real[10:])
    specimen = prepare_specimen(recipe, structures)
    interval = calibrate(specimen, first, voxel_size).snr
    assert 1e-4 < interval.low < interval.high < 0.05
    found = calibrate(specimen, first, voxel_size, snr=0.001, contrast="light")
    assert found.notes == ()
    assert found.tilt_range is not None
    tilts = found.tilt_range
    lowest, highest = tilts_of(shared_data, "Unt_050")
    assert tilts.lowest == pytest.approx(lowest, abs=tilts.lowest_error)
    assert tilts.highest == pytest.approx(highest, abs=tilts.highest_error)
    assert max(tilts.lowest_error, tilts.highest_error) < 5.0
    measured = radial_power(second)

    def misses(power: RadialPower, fitted: RadialPower | None) -> set[float]:
        ratio = compare_power(measured, power, fitted=fitted)
        return set(np.round(ratio.frequencies[~ratio.agrees], 4).tolist())

    assert len(misses(found.measured, None)) > 8
    defocus = estimate_defocus(found.recipe, second)
    assert found.defoci["all"] - defocus == pytest.approx(3.00 - 2.55, abs=0.15)
    of_second = found.recipe.microscope.model_copy(update={"defocus_um": defocus})
    simulated = simulate_radial_power(
        found.recipe.model_copy(update={"microscope": of_second}), structures, 300, 32
    )
    # Of 100 cubes the draw decides whether 190 Å (0.0625) agrees, and the draw hangs on the path of
    # the structures.
    assert misses(simulated, found.measured) <= {0.1562}

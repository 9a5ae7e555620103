"""Pictures of a simulation show what is there: planes, wedge, zeros, labels, numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cectflow.simulation.field import SimulatedField, Specimen, prepare_specimen, simulate_field
from cectflow.simulation.figures import (
    draw_optics,
    draw_simulated_field,
    draw_snr,
    draw_spectra,
    draw_tomogram,
)
from cectflow.simulation.microscope import contrast_transfer
from cectflow.simulation.microscope import draw_optics as draw_of
from cectflow.simulation.optics import optics_of
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.structure import Structure
from cectflow.simulation.tomogram import simulate_tomogram, surround

MakeRecipe = Callable[..., SimulationRecipe]
Phantom = Callable[[str], Structure]


@pytest.fixture(scope="module")
def field(specimen: Specimen) -> SimulatedField:
    return simulate_field(specimen, "train", 0)


def save(figure: Figure) -> None:
    figure.savefig(BytesIO(), format="png", dpi=40)


def draw_for(recipe: SimulationRecipe) -> Figure:
    draw = draw_of(recipe.microscope, recipe.tilts, np.random.default_rng(0))
    optics = optics_of(
        recipe.field_shape, recipe.voxel_size, draw.microscope, draw.tilts, draw.defoci_um,
        recipe.ctf_correction, shifts=draw.shifts,
    )  # fmt: skip
    figure = draw_optics(optics, draw, recipe)
    # Every sample of H, both signs of k, zero frequency in the middle.
    point_spread = torch.fft.irfftn(optics.signal.to(torch.complex64), s=recipe.field_shape)
    whole = np.fft.fftshift(np.fft.fftn(point_spread.numpy()).real)
    z, y, x = (n // 2 for n in recipe.field_shape)
    column = x + recipe.field_shape[2] // 6
    for axes, plane in zip(figure.axes, (whole[:, y], whole[:, :, column], whole[z]), strict=False):
        shown = axes.images[0].get_array()
        # Samples at the Nyquist frequency stand for both signs: the half spectrum has one.
        np.testing.assert_allclose(shown[1:, 1:], plane[1:, 1:], atol=2e-5)
    return figure


def planes_of(axes: Axes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shown values and the two frequencies of each."""
    values = np.asarray(axes.images[0].get_array())
    left, right, bottom, top = axes.images[0].get_extent()
    across = left + (np.arange(values.shape[1]) + 0.5) * (right - left) / values.shape[1]
    up = bottom + (np.arange(values.shape[0]) + 0.5) * (top - bottom) / values.shape[0]
    assert axes.images[0].origin == "lower"
    assert np.abs(across).min() < 1e-9
    return values, across[None, :], up[:, None]


def test_the_planes_of_h_are_where_their_axes_say(make_recipe: MakeRecipe) -> None:
    save(draw_for(make_recipe(field_shape=(24, 36, 30))))
    draw_for(make_recipe(field_shape=(24, 35, 33), tilts={"alignment_jitter": 3.0}))


@pytest.mark.parametrize(("lowest", "highest"), [(-60.0, 60.0), (-20.0, 60.0), (-65.0, 10.0)])
def test_no_signal_lies_in_the_wedge_that_is_drawn(
    make_recipe: MakeRecipe, lowest: float, highest: float
) -> None:
    figure = draw_for(make_recipe(tilts={"lowest": lowest, "highest": highest, "step": 2.0}))
    values, kx, kz = planes_of(figure.axes[0])
    slopes = sorted(line.get_slope() for line in figure.axes[0].lines)
    assert len(slopes) == 2
    seen = (np.sign(kx) * kz >= np.abs(kx) * slopes[0]) & (
        np.sign(kx) * kz <= np.abs(kx) * slopes[1]
    )
    inside, outside = (values[seen] ** 2).sum(), (values[~seen] ** 2).sum()
    assert outside < 0.02 * inside
    # Drawn as a mirror image, the lines of an asymmetric range would cut off signal.
    mirrored = seen[:, ::-1]
    if abs(lowest + highest) > 1:
        assert (values[~mirrored] ** 2).sum() > 0.1 * inside


@pytest.mark.parametrize(("defocus", "voxel_size"), [(4.0, 16.0), (5.0, 8.0), (-3.0, 8.0)])
def test_zeros_are_drawn_where_the_ctf_changes_its_sign(
    make_recipe: MakeRecipe, defocus: float, voxel_size: float
) -> None:
    recipe = make_recipe(
        microscope={"defocus_um": defocus}, voxel_size=voxel_size, blur=0.7 * voxel_size
    )
    axes = draw_for(recipe).axes[-1]
    drawn = sorted(
        float(line.get_xdata()[0])
        for line in axes.lines
        if line.get_linestyle() == ":" and len(line.get_xdata()) == 2
    )
    k = np.linspace(0.0, axes.get_xlim()[1], 200_001)
    values = contrast_transfer(k**2, defocus, recipe.microscope)
    changes = np.nonzero(np.diff(np.sign(values)))[0]
    assert len(changes) > 0
    np.testing.assert_allclose(drawn, k[changes], atol=2 * k[1])
    named = [float(t.get_text().split()[0]) for t in axes.texts]
    np.testing.assert_allclose(named, [1 / zero for zero in drawn], rtol=5e-3)
    # Where no zero lies below the Nyquist frequency, the axis goes on to the first.
    if changes.size and k[changes[0]] > 0.5 / voxel_size:
        assert axes.get_xlim()[1] > 0.5 / voxel_size


def test_the_upper_axis_marks_the_resolution_of_the_lower(
    specimen: Specimen, field: SimulatedField
) -> None:
    figure = draw_spectra(specimen, field)
    save(figure)
    for axes in figure.axes:
        (upper,) = axes.child_axes
        ticks = upper.get_xticks()
        assert len(ticks) >= 4
        for tick, label in zip(ticks, upper.get_xticklabels(), strict=True):
            assert tick == pytest.approx(1.0 / float(label.get_text()))


def test_spectra_of_a_noise_free_field_have_one_panel(
    make_recipe: MakeRecipe, phantom: Phantom
) -> None:
    quiet = prepare_specimen(make_recipe(snr=None), [phantom("rod")])
    figure = draw_spectra(quiet, simulate_field(quiet, "train", 0))
    assert len(figure.axes) == 1
    assert "noise-free" in figure.get_suptitle()
    save(figure)


def test_a_band_that_is_cut_off_is_drawn_without_a_warning(
    make_recipe: MakeRecipe, phantom: Phantom
) -> None:
    recipe = make_recipe(snr_stage="aitom", snr=(0.05, 0.05))
    cut = prepare_specimen(recipe, [phantom("rod")])
    save(draw_spectra(cut, simulate_field(cut, "train", 0)))


def test_the_montage_shows_the_middle_of_field_classes_and_instances(
    specimen: Specimen, field: SimulatedField
) -> None:
    figure = draw_simulated_field(specimen, field)
    save(figure)
    assert len(figure.axes) == 8
    depth, height, _ = field.density.shape
    for volume, top, bottom in zip(
        (field.density, field.tomogram.numpy()), figure.axes[:2], figure.axes[4:6], strict=True
    ):
        np.testing.assert_array_equal(top.images[0].get_array(), volume[depth // 2])
        np.testing.assert_array_equal(bottom.images[0].get_array(), volume[:, height // 2])
    for axes, place in ((figure.axes[2], depth // 2), (figure.axes[3], depth // 2)):
        mask = np.ma.getmaskarray(axes.images[0].get_array())
        np.testing.assert_array_equal(mask, field.owners[place] == 0)
    class_of_owner = np.concatenate([[0], field.scene.class_ids])
    shown = figure.axes[2].images[0].get_array()
    expected = class_of_owner[field.owners[depth // 2]]
    np.testing.assert_array_equal(shown[~shown.mask] + 1, expected[expected > 0])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert tuple(names) == specimen.classes
    # The legend's colours are those of the panel.
    image = figure.axes[2].images[0]
    for number, patch in enumerate(figure.legends[0].get_patches()):
        np.testing.assert_allclose(image.cmap(image.norm(number)), patch.get_facecolor())
    assert f"{len(field.scene)} particles" in figure.get_suptitle()


def test_the_montage_of_a_tomogram_counts_the_particles_inside(specimen: Specimen) -> None:
    shape = (18, 28, 24)
    tomogram = simulate_tomogram(surround(specimen, shape), shape, 0)
    figure = draw_tomogram(specimen, tomogram, "tomo_000")
    save(figure)
    assert figure.get_suptitle().startswith(f"tomo_000: {len(tomogram.class_ids)} particles")
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array(), tomogram.data[9])


@pytest.mark.parametrize("wide", [True, False])
def test_the_histograms_hold_every_field_and_name_the_means(
    field: SimulatedField, wide: bool
) -> None:
    generator = np.random.default_rng(0)
    asked = np.exp(generator.uniform(*np.log([0.01 if wide else 0.8, 1.0]), 40))
    records = [
        field.record.model_copy(
            update={
                "requested_snr": snr, "snr": 1.1 * snr, "snr_reconstruction": 0.9 * snr,
                "snr_60": 20 * snr,
            }
        )
        for snr in asked.tolist()
    ]  # fmt: skip
    requested = (float(asked.min()), float(asked.max()))
    for stage in ("reconstruction", "projection"):
        figure = draw_snr(records, stage=stage, requested=requested)
        save(figure)
        assert [axes.get_xscale() == "log" for axes in figure.axes] == [
            wide,
            stage != "reconstruction" or wide,
        ]
        assert "40 fields" in figure.get_suptitle()
        assert "1.100 ± 0.000" in figure.get_suptitle()
        means = {
            match[1]: float(match[2])
            for axes in figure.axes
            for text in axes.get_legend().get_texts()
            if (match := re.match(r"(.*), mean (\S+)", text.get_text()))
        }
        expected = {"requested": 1.0, "measured": 1.1, "low-passed to 60 Å": 20.0}
        if stage == "projection":
            expected["full band"] = 0.9
        assert means.keys() == expected.keys()
        for name, factor in expected.items():
            assert means[name] == pytest.approx(factor * asked.mean(), rel=6e-3)


def test_every_field_asking_for_one_snr_is_drawn(field: SimulatedField) -> None:
    records = [field.record.model_copy(update={"requested_snr": 1.0})] * 3
    figure = draw_snr(records, stage="reconstruction", requested=(1.0, 1.0))
    save(figure)
    save(draw_snr(records[:1], stage="reconstruction", requested=(1.0, 1.0)))


def test_a_histogram_of_nothing_is_refused(field: SimulatedField) -> None:
    quiet = field.record.model_copy(update={"snr": None})
    with pytest.raises(ValueError, match="none of 2 fields has a measured SNR"):
        draw_snr([quiet, quiet], stage="reconstruction", requested=(1.0, 1.0))

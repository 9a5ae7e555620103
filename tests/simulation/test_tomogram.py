"""Whole tomograms: cropped from a wider field, with a truth that fits them voxel by voxel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cectflow.simulation.field import Specimen, simulate_field
from cectflow.simulation.imaging import noise_scale
from cectflow.simulation.optics import optics_of
from cectflow.simulation.tomogram import (
    Tomogram,
    check_tomogram_shape,
    simulate_tomogram,
    surround,
)

SHAPE = (24, 40, 36)


@pytest.fixture(scope="module")
def surrounded(specimen: Specimen) -> Specimen:
    return surround(specimen, SHAPE)


@pytest.fixture(scope="module")
def tomogram(surrounded: Specimen) -> Tomogram:
    return simulate_tomogram(surrounded, SHAPE, 0)


def low_pass(volume: NDArray[Any]) -> NDArray[Any]:
    k = np.meshgrid(*[np.fft.fftfreq(n) for n in volume.shape], indexing="ij")
    kept = np.sqrt(sum(f**2 for f in k)) < 0.2
    return np.fft.ifftn(np.fft.fftn(volume) * kept).real


def test_every_array_has_the_shape_asked_for(tomogram: Tomogram) -> None:
    for volume in (tomogram.data, tomogram.density, tomogram.classes, tomogram.instances):
        assert volume.shape == SHAPE
    assert tomogram.series is None


def test_the_field_is_wider_by_the_longest_structure(
    surrounded: Specimen, specimen: Specimen
) -> None:
    longest = max(grains.diameter for grains in specimen.beads) / specimen.recipe.voxel_size
    for whole, part in zip(surrounded.recipe.field_shape, SHAPE, strict=True):
        assert whole - part >= longest + 2


def test_opposite_faces_are_strangers(tomogram: Tomogram, specimen: Specimen) -> None:
    """In a periodic field the first slice continues the last one; here nothing does."""
    periodic = simulate_field(specimen, "test", 0).density
    for axis in range(3):
        for volume, alike in ((periodic, True), (tomogram.density, False)):
            ends = [np.take(volume, end, axis).ravel() for end in (0, -1)]
            assert bool(np.corrcoef(ends)[0, 1] > 0.5) is alike


def test_the_rows_are_the_particles_of_the_label_maps(
    tomogram: Tomogram, specimen: Specimen
) -> None:
    number = len(tomogram.class_ids)
    assert number > 5
    assert (tomogram.positions_zyx >= 0).all()
    assert (tomogram.positions_zyx <= np.array(SHAPE) - 1).all()
    owned = np.unique(tomogram.instances)
    assert owned.max() > number, "some reach in from beyond the faces"
    for row, (class_id, position) in enumerate(
        zip(tomogram.class_ids, tomogram.positions_zyx, strict=True)
    ):
        mine = np.argwhere(tomogram.instances == row + 1)
        if len(mine) == 0:  # all of it is nearer to its neighbours
            continue
        assert set(tomogram.classes[tomogram.instances == row + 1]) == {class_id}
        assert np.linalg.norm(mine.mean(axis=0) - position) < 4
    np.testing.assert_array_equal(tomogram.classes > 0, tomogram.instances > 0)
    assert set(np.unique(tomogram.classes)) <= set(range(len(specimen.classes) + 1))


def test_protein_is_dark(tomogram: Tomogram) -> None:
    smooth = low_pass(tomogram.data)
    assert smooth[tomogram.classes > 0].mean() < smooth[tomogram.classes == 0].mean()


def test_the_snr_of_the_recipe_holds_in_the_wider_field(
    tomogram: Tomogram, surrounded: Specimen, specimen: Specimen
) -> None:
    assert tomogram.record.snr is not None
    assert tomogram.record.snr == pytest.approx(1.0, rel=0.25)
    # A pixel of a tilt image has the same noise, the sum of what the voxels along its ray have.
    recipe = specimen.recipe
    again = surround(specimen, tuple(n - 8 for n in recipe.field_shape))
    optics = optics_of(
        again.recipe.field_shape, recipe.voxel_size, recipe.microscope, recipe.tilts, 4.0, "none"
    )
    own = optics_of(
        recipe.field_shape, recipe.voxel_size, recipe.microscope, recipe.tilts, 4.0, "none"
    )
    carried = noise_scale(again.expected_power, optics, 1.0, width=again.recipe.field_shape[2])
    first = noise_scale(specimen.expected_power, own, 1.0, width=recipe.field_shape[2])
    depths = [recipe.field_shape[0], again.recipe.field_shape[0]]
    assert carried / first == pytest.approx(np.sqrt(depths[0] / depths[1]), rel=0.05)


def test_the_same_index_gives_the_same_tomogram_and_another_another(
    tomogram: Tomogram, surrounded: Specimen
) -> None:
    again, other = (simulate_tomogram(surrounded, SHAPE, index) for index in (0, 1))
    np.testing.assert_array_equal(again.data, tomogram.data)
    np.testing.assert_array_equal(again.instances, tomogram.instances)
    assert not np.array_equal(other.density, tomogram.density)


def test_a_tilt_series_reconstructs_to_the_same_specimen(
    tomogram: Tomogram, surrounded: Specimen
) -> None:
    literal = simulate_tomogram(surrounded, SHAPE, 0, tilt_series=True)
    np.testing.assert_array_equal(literal.density, tomogram.density)
    assert literal.series is not None
    tilts = surrounded.recipe.tilts
    np.testing.assert_array_equal(literal.series.angles, tilts.angles)
    assert literal.series.projections.shape[:2] == (
        tilts.angles.size,
        surrounded.recipe.field_shape[1],
    )
    # Their noise is not the same; at low frequencies there is little of it.
    alike = np.corrcoef(low_pass(literal.data).ravel(), low_pass(tomogram.data).ravel())[0, 1]
    assert alike > 0.85
    # Signal and noise together have the variance of the fast path's.
    assert float(literal.data.std()) == pytest.approx(float(tomogram.data.std()), rel=0.15)


def test_without_noise_both_paths_are_one(specimen: Specimen) -> None:
    silent = specimen.recipe.model_copy(update={"snr": None})
    wide = surround(replace(specimen, recipe=silent), SHAPE)
    quick, literal = (simulate_tomogram(wide, SHAPE, 0, tilt_series=t) for t in (False, True))
    assert quick.record.snr is None
    assert np.corrcoef(quick.data.ravel(), literal.data.ravel())[0, 1] > 0.95


def test_a_tomogram_smaller_than_a_structure_is_refused(phantom: Any) -> None:
    structures = (phantom("rod"), phantom("barrel"))
    largest = max(structures, key=lambda structure: structure.extent)
    with pytest.raises(ValueError, match=f"smaller than {largest.name}.*expected at least"):
        check_tomogram_shape(structures, (200, 512, 8), 16.0)
    check_tomogram_shape(structures, (32, 32, 32), 16.0)

"""Recipes: the same one gives the same fields, targets are what their rows say, nothing leaks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize

from cectflow.dataset import open_dataset
from cectflow.shards import Subtomograms, check_dataset
from cectflow.simulation.beads import label_threshold, render_field
from cectflow.simulation.delivery import simulate_dataset
from cectflow.simulation.distractors import GOLD, MEMBRANE, Distractors, Junk
from cectflow.simulation.extraction import choose_targets, cut_cubes
from cectflow.simulation.field import (
    DrawnField,
    RenderedField,
    SimulatedField,
    Specimen,
    draw_field_optics,
    leave_out,
    prepare_specimen,
    simulate_field,
)
from cectflow.simulation.imaging import image_field, noise_scale
from cectflow.simulation.microscope import Microscope, TiltScheme
from cectflow.simulation.optics import optics_of
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.structure import Structure
from cectflow.subtomogram import cut, robust_statistics

Phantom = Callable[[str], Structure]
MakeRecipe = Callable[..., SimulationRecipe]
Array = NDArray[np.float64]


def with_recipe(specimen: Specimen, **changes: Any) -> Specimen:
    """The specimen under a changed recipe, with the seeds and expected power of its own."""
    return dataclasses.replace(specimen, recipe=specimen.recipe.model_copy(update=changes))


def image_again(specimen: Specimen, field: SimulatedField) -> tuple[Array, Array]:
    """Signal and noise whose sum is the tomogram of a field."""
    recipe = specimen.recipe
    split, index = field.record.field.split("-")
    draw = draw_field_optics(specimen, split, int(index))
    optics = optics_of(
        recipe.field_shape,
        recipe.voxel_size,
        draw.microscope,
        draw.tilts,
        draw.defoci_um,
        recipe.ctf_correction,
        shifts=draw.shifts,
        snr_stage=recipe.snr_stage,
    )
    signal = image_field(torch.from_numpy(field.density), optics, 0.0, torch.Generator())[0].numpy()
    return signal.astype(np.float64), field.tomogram.numpy().astype(np.float64) - signal


def cut_targets(specimen: Specimen, field: SimulatedField, seed: int) -> Subtomograms:
    """Subtomograms of a field that is at hand, with places drawn by a seed."""
    drawn = DrawnField(field.record.field, field.scene, None, field.draw, 0)
    rendered = RenderedField(drawn, field.density, None, field.owners, field.distractor_kinds)
    targets = choose_targets(specimen, rendered, seed)
    cubes = cut_cubes(field.tomogram, targets.centres, specimen.recipe.box).numpy()
    return Subtomograms(cubes, targets.voxel_labels, targets.instances, targets.rows)


# --- what is refused ------------------------------------------------------------------------------


def test_a_box_too_small_for_a_structure_is_refused_with_the_box_it_needs(
    phantom: Phantom, make_recipe: MakeRecipe
) -> None:
    cage = phantom("cage")
    needed = int(np.ceil((cage.extent + 2 * 8.0) / 16.0))
    with pytest.raises(
        ValueError,
        match=rf"cage is 275 Å across; a box of 16 .* room for 240 Å: use a box of {needed},",
    ):
        prepare_specimen(make_recipe(jitter=8.0), [phantom("rod"), cage])
    recipe = make_recipe(jitter=8.0, box=needed, occupancy=0.03)
    assert prepare_specimen(recipe, [phantom("rod"), cage]).classes == ("rod", "cage")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bead_spacing": 0.0}, "bead_spacing"),
        ({"blur": 10.8}, r"blur is 10\.8 Å: expected at least 0\.68 voxel, 10\.88 Å at 16 Å"),
        ({"snr": (0.0, 1.0)}, r"snr is \(0\.0, 1\.0\): expected 0 < lowest <= highest"),
        ({"snr": (-1.0, 1.0)}, r"snr is \(-1\.0, 1\.0\): expected 0 < lowest <= highest"),
        ({"snr": (1.0, 0.5)}, r"snr is \(1\.0, 0\.5\): .* or null for noise-free"),
        ({"box": 33}, r"box 33 is larger than the field \(32, 32, 32\)"),
        ({"fields": {}}, "expected at least one field in each split named"),
        ({"fields": {"train": 0}}, "expected at least one field in each split named"),
        ({"fields": {"training": 1}}, "train"),
        ({"occupancy": 0.5}, "occupancy"),
        ({"abundances": {"rod": -1.0}}, r"abundances is .* expected finite numbers of 0 or more"),
        ({"abundances": {"rod": float("nan")}}, r"expected finite numbers of 0 or more"),
        ({"keep_out": -1.0}, "keep_out"),
        (
            {"distractors": Distractors(vesicles=1.0, vesicle_radius=(100.0, 250.0))},
            r"distractors reach 547 Å across, the field only 512 Å",
        ),
        (
            {"independent": True, "box": 24},
            r"needs edges of at least 1\.6 times the box, 39 voxels",
        ),
        ({"independent": True, "targets_per_field": 3}, "an independent field has one target"),
        (
            {"junk": True, "distractors": Distractors(gold=1.0)},
            r"junk\.membrane is 0\.05, but distractors has none: .* or set junk\.membrane to 0",
        ),
        (
            {"junk": Junk(membrane=0.0)},
            r"junk\.gold is 0\.02, but distractors has none",
        ),
        ({"voltage": 300.0}, "voltage"),
        ({"num_optics": 0}, "num_optics"),
        ({"snr_stage": "camera"}, "snr_stage"),
        (
            {"snr_stage": "aitom", "ctf_correction": "wiener"},
            r"aitom with ctf_correction wiener .* expected none and white",
        ),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(
    make_recipe: MakeRecipe, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_recipe(**changes)


@pytest.mark.parametrize("voxel_size", [8.0, 10.0, 12.0, 13.48])
def test_the_blur_that_the_message_asks_for_is_accepted(
    make_recipe: MakeRecipe, voxel_size: float
) -> None:
    blur = round(0.68 * voxel_size, 4)
    assert make_recipe(voxel_size=voxel_size, blur=blur).blur == blur


def test_an_occupancy_that_cannot_be_packed_is_refused_before_any_field_is_made(
    phantom: Phantom, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe = make_recipe(occupancy=0.4, field_shape=(16, 16, 16))
    with pytest.raises(ValueError, match=r"occupancy 0\.4 was requested, 0\.\d+ could be packed"):
        simulate_dataset(recipe, [phantom("rod")], tmp_path / "data")
    assert not (tmp_path / "data").exists()


# --- seeds ----------------------------------------------------------------------------------------


def test_a_field_is_the_same_at_every_call(specimen: Specimen) -> None:
    first, again = (simulate_field(specimen, "train", 1) for _ in range(2))
    np.testing.assert_array_equal(first.tomogram, again.tomogram)
    np.testing.assert_array_equal(first.owners, again.owners)
    assert first.record == again.record


def test_a_field_states_the_statistics_of_its_tomogram(specimen: Specimen) -> None:
    field = simulate_field(specimen, "train", 1)
    record, values = field.record, field.tomogram.double().numpy()
    median, deviation = robust_statistics(values)
    assert record.median == pytest.approx(median, abs=1e-3 * deviation)
    assert record.robust_std == pytest.approx(deviation, rel=1e-3)
    assert record.mean == pytest.approx(values.mean(), abs=1e-5)


def test_no_two_fields_share_a_scene_or_noise(specimen: Specimen) -> None:
    keys = [("train", 0), ("train", 1), ("validation", 0), ("test", 0), ("test", 1)]
    fields = [simulate_field(specimen, *key) for key in keys]
    assert [field.record.field for field in fields] == [f"{name}-{i:05d}" for name, i in keys]
    noises = [image_again(specimen, field)[1].ravel() for field in fields]
    for (first, noise), (second, other) in combinations(zip(fields, noises, strict=True), 2):
        assert not np.isin(first.scene.positions_zyx, second.scene.positions_zyx).any()
        # 32,768 voxels, of which the wedge and the blur leave about 10,000 free.
        assert abs(np.corrcoef(noise, other)[0, 1]) < 0.05


def test_fields_do_not_depend_on_where_the_structures_are(
    phantom: Phantom, make_recipe: MakeRecipe, specimen: Specimen
) -> None:
    structures = [phantom(name) for name in specimen.classes]
    moved = make_recipe(structures=("/elsewhere/structures",), include=specimen.classes)
    assert prepare_specimen(moved, structures).recipe_digest == specimen.recipe_digest
    # What the files hold counts, and what they are called: classes are.
    for change in ({"digest": "0" * 64}, {"name": "another"}):
        changed = [dataclasses.replace(structures[0], **change), *structures[1:]]
        assert prepare_specimen(make_recipe(), changed).recipe_digest != specimen.recipe_digest


def test_another_recipe_seed_gives_other_fields(
    phantom: Phantom, make_recipe: MakeRecipe, specimen: Specimen
) -> None:
    structures = [phantom(name) for name in specimen.classes]
    other = prepare_specimen(make_recipe(seed=1), structures)
    again = prepare_specimen(make_recipe(), structures)
    assert other.recipe_digest != specimen.recipe_digest == again.recipe_digest
    assert torch.equal(again.expected_power, specimen.expected_power)
    first, second = (simulate_field(s, "train", 0).scene for s in (specimen, other))
    assert not np.isin(first.positions_zyx, second.positions_zyx).any()


RANDOMISED: dict[str, Any] = {
    "snr": (0.1, 10.0),
    "microscope": Microscope(
        defocus_um=(3.0, 5.0),
        amplitude_contrast=(0.05, 0.1),
        mtf=(0.4, 0.8),
        defocus_spread_um=0.1,
        astigmatism_um=(0.0, 0.2),
    ),
    "tilts": TiltScheme(step=6.0, thickness=(1000.0, 3000.0), alignment_jitter=(2.0, 6.0)),
}


def test_optics_and_snr_are_drawn_per_field_within_their_ranges(specimen: Specimen) -> None:
    varied = with_recipe(specimen, **RANDOMISED)
    records = [simulate_field(varied, "train", index).record for index in range(12)]
    requested = np.log10([record.requested_snr for record in records])
    # Uniform in the logarithm: about as many below 1 as above.
    assert ((requested >= -1) & (requested <= 1)).all()
    assert 2 <= (requested < 0).sum() <= 10
    ranges = {
        name: getattr(config, name)
        for config in (RANDOMISED["microscope"], RANDOMISED["tilts"])
        for name in config.drawn
    }
    for name, given in ranges.items():
        drawn = [record.drawn.get(name) for record in records]
        if isinstance(given, tuple):
            assert all(value is not None and given[0] <= value <= given[1] for value in drawn)
            assert np.ptp(np.array(drawn, float)) > 0.5 * (given[1] - given[0])
        else:
            assert set(drawn) == {given}
    assert [record.defocus_um for record in records] == [r.drawn["defocus_um"] for r in records]


def test_a_randomised_field_is_that_of_its_record(specimen: Specimen) -> None:
    varied = with_recipe(specimen, **RANDOMISED)
    field = simulate_field(varied, "train", 3)
    np.testing.assert_array_equal(field.tomogram, simulate_field(varied, "train", 3).tomogram)
    signal, noise = image_again(varied, field)
    assert field.record.snr == pytest.approx(signal.var() / noise.var(), rel=0.01)
    assert draw_field_optics(varied, "train", 3).numbers() == field.record.drawn


def test_fields_may_share_a_number_of_optics(specimen: Specimen) -> None:
    shared = with_recipe(specimen, **RANDOMISED, num_optics=3)
    draws = {draw_field_optics(shared, split, i) for split in ("train", "test") for i in range(20)}
    assert len(draws) == 3
    own = with_recipe(specimen, **RANDOMISED)
    assert len({draw_field_optics(own, "train", i) for i in range(20)}) == 20


# --- labels ---------------------------------------------------------------------------------------


def test_labels_know_nothing_of_the_microscope(specimen: Specimen) -> None:
    field = simulate_field(specimen, "train", 0)
    for changes in (
        {"snr": None},
        {"snr": (0.01, 0.01)},
        {"microscope": Microscope(defocus_um=(8.0, 8.0))},
        {"ctf_correction": "premultiplied"},
    ):
        other = simulate_field(with_recipe(specimen, **changes), "train", 0)
        np.testing.assert_array_equal(other.owners, field.owners)
        np.testing.assert_array_equal(other.density, field.density)
        assert not np.allclose(other.tomogram, field.tomogram)


def test_density_and_labels_are_those_of_the_scene(specimen: Specimen) -> None:
    recipe, field = specimen.recipe, simulate_field(specimen, "train", 0)
    grid: dict[str, float] = {"voxel_size": recipe.voxel_size, "sigma": recipe.blur}
    thresholds = [
        label_threshold(beads, volume_factor=recipe.label_volume, **grid)
        for beads in specimen.beads
    ]
    scene = field.scene
    density, owners = render_field(
        specimen.beads,
        scene.class_ids,
        scene.positions_zyx,
        scene.angles,
        shape=recipe.field_shape,
        thresholds=np.array(thresholds),
        **grid,
    )
    np.testing.assert_array_equal(field.density, density)
    np.testing.assert_array_equal(field.owners, owners)
    # Neighbours contest few voxels: together they are labelled as each would be alone.
    share = (owners > 0).mean()
    assert share == pytest.approx(recipe.label_volume * scene.occupancy, rel=0.1)


def test_labels_mark_bright_density_around_their_particle(specimen: Specimen) -> None:
    field = simulate_field(specimen, "train", 0)
    assert field.density[field.owners > 0].mean() > 5 * field.density[field.owners == 0].mean()
    for owner in np.unique(field.owners)[1:]:
        distance = np.argwhere(field.owners == owner) - field.scene.positions_zyx[owner - 1]
        distance -= 32 * np.round(distance / 32)
        radius = specimen.beads[field.scene.class_ids[owner - 1] - 1].diameter / 2 / 16.0
        assert np.linalg.norm(distance, axis=1).max() < radius + 2


# --- targets --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(0.0, None), (40.0, None), (16.0, 20)])
def targets(request: pytest.FixtureRequest, specimen: Specimen) -> tuple[Specimen, Subtomograms]:
    """Subtomograms of a field at a jitter and a largest number of targets."""
    jitter, largest = request.param
    jittered = with_recipe(specimen, jitter=jitter, targets_per_field=largest)
    return jittered, cut_targets(jittered, simulate_field(jittered, "train", 0), 3)


def test_instance_one_is_of_the_class_of_its_row(targets: tuple[Specimen, Subtomograms]) -> None:
    specimen, content = targets
    assert content.voxel_labels is not None
    assert content.instances is not None
    assert len(content.rows) >= 20
    classes = content.rows["rlnClassNumber"].to_numpy()
    names = [specimen.classes[class_id - 1] for class_id in classes]
    assert content.rows["cectflowClassName"].tolist() == names
    for labels, instances, class_id in zip(
        content.voxel_labels, content.instances, classes, strict=True
    ):
        assert (instances == 1).sum() > 0
        assert (labels[instances == 1] == class_id).all()
        # Neighbours are numbered without gaps, and each is of one class.
        assert np.unique(instances).tolist() == list(range(instances.max() + 1))
        for instance in range(1, instances.max() + 1):
            assert len(np.unique(labels[instances == instance])) == 1
        np.testing.assert_array_equal(labels == 0, instances == 0)


def test_labels_and_instances_are_those_of_the_owners(
    targets: tuple[Specimen, Subtomograms],
) -> None:
    """Neighbours are numbered from 2 in the order of the scene; cubes wrap around the field."""
    specimen, content = targets
    assert content.voxel_labels is not None
    assert content.instances is not None
    field = simulate_field(specimen, "train", 0)
    class_of_owner = np.concatenate([[0], field.scene.class_ids])
    centres = content.rows[[f"cectflowCentre{axis}" for axis in "ZYX"]].to_numpy()
    assert ((centres < 8) | (centres > 24)).any(), "some cubes are meant to wrap around"
    for centre, labels, instances in zip(
        centres, content.voxel_labels, content.instances, strict=True
    ):
        steps = [(place - 8 + np.arange(16)) % 32 for place in centre]
        owners = field.owners[np.ix_(*steps)]
        np.testing.assert_array_equal(labels, class_of_owner[owners])
        (target,) = np.unique(owners[instances == 1])
        neighbours = np.setdiff1d(owners, [0, target])
        expected = np.zeros_like(owners)
        expected[owners == target] = 1
        for number, neighbour in enumerate(neighbours, start=2):
            expected[owners == neighbour] = number
        np.testing.assert_array_equal(instances, expected)


def test_targets_lie_within_the_jitter_of_the_box_centre(
    targets: tuple[Specimen, Subtomograms],
) -> None:
    specimen, content = targets
    recipe = specimen.recipe
    # At the centre of its cube an unjittered particle is still off by up to half a voxel.
    limit = recipe.jitter / recipe.voxel_size + 0.5
    columns = content.rows[[f"cectflowCentre{axis}" for axis in "ZYX"]].to_numpy()
    positions = simulate_field(specimen, "train", 0).scene.positions_zyx
    offsets = columns[:, None] - positions
    nearest = np.abs(offsets).max(axis=2).min(axis=1)
    assert (nearest <= limit).all()
    if recipe.jitter:
        assert nearest.max() > recipe.jitter / recipe.voxel_size * 0.8


def test_cubes_are_cut_where_their_rows_say(targets: tuple[Specimen, Subtomograms]) -> None:
    specimen, content = targets
    field = simulate_field(specimen, "train", 0)
    for row in range(0, len(content.rows), 5):
        z, y, x = (int(content.rows[f"cectflowCentre{axis}"][row]) for axis in "ZYX")
        centre = content.cubes[row, 8, 8, 8]
        assert centre == pytest.approx(float(field.tomogram[z % 32, y % 32, x % 32]), rel=1e-3)


def test_no_more_targets_than_asked_for(specimen: Specimen) -> None:
    field = simulate_field(specimen, "train", 0)
    everything = cut_targets(specimen, field, 0)
    assert len(everything.rows) == len(field.scene)
    few = with_recipe(specimen, targets_per_field=5)
    chosen, others = (cut_targets(few, field, seed).rows for seed in (0, 1))
    assert len(chosen) == len(others) == 5
    assert chosen["rlnCoordinateX"].tolist() != others["rlnCoordinateX"].tolist()


# --- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("snr_stage", ["reconstruction", "projection", "aitom"])
def test_the_measured_snr_is_on_average_the_one_asked_for(
    phantom: Phantom, make_recipe: MakeRecipe, snr_stage: str
) -> None:
    recipe = make_recipe(snr=(0.5, 0.5), snr_stage=snr_stage, field_shape=(24, 24, 24))
    specimen = prepare_specimen(recipe, [phantom("ring"), phantom("rod")])
    fields = [simulate_field(specimen, "train", index) for index in range(50)]
    in_reconstruction = np.array([field.record.snr_reconstruction for field in fields])
    for field, reported in zip(fields[:8], in_reconstruction[:8], strict=True):
        signal, noise = image_again(specimen, field)
        assert reported == pytest.approx(signal.var() / noise.var(), rel=2e-3)
    at_stage = np.array([field.record.snr for field in fields])
    assert at_stage.mean() == pytest.approx(0.5, rel=0.05)
    if snr_stage == "reconstruction":
        np.testing.assert_allclose(at_stage, in_reconstruction, rtol=1e-6)
    elif snr_stage == "aitom":  # three quarters and more of its noise are cut away
        assert in_reconstruction.mean() > 1.5 * at_stage.mean()


def test_without_an_snr_the_tomogram_is_the_signal(specimen: Specimen) -> None:
    field = simulate_field(with_recipe(specimen, snr=None), "train", 0)
    signal, noise = image_again(specimen, field)
    assert np.abs(noise).max() < 1e-6 * np.abs(signal).max()
    assert field.record.snr is None
    assert field.record.requested_snr is None


def test_the_noise_is_as_strong_in_a_sparse_field_as_in_a_crowded_one(specimen: Specimen) -> None:
    variances = {}
    for occupancy in (0.03, 0.12):
        changed = with_recipe(specimen, occupancy=occupancy)
        pairs = [image_again(changed, simulate_field(changed, "train", i)) for i in range(4)]
        variances[occupancy] = np.mean([[v.var() for v in pair] for pair in pairs], axis=0)
    (sparse_signal, sparse_noise), (signal, noise) = variances.values()
    assert signal > 3 * sparse_signal
    # The sampling error of a variance over four fields is 1 %.
    assert sparse_noise == pytest.approx(noise, rel=0.05)


def test_the_noise_scale_is_that_of_the_recipes_power_not_of_the_field(specimen: Specimen) -> None:
    recipe = specimen.recipe
    optics = optics_of(
        recipe.field_shape,
        recipe.voxel_size,
        recipe.microscope,
        recipe.tilts,
        4.0,
        recipe.ctf_correction,
    )
    factor = noise_scale(specimen.expected_power, optics, 1.0, width=recipe.field_shape[2])
    unit = image_field(
        torch.zeros(recipe.field_shape), optics, factor, torch.Generator().manual_seed(0)
    )[1].var()
    for index in range(3):
        noise = image_again(specimen, simulate_field(specimen, "test", index))[1]
        assert noise.var() == pytest.approx(float(unit), rel=0.1)


# --- leaks ----------------------------------------------------------------------------------------


def describe(cubes: Array) -> Array:
    """What a cube tells without its shapes: variance, total power and mean."""
    flat = cubes.reshape(len(cubes), -1)
    return np.stack([flat.var(axis=1), (flat**2).mean(axis=1), flat.mean(axis=1)], axis=1)


def accuracy_of_regression(features: Array, classes: NDArray[np.int64], fit: Any) -> float:
    """Accuracy of a multinomial logistic regression on the cubes it was not fitted to."""
    features = (features - features[fit].mean(axis=0)) / features[fit].std(axis=0)
    # With squares, so that a class in the middle can be told from those on either side.
    design = np.column_stack([np.ones(len(features)), features, features**2])
    truth, num_classes = np.eye(classes.max() + 1)[classes], classes.max() + 1

    def loss(flat: Array) -> tuple[float, Array]:
        logits = design[fit] @ flat.reshape(-1, num_classes)
        logits -= logits.max(axis=1, keepdims=True)
        shares = np.exp(logits)
        shares /= shares.sum(axis=1, keepdims=True)
        entropy = -np.log((shares * truth[fit]).sum(axis=1)).mean()
        gradient = design[fit].T @ (shares - truth[fit]) / len(truth[fit]) + 2e-3 * flat.reshape(
            -1, num_classes
        )
        return float(entropy + 1e-3 * (flat**2).sum()), gradient.ravel()

    start = np.zeros(design.shape[1] * num_classes)
    weights = minimize(loss, start, jac=True, method="L-BFGS-B").x.reshape(-1, num_classes)
    guesses = (design[~fit] @ weights).argmax(axis=1)
    return float((guesses == classes[~fit]).mean())


@dataclasses.dataclass(frozen=True)
class Parts:
    """Cubes of many fields in parts: what they are made of, and whose they are."""

    signal: Array
    noise: Array
    density: Array
    classes: NDArray[np.int64]
    fit: NDArray[np.bool_]
    """Of the fields to which a classifier is fitted, two thirds of them."""

    def accuracy(self, cubes: Array) -> float:
        """Of a classifier that sees what :func:`describe` says of these cubes."""
        return accuracy_of_regression(describe(cubes), self.classes, self.fit)

    @property
    def error(self) -> float:
        """Standard error of an accuracy at chance."""
        return float(np.sqrt(2 / 9 / (~self.fit).sum()))


def cut_parts(specimen: Specimen, num_fields: int) -> Parts:
    recipe, parts, classes, fit = specimen.recipe, [], [], []
    for index in range(num_fields):
        field = simulate_field(specimen, "train", index)
        volumes = (*image_again(specimen, field), field.density.astype(np.float64))
        rows = cut_targets(specimen, field, index).rows
        centres = rows[[f"cectflowCentre{axis}" for axis in "ZYX"]].to_numpy()
        parts.append([cut(volume, centres, recipe.box, periodic=True) for volume in volumes])
        classes.append(rows["rlnClassNumber"].to_numpy(np.int64) - 1)
        fit.append(np.full(len(rows), index % 3 > 0))
    signal, noise, density = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Parts(signal, noise, density, np.concatenate(classes), np.concatenate(fit))


@pytest.fixture(scope="module")
def crowded(specimen: Specimen) -> Parts:
    """Cubes of rod, ring and barrel, 167 to 622 kDa, at an SNR of 0.5 to 1."""
    return cut_parts(with_recipe(specimen, snr=(0.5, 1.0)), 45)


@pytest.fixture(scope="module")
def unequal(phantom: Phantom, make_recipe: MakeRecipe) -> Parts:
    """Cubes of rod, barrel and boulder, 167 to 3303 kDa: sizes that show in a cube's signal."""
    recipe = make_recipe(box=20, field_shape=(36, 36, 36), snr=(0.5, 1.0))
    structures = [phantom(name) for name in ("rod", "barrel", "boulder")]
    return cut_parts(prepare_specimen(recipe, structures), 45)


def test_variance_and_power_of_a_cube_hardly_tell_its_class(crowded: Parts) -> None:
    # Chance is 1/3. Three standard errors are 0.06; the rest is left to the signal itself.
    assert crowded.accuracy(crowded.signal + crowded.noise) < 1 / 3 + 0.1


@pytest.mark.parametrize("parts", ["crowded", "unequal"])
def test_noise_alone_tells_no_class(parts: str, request: pytest.FixtureRequest) -> None:
    cubes: Parts = request.getfixturevalue(parts)
    assert cubes.accuracy(cubes.noise) < 1 / 3 + 4 * cubes.error


def test_noise_scaled_cube_by_cube_would_tell(unequal: Parts) -> None:
    # What the test above is there to catch: the SNR as requested in each cube by itself.
    power = [part.reshape(len(part), -1).var(axis=1) for part in (unequal.signal, unequal.noise)]
    scaled = unequal.noise * np.sqrt(power[0] / power[1])[:, None, None, None]
    assert unequal.accuracy(scaled) > 1 / 3 + 4 * unequal.error


def test_noise_adds_nothing_to_what_the_signal_tells(unequal: Parts) -> None:
    with_noise = unequal.accuracy(unequal.signal + unequal.noise)
    assert with_noise < unequal.accuracy(unequal.signal) + 3 * unequal.error


@pytest.mark.parametrize("parts", ["crowded", "unequal"])
def test_noise_does_not_know_how_crowded_a_cube_is(
    parts: str, request: pytest.FixtureRequest
) -> None:
    cubes: Parts = request.getfixturevalue(parts)
    crowding = cubes.density.reshape(len(cubes.density), -1).mean(axis=1)
    variance = cubes.noise.reshape(len(cubes.noise), -1).var(axis=1)
    signal = cubes.signal.reshape(len(cubes.signal), -1).var(axis=1)
    # Cubes of a field overlap and share its draw of the SNR: fewer are independent than there are.
    assert abs(np.corrcoef(crowding, variance)[0, 1]) < 0.15
    assert np.corrcoef(crowding, signal)[0, 1] > 0.3


# --- what fields hold besides ---------------------------------------------------------------------

CROWD = Distractors(
    vesicles=1.5, vesicle_radius=(70.0, 110.0), sheets=0.3, gold=2.0, gold_diameter=(60.0, 100.0)
)


@pytest.fixture(scope="module")
def foreign(phantom: Phantom, make_recipe: MakeRecipe) -> Specimen:
    """Ring and rod among membranes and gold, with a class of junk."""
    junk = Junk(membrane=0.3, gold=0.1, empty=0.2)
    recipe = make_recipe(distractors=CROWD, junk=junk, jitter=8.0, occupancy=0.06)
    return prepare_specimen(recipe, [phantom("ring"), phantom("rod")])


def test_abundances_of_unknown_or_no_structures_are_refused(
    phantom: Phantom, make_recipe: MakeRecipe
) -> None:
    structures = [phantom("rod"), phantom("ring")]
    for abundances, message in (
        ({"rods": 1.0}, "abundances names rods: not among the structures, which are rod, ring"),
        ({"rod": 0.0, "ring": 0.0}, "abundances is 0 for all of rod, ring: expected one above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_specimen(make_recipe(abundances=abundances), structures)
    only = prepare_specimen(make_recipe(abundances={"rod": 0.0}), structures)
    assert set(simulate_field(only, "train", 0).scene.class_ids.tolist()) == {2}


def test_distractors_are_in_the_density_but_not_in_the_labels(foreign: Specimen) -> None:
    seen = set()
    for index in range(4):
        field = simulate_field(foreign, "train", index)
        scene, kinds = field.scene, field.distractor_kinds
        seen |= set(np.unique(kinds).tolist())
        particles, owners = render_field(
            foreign.beads,
            scene.class_ids,
            scene.positions_zyx,
            scene.angles,
            shape=(32, 32, 32),
            voxel_size=16.0,
            sigma=11.0,
            thresholds=foreign.thresholds,
        )
        np.testing.assert_array_equal(owners, field.owners)
        foreign_density = field.density - particles
        if (kinds == GOLD).any():
            assert foreign_density[kinds == GOLD].mean() > 5 * particles.max()
        if (kinds == MEMBRANE).any():
            assert foreign_density[kinds == MEMBRANE].mean() > 0.5
    assert seen == {0, MEMBRANE, GOLD}


def test_the_snr_is_that_of_the_particles(phantom: Phantom, make_recipe: MakeRecipe) -> None:
    structures = [phantom("ring"), phantom("rod")]
    asked = {"snr": (0.5, 0.5), "occupancy": 0.08, "seed": 3}
    specimen = prepare_specimen(make_recipe(distractors=CROWD, **asked), structures)
    plain = prepare_specimen(make_recipe(**asked), structures)
    # Not at the lowest frequencies: particles crowd where membranes leave room.
    power, plain_power = (s.expected_power[4:12, 4:12, 4:12].mean() for s in (specimen, plain))
    assert float(power) == pytest.approx(float(plain_power), rel=0.2)
    fields = [simulate_field(specimen, "train", index) for index in range(12)]
    reported = np.array([field.record.snr for field in fields])
    assert reported.mean() == pytest.approx(0.5, rel=0.08)
    with_all = []
    for field in fields:
        signal, noise = image_again(specimen, field)
        with_all.append(signal.var() / noise.var())
    assert np.mean(with_all) > 2 * reported.mean(), "gold and membranes would swamp it"


def test_junk_is_the_last_class_and_has_no_target(foreign: Specimen) -> None:
    assert foreign.classes == ("ring", "rod", "junk")
    num_particles, num_junk = 0, 0
    for index in range(6):
        field = simulate_field(foreign, "train", index)
        content = cut_targets(foreign, field, index)
        assert content.voxel_labels is not None
        assert content.instances is not None
        is_junk = content.rows["rlnClassNumber"].to_numpy() == 3
        assert (content.rows["cectflowClassName"] == "junk").tolist() == is_junk.tolist()
        num_particles, num_junk = num_particles + (~is_junk).sum(), num_junk + is_junk.sum()
        assert ((content.instances == 1).any(axis=(1, 2, 3)) == ~is_junk).all()
        assert content.voxel_labels.max() <= 2
        # In the middle of a cube of junk there is a distractor, or nothing.
        kinds = cut(
            field.distractor_kinds,
            content.rows[[f"cectflowCentre{axis}" for axis in "ZYX"]].to_numpy(),
            16,
            periodic=True,
        )
        middle = slice(8 - 2, 8 + 3)
        blocks = np.stack([kinds, content.voxel_labels])[:, is_junk, middle, middle, middle]
        assert ((blocks[0, :, 2, 2, 2] > 0) | ~blocks[:, :].any(axis=(0, 2, 3, 4))).all()
    # The shares add up to 0.6; fields without gold, or without a membrane, give less.
    assert 0.3 < num_junk / num_particles <= 0.65


def test_independent_fields_have_one_target_each_and_share_shards(
    phantom: Phantom, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    structures = [phantom("ring"), phantom("rod")]
    recipe = make_recipe(
        independent=True, fields_per_shard=4, fields={"train": 10, "test": 3}, jitter=16.0,
        field_shape=(26, 26, 26), occupancy=0.08,
    )  # fmt: skip
    manifest = simulate_dataset(recipe, structures, tmp_path / "a").manifest
    assert not check_dataset(tmp_path / "a")
    assert manifest.planned_shards == {"train": 3, "validation": 0, "test": 1}
    assert [len(shard.fields) for shard in manifest.shards["train"]] == [4, 4, 2]
    assert manifest.count("train") == 10
    names = [record.field for record in manifest.field_records("train")]
    assert names == [f"train-{index:05d}" for index in range(10)]
    assert min(record.num_particles or 0 for record in manifest.field_records("train")) >= 3
    whole = recipe.model_copy(update={"fields_per_shard": None})
    assert (whole.shards_of("train"), whole.fields_of("train", 0)) == (1, range(10))
    # Which shard a field is in does not change it, nor do other workers.
    specimen = prepare_specimen(recipe, structures)
    rows = open_dataset(tmp_path / "a").split("train").rows
    for index in (0, 9):
        field = simulate_field(specimen, "train", index)
        position = rows[[f"rlnCoordinate{axis}" for axis in "ZYX"]].to_numpy(np.float64)[index]
        np.testing.assert_allclose(position, field.scene.positions_zyx[0], atol=1e-4)
        centre = rows[[f"cectflowCentre{axis}" for axis in "ZYX"]].to_numpy()[index]
        assert np.abs(centre - 13).max() <= 1 + 1  # the jitter is one voxel, and whole voxels


def test_independent_junk_comes_in_its_share(foreign: Specimen) -> None:
    changes = {"independent": True, "field_shape": (26, 26, 26), "jitter": 0.0}
    alone = with_recipe(foreign, **changes, snr=None)
    counts = []
    for index in range(60):
        content = cut_targets(alone, simulate_field(alone, "train", index), index)
        assert len(content.rows) == 1
        counts.append(int(content.rows["rlnClassNumber"][0] == 3))
    # 0.6 in 1.6, less where a field has no gold or no membrane; four standard deviations.
    assert 0.6 / 1.6 - 4 * np.sqrt(0.25 / 60) - 0.1 < np.mean(counts) < 0.6 / 1.6 + 0.25
    assert 0 < sum(counts) < 60


# --- the dataset ----------------------------------------------------------------------------------


def test_a_dataset_is_complete_sound_and_the_same_again(
    phantom: Phantom, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    structures = [phantom("rod"), phantom("ring")]
    recipe = make_recipe(jitter=8.0, field_shape=(24, 24, 24), fields={"train": 2, "test": 1})
    first = simulate_dataset(recipe, structures, tmp_path / "a", commit="abc")
    assert not check_dataset(tmp_path / "a")
    assert first.manifest.is_complete
    assert first.manifest.classes == ("rod", "ring")
    assert SimulationRecipe.model_validate_json(recipe.model_dump_json()) == recipe
    again = simulate_dataset(recipe, structures, tmp_path / "b")
    assert again.manifest.content_digest() == first.manifest.content_digest()


def test_a_simulation_resumes_where_it_was_stopped(
    phantom: Phantom, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    structures = [phantom("rod"), phantom("ring")]
    recipe = make_recipe(field_shape=(24, 24, 24), fields={"train": 2})
    whole = simulate_dataset(recipe, structures, tmp_path).manifest
    kept = tmp_path / "train" / "00000.mrcs"
    before = kept.stat().st_mtime_ns
    for path in (tmp_path / "train").glob("00001*"):
        path.unlink()
    shards = {**whole.shards, "train": whole.shards["train"][:1]}
    whole.model_copy(update={"shards": shards}).write(tmp_path)
    resumed = simulate_dataset(recipe, structures, tmp_path)
    assert kept.stat().st_mtime_ns == before
    assert not check_dataset(tmp_path)
    assert resumed.manifest.content_digest() == whole.content_digest()


def test_a_folder_of_another_dataset_is_refused(
    phantom: Phantom, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    structures = [phantom("rod")]
    recipe = make_recipe(field_shape=(16, 16, 16), fields={"train": 1})
    simulate_dataset(recipe, structures, tmp_path / "a")
    other = recipe.model_copy(update={"seed": 1})
    with pytest.raises(FileExistsError, match="holds another dataset: give another folder"):
        simulate_dataset(other, structures, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="is not empty: give another folder"):
        simulate_dataset(recipe, structures, tmp_path / "b")


def test_a_dataset_with_junk_is_sound(
    phantom: Phantom, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    structures = [phantom("rod"), phantom("ring")]
    recipe = make_recipe(
        field_shape=(24, 24, 24), fields={"train": 3}, fields_per_shard=2, occupancy=0.05,
        distractors=Distractors(sheets=1.0, gold=2.0), junk=True,
    )  # fmt: skip
    manifest = simulate_dataset(recipe, structures, tmp_path).manifest
    assert manifest.classes == ("rod", "ring", "junk")
    assert not check_dataset(tmp_path)
    assert SimulationRecipe.model_validate_json(recipe.model_dump_json()) == recipe


# --- structures left out ----------------------------------------------------------------------


def test_what_is_left_out_is_in_no_field_and_all_else_is_as_before(specimen: Specimen) -> None:
    without = leave_out(specimen, ["ring"])
    assert without.classes == specimen.classes == ("rod", "ring", "barrel")
    assert without.left_out == ("ring",)
    assert without.recipe_digest != specimen.recipe_digest
    assert leave_out(leave_out(specimen, ["ring"]), ["rod"]).left_out == ("rod", "ring")
    noise = []
    for kind in (specimen, without):
        fields = [simulate_field(kind, "train", index) for index in range(6)]
        found = {int(i) for field in fields for i in field.scene.class_ids}
        assert found == ({1, 2, 3} if kind is specimen else {1, 3})
        assert np.mean([field.record.occupancy for field in fields]) == pytest.approx(0.1, rel=0.15)
        noise.append(np.mean([field.record.noise_std for field in fields]))
    # The noise is set by the signal of all structures; without them it must not be less.
    assert noise[1] == pytest.approx(noise[0], rel=0.02)


def test_leaving_out_all_or_strangers_is_refused(specimen: Specimen) -> None:
    assert leave_out(specimen, []) is specimen
    with pytest.raises(ValueError, match="cannot leave out cage: the structures are rod, ring"):
        leave_out(specimen, ["cage"])
    with pytest.raises(ValueError, match="without rod, ring, barrel no structure is left"):
        leave_out(specimen, ["barrel", "rod", "ring"])


def test_a_folder_of_other_splits_is_refused(
    phantom: Phantom, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    structures = [phantom("rod"), phantom("barrel")]
    made = simulate_dataset(make_recipe(), structures, tmp_path / "data", splits=["test"])
    assert made.manifest.planned_shards == {"test": 1}
    with pytest.raises(FileExistsError, match="holds another dataset"):
        simulate_dataset(make_recipe(), structures, tmp_path / "data")

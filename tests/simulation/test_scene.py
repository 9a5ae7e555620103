"""Scenes: particles do not overlap, fill what was asked for, and are where the table says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from cectflow.simulation.beads import Beads, coarse_grain, rotate_beads
from cectflow.simulation.distractors import HALF_MEMBRANE, Distractors, GoldBead, Vesicle
from cectflow.simulation.phantoms import list_phantoms
from cectflow.simulation.scene import (
    CELL,
    Scene,
    _fits,
    _pack_bits,
    _rotate_zyx,
    _search_everywhere,
    _turn_into_cells,
    _uniform,
    pack_scene,
)
from cectflow.simulation.structure import Structure

Phantom = Callable[[str], Structure]

VOXEL_SIZE = 13.0


@pytest.fixture(scope="module")
def beads(phantom: Phantom) -> tuple[Beads, ...]:
    return tuple(coarse_grain(phantom(name)) for name in ("rod", "ring", "barrel"))


def pack(
    beads: tuple[Beads, ...],
    seed: int,
    *,
    shape: tuple[int, int, int] = (32, 36, 40),
    occupancy: float = 0.1,
    **changes: Any,
) -> Scene:
    return pack_scene(
        beads,
        shape=shape,
        voxel_size=VOXEL_SIZE,
        occupancy=occupancy,
        generator=np.random.default_rng(seed),
        **changes,
    )


def place_beads(
    scene: Scene, beads: tuple[Beads, ...]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Positions in Å of all beads of a scene, from its table alone, and their particles."""
    placed = [
        rotate_beads(beads[class_id - 1], angles) + position * VOXEL_SIZE
        for class_id, position, angles in zip(
            scene.class_ids, scene.positions_zyx, scene.angles, strict=True
        )
    ]
    return np.concatenate(placed), np.repeat(np.arange(len(scene)), [len(p) for p in placed])


def test_single_beads_pack_as_close_as_half_a_cell_and_no_closer() -> None:
    dot = Beads("dot", np.zeros((1, 3), np.float32), np.ones(1, np.float32), 1.0, CELL**3)
    nearest = []
    for seed in range(40):
        scene = pack_scene(
            (dot,),
            shape=(10, 9, 8),
            voxel_size=CELL,
            occupancy=0.08,
            generator=np.random.default_rng(seed),
        )
        tree = cKDTree(scene.positions_zyx, boxsize=(10, 9, 8))
        nearest.append(tree.query(scene.positions_zyx, k=2, p=np.inf)[0][:, 1].min())
    assert 0.5 < min(nearest) < 0.65


@pytest.mark.parametrize(("seed", "occupancy"), [(0, 0.12), (1, 0.12), (2, 0.25)])
def test_beads_of_two_particles_stay_half_a_cell_apart(
    beads: tuple[Beads, ...], seed: int, occupancy: float
) -> None:
    # A particle takes the cells floor(u) and floor(u) + 1 along each axis about its beads u. A
    # later bead v is refused where round(v) is taken: along some axis |v - u| > 1/2 cell.
    shape = (32, 36, 40)
    scene = pack(beads, seed, shape=shape, occupancy=occupancy)
    points, particle = place_beads(scene, beads)
    edges = np.array(shape) * VOXEL_SIZE
    num_cells = np.round(edges / CELL)
    tree = cKDTree(np.mod(points / (edges / num_cells), num_cells), boxsize=num_cells)

    def count_contacts(distance: float) -> int:
        pairs = tree.query_pairs(distance, p=np.inf, output_type="ndarray")
        return int((particle[pairs[:, 0]] != particle[pairs[:, 1]]).sum())

    assert count_contacts(0.5 - 1e-6) == 0
    # They do touch: a pose other than the packed one would show.
    assert count_contacts(2.0) > 50


def test_the_pose_that_was_packed_is_that_of_the_angles(beads: tuple[Beads, ...]) -> None:
    for turn in Rotation.random(5, rng=np.random.default_rng(0)):
        packed = _rotate_zyx(beads[0].positions_zyx.astype(np.float64), turn.as_quat())
        angles = turn.as_euler("ZYZ", degrees=True)
        np.testing.assert_allclose(rotate_beads(beads[0], angles), packed, atol=1e-9)


def test_occupancy_is_on_average_what_was_asked_for(beads: tuple[Beads, ...]) -> None:
    field_volume = float(np.prod(np.array((32, 36, 40)) * VOXEL_SIZE))
    scenes = [pack(beads, seed) for seed in range(12)]
    for scene in scenes:
        volume = sum(beads[i - 1].molecular_volume for i in scene.class_ids)
        assert scene.occupancy == pytest.approx(volume / field_volume)
    assert np.mean([scene.occupancy for scene in scenes]) == pytest.approx(0.1, rel=0.05)


def test_one_large_structure_among_small_ones_is_no_shortfall(phantom: Phantom) -> None:
    # A capsid has half the volume asked for: left out as the last, it leaves a large gap.
    beads = tuple(coarse_grain(phantom(name)) for name in ("ring", "rod", "capsid"))
    reached = [pack(beads, seed, shape=(32, 32, 32), occupancy=0.1).occupancy for seed in range(40)]
    assert np.mean(reached) == pytest.approx(0.1, rel=0.05)
    assert min(reached) < 0.8 * 0.1, "the case this test is about did not come up"


def test_classes_come_equally_often(beads: tuple[Beads, ...]) -> None:
    counts = sum(np.bincount(pack(beads, seed).class_ids, minlength=4)[1:] for seed in range(25))
    total = counts.sum()
    # Four standard deviations of a fair draw.
    np.testing.assert_allclose(counts / total, 1 / 3, atol=4 * np.sqrt(2 / 9 / total))


def test_orientations_and_positions_are_uniform(beads: tuple[Beads, ...]) -> None:
    scenes = [pack(beads, seed) for seed in range(25)]
    angles = np.concatenate([scene.angles for scene in scenes])
    positions = np.concatenate([scene.positions_zyx / (32, 36, 40) for scene in scenes])
    assert positions.min() >= 0
    assert positions.max() < 1
    # Uniform on the sphere: the cosine of the tilt is uniform on [-1, 1]. Rot and psi are whole
    # turns. The tolerance is four standard deviations of a mean over independent particles.
    shares = {
        "position": positions,
        "rot": (angles[:, 0] + 180) / 360,
        "tilt": (1 + np.cos(np.deg2rad(angles[:, 1]))) / 2,
        "psi": (angles[:, 2] + 180) / 360,
    }
    for name, share in shares.items():
        mean, square = share.mean(axis=0), (share**2).mean(axis=0)
        np.testing.assert_allclose(mean, 1 / 2, atol=4 * np.sqrt(1 / 12 / len(share)), err_msg=name)
        np.testing.assert_allclose(
            square, 1 / 3, atol=4 * np.sqrt(4 / 45 / len(share)), err_msg=name
        )


def test_the_same_seed_gives_the_same_scene(beads: tuple[Beads, ...]) -> None:
    first, again, other = pack(beads, 7), pack(beads, 7), pack(beads, 8)
    np.testing.assert_array_equal(first.positions_zyx, again.positions_zyx)
    np.testing.assert_array_equal(first.angles, again.angles)
    np.testing.assert_array_equal(first.class_ids, again.class_ids)
    assert first.positions_zyx[0].tolist() != other.positions_zyx[0].tolist()


def test_an_unreachable_occupancy_is_refused_with_what_was_reached(
    beads: tuple[Beads, ...],
) -> None:
    with pytest.raises(
        ValueError, match=r"occupancy 0\.4 was requested, 0\.[23]\d\d could be packed into"
    ):
        pack(beads, 0, shape=(16, 16, 16), occupancy=0.4)


def test_an_occupancy_of_less_than_one_particle_is_refused(beads: tuple[Beads, ...]) -> None:
    expected = beads[2].molecular_volume / (16 * VOXEL_SIZE) ** 3
    with pytest.raises(
        ValueError, match=rf"less than one barrel: expected at least {expected:.2g}, or a larger"
    ):
        pack(beads, 0, shape=(16, 16, 16), occupancy=0.05)


def test_a_structure_larger_than_the_field_is_refused(beads: tuple[Beads, ...]) -> None:
    with pytest.raises(ValueError, match=r"rod is 172 Å across, .* 156 Å: .* at least 14 voxels"):
        pack(beads, 0, shape=(12, 32, 32))


# --- dense packing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("barrel", "bowl", "discs", "dumbbell", "elbow", "mallet", "ring", "rod", "shell"),
        list_phantoms(),
    ],
)
def test_a_fifth_of_the_volume_is_filled_whatever_the_mix(
    phantom: Phantom, names: tuple[str, ...]
) -> None:
    beads = tuple(coarse_grain(phantom(name)) for name in names)
    scenes = [pack(beads, seed, shape=(48, 52, 48), occupancy=0.2) for seed in range(3)]
    drawn = [sum(beads[i - 1].molecular_volume for i in scene.class_ids) for scene in scenes]
    assert np.mean(drawn) / (48 * 52 * 48 * VOXEL_SIZE**3) == pytest.approx(0.2, rel=0.05)
    assert min(scene.occupancy for scene in scenes) > 0.185


@pytest.mark.parametrize("shape", [(12, 17, 23), (20, 9, 64), (11, 20, 70)])
def test_the_search_finds_a_place_exactly_where_there_is_one(shape: tuple[int, int, int]) -> None:
    generator = np.random.default_rng(0)
    cell = np.full(3, CELL)
    state = np.array([7], np.uint64)
    positions = generator.uniform(-35, 35, (6, 3)).astype(np.float32)
    turned = _turn_into_cells(positions, np.array([0.0, 0.0, 0.0, 1.0]), cell)
    outcomes = []
    for share in (0.2, 0.8, 0.8, 0.9, 0.9, 0.97):
        taken = generator.random(shape) < share
        again, centre = state.copy(), np.zeros(3)
        found = _search_everywhere(turned, centre, _pack_bits(taken), shape[2], state)
        shift = np.array([_uniform(again), _uniform(again), _uniform(again)])
        places = [place for place in np.ndindex(shape) if _fits(turned, place + shift, taken)]
        assert found == bool(places)
        if found:
            np.testing.assert_allclose(np.mod(centre, 1), shift, atol=1e-12)
            assert tuple(np.floor(centre).astype(int)) in places
        outcomes.append(found)
    assert set(outcomes) == {True, False}


# --- what a recipe may ask for --------------------------------------------------------------------


def test_abundances_are_relative_numbers_of_particles(beads: tuple[Beads, ...]) -> None:
    abundances = np.array([3.0, 0.0, 1.0])
    scenes = [pack(beads, seed, abundances=abundances) for seed in range(40)]
    counts = sum(np.bincount(scene.class_ids, minlength=4)[1:] for scene in scenes)
    assert counts[1] == 0
    share = counts[0] / counts.sum()
    # Four standard deviations of the draw; the last particle of a scene, which may be left out
    # if it is large, is one of about 25.
    assert share == pytest.approx(0.75, abs=4 * np.sqrt(0.75 * 0.25 / counts.sum()))
    mean = np.mean([scene.occupancy for scene in scenes])
    assert mean == pytest.approx(0.1, rel=0.04)


@pytest.mark.parametrize("keep_out", [12.0, 30.0])
def test_particles_keep_their_distance(beads: tuple[Beads, ...], keep_out: float) -> None:
    shape = (32, 36, 40)
    scene = pack(beads, 1, shape=shape, occupancy=0.08, keep_out=keep_out)
    points, particle = place_beads(scene, beads)
    edges = np.array(shape) * VOXEL_SIZE
    tree = cKDTree(np.mod(points, edges), boxsize=edges)
    cell = edges / np.round(edges / CELL)

    def nearest(distance: float) -> float:
        pairs = tree.query_pairs(distance, output_type="ndarray")
        pairs = pairs[particle[pairs[:, 0]] != particle[pairs[:, 1]]]
        away = points[pairs[:, 0]] - points[pairs[:, 1]]
        away -= edges * np.round(away / edges)
        # Beyond the half cell that lies between two particles' beads anyway.
        return float(np.linalg.norm(np.maximum(np.abs(away) - cell / 2, 0), axis=1).min())

    assert keep_out - 1e-6 <= nearest(keep_out + 40) < keep_out + CELL


def test_a_target_is_at_the_centre_of_its_crowded_field(beads: tuple[Beads, ...]) -> None:
    offset = np.array([0.25, -0.4, 0.1])
    scenes = [pack(beads, seed, target_offset=offset) for seed in range(30)]
    for scene in scenes:
        np.testing.assert_allclose(scene.positions_zyx[0], np.array([16, 18, 20]) + offset)
    targets = np.bincount([scene.class_ids[0] for scene in scenes], minlength=4)[1:]
    assert targets.min() >= 3
    assert np.mean([scene.occupancy for scene in scenes]) == pytest.approx(0.1, rel=0.05)
    points, particle = place_beads(scenes[0], beads)
    edges = np.array((32, 36, 40)) * VOXEL_SIZE
    tree = cKDTree(np.mod(points, edges), boxsize=edges)
    pairs = tree.query_pairs(0.49 * CELL, p=np.inf, output_type="ndarray")
    assert (particle[pairs[:, 0]] == particle[pairs[:, 1]]).all()


def test_particles_leave_membranes_and_gold_free(beads: tuple[Beads, ...]) -> None:
    asked = Distractors(vesicles=1.0, vesicle_radius=(100.0, 130.0), gold=2.0)
    kinds = set()
    for seed in range(6):
        scene = pack(beads, seed, distractors=asked, occupancy=0.08, keep_out=5.0)
        edges = np.array((32, 36, 40)) * VOXEL_SIZE
        points, _ = place_beads(scene, beads)
        for distractor in scene.distractors:
            assert isinstance(distractor, Vesicle | GoldBead)
            kinds.add(type(distractor))
            away = points - distractor.centre_zyx
            away -= edges * np.round(away / edges)
            distance = np.linalg.norm(away, axis=1) - distractor.radius
            if isinstance(distractor, Vesicle):
                distance = np.abs(distance) - HALF_MEMBRANE
            assert distance.min() > 5.0
    assert kinds == {Vesicle, GoldBead}


def test_an_occupancy_that_distractors_and_distance_prevent_says_so(
    beads: tuple[Beads, ...],
) -> None:
    asked = Distractors(vesicles=8.0, vesicle_radius=(80.0, 120.0))
    with pytest.raises(
        ValueError,
        match=r"0\.\d+ could be packed .* lower the occupancy, the keep-out distance or the number "
        r"of distractors or enlarge the field",
    ):
        pack(beads, 0, occupancy=0.3, keep_out=30.0, distractors=asked)

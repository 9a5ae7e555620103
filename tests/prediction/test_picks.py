"""Bodies are told apart, measured alike whatever the blocks, and become picks with a score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist

from cectflow.particles import read_particles
from cectflow.placement import coordinates_zyx
from cectflow.prediction.picks import Bodies, PickRules, find_bodies, make_picks, suppress

VOXEL = 10.0
ANY_SIZE = PickRules(min_volume=0.0, radius=0.0)


def draw(
    shape: tuple[int, int, int],
    balls: list[tuple[tuple[float, float, float], float, float, int]],
) -> tuple[np.ndarray, np.ndarray]:
    """Probability and label of balls: centre, radius in voxels, probability, label."""
    probabilities = np.full(shape, 0.01, np.float32)
    labels = np.ones(shape, np.int16)
    grid = np.indices(shape)
    for centre, radius, probability, label in balls:
        inside = sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= radius**2
        probabilities[inside], labels[inside] = probability, label
    return probabilities, labels


def find(
    balls: list[tuple[tuple[float, float, float], float, float, int]],
    rules: PickRules = ANY_SIZE,
    shape: tuple[int, int, int] = (32, 48, 48),
    core: int = 128,
) -> Bodies:
    return find_bodies(*draw(shape, balls), 2, VOXEL, rules, core=core)


def test_separate_balls_are_found_at_their_centres_with_their_size_label_and_score() -> None:
    bodies = find([((10, 12, 14), 5, 0.9, 1), ((20, 34, 30), 7, 0.7, 2)])
    np.testing.assert_allclose(bodies.centres_zyx, [[10, 12, 14], [20, 34, 30]], atol=0.05)
    np.testing.assert_allclose(bodies.voxels, 4 / 3 * np.pi * np.array([5, 7]) ** 3, rtol=0.05)
    np.testing.assert_allclose(bodies.scores, [0.9, 0.7], atol=1e-3)
    assert bodies.labels.tolist() == [1, 2]


@pytest.mark.parametrize("distance", [10.0, 9.0])
def test_touching_balls_are_two_particles(distance: float) -> None:
    centres = [(16.0, 24.0, 20.0), (16.0, 24.0, 20.0 + distance)]
    bodies = find([(centre, 5, 0.9, 1) for centre in centres])
    assert len(bodies) == 2
    found = bodies.centres_zyx[np.argsort(bodies.centres_zyx[:, 2])]
    np.testing.assert_allclose(found, centres, atol=0.6)


def test_a_small_ball_on_a_large_one_is_a_particle_of_its_own() -> None:
    bodies = find([((16, 24, 18), 9, 0.9, 1), ((16, 24, 31), 4, 0.9, 2)])
    assert sorted(bodies.labels.tolist()) == [1, 2]
    assert bodies.voxels.max() > 8 * bodies.voxels.min()


def test_rods_rings_and_shells_are_one_particle_each() -> None:
    z, y, x = np.indices((40, 60, 60)) - np.array([20, 30, 30])[:, None, None, None]
    rod = (np.abs(x) < 20) & (z**2 + y**2 <= 16)
    ring = (np.hypot(y, x) - 12) ** 2 + z**2 <= 16
    shell = np.abs(np.sqrt(z**2 + y**2 + x**2) - 9) <= 2.5
    labels = np.ones(rod.shape, np.int16)
    for mask in (rod, ring, shell):
        probabilities = np.where(mask, 0.9, 0.05).astype(np.float32)
        bodies = find_bodies(probabilities, labels, 1, VOXEL, ANY_SIZE)
        assert len(bodies) == 1
        assert bodies.voxels[0] > 0.95 * mask.sum()
        np.testing.assert_allclose(bodies.centres_zyx, [[20, 30, 30]], atol=0.1)


def test_a_few_voxels_of_noise_are_no_particle() -> None:
    generator = np.random.default_rng(0)
    probabilities, labels = draw((32, 48, 48), [((16, 24, 24), 6, 0.9, 1)])
    probabilities[tuple(generator.integers(0, 32, (3, 40)))] = 0.95
    probabilities[16, 24, 24] = 0.0  # a pinhole
    assert len(find_bodies(probabilities, labels, 1, VOXEL, PickRules())) == 1


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), core=st.sampled_from([13, 20, 31]))
def test_blocks_do_not_show(seed: int, core: int) -> None:
    generator = np.random.default_rng(seed)
    shape = (36, 50, 44)
    balls = [
        (
            tuple(generator.uniform(0, shape)),
            generator.uniform(2.5, 5.0),
            generator.uniform(0.6, 1.0),
            1,
        )
        for _ in range(25)
    ]
    whole, pieces = find(balls, shape=shape), find(balls, shape=shape, core=core)
    assert len(whole) > 5
    np.testing.assert_allclose(pieces.centres_zyx, whole.centres_zyx, atol=1e-9)
    np.testing.assert_array_equal(pieces.voxels, whole.voxels)


def test_rules_leave_out_the_small_the_doubtful_and_the_too_close() -> None:
    balls = [
        ((10.0, 12.0, 12.0), 4.0, 0.9, 1),
        ((10.0, 12.0, 36.0), 2.0, 0.95, 1),
        ((24.0, 34.0, 14.0), 4.0, 0.6, 1),
        ((24.0, 34.0, 23.0), 4.0, 0.8, 1),
    ]
    assert len(find(balls)) == 4
    assert len(find(balls, PickRules(min_volume=100_000.0, radius=0.0))) == 3
    assert len(find(balls, PickRules(min_volume=0.0, max_volume=100_000.0, radius=0.0))) == 1
    assert len(find(balls, PickRules(min_volume=0.0, radius=0.0, min_score=0.7))) == 3
    kept = find(balls, PickRules(min_volume=0.0, radius=95.0))
    assert kept.scores.min() > 0.7, "of two neighbours the better one stays"
    assert len(kept) == 3
    assert len(find(balls, PickRules(probability=0.85, min_volume=0.0, radius=0.0))) == 2


def test_a_threshold_taken_from_a_pick_keeps_that_pick() -> None:
    """Picks are written with six decimals, and thresholds are read from what is written."""
    for share in np.linspace(0.6, 0.9, 20):
        ball = [((10.0, 12.0, 12.0), 4.0, float(share), 1)]
        written = float(find(ball).scores.round(6)[0])
        assert len(find(ball, PickRules(min_volume=0.0, radius=0.0, min_score=written))) == 1


def test_nothing_is_found_in_nothing() -> None:
    assert len(find([])) == 0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), radius=st.floats(0.05, 0.6))
def test_suppression_keeps_the_best_and_covers_the_rest(seed: int, radius: float) -> None:
    generator = np.random.default_rng(seed)
    positions, scores = generator.random((30, 3)), generator.random(30)
    kept = suppress(positions, scores, radius)
    assert kept[0] == scores.argmax()
    assert len(kept) < 2 or pdist(positions[kept]).min() >= radius
    for row in set(range(30)) - set(kept.tolist()):
        near = np.linalg.norm(positions[kept] - positions[row], axis=1) < radius
        assert scores[kept][near].max() >= scores[row]


def test_picks_are_written_as_relion_reads_them_and_say_how_large_their_voxels_are(
    tmp_path: Path,
) -> None:
    bodies = find([((10, 12, 14), 5, 0.9, 1), ((20, 34, 30), 7, 0.7, 2)])
    table = make_picks(
        bodies, bodies.centres_zyx, ("ribosome", "proteasome"), tomogram="t1", voxel_size=VOXEL,
        volumes=bodies.voxels * VOXEL**3, model="m/1",
    )  # fmt: skip
    table.write(tmp_path / "picks.star")
    rows = read_particles(tmp_path / "picks.star").rows
    assert rows["cectflowClassName"].tolist() == ["ribosome", "proteasome"]
    assert rows["rlnCoordinateX"].tolist() == pytest.approx([14, 30], abs=0.05)
    assert rows["rlnCoordinateZ"].tolist() == pytest.approx([10, 20], abs=0.05)
    assert (rows["cectflowScore"] == rows["rlnAutopickFigureOfMerit"]).all()
    assert set(rows["rlnPixelSize"]) == {VOXEL}
    assert set(rows["rlnTomoName"]) == {"t1"}
    back = coordinates_zyx(
        read_particles(tmp_path / "picks.star"), voxel_size=VOXEL, shape=(32, 48, 48)
    )
    np.testing.assert_allclose(back, bodies.centres_zyx, atol=1e-6)

"""Distractors: densities that theory gives, places that particles leave free, junk between them."""

from __future__ import annotations

from typing import Any

import gemmi
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from cectflow.simulation import distractors as module
from cectflow.simulation.atoms import ICE_POTENTIAL, VOLT_PER_FACTOR
from cectflow.simulation.distractors import (
    GOLD,
    MEMBRANE,
    Distractor,
    Distractors,
    GoldBead,
    Sheet,
    Vesicle,
    choose_junk,
    draw_distractors,
    render_distractors,
)

SHAPE = (40, 44, 48)
VOXEL_SIZE = 10.0
EDGES = np.array(SHAPE) * VOXEL_SIZE
SIGMA = 8.0
FLAT = Sheet((1, 0, 0), 0.25, ())
WAVY = Sheet((1, 0, 1), 0.4, ((0.05, 0, 1, 0, 0.3), (0.03, 0, 0, 1, 2.0)))
CELL = np.array([10.0, 11.0, 9.6])
CELLS = (40, 40, 50)


def render(
    *distractors: Distractor, **changes: Any
) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    grid: dict[str, Any] = {"shape": SHAPE, "voxel_size": VOXEL_SIZE, "sigma": SIGMA}
    return render_distractors(distractors, **(grid | changes))


def distances_to(centre: tuple[float, float, float]) -> NDArray[np.float64]:
    """Of each voxel from a point, the nearest of its periodic copies."""
    away = np.moveaxis(np.indices(SHAPE), 0, -1) * VOXEL_SIZE - centre
    away -= EDGES * np.round(away / EDGES)
    return np.asarray(np.linalg.norm(away, axis=-1))


def nearest_on(sheet: Sheet, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Distance in Å of points from a sheet, found by brute force on samples of the surface."""
    y, x = np.meshgrid(np.arange(0, EDGES[1], 4.0), np.arange(0, EDGES[2], 4.0), indexing="ij")
    # All sheets here have n_z = 1 and no wave along z: the height is an explicit function.
    height = sheet.offset - sheet.normal[1] * y / EDGES[1] - sheet.normal[2] * x / EDGES[2]
    for a, m_z, m_y, m_x, phase in sheet.waves:
        assert m_z == 0
        height += a * np.cos(2 * np.pi * (m_y * y / EDGES[1] + m_x * x / EDGES[2]) + phase)
    surface = np.stack([height * EDGES[0], y, x], axis=-1).reshape(-1, 3)
    tree = cKDTree(np.mod(surface, EDGES), boxsize=EDGES)
    return np.asarray(tree.query(np.mod(points, EDGES))[0])


# --- densities ------------------------------------------------------------------------------------


def test_potentials_follow_from_atoms_and_volumes() -> None:
    def factor(formula: dict[str, int]) -> float:
        return sum(n * sum(gemmi.Element(name).c4322.a) for name, n in formula.items())

    # Nagle and Tristram-Nagle 2000, DPPC at 50 °C: area 64 Å², volumes 1232 and 319 Å³.
    heads = VOLT_PER_FACTOR * factor({"C": 10, "H": 18, "N": 1, "O": 8, "P": 1})
    tails = VOLT_PER_FACTOR * factor({"C": 30, "H": 62})
    assert pytest.approx((heads - ICE_POTENTIAL * 319) / 64, rel=0.01) == module.HEAD_EXCESS
    assert pytest.approx(tails / (1232 - 319) - ICE_POTENTIAL, rel=0.01) == module.TAIL_EXCESS
    assert pytest.approx(2 * (1232 - 319) / 64, rel=0.01) == module.TAIL_THICKNESS
    atoms = 19.3 / 196.97 * 0.602214
    gold = VOLT_PER_FACTOR * atoms * factor({"Au": 1}) - ICE_POTENTIAL
    assert pytest.approx(gold, rel=0.01) == module.GOLD_EXCESS


def test_a_gold_bead_is_a_blurred_ball_across_the_fields_edge() -> None:
    bead = GoldBead((3.0, 219.0, 477.0), 60.0)
    density, kinds = render(bead)
    fine = 2.0  # each voxel as five samples along each axis, blurred on the fine grid
    samples = np.stack(np.meshgrid(*[np.arange(-120, 120, fine)] * 3, indexing="ij"), axis=-1)
    ball = (np.linalg.norm(samples, axis=-1) <= 60.0).astype(np.float64) * module.GOLD_EXCESS
    blurred = gaussian_filter(ball, SIGMA / fine)
    distance = distances_to(bead.centre_zyx)
    expected = np.interp(distance, np.arange(0, 120, fine), blurred[60:, 60, 60])
    np.testing.assert_allclose(density, expected, atol=0.02 * module.GOLD_EXCESS)
    np.testing.assert_array_equal(kinds == GOLD, distance <= 60.0)
    volume = 4 / 3 * np.pi * 60.0**3
    assert density.sum() * VOXEL_SIZE**3 == pytest.approx(module.GOLD_EXCESS * volume, rel=0.01)


def test_a_vesicle_holds_two_leaflets_about_a_thinner_core() -> None:
    vesicle = Vesicle((200.0, 210.0, 30.0), 150.0)
    density, kinds = render(vesicle, sigma=6.8)
    distance = distances_to(vesicle.centre_zyx)

    def mean(low: float, high: float) -> float:
        return float(density[(distance >= low) & (distance < high)].mean())

    middle, inner, outer = mean(148, 152), mean(129, 133), mean(167, 171)
    assert min(inner, outer) > 1.1 * middle
    assert middle > 5 * abs(mean(0, 90))
    assert mean(215, 400) < 1e-3
    assert (kinds[(distance > 130) & (distance < 170)] == MEMBRANE).all()
    assert not kinds[(distance < 120) | (distance > 180)].any()
    # All matter is there: heads and tails of two leaflets over the area of the sphere.
    half, area = module.TAIL_THICKNESS / 2, 4 * np.pi
    tails = area / 3 * ((150 + half) ** 3 - (150 - half) ** 3) * module.TAIL_EXCESS
    heads = sum(area * (150 + side * module.HEAD_DISTANCE / 2) ** 2 for side in (-1, 1))
    total = tails + heads * module.HEAD_EXCESS
    assert density.sum() * VOXEL_SIZE**3 == pytest.approx(total, rel=0.01)


def test_a_flat_sheet_is_a_large_vesicle_seen_from_near() -> None:
    distance = np.arange(0.0, 60.0, 1.0)
    flat = module._flat_bilayer(distance, SIGMA)
    sphere = Vesicle((0.0, 0.0, 0.0), 1e5)
    np.testing.assert_allclose(
        flat, module._radial_profile(1e5 + distance, sphere, SIGMA), atol=1e-3
    )


@pytest.mark.parametrize("sheet", [FLAT, WAVY])
def test_a_sheet_runs_periodically_through_the_field(sheet: Sheet) -> None:
    density, kinds = render(sheet)
    points = np.moveaxis(np.indices(SHAPE), 0, -1).reshape(-1, 3) * VOXEL_SIZE
    distance = nearest_on(sheet, points).reshape(SHAPE)
    expected = module._flat_bilayer(distance.ravel(), SIGMA).reshape(SHAPE)
    peak = expected.max()
    assert np.abs(density - expected).max() < 0.1 * peak
    assert np.sqrt(np.mean((density - expected) ** 2)) < 0.02 * peak
    assert (kinds[distance < 20] == MEMBRANE).all()
    assert not kinds[distance > 27].any()


def test_nothing_is_rendered_where_nothing_is() -> None:
    density, kinds = render()
    assert not density.any()
    assert not kinds.any()


# --- places ---------------------------------------------------------------------------------------


def draw(seed: int, keep_out: float = 0.0, **numbers: Any) -> tuple[Any, NDArray[np.bool_]]:
    taken = np.zeros(CELLS, np.bool_)
    drawn = draw_distractors(
        Distractors(**numbers),
        taken,
        CELL,
        keep_out=keep_out,
        generator=np.random.default_rng(seed),
    )
    return drawn, taken


@pytest.mark.parametrize("keep_out", [0.0, 15.0])
def test_no_bead_in_a_free_cell_is_in_a_distractor(keep_out: float) -> None:
    drawn, taken = draw(
        4, keep_out, vesicles=3.0, vesicle_radius=(60.0, 80.0), gold=3.0, gold_diameter=(50.0, 90.0)
    )
    assert {type(distractor) for distractor in drawn} == {Vesicle, GoldBead}
    generator = np.random.default_rng(0)
    points = np.argwhere(~taken) + generator.uniform(-0.5, 0.5, ((~taken).sum(), 3))
    edges = CELL * CELLS
    nearest = []
    for distractor in drawn:
        away = points * CELL - distractor.centre_zyx
        away -= edges * np.round(away / edges)
        distance = np.linalg.norm(away, axis=1) - distractor.radius
        is_gold = isinstance(distractor, GoldBead)
        nearest.append((distance if is_gold else np.abs(distance) - module.HALF_MEMBRANE).min())
    assert min(nearest) > keep_out
    assert min(nearest) < keep_out + np.linalg.norm(CELL)  # no more is taken than needed
    if not keep_out:
        lumen = next(d for d in drawn if isinstance(d, Vesicle))
        middle = np.round(np.array(lumen.centre_zyx) / CELL).astype(int) % CELLS
        assert not taken[tuple(middle)], "particles may fill a vesicle"


def test_no_bead_in_a_free_cell_is_in_a_sheet() -> None:
    taken = np.zeros(SHAPE, np.bool_)
    assert module._mark(WAVY, taken, np.full(3, VOXEL_SIZE), np.sqrt(75.0), write=True)
    points = np.argwhere(~taken) * VOXEL_SIZE
    points += np.random.default_rng(0).uniform(-5, 5, points.shape)
    # The distance from a wavy sheet is of first order: an Å or so.
    assert nearest_on(WAVY, points).min() > module.HALF_MEMBRANE - 1.5


def test_distractors_do_not_overlap_one_another() -> None:
    for seed in range(4):
        drawn, _ = draw(seed, sheets=0.5, vesicles=2.0, vesicle_radius=(50.0, 90.0), gold=6.0)
        parts = [render(part, shape=CELLS)[1] > 0 for part in drawn]
        assert len(parts) > 3
        assert np.sum(parts, axis=0).max() == 1


def test_numbers_are_poisson_about_their_mean_and_sizes_in_their_range() -> None:
    drawn = [draw(seed, gold=2.0, gold_diameter=(50.0, 70.0))[0] for seed in range(200)]
    counts = np.array([len(beads) for beads in drawn])
    # Four standard deviations of the mean of 200, and of its variance.
    assert counts.mean() == pytest.approx(2.0, abs=4 * np.sqrt(2 / 200))
    assert counts.var() == pytest.approx(2.0, abs=4 * np.sqrt((2 + 2 * 4) / 200))
    radii = np.array([bead.radius for beads in drawn for bead in beads])
    assert 25 <= radii.min() < 26
    assert 34 < radii.max() <= 35


def test_sheets_undulate_as_asked() -> None:
    heights = []
    for seed in range(60):
        for sheet in draw(seed, sheets=1.0, undulation=12.0)[0]:
            spacing = 1 / np.linalg.norm(np.array(sheet.normal) / (CELL * CELLS))
            heights.append(np.sqrt(sum(wave[0] ** 2 for wave in sheet.waves) / 2) * spacing)
    np.testing.assert_allclose(heights, 12.0, rtol=1e-6)


def test_a_field_without_room_leaves_distractors_out() -> None:
    drawn, _ = draw(0, vesicles=200.0, vesicle_radius=(90.0, 100.0))
    assert 2 < len(drawn) < 30


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vesicle_radius": (200.0, 100.0)}, r"vesicle_radius is \(200, 100\): expected 46\.6 <"),
        ({"vesicle_radius": (20.0, 100.0)}, r"vesicle_radius is \(20, 100\): expected 46\.6 <"),
        ({"gold_diameter": (0.0, 100.0)}, r"gold_diameter is \(0, 100\): expected 0 < lowest"),
        ({"gold": -1.0}, "gold"),
        ({"undulation": -1.0}, "undulation"),
        ({"vesicle": 1.0}, "vesicle"),
    ],
)
def test_distractors_that_make_no_sense_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distractors(**changes)


# --- junk -----------------------------------------------------------------------------------------


def junk(kind: Any, number: int, owners: NDArray[np.int32]) -> NDArray[np.float64]:
    drawn: tuple[Distractor, ...] = (FLAT, GoldBead((250.0, 100.0, 100.0), 40.0))
    return choose_junk(
        kind,
        number,
        owners=owners,
        kinds=render(*drawn)[1],
        distractors=drawn,
        voxel_size=VOXEL_SIZE,
        box=24,
        generator=np.random.default_rng(0),
    )


def test_junk_is_where_its_kind_is() -> None:
    owners = np.zeros(SHAPE, np.int32)
    owners[30, 10:30, 20:40] = 7
    membrane = junk("membrane", 30, owners)
    assert len(membrane) == 30
    assert np.abs(membrane[:, 0] - 10).max() <= 2  # the sheet lies at a quarter of 40 voxels
    gold = junk("gold", 5, owners)
    np.testing.assert_allclose(gold, [[25.0, 10.0, 10.0]])
    empty = junk("empty", 50, owners)
    assert len(empty) == 50
    matter = (owners > 0) | (render(FLAT, GoldBead((250.0, 100.0, 100.0), 40.0))[1] > 0)
    for centre in empty.astype(int):
        block = np.ix_(*[(c + np.arange(-3, 4)) % n for c, n in zip(centre, SHAPE, strict=True)])
        assert not matter[block].any()
    assert len(junk("empty", 10, np.ones(SHAPE, np.int32))) == 0

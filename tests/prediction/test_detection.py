"""Laws of matching picks with the truth, and the command that prints the figures."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cectflow.cli import main
from cectflow.flows.picks import evaluate_picks
from cectflow.particles import make_particle_rows, particles_from
from cectflow.placement import coordinate_columns
from cectflow.prediction.detection import Found, agree, best_threshold, compare_picks, match
from cectflow.volume import Volume
from cectflow.volume_writer import write_volume

RADIUS = 100.0


def spread(num: int, seed: int = 0) -> np.ndarray:
    """Places at least 200 Å apart."""
    generator = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(12)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    return 200.0 * generator.permutation(grid)[:num].astype(np.float64)


def found(positions: np.ndarray, name: str | list[str] = "a", scores: object = None) -> Found:
    names = [name] * len(positions) if isinstance(name, str) else name
    return Found(positions, tuple(names), None if scores is None else np.asarray(scores, float))


def test_perfect_picks_have_every_figure_one() -> None:
    truth = found(spread(40), ["a", "b"] * 20)
    for agreement in compare_picks([(truth, truth)], RADIUS).values():
        assert agreement.precision == agreement.recall == agreement.f1 == agreement.f4 == 1.0
        assert agreement.duplicates == 0
    assert set(compare_picks([(truth, truth)], RADIUS)) == {"any", "a", "b"}


def test_a_pick_hits_within_half_the_radius_and_not_beyond() -> None:
    truth = found(spread(10))
    for shift, hits in ((49.9, 10), (50.1, 0)):
        picks = found(truth.positions + np.array([shift, 0.0, 0.0]))
        assert agree(truth, picks, RADIUS).hits == hits


def test_a_duplicate_lowers_precision_and_not_recall_and_is_counted() -> None:
    truth = found(spread(20))
    twice = found(np.concatenate([truth.positions, truth.positions[:5] + 10.0]))
    agreement = agree(truth, twice, RADIUS)
    assert agreement.recall == 1.0
    assert agreement.precision == pytest.approx(20 / 25)
    assert agreement.duplicates == 5
    elsewhere = found(np.concatenate([truth.positions, truth.positions[:5] + 90.0]))
    assert agree(truth, elsewhere, RADIUS).duplicates == 0


def test_the_figures_are_the_textbooks() -> None:
    truth, picks = found(spread(10)), found(np.concatenate([spread(10)[:6], [[-500.0] * 3] * 2]))
    agreement = agree(truth, picks, RADIUS)
    precision, recall = 6 / 8, 6 / 10
    assert agreement.f1 == pytest.approx(2 * precision * recall / (precision + recall))
    expected = 17 * precision * recall / (16 * precision + recall)
    assert agreement.f4 == pytest.approx(expected)
    nothing = agree(truth, found(np.zeros((0, 3))), RADIUS)
    assert nothing.precision == nothing.recall == nothing.f4 == 0.0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), num_truth=st.integers(0, 5), num_picks=st.integers(0, 5))
def test_matching_is_the_best_of_all_one_to_one_choices(
    seed: int, num_truth: int, num_picks: int
) -> None:
    generator = np.random.default_rng(seed)
    truth, picks = generator.random((num_truth, 3)), generator.random((num_picks, 3))
    limit = 0.45
    distances = np.linalg.norm(truth[:, None] - picks[None], axis=2)
    slots = [*range(num_picks), *[-1] * num_truth]
    best = (0, 0.0)
    for order in set(permutations(slots, num_truth)):
        chosen = [distances[i, j] for i, j in enumerate(order) if j >= 0]
        if all(distance <= limit for distance in chosen):
            best = min(best, (-len(chosen), sum(chosen)))
    pairs = match(truth, picks, limit)
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs) == -best[0]
    assert distances[pairs[:, 0], pairs[:, 1]].sum() == pytest.approx(best[1])


def test_ten_thousand_picks_are_matched() -> None:
    generator = np.random.default_rng(0)
    truth = generator.uniform(0, 6000, (10_000, 3))
    picks = generator.permutation(truth + generator.normal(0, 10, truth.shape))
    agreement = agree(found(truth), found(picks), RADIUS)
    assert agreement.recall > 0.99


def test_ignored_classes_change_nothing() -> None:
    places = spread(60)
    big, small = places[:30], places[30:50]
    picks = np.concatenate([big[:25], places[50:54]])
    alone = agree(found(big), found(picks), RADIUS)
    truth = found(np.concatenate([big, small]), ["a"] * 30 + ["tiny"] * 20)
    with_small = found(
        np.concatenate([picks, small[:12], places[54:58]]), ["a"] * 41 + ["tiny"] * 4
    )
    assert agree(truth, with_small, RADIUS, {"tiny"}) == alone
    figures = compare_picks([(truth, with_small)], RADIUS, {"tiny"})
    assert set(figures) == {"any", "a"}
    assert figures["any"] == figures["a"] == alone
    assert agree(truth, with_small, RADIUS).particles == 50


def test_a_wrong_class_is_a_hit_of_any_and_a_miss_of_its_own() -> None:
    places = spread(4)
    figures = compare_picks(
        [(found(places, ["a", "a", "b", "b"]), found(places, ["a", "b", "b", "b"]))], RADIUS
    )
    assert figures["any"].f1 == 1.0
    assert (figures["a"].precision, figures["a"].recall) == (1.0, 0.5)
    assert (figures["b"].precision, figures["b"].recall) == (pytest.approx(2 / 3), 1.0)


def test_names_that_have_nothing_in_common_are_not_held_against_each_other() -> None:
    places = spread(4)
    truth = found(places, ["a", "a", "b", "b"])
    assert set(compare_picks([(truth, found(places, ["particle"] * 4))], RADIUS)) == {"any"}


def test_what_is_near_a_face_neither_counts_as_hit_nor_as_miss(tmp_path: Path) -> None:
    volume = tmp_path / "tomogram.mrc"
    write_volume(volume, Volume(np.zeros((20, 40, 60), np.float32), 10.0))
    inside, edge = [(10.0, 20.0, 30.0), (10.0, 12.0, 40.0)], [(10.0, 2.0, 30.0)]
    truth = write(tmp_path / "truth.star", np.array(inside + edge))
    # One particle is missed; of the false picks one is cut by a face and one is not.
    picks = write(
        tmp_path / "picks.star", np.array([inside[0], (10.0, 20.0, 57.0), (10.0, 28.0, 50.0)])
    )
    with_all = evaluate_picks(truth, picks, 40.0, tomogram=volume).agreements["any"]
    assert (with_all.particles, with_all.picks, with_all.hits) == (3, 3, 1)
    without = evaluate_picks(truth, picks, 40.0, border=50.0, tomogram=volume).agreements["any"]
    assert (without.particles, without.picks, without.hits) == (2, 2, 1)
    with pytest.raises(ValueError, match=r"--border is counted from .* faces: give --tomogram"):
        evaluate_picks(truth, picks, 40.0, border=50.0)


def test_the_best_threshold_leaves_out_the_false() -> None:
    places = spread(20)
    scores = np.concatenate([np.linspace(0.6, 0.9, 10), np.linspace(0.1, 0.5, 10)])
    threshold, agreement = best_threshold(
        [(found(places[:10]), found(places, "a", scores))], RADIUS
    )
    assert threshold == pytest.approx(0.6)
    assert agreement.f1 == 1.0


def write(path: Path, positions: np.ndarray, name: str = "t", **columns: object) -> Path:
    particles_from(make_particle_rows(positions, tomogram=name, **columns)).write(path)
    return path


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Truth without a voxel size, and picks at 10 Å of all but two of its particles."""
    places = spread(12) / 10.0
    truth = write(tmp_path / "truth.star", places, cectflowTrueClass=["a", "b"] * 6)
    picks = write(
        tmp_path / "picks.star", places[2:], "tomogram", cectflowClassName=["a", "b"] * 5,
        rlnPixelSize=[10.0] * 10, cectflowScore=np.linspace(0.5, 0.9, 10),
    )  # fmt: skip
    return truth, picks


def test_the_command_prints_a_table_and_json(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "picks", "--truth", str(files[0]), "--picks", str(files[1])]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--radius", "100"])
    assert not stop.value.code
    out = capsys.readouterr().out
    assert "precision" in out
    assert "0.833" in out
    with pytest.raises(SystemExit):
        main([*arguments, "--radius", "100", "--ignore", "b", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert set(content["classes"]) == {"any", "a"}
    assert content["classes"]["a"]["recall"] == pytest.approx(5 / 6)
    assert content["best_min_score"]["score"] == 0.5
    for further, message in (
        (["--radius", "0"], "positive number"),
        (["--radius", "100", "--ignore", "c"], "expected classes of the truth: a, b"),
        (["--radius", "100", "--ignore", "a", "--ignore", "b"], "left to find"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, *further])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_the_voxel_size_must_be_known(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--voxel-size in angstrom, or --tomogram"):
        evaluate_picks(files[0], files[0], 100.0)
    assert evaluate_picks(files[0], files[0], 100.0, voxel_size=10.0).agreements["any"].f1 == 1.0


def test_other_conventions_are_understood(files: tuple[Path, Path], tmp_path: Path) -> None:
    places = spread(12)[2:] / 10.0
    for name, convention in (("four", "relion4"), ("five", "relion5")):
        columns = coordinate_columns(
            places, convention, voxel_size=10.0, shape=(300, 300, 300), tilt_series_pixel_size=2.5
        )  # type: ignore[arg-type]
        rows = make_particle_rows(places, tomogram="t")[["rlnTomoName"]].assign(**columns)
        if convention == "relion5":
            rows = rows.assign(**{f"rlnTomoSize{axis}": 1200 for axis in "XYZ"})
        particles_from(rows).write(tmp_path / f"{name}.star")
        outcome = evaluate_picks(files[0], tmp_path / f"{name}.star", 100.0, voxel_size=10.0)
        assert outcome.agreements["any"].hits == 10


def test_tomograms_are_compared_by_name(tmp_path: Path) -> None:
    def both(path: Path, places: np.ndarray, names: list[str]) -> Path:
        rows = make_particle_rows(places, tomogram="x", rlnPixelSize=[10.0] * len(places))
        particles_from(rows.assign(rlnTomoName=names)).write(path)
        return path

    places = np.concatenate([spread(4), spread(4)]) / 10.0
    truth = both(tmp_path / "truth.star", places, ["one"] * 4 + ["two"] * 4)
    picks = both(tmp_path / "picks.star", places[:4], ["two"] * 4)
    outcome = evaluate_picks(truth, picks, 100.0).agreements["any"]
    assert (outcome.particles, outcome.picks, outcome.hits) == (8, 4, 4)
    strange = both(tmp_path / "strange.star", places[:4], ["three"] * 4)
    with pytest.raises(ValueError, match="'three', of which there is no truth: it has one, two"):
        evaluate_picks(truth, strange, 100.0)

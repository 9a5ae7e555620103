"""Folds hold homologous structures out together; comparisons are paired and count alike."""

from __future__ import annotations

import numpy as np
import pytest
from builders import CLASSES, write_dataset
from numpy.typing import NDArray

from cectflow.dataset import Selection, Split
from cectflow.learning.generalisation import compare_folds, make_folds
from cectflow.learning.scores import Evaluation, baseline_ball
from cectflow.recipe import GeneralisationRecipe

SMALL, LARGE = CLASSES
MASSES = {SMALL: 90.0, LARGE: 30.0}


@pytest.fixture(scope="module")
def test_split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return write_dataset(tmp_path_factory.mktemp("data") / "dataset").split("test")


def judged(split: Split, values: NDArray[np.float64]) -> Evaluation:
    return Evaluation({"foreground_iou": values}, split.class_ids, None, split.fields)


def test_homologous_structures_are_held_out_together_and_others_alone() -> None:
    structures = ("1oel", "1bxn", "3j9i", "1aon")
    assert make_folds(structures, [["3j9i", "6utj"], ["1aon", "1oel"]]) == (
        ("1oel", "1aon"), ("1bxn",), ("3j9i",),
    )  # fmt: skip
    assert make_folds(structures, []) == tuple((name,) for name in structures)


def test_one_group_of_all_is_refused() -> None:
    with pytest.raises(ValueError, match="expected two groups"):
        make_folds(("a", "b"), [["a", "b", "c"]])


def test_a_structure_in_two_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="names b twice"):
        GeneralisationRecipe(groups=(("a", "b"), ("b", "c")))


def test_each_structure_is_judged_by_the_network_that_never_saw_it(test_split: Split) -> None:
    small = test_split.class_ids == 1
    seen = judged(test_split, np.full(len(test_split), 0.8))
    unseen = {
        (SMALL,): judged(test_split, np.where(small, 0.6, 0.0)),
        (LARGE,): judged(test_split, np.where(small, 0.0, 0.4)),
    }
    rows, ratio, control = compare_folds(test_split, seen, unseen, seen, MASSES)
    assert [row.name for row in rows] == [LARGE, SMALL]  # by mass
    by_name = {row.name: row for row in rows}
    for name, expected in ((SMALL, 0.75), (LARGE, 0.5)):
        found = by_name[name].ratio
        assert found is not None
        assert found.value == pytest.approx(expected)
        assert found.low == pytest.approx(expected) == pytest.approx(found.high)
        again = by_name[name].control
        assert again is not None
        assert again.value == 1.0
    assert ratio is not None
    assert control is not None
    assert (ratio.value, control.value) == (pytest.approx(1.0 / 1.6), 1.0)


def test_structures_count_alike_however_many_cubes_they_have(test_split: Split) -> None:
    rows = np.flatnonzero((test_split.class_ids == 1) | (np.arange(len(test_split)) < 4))
    few = test_split.class_ids[rows]
    assert (few == 1).sum() > (few == 2).sum() > 0
    kept = _Kept(test_split, rows)
    seen = Evaluation({"foreground_iou": np.ones(len(rows))}, few, None, kept.fields)
    values = np.where(few == 1, 1.0, 0.5)
    unseen = {CLASSES: Evaluation({"foreground_iou": values}, few, None, kept.fields)}
    _, ratio, _ = compare_folds(kept, seen, unseen, None, MASSES)
    assert ratio is not None
    assert ratio.value == pytest.approx(0.75)


def test_a_structure_that_nobody_finds_has_no_ratio(test_split: Split) -> None:
    small = test_split.class_ids == 1
    seen = judged(test_split, np.where(small, 0.0, 0.5))
    rows, ratio, _ = compare_folds(test_split, seen, {CLASSES: seen}, None, MASSES)
    assert {row.name: row.ratio is None for row in rows} == {SMALL: True, LARGE: False}
    assert ratio is not None
    assert ratio.value == 1.0


def test_trivial_methods_are_fitted_to_each_structure(test_split: Split) -> None:
    seen = judged(test_split, np.ones(len(test_split)))
    rows, _, _ = compare_folds(test_split, seen, {CLASSES: seen}, None, MASSES)
    # Targets are balls of one radius for each class: the ball of its own is the truth.
    assert [row.ball for row in rows] == [1.0, 1.0]
    assert baseline_ball(test_split)[0] < 1.0


def test_a_structure_without_test_cubes_is_refused(test_split: Split) -> None:
    kept = _Kept(test_split, np.flatnonzero(test_split.class_ids == 1))
    seen = judged(kept, np.ones(len(kept)))
    with pytest.raises(ValueError, match=f"no test cube is about {LARGE}: give more test fields"):
        compare_folds(kept, seen, {CLASSES: seen}, None, MASSES)


def test_a_selection_is_a_source_of_its_own(test_split: Split) -> None:
    rows = np.array([7, 2, 5])
    selection = Selection(test_split, rows)
    assert len(selection) == 3
    batches = list(selection.batches(2))
    assert [len(batch) for batch in batches] == [2, 1]
    whole = test_split.read(rows)
    assert (batches[0].subtomograms == whole.subtomograms[:2]).all()
    assert batches[1].fields.tolist() == test_split.fields[rows[2:]].tolist()
    assert selection.manifest is test_split.manifest


class _Kept(Split):
    """A split that has only some of its subtomograms."""

    def __init__(self, split: Split, rows: NDArray[np.int64]) -> None:
        self.__dict__ = dict(vars(split))
        self.class_ids, self.fields = split.class_ids[rows], split.fields[rows]
        self._rows = rows
        self._whole = split

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: NDArray[np.int64]):  # type: ignore[no-untyped-def]
        return self._whole.read(self._rows[indices])

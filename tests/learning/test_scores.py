"""Scores follow their definitions, and their intervals come from fields."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import BOX, CLASSES, MemorySource, make_ball, make_manifest
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.segmentation import DiceScore

from cectflow.dataset import Batch
from cectflow.learning.scores import (
    Evaluation,
    LabelIou,
    SubtomogramIou,
    baseline_ball,
    baseline_threshold,
    baselines,
    bootstrap_ratio,
    bootstrap_score,
    evaluate,
    intersection_over_union,
)
from cectflow.learning.task import SemanticLabels, target_mask


def cube_of(*voxels: int) -> Tensor:
    """Cube of 2³ in which the numbered voxels are set."""
    cube = torch.zeros(8, dtype=torch.bool)
    cube[list(voxels)] = True
    return cube.reshape(1, 2, 2, 2)


@pytest.mark.parametrize(
    ("truth", "prediction", "expected"),
    [
        ((0, 1), (0, 1), 1.0),
        ((), (), 1.0),
        (range(8), range(8), 1.0),
        ((0, 1), (), 0.0),
        ((), (0, 1), 0.0),
        ((0, 1), (2, 3), 0.0),
        ((0, 1), (1, 2), 1 / 3),
        ((0, 1, 2, 3), (0, 1), 1 / 2),
        ((0,), range(8), 1 / 8),
    ],
)
def test_intersection_over_union(
    truth: tuple[int, ...], prediction: tuple[int, ...], expected: float
) -> None:
    first, second = cube_of(*truth), cube_of(*prediction)
    assert intersection_over_union(second, first).item() == pytest.approx(expected)
    assert intersection_over_union(first, second).item() == pytest.approx(expected)


def test_a_target_needs_voxel_labels(unlabelled: MemorySource) -> None:
    with pytest.raises(ValueError, match=r"no voxel labels: .* --voxel-labels"):
        target_mask(unlabelled.content)


def noisy_segmentation(cubes: Tensor) -> Tensor:
    """Logits of a threshold, wrong in places."""
    dark = -1.0 - cubes[:, 0]
    return torch.stack([-dark, dark], dim=1)


@pytest.mark.parametrize(("name", "foreground_only"), [("foreground_iou", True), ("iou", False)])
def test_the_validation_score_is_the_mean_of_the_test_scores(
    eight: MemorySource, name: str, foreground_only: bool
) -> None:
    metric = SubtomogramIou(foreground_only=foreground_only)
    for batch in eight.batches(3):
        metric.update(noisy_segmentation(batch.subtomograms), target_mask(batch))
    evaluation = evaluate(noisy_segmentation, eight, "target", batch_size=5)
    assert 0.2 < evaluation.scores[name].mean() < 0.99
    assert metric.compute().item() == pytest.approx(evaluation.scores[name].mean(), abs=1e-6)


EACH = SemanticLabels.choose(CLASSES, None, merged=False)


def three_labels(cubes: Tensor) -> Tensor:
    """Logits of background and two labels: thresholds, wrong in places."""
    dark = -cubes[:, 0]
    return torch.stack([torch.ones_like(dark), dark, 1.2 * dark - 1.0], dim=1)


def test_overlap_of_labels_is_that_of_torchmetrics_over_all_voxels(eight: MemorySource) -> None:
    evaluation = evaluate(three_labels, eight, "semantic", labels=EACH, batch_size=3)
    guess = three_labels(eight.content.subtomograms / 0.4).argmax(dim=1)
    truth = EACH.truth(eight.content)
    iou = MulticlassJaccardIndex(3, average="none")(guess, truth)[1:]
    dice = DiceScore(
        3, include_background=False, average="none", input_format="index",
        aggregation_level="global",
    )(guess, truth)  # fmt: skip
    found = evaluation.summary()
    assert 0.05 < iou.min() < iou.max() < 0.95
    for number, name in enumerate(CLASSES):
        assert found[f"iou_{name}"].value == pytest.approx(iou[number].item())
        assert found[f"dice_{name}"].value == pytest.approx(dice.flatten()[number].item())
    assert found["mean_iou"].value == pytest.approx(iou.mean().item())
    assert found["mean_dice"].value == pytest.approx(dice.mean().item())
    metric = LabelIou(3)
    for batch in eight.batches(3):
        metric.update(three_labels(batch.subtomograms / 0.4), EACH.truth(batch))
    assert metric.compute().item() == pytest.approx(iou.mean().item())
    # All labels are one for the foreground score.
    foreground = intersection_over_union(guess > 0, truth > 0)
    np.testing.assert_allclose(evaluation.scores["foreground_iou"], foreground)


def counted(counts: list[list[list[int]]], fields: list[int]) -> Evaluation:
    """Evaluation of subtomograms with these confusion counts."""
    number = len(fields)
    return Evaluation(
        {}, np.ones(number, np.int64), None, np.array(fields), np.array(counts), ("a", "b")
    )


def test_a_label_that_nobody_has_is_left_out_of_the_mean() -> None:
    # One field: label a 3 hits of 4, label b nowhere.
    found = counted([[[5, 0, 0], [1, 3, 0], [0, 0, 0]]], [0]).summary()
    assert set(found) == {"mean_iou", "mean_dice", "iou_a", "dice_a"}
    assert found["mean_iou"].value == found["iou_a"].value == 0.75
    assert found["dice_a"].value == pytest.approx(6 / 7)
    nothing = counted([[[9, 0, 0], [0, 0, 0], [0, 0, 0]]], [0]).summary()
    assert nothing["mean_iou"].value == 1.0  # nothing there, and nothing predicted


def test_labels_are_resampled_by_field_and_pooled() -> None:
    right, wrong = [[0, 0, 0], [0, 8, 0], [0, 0, 0]], [[0, 0, 0], [2, 0, 0], [0, 0, 0]]
    score = counted([right, right, wrong], [0, 0, 1]).interval("iou_a")
    # Both fields: 16 of 18. A resample of one field alone is all right or all wrong.
    assert score.value == pytest.approx(16 / 18)
    assert (score.low, score.high) == (0.0, 1.0)


def test_a_student_is_compared_with_its_teacher_field_by_field() -> None:
    generator = np.random.default_rng(4)
    teacher, student = [], []
    for hits in generator.integers(20, 90, 30):
        teacher.append([[0, 0, 0], [100 - hits, hits, 0], [0, 0, 0]])
        half = hits // 2
        student.append([[0, 0, 0], [100 - half, half, 0], [0, 0, 0]])
    fields = list(range(30))
    ratio = counted(student, fields).ratio(counted(teacher, fields), "mean_iou")
    assert ratio.value == pytest.approx(0.5, abs=0.01)
    assert ratio.high - ratio.low < 0.01  # though their scores vary from 0.2 to 0.9
    zero = counted([[[0, 0, 0], [5, 0, 0], [0, 0, 0]]], [0])
    with pytest.raises(ValueError, match="expected a teacher that learned"):
        zero.ratio(zero, "mean_iou")


def test_an_unknown_score_is_refused_with_the_known_ones(eight: MemorySource) -> None:
    evaluation = evaluate(noisy_segmentation, eight, "target")
    with pytest.raises(
        ValueError, match="no score 'mean_iou': expected one of foreground_iou, iou"
    ):
        evaluation.interval("mean_iou")


def test_semantic_segmenters_are_measured_against_a_threshold_in_units_of_the_field(
    eight: MemorySource,
) -> None:
    assert set(baselines(eight, "target", None)) == {"ball", "threshold"}
    assert set(baselines(eight, "semantic", EACH)) == {"threshold"}
    assert baselines(eight, "classify", None) == {}
    score, threshold = baseline_threshold(eight, EACH)
    # Particles are 2 darker in noise of 0.3, and the fields' robust deviation is given as 0.4.
    assert score > 0.95
    assert -4.0 < threshold < -1.5


def test_an_evaluation_keeps_every_subtomogram_in_order(eight: MemorySource) -> None:
    def first_class(cubes: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0]).expand(len(cubes), 2)

    evaluation = evaluate(first_class, eight, "classify", batch_size=3)
    np.testing.assert_array_equal(evaluation.class_ids, [1, 2] * 4)
    np.testing.assert_array_equal(evaluation.scores["accuracy"], [1.0, 0.0] * 4)
    np.testing.assert_array_equal(evaluation.fields, [0, 1, 2, 0, 1, 2, 0, 1])
    assert evaluation.predicted is not None
    np.testing.assert_array_equal(evaluation.predicted, 1)
    assert evaluation.interval("accuracy").value == 0.5
    assert evaluate(noisy_segmentation, eight, "target").predicted is None


def test_the_interval_contains_the_mean_and_lies_within_the_scores() -> None:
    generator = np.random.default_rng(3)
    values = generator.random(200)
    score = bootstrap_score(values, generator.integers(0, 17, 200))
    assert score.value == pytest.approx(values.mean())
    assert 0 < score.low < score.value < score.high < 1


def test_a_constant_score_has_an_interval_without_width() -> None:
    score = bootstrap_score(np.full(30, 0.75), np.arange(30) % 4)
    assert (score.value, score.low, score.high) == (0.75, 0.75, 0.75)


def test_fields_are_resampled_and_not_subtomograms() -> None:
    fields = np.repeat(np.arange(8), 100)
    # Cubes of a field agree: 800 of them say no more than 8.
    agreeing = bootstrap_score((fields % 2).astype(np.float64), fields)
    assert agreeing.high - agreeing.low > 0.5  # over cubes: 0.07
    # Every field has the same mean, however its cubes differ.
    differing = bootstrap_score((np.arange(800) % 2).astype(np.float64), fields)
    assert differing.high - differing.low == 0.0


def test_the_same_seed_gives_the_same_interval_and_another_seed_not() -> None:
    generator = np.random.default_rng(3)
    values, fields = generator.random(50), generator.integers(0, 7, 50)
    assert bootstrap_score(values, fields, seed=1) == bootstrap_score(values, fields, seed=1)
    assert bootstrap_score(values, fields, seed=1) != bootstrap_score(values, fields, seed=2)


def test_a_student_that_equals_its_teacher_retains_exactly_all() -> None:
    generator = np.random.default_rng(4)
    values = (generator.random(60) < 0.7).astype(np.float64)
    ratio = bootstrap_ratio(values, values, np.arange(60) % 9)
    assert (ratio.value, ratio.low, ratio.high) == (1.0, 1.0, 1.0)


def test_a_teacher_that_is_right_in_one_field_only_still_gives_a_ratio() -> None:
    values = np.array([1.0, 0.0, 0.0])
    ratio = bootstrap_ratio(values, values, np.arange(3))
    assert (ratio.value, ratio.low, ratio.high) == (1.0, 1.0, 1.0)


def test_the_ratio_is_paired() -> None:
    generator = np.random.default_rng(5)
    teacher = np.repeat(generator.random(10), 20)
    fields = np.repeat(np.arange(10), 20)
    ratio = bootstrap_ratio(0.9 * teacher, teacher, fields)
    # Fields differ widely, but the student loses a tenth in each of them.
    assert ratio.high - ratio.low < 1e-9
    assert ratio.value == pytest.approx(0.9)


def test_a_ratio_to_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0 on every subtomogram: expected a teacher that"):
        bootstrap_ratio(np.ones(3), np.zeros(3), np.arange(3))


def source_of(targets: np.ndarray, cubes: np.ndarray) -> MemorySource:
    num = len(targets)
    batch = Batch(
        torch.from_numpy(cubes.astype(np.float32))[:, None],
        torch.from_numpy(targets.astype(np.int8)),
        torch.from_numpy(targets.astype(np.int16)),
        torch.ones(num, dtype=torch.int64),
        torch.zeros(num, dtype=torch.int64),
    )
    return MemorySource(batch, make_manifest())


def test_the_ball_finds_the_radius_of_a_ball() -> None:
    targets = np.stack([make_ball(3.0)] * 3)
    assert baseline_ball(source_of(targets, targets)) == (1.0, 3.0)


def test_one_ball_serves_all_cubes(eight: MemorySource) -> None:
    score, radius = baseline_ball(eight)
    assert 2.0 <= radius <= 3.5
    assert 0.4 < score < 0.8  # the two classes differ in radius


def test_the_threshold_finds_dark_targets_and_no_light_ones() -> None:
    targets = np.stack([make_ball(3.0), make_ball(4.0)])
    noise = np.random.default_rng(6).normal(0, 0.1, targets.shape)
    score, threshold = baseline_threshold(source_of(targets, 500 * (noise - targets) + 7000))
    assert score > 0.99
    assert threshold < 0
    light, _ = baseline_threshold(source_of(targets, noise + targets))
    assert light < targets.mean() + 0.05  # no better than to call all voxels foreground


def test_a_constant_cube_is_no_reason_to_fail() -> None:
    score, _ = baseline_threshold(source_of(make_ball(3.0)[None], np.full((1, *(BOX,) * 3), 5.0)))
    assert score == 0.0

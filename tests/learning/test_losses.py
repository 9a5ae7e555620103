"""Losses are zero where they should be, never negative, and prefer the better prediction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cectflow.learning.losses import (
    DistillationLoss,
    SegmentationLoss,
    decoupled_kl,
    focal_loss,
    similarity_difference,
    soft_tversky_loss,
    softened_kl,
    voxel_cross_entropy,
)

CONFIDENT = 50.0


@pytest.fixture
def truth() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (3, 6, 6, 6), generator=generator)


def confident(labels: Tensor, number: int = 2) -> Tensor:
    """Logits that are sure of these labels."""
    return CONFIDENT * F.one_hot(labels, number).movedim(-1, 1).float()


def draw(number: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Random logits and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, number, 6, 6, 6, generator=generator)
    return logits, torch.randint(0, number, (3, 6, 6, 6), generator=generator)


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7), (1.0, 0.0)])
def test_overlap_of_a_perfect_confident_prediction_costs_nothing(
    number: int, weights: tuple[float, float]
) -> None:
    _, truth = draw(number)
    loss = soft_tversky_loss(confident(truth, number), truth, *weights)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_dice_of_the_complement_costs_one(truth: Tensor) -> None:
    loss = soft_tversky_loss(confident(1 - truth), truth).item()
    assert loss == pytest.approx(1.0, abs=1.5 / 6**3)  # the half voxel of the smoothing


def test_tversky_with_equal_halves_is_dice() -> None:
    logits, truth = draw(2)
    probability = logits.softmax(dim=1)[:, 1]
    axes = (1, 2, 3)
    dice = (2 * (probability * truth).sum(axes) + 1) / ((probability + truth).sum(axes) + 1)
    assert soft_tversky_loss(logits, truth).item() == pytest.approx(1 - dice.mean().item())
    for halves in (
        SegmentationLoss(dice=1.0),
        SegmentationLoss(tversky=1.0, false_positives=0.5, false_negatives=0.5),
    ):
        assert halves.measure(logits, truth)["loss"].item() == pytest.approx(1 - dice.mean().item())


def test_tversky_counts_misses_and_false_alarms_as_it_is_told() -> None:
    truth = torch.zeros(1, 8, 8, 8, dtype=torch.int64)
    truth[:, :4] = 1
    small, large = truth.clone(), truth.clone()
    small[:, 3:], large[:, :5] = 0, 1
    missed, invented = (
        soft_tversky_loss(confident(guess), truth, 0.3, 0.7).item() for guess in (small, large)
    )
    assert missed == pytest.approx(0.7 * 64 / (192 + 0.7 * 64), abs=0.003)
    assert invented == pytest.approx(0.3 * 64 / (256 + 0.3 * 64), abs=0.003)


def test_a_label_that_a_cube_does_not_have_is_left_out_of_it() -> None:
    logits, truth = draw(3)
    truth[0] = 0  # no label in the first cube, no label 2 in the second
    truth[1][truth[1] == 2] = 0
    costs = [soft_tversky_loss(logits[i : i + 1], truth[i : i + 1]).item() for i in range(3)]
    assert costs[0] == 0.0
    # Over all cubes every label that is present counts alike: one in cube 1, two in cube 2.
    expected = (costs[1] + 2 * costs[2]) / 3
    assert soft_tversky_loss(logits, truth).item() == pytest.approx(expected, abs=1e-6)


def test_dice_weighs_a_small_target_like_a_large_one() -> None:
    losses = []
    for edge in (2, 6):
        truth = torch.zeros(1, 8, 8, 8, dtype=torch.int64)
        truth[:, :edge, :edge, :edge] = 1
        half = truth.clone()
        half[:, : edge // 2] = 0
        losses.append(soft_tversky_loss(confident(half), truth).item())
    small, large = losses
    assert small == pytest.approx(large, abs=0.05)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.1, 1.0, 3.0])])
def test_focal_loss_of_gamma_nought_is_cross_entropy(weights: Tensor | None) -> None:
    logits, truth = draw(3)
    expected = voxel_cross_entropy(logits, truth, weights).item()
    assert focal_loss(logits, truth, 0.0, weights).item() == pytest.approx(expected, rel=1e-5)


def test_focal_loss_looks_away_from_what_is_easy() -> None:
    truth = torch.ones(1, 2, 2, 2, dtype=torch.int64)
    for margin, probability in ((0.0, 0.5), (2.1972246, 0.9)):
        logits = torch.zeros(1, 2, 2, 2, 2)
        logits[:, 1] = margin
        entropy = voxel_cross_entropy(logits, truth).item()
        expected = (1 - probability) ** 2 * entropy
        assert focal_loss(logits, truth, 2.0).item() == pytest.approx(expected, rel=1e-4)


def test_class_weights_count_voxels_of_a_label_as_if_there_were_more() -> None:
    logits, truth = draw(2)
    twice = SegmentationLoss(cross_entropy=1.0, class_weights=(1.0, 2.0))
    losses = F.cross_entropy(logits, truth, reduction="none")
    expected = (losses * (1 + truth)).sum() / (1 + truth).sum()
    assert twice.measure(logits, truth)["loss"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("kind", ["cross_entropy", "dice", "tversky", "focal"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("empty", [False, True])
def test_every_loss_has_a_finite_gradient(kind: str, scale: float, empty: bool) -> None:
    logits, truth = draw(3)
    # Of the largest scale every voxel is sure, some of the truth and some of another label.
    logits = (scale * logits).requires_grad_()
    if empty:
        truth = torch.zeros_like(truth)
    loss = SegmentationLoss(**{kind: 1.0}).measure(logits, truth)["loss"]
    loss.backward()
    assert logits.grad is not None
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["cross_entropy", "dice", "tversky", "focal"])
def test_every_loss_prefers_the_better_prediction(kind: str) -> None:
    _, truth = draw(3)
    loss = SegmentationLoss(**{kind: 1.0})
    sure = confident(truth, 3)
    good, fair, bad = (
        loss.measure(logits, truth)["loss"].item()
        for logits in (sure, 0.01 * sure, confident((truth + 1) % 3, 3))
    )
    assert good < fair < bad


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "needs a weight above 0 for cross_entropy, dice, tversky or focal"),
        ({"focal": 1.0, "gamma": 0.5}, r"gamma is 0.5: expected 0, or at least 1"),
        (
            {"tversky": 1.0, "false_positives": 0.0, "false_negatives": 0.0},
            "false_positives and false_negatives are both 0",
        ),
        ({"dice": 1.0, "class_weights": (-1.0, 1.0)}, "expected none below 0, and one above"),
        ({"dice": -1.0}, "greater than or equal to 0"),
    ],
)
def test_a_loss_that_teaches_nothing_is_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationLoss(**content)


def test_cross_entropy_prefers_good_logits(truth: Tensor) -> None:
    good, unsure, bad = (
        voxel_cross_entropy(logits, truth).item()
        for logits in (confident(truth), torch.zeros(3, 2, 6, 6, 6), confident(1 - truth))
    )
    assert good < 1e-6
    assert unsure == pytest.approx(torch.log(torch.tensor(2.0)).item())
    assert bad == pytest.approx(CONFIDENT)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("shape", [(5, 4), (2, 2, 3, 3, 3)])
def test_the_teacher_does_not_diverge_from_itself(
    temperature: float, shape: tuple[int, ...]
) -> None:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert softened_kl(logits, logits, temperature).item() == pytest.approx(0.0, abs=1e-6)
    # Softmax does not see an offset of all logits.
    assert softened_kl(logits + 3.0, logits, temperature).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_divergence_is_never_negative(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (4.0 * torch.randn(7, 3, generator=generator) for _ in range(2))
    assert softened_kl(student, teacher, temperature).item() > 0


def test_divergence_at_temperature_one_is_the_textbook_one() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]]).log1p()
    expected = 1 / 3 * torch.tensor(2 / 3).log() + 2 / 3 * torch.tensor(4 / 3).log()
    assert softened_kl(student, teacher, 1.0).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_divergence_is_that_about_the_target_and_that_among_the_others(
    temperature: float,
) -> None:
    """Zhao et al. 2022, equation 6: softened_kl = target + (1 - p) others, for every cube."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (3.0 * torch.randn(6, 5, generator=generator) for _ in range(2))
    truth = torch.tensor([0, 1, 2, 3, 4, 0])
    for row in range(6):
        ours, theirs, true = (part[row : row + 1] for part in (student, teacher, truth))
        target = decoupled_kl(ours, theirs, true, temperature, 0.0)
        others = decoupled_kl(ours, theirs, true, temperature, 1.0) - target
        unsure = 1.0 - torch.softmax(theirs / temperature, dim=1)[0, truth[row]]
        together = softened_kl(ours, theirs, temperature)
        torch.testing.assert_close(target + unsure * others, together, atol=1e-4, rtol=1e-4)
        assert target >= 0
        assert others >= 0


def test_a_sure_teacher_still_tells_of_the_other_classes() -> None:
    """Where the softened divergence has no gradient left among them."""
    teacher = torch.tensor([[30.0, 4.0, 0.0, -4.0]])
    truth = torch.tensor([0])
    sizes = []
    for loss in (
        lambda student: softened_kl(student, teacher, 1.0),
        lambda student: decoupled_kl(student, teacher, truth, 1.0, 1.0),
    ):
        student = torch.tensor([[30.0, 0.0, 0.0, 0.0]], requires_grad=True)
        loss(student).backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()
        sizes.append(student.grad[0, 1:].abs().sum().item())
    assert sizes[0] < 1e-6
    assert sizes[1] > 0.5


def test_no_teacher_is_too_sure() -> None:
    teacher = torch.tensor([[400.0, 2.0, 0.0]])
    for logits in ([[0.0, 0.0, 0.0]], [[400.0, 0.0, 0.0]], [[0.0, 400.0, 0.0]]):
        student = torch.tensor(logits, requires_grad=True)
        loss = decoupled_kl(student, teacher, torch.tensor([0]), 1.0, 1.0)
        loss.backward()
        assert student.grad is not None
        assert loss.isfinite()
        assert student.grad.isfinite().all()


def test_decoupling_serves_voxels_and_two_classes() -> None:
    student, labels = draw(2)
    teacher, _ = draw(2, seed=4)
    both = decoupled_kl(student, teacher, labels, 2.0, 8.0)
    # Of two classes the other one is certain: nothing is left but the target.
    torch.testing.assert_close(both, softened_kl(student, teacher, 2.0), atol=1e-5, rtol=1e-5)


def test_a_distillation_that_weighs_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a weight above 0 for mse, kl, dkd or hint"):
        DistillationLoss(temperature=4.0)


def test_terms_are_chosen_by_name() -> None:
    given = DistillationLoss(mse=0.5, kl=2.0, temperature=4.0)
    assert given.only("dkd") == DistillationLoss(dkd=1.0, temperature=4.0)
    assert given.only("kl") == DistillationLoss(kl=2.0, temperature=4.0)
    assert given.only("kl+hint") == DistillationLoss(kl=2.0, hint=3000.0, temperature=4.0)
    for other in ("l2", "kl+", "kl,mse", ""):
        with pytest.raises(ValueError, match="expected one of mse, kl, dkd, hint, or several"):
            given.only(other)


def test_without_truth_the_teachers_class_is_the_target() -> None:
    student, truth = draw(5)
    teacher, _ = draw(5, seed=4)
    loss = DistillationLoss(dkd=1.0, non_target=4.0)
    unknown = loss.measure(student, teacher, torch.full_like(truth, -1))
    torch.testing.assert_close(unknown, loss.measure(student, teacher, teacher.argmax(dim=1)))


def test_similarities_are_compared_and_not_features() -> None:
    """Neither turns of the features, nor their size or number, make a difference."""
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(6, 4, generator=generator)
    turn, _ = torch.linalg.qr(torch.randn(9, 9, generator=generator))
    turned = 3.0 * torch.nn.functional.pad(features, (0, 5)) @ turn
    assert similarity_difference(features, turned).item() == pytest.approx(0.0, abs=1e-12)
    assert similarity_difference(features, features.flip(0)).item() > 1e-3


def test_the_difference_of_similarities_by_hand() -> None:
    # Two cubes: alike to the student, orthogonal to the teacher.
    alike = similarity_difference(torch.tensor([[2.0], [2.0]]), torch.eye(2))
    each = 0.5**0.5
    assert alike.item() == pytest.approx((2 * (each - 1) ** 2 + 2 * each**2) / 4)


def test_the_size_of_the_gradient_does_not_hang_on_the_temperature() -> None:
    teacher = torch.tensor([[0.3, -0.2, 0.1]])
    sizes = []
    for temperature in (4.0, 16.0):
        student = torch.zeros(1, 3, requires_grad=True)
        softened_kl(student, teacher, temperature).backward()
        assert student.grad is not None
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)

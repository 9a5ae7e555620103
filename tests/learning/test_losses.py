"""Losses are zero where they should be, never negative, and prefer the better prediction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cectflow.learning.losses import soft_dice_loss, softened_kl, voxel_cross_entropy

CONFIDENT = 50.0


@pytest.fixture
def truth() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (3, 6, 6, 6), generator=generator)


def confident(labels: Tensor) -> Tensor:
    """Logits that are sure of these labels."""
    return CONFIDENT * torch.stack([1.0 - labels, labels.float()], dim=1)


def test_dice_of_a_perfect_confident_prediction_costs_nothing(truth: Tensor) -> None:
    assert soft_dice_loss(confident(truth), truth).item() == pytest.approx(0.0, abs=1e-6)


def test_dice_of_the_complement_costs_one(truth: Tensor) -> None:
    loss = soft_dice_loss(confident(1 - truth), truth).item()
    assert loss == pytest.approx(1.0, abs=1.5 / 6**3)  # one voxel keeps empty cubes finite


def test_dice_of_nothing_predicted_where_there_is_nothing_costs_nothing() -> None:
    empty = torch.zeros(2, 4, 4, 4, dtype=torch.int64)
    assert soft_dice_loss(confident(empty), empty).item() == pytest.approx(0.0, abs=1e-6)


def test_dice_weighs_a_small_target_like_a_large_one() -> None:
    losses = []
    for edge in (2, 6):
        truth = torch.zeros(1, 8, 8, 8, dtype=torch.int64)
        truth[:, :edge, :edge, :edge] = 1
        half = truth.clone()
        half[:, : edge // 2] = 0
        losses.append(soft_dice_loss(confident(half), truth).item())
    small, large = losses
    assert small == pytest.approx(large, abs=0.05)


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


def test_the_size_of_the_gradient_does_not_hang_on_the_temperature() -> None:
    teacher = torch.tensor([[0.3, -0.2, 0.1]])
    sizes = []
    for temperature in (4.0, 16.0):
        student = torch.zeros(1, 3, requires_grad=True)
        softened_kl(student, teacher, temperature).backward()
        assert student.grad is not None
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)

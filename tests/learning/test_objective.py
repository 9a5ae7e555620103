"""Objectives give a loss and an output, and combine as they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from builders import CLASSES, MemorySource, TinyClassifier, TinySegmenter, write_dataset
from torch import Tensor, nn

from cectflow.learning.augmentation import augment
from cectflow.learning.losses import (
    DistillationLoss,
    SegmentationLoss,
    decoupled_kl,
    soft_tversky_loss,
    softened_kl,
    voxel_cross_entropy,
)
from cectflow.learning.objective import Classify, Distill, Objective, Segment
from cectflow.learning.task import SemanticLabels, target_mask
from cectflow.learning.teacher import KnownLogits, Teacher
from cectflow.turns import HALF_TURNS

MERGED = SemanticLabels.choose(CLASSES, None, merged=True)
EACH = SemanticLabels.choose(CLASSES, None, merged=False)

BY_KL = DistillationLoss(kl=1.0)


@pytest.fixture
def student() -> nn.Module:
    torch.manual_seed(0)
    return TinyClassifier().eval()


@pytest.fixture
def teacher() -> nn.Module:
    torch.manual_seed(1)
    return TinyClassifier().eval()


@pytest.mark.parametrize(
    ("objective", "network"),
    [
        (Classify(2), TinyClassifier()),
        (Segment(), TinySegmenter()),
        (Segment(SegmentationLoss(cross_entropy=1.0, dice=0.5)), TinySegmenter()),
        (Segment(labels=MERGED), TinySegmenter()),
        (Segment(SegmentationLoss(tversky=1.0, focal=1.0), EACH), TinySegmenter(3)),
        (
            Distill(Segment(labels=EACH), Teacher(TinySegmenter(3).eval()), soft=BY_KL),
            TinySegmenter(3),
        ),
        (Distill(Classify(2), Teacher(TinyClassifier().eval())), TinyClassifier()),
        (
            Distill(Segment(), Teacher(TinySegmenter().eval()), soft=BY_KL, weight=0.5),
            TinySegmenter(),
        ),
    ],
    ids=repr,
)
def test_each_objective_gives_a_finite_loss_that_teaches_and_logits_that_are_judged(
    objective: Objective, network: nn.Module, eight: MemorySource
) -> None:
    terms = objective(network, eight.content)
    assert terms["loss"].shape == ()
    assert torch.isfinite(terms["loss"])
    terms["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    scores = objective.make_scores()
    scores.update(terms["output"], objective.truth(eight.content))
    found = scores.compute()
    assert objective.monitor in found
    assert all(0 <= value <= 1 for value in found.values())


def test_classes_are_counted_from_one_and_logits_from_zero(eight: MemorySource) -> None:
    assert Classify(2).truth(eight.content).tolist() == [0, 1] * 4


def test_a_perfect_classifier_scores_one(eight: MemorySource) -> None:
    objective = Classify(2)
    scores = objective.make_scores()
    scores.update(10.0 * F.one_hot(objective.truth(eight.content)), objective.truth(eight.content))
    assert scores.compute()["accuracy"].item() == 1.0


def test_accuracy_counts_subtomograms_and_not_classes() -> None:
    scores = Classify(2).make_scores()
    scores.update(torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1]))
    assert scores.compute()["accuracy"].item() == 0.75


def test_segmentation_scores_stay_apart_after_a_perfect_batch() -> None:
    # torchmetrics would merge the two for good, since their states agree so far.
    truth = torch.zeros(1, 4, 4, 4, dtype=torch.int64)
    truth[:, :1] = 1
    right = torch.stack([1.0 - truth, truth.float()], dim=1)
    scores = Segment().make_scores()
    scores.update(right, truth)
    scores.update(torch.zeros(1, 2, 4, 4, 4), truth)  # all background
    found = scores.compute()
    assert found["foreground_iou"].item() == pytest.approx(0.5)
    assert found["iou"].item() == pytest.approx((1.0 + 0.75 / 2) / 2)


def test_losses_are_added_with_their_weights_and_reported_apart(eight: MemorySource) -> None:
    network, batch = TinySegmenter(), eight.content
    terms = Segment(SegmentationLoss(cross_entropy=2.0, dice=0.3))(network, batch)
    logits, truth = terms["output"], target_mask(batch)
    entropy, dice = voxel_cross_entropy(logits, truth), soft_tversky_loss(logits, truth)
    assert terms["loss"].item() == pytest.approx(2.0 * entropy.item() + 0.3 * dice.item())
    assert terms["cross_entropy"].item() == pytest.approx(entropy.item())
    assert terms["dice"].item() == pytest.approx(dice.item())


def test_a_semantic_network_is_shown_cubes_in_units_of_their_field(eight: MemorySource) -> None:
    shown = []

    class Recording(TinySegmenter):
        def forward(self, cubes: Tensor) -> Tensor:
            shown.append(cubes)
            return super().forward(cubes)

    batch = replace(eight.content, statistics=torch.tensor([[3.0, 2.0]] * 8))
    Segment(labels=MERGED)(Recording(), batch)
    Segment()(Recording(), batch)
    torch.testing.assert_close(shown[0], (batch.subtomograms - 3.0) / 2.0)
    assert shown[1] is batch.subtomograms
    # Its teacher sees the same.
    Distill(Segment(labels=MERGED), Teacher(Recording()))(TinySegmenter(), batch)
    torch.testing.assert_close(shown[2], shown[0])


def test_class_weights_of_another_number_than_the_outputs_are_refused() -> None:
    loss = SegmentationLoss(cross_entropy=1.0, class_weights=(0.5, 1.0))
    with pytest.raises(ValueError, match=r"class_weights has 2 numbers, the network 3 outputs"):
        Segment(loss, EACH)


def test_segmentation_without_voxel_labels_is_refused(unlabelled: MemorySource) -> None:
    with pytest.raises(ValueError, match=r"no voxel labels: expected a simulated dataset"):
        Segment()(TinySegmenter(), unlabelled.content)


@pytest.mark.parametrize("kind", ["mse", "kl", "dkd"])
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(
    kind: str, student: nn.Module, eight: MemorySource
) -> None:
    soft = DistillationLoss(**{kind: 1.0})
    terms = Distill(Classify(2), Teacher(student), soft=soft, weight=1.0)(student, eight.content)
    assert terms["loss"].item() == pytest.approx(0.0, abs=1e-7)
    assert terms["hard"].item() > 0


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_soft_and_hard_terms_are_weighed(
    weight: float, student: nn.Module, teacher: nn.Module, eight: MemorySource
) -> None:
    terms = Distill(Classify(2), Teacher(teacher), weight=weight)(student, eight.content)
    soft, hard, loss = (terms[name].item() for name in ("soft", "hard", "loss"))
    assert loss == pytest.approx(weight * soft + (1 - weight) * hard)
    assert hard == pytest.approx(Classify(2)(student, eight.content)["loss"].item())


def test_the_soft_term_is_what_its_method_says(
    student: nn.Module, teacher: nn.Module, eight: MemorySource
) -> None:
    ours, theirs = (network(eight.content.subtomograms) for network in (student, teacher))
    by_mse = Distill(Classify(2), Teacher(teacher))(student, eight.content)
    by_kl = Distill(Classify(2), Teacher(teacher), soft=DistillationLoss(kl=1.0, temperature=3.0))(
        student, eight.content
    )
    assert by_mse["soft"].item() == pytest.approx((ours - theirs).square().mean().item())
    assert by_kl["soft"].item() == pytest.approx(softened_kl(ours, theirs, 3.0).item())
    mixed = DistillationLoss(mse=0.25, dkd=2.0, temperature=3.0, non_target=4.0)
    apart = decoupled_kl(ours, theirs, eight.content.class_ids - 1, 3.0, 4.0)
    by_both = Distill(Classify(2), Teacher(teacher), soft=mixed)(student, eight.content)
    expected = 0.25 * by_mse["soft"].item() + 2.0 * apart.item()
    assert by_both["soft"].item() == pytest.approx(expected)


def test_the_teacher_learns_nothing(
    student: nn.Module, teacher: nn.Module, eight: MemorySource
) -> None:
    Distill(Classify(2), Teacher(teacher), weight=0.5)(student, eight.content)["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_student_is_run_once_and_judged_like_the_wrapped_objective(
    teacher: nn.Module, eight: MemorySource
) -> None:
    calls = []

    class Counting(TinyClassifier):
        def forward(self, cubes: Tensor) -> Tensor:
            calls.append(len(cubes))
            return super().forward(cubes)

    objective = Distill(Classify(2), Teacher(teacher))
    objective(Counting(), eight.content)
    assert calls == [8]
    assert (objective.task, objective.monitor) == ("classify", "accuracy")


def test_an_objective_is_named_by_what_it_learns_and_not_by_where_it_lies(
    teacher: nn.Module,
) -> None:
    first, again = (Distill(Classify(2), Teacher(teacher), soft=BY_KL) for _ in range(2))
    assert repr(first) == repr(again)
    assert repr(first) != repr(
        Distill(Classify(2), Teacher(teacher), soft=DistillationLoss(mse=1.0))
    )


def test_known_logits_are_what_the_teacher_says_of_each_turned_cube(
    teacher: nn.Module, tmp_path: Path
) -> None:
    dataset = write_dataset(tmp_path / "data")
    turns = tuple(HALF_TURNS)
    sources = [(dataset.split("train"), turns), (dataset.split("validation"), ("identity",))]
    known = KnownLogits(Teacher(teacher), sources, batch_size=5, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    for source, allowed in sources:
        for batch in source.batches(4, generator):
            shown = augment(batch, allowed, generator)
            assert shown.views is not None
            torch.testing.assert_close(known(shown.views), teacher(shown.subtomograms))


def test_distillation_with_known_logits_has_the_same_loss(
    student: nn.Module, teacher: nn.Module, tmp_path: Path
) -> None:
    split = write_dataset(tmp_path / "data").split("train")
    known = KnownLogits(
        Teacher(teacher), [(split, ("identity",))], batch_size=5, device=torch.device("cpu")
    )
    batch = next(split.batches(6))
    asked = Distill(Classify(2), Teacher(teacher))(student, batch)
    looked_up = Distill(Classify(2), Teacher(teacher), known=known)(student, batch)
    torch.testing.assert_close(looked_up["loss"], asked["loss"])

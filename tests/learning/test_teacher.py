"""Teachers answer together, and what they said is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from builders import MemorySource, TinyClassifier, TinySegmenter, write_dataset
from torch import Tensor, nn

from cectflow.learning.losses import DistillationLoss, similarity_difference
from cectflow.learning.objective import Classify, Distill, Segment
from cectflow.learning.teacher import KnownLogits, Teacher
from cectflow.networks.embedding import embed


class Counting(TinyClassifier):
    """Counts the cubes that it is asked about."""

    asked = 0

    def forward(self, cubes: Tensor) -> Tensor:
        self.asked += len(cubes)
        return super().forward(cubes)


def make_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return TinyClassifier().eval()


def test_an_ensemble_answers_with_the_mean_of_its_members_logits(eight: MemorySource) -> None:
    first, second = make_network(1), make_network(2)
    cubes = eight.content.subtomograms
    mean = (first(cubes) + second(cubes)) / 2
    torch.testing.assert_close(Teacher(first, second)(cubes), mean)
    logits, _ = Teacher(first, second).embed(cubes)
    torch.testing.assert_close(logits, mean)


def test_no_member_of_an_ensemble_outweighs_the_others_similarities(eight: MemorySource) -> None:
    first, second = make_network(1), make_network(2)
    _, together = Teacher(first, second).embed(eight.content.subtomograms)
    grams = []
    for network in (first, second):
        features = embed(network, eight.content.subtomograms)[1]
        unit = features / features.norm(dim=1, keepdim=True)
        grams.append(unit @ unit.T)
    torch.testing.assert_close(together @ together.T, grams[0] + grams[1])


def test_hints_are_added_with_their_weight_and_reach_the_student(eight: MemorySource) -> None:
    student, teacher = make_network(0), make_network(1)
    without, with_hints = (
        Distill(Classify(2), Teacher(teacher), soft=DistillationLoss(kl=1.0, hint=weight))
        for weight in (0.0, 7.0)
    )
    cubes = eight.content.subtomograms
    gradients = []
    for objective in (without, with_hints):
        student.zero_grad()
        objective(student, eight.content)["soft"].backward()
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(*gradients, strict=True))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    with torch.no_grad():
        hint = similarity_difference(embed(student, cubes)[1], embed(teacher, cubes)[1])
        soft = without(student, eight.content)["soft"] + 7.0 * hint
        torch.testing.assert_close(with_hints(student, eight.content)["soft"], soft)


def test_segmenters_have_no_hints_to_give() -> None:
    with pytest.raises(ValueError, match="networks of the task 'target' have none: use mse, kl"):
        Distill(Segment(), Teacher(TinySegmenter()), soft=DistillationLoss(hint=1.0))


def make_known(folder: Path, network: nn.Module, store: Path, identity: str) -> KnownLogits:
    split = write_dataset(folder).split("train")
    sources = [(split, ("identity", "y"))]
    return KnownLogits(
        Teacher(network), sources, batch_size=5, device=torch.device("cpu"), store=store,
        identity=identity,
    )  # fmt: skip


def test_answers_that_were_kept_are_not_asked_for_again(tmp_path: Path) -> None:
    network, store = Counting().eval(), tmp_path / "logits" / "one.npz"
    known = make_known(tmp_path / "data", network, store, "one")
    split = known.sources[0][0]
    views = torch.cat([batch.views for batch in split.batches(3) if batch.views is not None])
    first = known(views)
    assert network.asked == 2 * len(split)
    again = make_known(tmp_path / "again", network, store, "one")
    torch.testing.assert_close(again(views), first)
    assert network.asked == 2 * len(split)


def test_an_interrupted_teacher_is_asked_for_the_rest_only(tmp_path: Path) -> None:
    network, store = Counting().eval(), tmp_path / "one.npz"
    known = make_known(tmp_path / "data", network, store, "one")
    known(torch.tensor([0]))
    with np.load(store) as kept:
        views, logits = kept["views"], kept["logits"]
    half = views % 4 == 0  # the first pass
    np.savez(store, identity="one", views=views[half], logits=logits[half])
    network.asked = 0
    again = make_known(tmp_path / "again", network, store, "one")
    torch.testing.assert_close(again(torch.from_numpy(views)), torch.from_numpy(logits))
    assert network.asked == (~half).sum()


def test_answers_of_another_teacher_are_replaced(tmp_path: Path) -> None:
    store = tmp_path / "logits.npz"
    first = make_known(tmp_path / "data", make_network(1), store, "one")(torch.tensor([0, 4]))
    second = make_known(tmp_path / "again", make_network(2), store, "two")(torch.tensor([0, 4]))
    assert not torch.allclose(first, second)
    with np.load(store) as kept:
        assert str(kept["identity"]) == "two"


def test_answers_that_cannot_be_kept_are_used_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "logits").write_text("no folder")
    network = make_network(1)
    known = make_known(tmp_path / "data", network, tmp_path / "logits" / "one.npz", "one")
    with pytest.warns(UserWarning, match="the teacher's answers are not kept"):
        logits = known(torch.tensor([0, 4]))
    assert logits.shape == (2, 2)

"""Unlabelled cubes are shown beside labelled ones, and teach through the teacher alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import MemorySource, TinyClassifier, make_manifest

from cectflow.learning.objective import Classify, Distill
from cectflow.learning.teacher import KnownLogits, Teacher
from cectflow.learning.unlabelled import UnlabelledCubes, WithUnlabelled


@pytest.fixture
def three(eight: MemorySource) -> UnlabelledCubes:
    box = eight.manifest.box
    cubes = torch.arange(3.0).reshape(3, 1, 1, 1, 1).expand(3, 1, box, box, box)
    return UnlabelledCubes(cubes.clone(), eight.manifest, 0.5)


def test_every_batch_has_its_share_and_every_cube_its_turn(
    eight: MemorySource, three: UnlabelledCubes
) -> None:
    source = WithUnlabelled(eight, three)
    batches = list(source.batches(4, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [6, 6]
    assert len(source) == 8
    shown = [batch.subtomograms[batch.class_ids == 0, 0, 0, 0, 0].tolist() for batch in batches]
    assert sorted(shown[0] + shown[1][:1]) == [0.0, 1.0, 2.0]
    labelled = torch.cat([batch.class_ids[batch.class_ids > 0] for batch in batches])
    assert sorted(labelled.tolist()) == sorted(eight.content.class_ids.tolist())


def test_a_small_share_is_one_cube(eight: MemorySource, three: UnlabelledCubes) -> None:
    source = WithUnlabelled(eight, replace(three, share=0.01))
    assert [len(batch) for batch in source.batches(4)] == [5, 5]


def test_the_labels_loss_is_of_the_labelled_cubes(
    eight: MemorySource, three: UnlabelledCubes
) -> None:
    network = TinyClassifier().eval()
    (batch,) = WithUnlabelled(eight, three).batches(8)
    alone = Classify(2)(network, eight.content)["loss"]
    torch.testing.assert_close(Classify(2)(network, batch)["loss"], alone)
    (bare,) = three.batches(3)
    assert Classify(2)(network, bare)["loss"].item() == 0.0


def test_the_soft_loss_is_of_all_cubes(eight: MemorySource, three: UnlabelledCubes) -> None:
    student, teacher = TinyClassifier().eval(), TinyClassifier().eval()
    (batch,) = WithUnlabelled(eight, three).batches(8)
    objective = Distill(Classify(2), Teacher(teacher))
    both = objective(student, batch)["soft"]
    (bare,) = three.batches(4)
    more = torch.cat([bare.subtomograms, bare.subtomograms[:1]])  # the fourth is the first again
    parts = [
        (teacher(cubes) - student(cubes)).square().mean()
        for cubes in (eight.content.subtomograms, more)
    ]
    torch.testing.assert_close(both, (8 * parts[0] + 4 * parts[1]) / 12)


def test_known_logits_cover_unlabelled_views(three: UnlabelledCubes) -> None:
    network = TinyClassifier().eval()
    known = KnownLogits(
        Teacher(network), [(three, ("identity", "z"))], batch_size=2, device=torch.device("cpu")
    )
    (batch,) = three.batches(3)
    assert batch.views is not None
    with torch.no_grad():
        torch.testing.assert_close(known(batch.views), network(batch.subtomograms))


def test_other_cubes_are_other_data(three: UnlabelledCubes) -> None:
    assert three.digest == replace(three, cubes=three.cubes.clone()).digest
    assert three.digest != replace(three, cubes=three.cubes + 1.0).digest


@pytest.mark.parametrize("shape", [(0, 1, 12, 12, 12), (2, 1, 10, 10, 10)])
def test_cubes_of_another_box_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected at least one of 12³"):
        UnlabelledCubes(torch.zeros(shape), make_manifest(), 0.25)

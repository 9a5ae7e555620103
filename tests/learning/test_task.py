"""What networks of each task are shown, and what is true of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import CLASSES, MemorySource, make_ball, make_card, make_manifest

from cectflow.learning.task import (
    SemanticLabels,
    check_statistics,
    network_input,
    segmentation_truth,
    target_mask,
)
from cectflow.manifest import FieldRecord, ShardRecord


def test_the_target_is_the_particle_at_the_centre_and_no_other(eight: MemorySource) -> None:
    batch = eight.content
    mask = target_mask(batch)
    assert batch.instances is not None
    assert (batch.instances[0] == 2).any()
    assert torch.equal(mask[0] == 1, torch.from_numpy(make_ball(2.0)))


def test_semantic_truth_has_every_particle_neighbours_included(eight: MemorySource) -> None:
    batch = eight.content
    each = SemanticLabels.choose(CLASSES, None, merged=False)
    merged = SemanticLabels.choose(CLASSES, None, merged=True)
    assert batch.voxel_labels is not None
    assert (each.truth(batch) == batch.voxel_labels).all()
    assert (merged.truth(batch) == (batch.voxel_labels > 0)).all()
    assert (each.num_outputs, merged.num_outputs) == (3, 2)
    assert (segmentation_truth(batch, None) == target_mask(batch)).all()


def test_classes_that_are_not_listed_are_background_and_the_order_is_that_of_the_list() -> None:
    known = ("small", "large", "odd", "junk")
    labels = SemanticLabels.choose(known, ("odd", "small"), merged=False)
    assert labels.names == ("odd", "small")
    assert labels.of_class == (0, 2, 0, 1, 0)
    assert SemanticLabels.choose(known, None, merged=True).of_class == (0, 1, 1, 1, 0)


@pytest.mark.parametrize("merged", [False, True])
def test_a_card_gives_the_labels_again_whatever_the_order_of_the_classes(merged: bool) -> None:
    labels = SemanticLabels.choose(("a", "b", "c"), ("c", "a"), merged=merged)
    card = make_card(task="semantic", classes=labels.classes, labels=labels.names)
    found = SemanticLabels.of_card(card, ("c", "b", "a"))
    assert (found.names, found.classes) == (labels.names, labels.classes)
    assert found.of_class == ((0, 1, 0, 1) if merged else (0, 1, 0, 2))


@pytest.mark.parametrize("classes", [("nothing",), ("small", "small"), ()])
def test_classes_that_the_dataset_lacks_are_refused(classes: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="expected distinct ones of the dataset, which has small"):
        SemanticLabels.choose(CLASSES, classes, merged=True)


def test_only_semantic_networks_are_shown_normalised_cubes(eight: MemorySource) -> None:
    batch = replace(eight.content, statistics=torch.tensor([[5.0, 2.0], [1.0, 0.5]] * 4))
    assert network_input(batch, "target") is batch.subtomograms
    assert network_input(batch, "classify") is batch.subtomograms
    shown = network_input(batch, "semantic")
    torch.testing.assert_close(shown[0], (batch.subtomograms[0] - 5.0) / 2.0)
    torch.testing.assert_close(shown[1], (batch.subtomograms[1] - 1.0) / 0.5)
    with pytest.raises(ValueError, match="made by an earlier cectflow, simulate it anew"):
        network_input(replace(batch, statistics=None), "semantic")


@pytest.mark.parametrize(
    ("record", "kind", "message"),
    [
        ({}, "simulated", "states no median and robust standard deviation of its fields"),
        ({"median": 1.0, "robust_std": 0.0}, "simulated", "field f has one value in more than"),
        ({"median": 1.0, "robust_std": 1.0}, "imported", "needs every particle: give a simulated"),
    ],
)
def test_a_dataset_that_cannot_serve_semantic_segmenters_is_refused(
    record: dict[str, float], kind: str, message: str
) -> None:
    fields = (FieldRecord(field="f", mean=0.0, std=1.0, **record),)
    shard = ShardRecord(name="train/00000", count=0, fields=fields, sha256={})
    manifest = make_manifest(kind=kind, shards={"train": (shard,)})
    with pytest.raises(ValueError, match=message):
        check_statistics(manifest)

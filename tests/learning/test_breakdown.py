"""Groups hold the subtomograms that they name, and every one is in one group of a kind."""

from __future__ import annotations

import numpy as np
import pytest
from builders import CLASSES, make_manifest

from cectflow.learning.breakdown import Group, break_down
from cectflow.learning.scores import Evaluation
from cectflow.manifest import FieldRecord, Manifest, ShardRecord

NUM_FIELDS = 8


def manifest_of(**record: float | None) -> Manifest:
    """Manifest of fields whose SNR rises from 1 to 8, whatever their order in the split."""
    fields = tuple(
        FieldRecord(
            field=f"test-{i}", mean=0.0, std=1.0, **({"snr": 8.0 - i, "occupancy": 0.1} | record)
        )
        for i in range(NUM_FIELDS)
    )
    shard = ShardRecord(name="test/00000", count=2 * NUM_FIELDS, fields=fields, sha256={})
    return make_manifest(shards={"test": (shard,)}, masses_kda={"small": 100.0})


def judged(values: np.ndarray) -> Evaluation:
    """Two subtomograms in each field, one of each class."""
    number = len(values)
    return Evaluation(
        {"foreground_iou": values}, np.arange(number) % 2 + 1, None, np.arange(number) // 2
    )


def by(groups: tuple[Group, ...], kind: str) -> list[Group]:
    return [group for group in groups if group.by == kind]


def test_groups_by_structure_hold_the_cubes_of_the_class() -> None:
    values = np.tile([0.2, 0.8], NUM_FIELDS)
    groups = by(break_down(judged(values), manifest_of(), "foreground_iou"), "structure")
    assert [(g.name, g.position, g.number) for g in groups] == [
        ("small", 100.0, NUM_FIELDS),
        ("large", None, NUM_FIELDS),
    ]
    assert [g.score.value for g in groups] == pytest.approx([0.2, 0.8])
    assert tuple(g.name for g in groups) == CLASSES


def test_groups_by_snr_are_fields_in_the_order_of_their_measured_snr() -> None:
    values = np.repeat((8.0 - np.arange(NUM_FIELDS)) / 10, 2)  # a tenth of the SNR
    groups = by(break_down(judged(values), manifest_of(), "foreground_iou"), "SNR")
    assert [g.name for g in groups] == ["1 to 2", "3 to 4", "5 to 6", "7 to 8"]
    assert [g.position for g in groups] == [1.5, 3.5, 5.5, 7.5]
    for group in groups:
        assert group.position is not None
        assert group.number == 4
        assert group.score.value == pytest.approx(group.position / 10)
        assert group.score.low == pytest.approx(group.score.value - 0.05)


def test_what_no_field_states_makes_no_group_and_what_has_no_score_is_not_counted() -> None:
    values = np.repeat(0.5, 2 * NUM_FIELDS)
    values[3] = np.nan
    groups = break_down(judged(values), manifest_of(snr=None), "foreground_iou")
    assert by(groups, "SNR") == []
    assert sum(g.number for g in by(groups, "occupancy")) == 2 * NUM_FIELDS - 1
    assert [g.number for g in by(groups, "structure")] == [NUM_FIELDS, NUM_FIELDS - 1]
    assert by(groups, "occupancy")[0].name == "0.1"

"""A card survives its file, and a faulty file is refused by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from builders import make_card

from cectflow.model_card import CARD_FILE, Cost, ModelCard, Score, VariantFigures
from cectflow.spectrum import num_shells


def full_card() -> ModelCard:
    return make_card(
        scores={"accuracy": Score(value=0.9, low=0.85, high=0.94)},
        baselines={"ball": 0.4},
        cost=Cost(
            parameters=10, macs=20, subtomograms_per_s=3.5, batch_size=4, device="cpu", threads=1
        ),
        parity=1e-6,
        variants={
            "int8": VariantFigures(
                score=Score(value=0.9, low=0.85, high=0.94),
                difference=Score(value=0.0, low=-0.01, high=0.01),
                parity=0.1,
                speedup=2.0,
                runtime="openvino",
                threads=1,
            )
        },
        teacher="models:/cectflow-teacher/1",
        snr=None,
        occupancy=None,
    )


@pytest.mark.parametrize("card", [make_card(), full_card()], ids=["bare", "full"])
def test_a_card_survives_its_file(card: ModelCard, tmp_path: Path) -> None:
    (tmp_path / CARD_FILE).write_text(card.to_json(), encoding="utf-8")
    read = ModelCard.from_folder(tmp_path)
    assert read == card
    assert read.digest() == card.digest()


def test_the_digest_of_a_card_that_lacks_later_fields_stays_what_it_was() -> None:
    card = make_card()
    content = card.model_dump(mode="json")
    assert content.pop("spectrum") is None
    earlier = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert card.digest() == hashlib.sha256(earlier.encode()).hexdigest()
    shells = (0.0, *[1.0] * (num_shells(card.box) - 1))
    assert make_card(spectrum=shells).digest() != card.digest()


def test_a_folder_without_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no card\.json: expected a model folder"):
        ModelCard.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temprature": 1.0}, r"card\.json is no valid ModelCard: temprature: no such key"),
        ({"role": "boss"}, r"role: Input should be 'segmenter', 'teacher' or 'student'"),
        ({"box": 0}, r"box: .* greater than or equal to 1 \(given 0\)"),
        ({"voxel_size": -1.0}, r"voxel_size: .* greater than 0 \(given -1.0\)"),
        ({"box": "32"}, r"box: .* valid integer \(given '32'\)"),
        ({"spectrum": [0.0, 1.0]}, r"spectrum has 2 shells: a box of \d+ has \d+"),
        ({"spectrum": [0.0] * 11}, "expected finite numbers from 0, not all 0"),
        ({"spectrum": [0.0, -1.0, *[1.0] * 9]}, "expected finite numbers from 0, not all 0"),
        ({"schema_version": 0}, r"schema_version: Input should be 1"),
        (
            {"schema_version": 2, "more": 1},
            r"card of schema 2, cectflow .* knows schemas up to 1: i",
        ),
        ({"tilt_axis": "x"}, r"tilt_axis: Input should be 'y'"),
    ],
)
def test_a_faulty_card_is_refused_with_the_fault_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    content = json.loads(make_card().to_json()) | changes
    (tmp_path / CARD_FILE).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        ModelCard.from_folder(tmp_path)


def test_a_card_without_what_prediction_needs_is_refused(tmp_path: Path) -> None:
    content = json.loads(make_card().to_json())
    del content["voxel_size"], content["classes"]
    (tmp_path / CARD_FILE).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"classes: Field required; voxel_size: Field required"):
        ModelCard.from_folder(tmp_path)

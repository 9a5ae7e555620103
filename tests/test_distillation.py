"""Teachers of a student: who may teach together, and on how many devices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders import make_card

from cectflow.flows.distillation import open_lesson
from cectflow.flows.teachers import resolve_teachers
from cectflow.flows.training import Hardware
from cectflow.flows.unlabelled import find_unlabelled
from cectflow.model_card import CARD_FILE, Masking
from cectflow.prediction.contract import InputOptions
from cectflow.recipe import load_recipe
from cectflow.volume_writer import write_stack


def make_teacher(folder: Path, **changes: object) -> str:
    folder.mkdir()
    (folder / CARD_FILE).write_text(make_card(**changes).to_json())
    return str(folder)


def test_an_ensemble_answers_one_question(tmp_path: Path) -> None:
    first = make_teacher(tmp_path / "first")
    second = make_teacher(tmp_path / "second", network="strided_micro")
    teachers = resolve_teachers(f"{first}, {second}")
    assert teachers.uri == f"{first},{second}"
    assert teachers.networks.endswith(" + strided_micro")
    other = make_teacher(tmp_path / "other", classes=("large", "small"))
    with pytest.raises(ValueError, match=r"other: classes is .*that of .*first is"):
        resolve_teachers(f"{first},{other}")
    with pytest.raises(ValueError, match="names 2 teachers, 1 of them different"):
        resolve_teachers(f"{first},{first}")


def test_what_compares_whole_batches_is_refused_on_several_devices(tmp_path: Path) -> None:
    teachers = resolve_teachers(make_teacher(tmp_path / "teacher"))
    recipe, hardware = load_recipe("tiny"), Hardware("cpu", devices=2)
    hints = recipe.student.model_copy(update={"soft": recipe.student.soft.only("kl+hint")})
    with pytest.raises(ValueError, match="hints go with one device, not with 2"):
        open_lesson(teachers, recipe, hints, tmp_path / "out", hardware)
    cubes = find_unlabelled(str(tmp_path / "no.mrcs"), InputOptions(), print)
    with pytest.raises(ValueError, match="--unlabelled goes with one device, not with 2"):
        open_lesson(teachers, recipe, recipe.student, tmp_path / "out", hardware, unlabelled=cubes)
    assert not (tmp_path / "out").exists()


def test_unlabelled_cubes_are_brought_to_the_teachers_card(tmp_path: Path) -> None:
    card = make_card()
    cubes = np.random.default_rng(0).normal(size=(3, *[card.box] * 3)).astype(np.float32)
    write_stack(tmp_path / "cubes.mrcs", cubes, card.voxel_size)
    told: list[str] = []
    options = InputOptions(contrast="light")
    found = find_unlabelled(str(tmp_path / "cubes.mrcs"), options, told.append)
    assert found is not None
    np.testing.assert_array_equal(found.read(card)[:, 0].numpy(), -cubes)
    assert told == ["contrast: input is light, dark is expected: flipped", "3 cubes without labels"]
    assert found.tags["unlabelled.contrast"] == "light"
    with pytest.raises(ValueError, match="goes with a teacher that classifies"):
        found.read(make_card(role="segmenter", task="target", network="ssn3d"))
    masked = make_card(masking=Masking(segmenter="cectflow-segmenter/3", card_digest="0" * 64))
    with pytest.raises(ValueError, match="knows cubes masked with cectflow-segmenter/3"):
        found.read(masked)
    assert find_unlabelled(None, InputOptions(), print) is None

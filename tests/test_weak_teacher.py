"""A teacher that is no better than chance is refused, with the numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from builders import make_card

from cectflow.cli import main
from cectflow.flows.teachers import refuse_weak_teacher
from cectflow.model_card import CARD_FILE, ModelCard, Score


def classifier(low: float) -> ModelCard:
    return make_card(scores={"accuracy": Score(value=low + 0.1, low=low, high=low + 0.2)})


def segmenter(low: float) -> ModelCard:
    scores = {"foreground_iou": Score(value=low + 0.1, low=low, high=low + 0.2)}
    return make_card(
        role="segmenter", task="target", scores=scores, baselines={"ball": 0.4, "threshold": 0.3}
    )


def test_teachers_above_chance_pass() -> None:
    refuse_weak_teacher("t", classifier(0.51), None)
    refuse_weak_teacher("t", segmenter(0.41), None)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (
            classifier(0.5),
            r"t/1 is no better than chance: its accuracy on the test split is 0\.600 \(95 % "
            r"interval 0\.500 to 0\.700\), and guessing one of 2 classes has 0\.500; train it .*"
            r"--allow-weak-teacher \(-P allow_weak_teacher=true\)",
        ),
        (segmenter(0.39), r"its foreground_iou .* 0\.490 .*, and the best ball has 0\.400"),
        (make_card(), r"the card of t/1 states no accuracy"),
    ],
)
def test_teachers_at_chance_are_refused(card: ModelCard, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_weak_teacher("t/1", card, None)


def test_chance_is_the_share_of_the_most_frequent_class() -> None:
    refuse_weak_teacher("t", classifier(0.7), np.array([1, 2, 1, 2]))
    with pytest.raises(ValueError, match=r"most frequent class has 0\.750"):
        refuse_weak_teacher("t", classifier(0.7), np.array([1, 1, 1, 2]))


def test_distill_refuses_before_anything_is_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    empty_store: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "store.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    (tmp_path / "weak").mkdir()
    (tmp_path / "weak" / CARD_FILE).write_text(classifier(0.4).to_json())
    with pytest.raises(SystemExit) as stop:
        main(["distill", "--teacher", "weak", "--recipe", "tiny", "--out", "out"])
    assert stop.value.code == 2
    assert "weak is no better than chance: its accuracy" in capsys.readouterr().err
    assert not Path("out").exists()

"""Variants are siblings: judged against float32 on the same cubes, which stays what it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from builders import Exported, write_dataset

from cectflow.learning.scores import Evaluation
from cectflow.learning.training import evaluate_folder
from cectflow.learning.variants import make_variants

pytest_plugins = ("exported",)


def test_int8_is_made_judged_and_paired_with_float32(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cectflow.cost.SECONDS_PER_REPEAT", 0.005)
    dataset = write_dataset(tmp_path / "data")
    folder = tmp_path / "model"
    shutil.copytree(exported.folder, folder)
    assert make_variants(folder, dataset, ()) == {}
    (figures,) = make_variants(folder, dataset, ("int8",)).values()
    assert (folder / "model.int8.onnx").is_file()
    plain = evaluate_folder(folder, dataset).summary()["accuracy"].value
    assert figures.score.value - figures.difference.value == pytest.approx(plain)
    assert figures.difference.low <= figures.difference.value <= figures.difference.high
    assert figures.parity > 0
    assert figures.speedup > 0


def test_a_difference_is_paired_over_fields() -> None:
    def evaluation(values: list[float]) -> Evaluation:
        rows = np.arange(4)
        return Evaluation({"accuracy": np.array(values, float)}, rows, None, rows // 2)

    better, worse = evaluation([1, 0, 1, 1]), evaluation([1, 0, 0, 1])
    same = better.difference(better, "accuracy")
    assert (same.value, same.low, same.high) == (0, 0, 0)
    # Of the two fields one is lost by half: its mean over resamples of fields is 0 to a half.
    found = worse.difference(better, "accuracy")
    assert (found.value, found.low, found.high) == (-0.25, -0.5, 0)

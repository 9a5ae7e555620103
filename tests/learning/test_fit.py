"""The loop learns each objective, resumes without a trace, stops in time and keeps the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import MemorySource, TinyClassifier, TinySegmenter, make_cubes, make_manifest
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from cectflow.dataset import Batch
from cectflow.learning.fit import DivergedError, FitRecipe, FitResult, fit, open_fabric
from cectflow.learning.losses import SegmentationLoss
from cectflow.learning.objective import Classify, Distill, Objective, Segment
from cectflow.learning.teacher import Teacher
from cectflow.networks.normalisation import NormalisePerCube

Weights = dict[str, Tensor]


def make_recipe(**changes: Any) -> FitRecipe:
    content: dict[str, Any] = {
        "network": "tiny", "epochs": 4, "batch_size": 3, "learning_rate": 0.003,
    }  # fmt: skip
    return FitRecipe(**content | changes)


def ignore(row: Mapping[str, float], epoch: int) -> None:
    """A log that keeps nothing."""


def make_classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NormalisePerCube(TinyClassifier())


def run(
    source: MemorySource,
    folder: Path,
    *,
    network: nn.Module | None = None,
    objective: Objective | None = None,
    log: Callable[[Mapping[str, float], int], None] = ignore,
    provenance: Mapping[str, str] | None = None,
    precision: Any = "float32",
    **recipe: Any,
) -> tuple[nn.Module, FitResult]:
    """Fit on a source that is its own validation data."""
    network = network or make_classifier()
    result = fit(
        network,
        objective or Classify(2),
        source,
        source,
        make_recipe(**recipe),
        fabric=open_fabric("cpu", precision),
        folder=folder,
        log=log,
        provenance=provenance,
    )
    return network, result


def weights_of(network: nn.Module) -> Weights:
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(first: Weights, second: Weights) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def without_time(result: FitResult) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if name != "epoch_seconds"}
        for row in result.history
    ]


# What it learns


def test_a_classifier_learns_eight_cubes_by_heart(eight: MemorySource, tmp_path: Path) -> None:
    _, result = run(eight, tmp_path, epochs=30, learning_rate=0.01)
    assert result.best_score == 1.0


def test_a_segmenter_learns_eight_cubes_by_heart(eight: MemorySource, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = NormalisePerCube(TinySegmenter())
    _, result = run(
        eight, tmp_path, network=network,
        objective=Segment(SegmentationLoss(cross_entropy=1.0, dice=1.0)),
        epochs=40, batch_size=4, learning_rate=0.02,
    )  # fmt: skip
    assert result.best_score > 0.9


def test_a_student_learns_its_teachers_logits_on_eight_cubes(
    eight: MemorySource, tmp_path: Path
) -> None:
    teacher = make_classifier(seed=1).eval()
    objective = Distill(Classify(2), Teacher(teacher))
    _, result = run(
        eight, tmp_path, objective=objective, epochs=60, learning_rate=0.01, augment=False
    )
    assert result.history[-1]["validation_loss"] < 0.02 * result.history[0]["validation_loss"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_offset_and_a_scale_of_the_cubes_do_not_hinder_learning(
    precision: str, tmp_path: Path
) -> None:
    # bfloat16 has 8 bits: of 5000 ± 1 it keeps nothing, unless it comes after the normalisation.
    batch = make_cubes(8)
    shifted = Batch(
        batch.subtomograms + 5000.0, batch.voxel_labels, batch.instances, batch.class_ids,
        batch.fields,
    )  # fmt: skip
    source = MemorySource(shifted, make_manifest())
    network, result = run(source, tmp_path, precision=precision, epochs=30, learning_rate=0.01)
    assert result.best_score == 1.0
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_bfloat16_is_refused_on_a_cpu_where_a_kernel_is_wider_than_its_grid(
    eight: MemorySource, tmp_path: Path
) -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv3d(1, 4, 3, stride=6, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 3, padding=1)
            )

        def forward(self, cubes: Tensor) -> Tensor:
            return self.layers(cubes).mean((2, 3, 4))

    with pytest.raises(ValueError, match=r"here \(3, 3, 3\) on \(2, 2, 2\) voxels: use precision"):
        run(eight, tmp_path, network=Narrow(), precision="bfloat16", epochs=1)
    _, result = run(eight, tmp_path, network=Narrow(), precision="float32", epochs=1)
    assert len(result.history) == 1


def test_the_history_tells_of_training_validation_rate_and_time(
    eight: MemorySource, tmp_path: Path
) -> None:
    rows: list[tuple[int, Mapping[str, float]]] = []
    objective = Distill(Classify(2), Teacher(make_classifier(seed=1).eval()), weight=0.5)
    _, result = run(
        eight, tmp_path, objective=objective, epochs=3, log=lambda row, n: rows.append((n, row))
    )
    assert [epoch for epoch, _ in rows] == [1, 2, 3]
    assert [dict(row) for _, row in rows] == result.history
    assert list(result.history[0]) == [
        "train_loss", "train_soft", "train_hard", "validation_accuracy", "validation_loss",
        "learning_rate", "epoch_seconds",
    ]  # fmt: skip


def test_a_row_averages_over_cubes_and_not_over_batches(
    eight: MemorySource, tmp_path: Path
) -> None:
    # Batches of 3, 3 and 2; nothing moves at this rate, and this network drops nothing.
    network = make_classifier().eval()
    network.network.dropout = nn.Identity()  # type: ignore[union-attr]
    expected = Classify(2)(network, eight.content)["loss"].item()
    _, result = run(eight, tmp_path, network=network, epochs=1, learning_rate=1e-12, augment=False)
    assert result.history[0]["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert result.history[0]["validation_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_rate_warms_up_to_its_peak_and_falls_to_nothing(
    eight: MemorySource, tmp_path: Path
) -> None:
    _, result = run(
        eight, tmp_path, epochs=40, batch_size=8, learning_rate=0.002, patience=40, augment=False
    )
    rates = [row["learning_rate"] for row in result.history]
    assert rates[:2] == [0.001, 0.002]  # one step per epoch, two of them to warm up
    assert all(later <= earlier for earlier, later in pairwise(rates[1:]))
    assert rates[20] == pytest.approx(0.001, rel=0.1)
    assert 0 < rates[-1] < 0.002 * 0.01


# The same again


@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_an_interrupted_training_ends_like_an_uninterrupted_one(
    eight: MemorySource, tmp_path: Path, optimiser: str
) -> None:
    through, expected = run(eight, tmp_path / "through", optimiser=optimiser)

    class InterruptionError(Exception):
        pass

    def interrupt(row: Mapping[str, float], epoch: int) -> None:
        if epoch == 2:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        run(eight, tmp_path / "stopped", optimiser=optimiser, log=interrupt)
    epochs: list[int] = []
    torch.manual_seed(99)  # whatever another process would have there
    resumed, result = run(
        eight, tmp_path / "stopped", optimiser=optimiser, network=make_classifier(seed=5),
        log=lambda _, epoch: epochs.append(epoch),
    )  # fmt: skip
    assert epochs == [1, 2, 3, 4]  # those of the checkpoint are told again
    assert equal(weights_of(through), weights_of(resumed))
    assert without_time(result) == without_time(expected)
    assert (result.best_epoch, result.best_score) == (expected.best_epoch, expected.best_score)


def test_a_finished_training_is_not_done_again(eight: MemorySource, tmp_path: Path) -> None:
    first, expected = run(eight, tmp_path)
    told: list[Mapping[str, float]] = []
    again, result = run(
        eight, tmp_path, network=make_classifier(seed=5), log=lambda row, _: told.append(row)
    )
    assert equal(weights_of(first), weights_of(again))
    assert result.history == expected.history == told  # the seconds of each epoch included


def test_the_same_seed_gives_the_same_training_and_another_seed_does_not(
    eight: MemorySource, tmp_path: Path
) -> None:
    first, second, other = (
        run(eight, tmp_path / name, network=make_classifier(), seed=seed)
        for name, seed in (("first", 1), ("second", 1), ("other", 2))
    )
    assert without_time(first[1]) == without_time(second[1])
    assert equal(weights_of(first[0]), weights_of(second[0]))
    assert without_time(first[1]) != without_time(other[1])


def test_checkpoints_hold_data_and_no_code(eight: MemorySource, tmp_path: Path) -> None:
    network, result = run(eight, tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["epoch"] == 4
    assert state["history"] == result.history
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert equal(best["network"], weights_of(network))


def test_the_loop_writes_nothing_outside_its_folder(
    eight: MemorySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(eight, tmp_path / "deep" / "folder")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert found == {"deep", "deep/folder", "deep/folder/best.pt", "deep/folder/last.pt"}


# What it refuses


def test_a_checkpoint_of_another_recipe_is_refused(eight: MemorySource, tmp_path: Path) -> None:
    run(eight, tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"last\.pt is of another recipe: give another folder"):
        run(eight, tmp_path, epochs=2)


def test_a_checkpoint_of_other_data_is_refused(eight: MemorySource, tmp_path: Path) -> None:
    run(eight, tmp_path, epochs=1)
    record = {"name": "train/00000", "count": 8, "fields": (), "sha256": {"00000.mrcs": "f" * 64}}
    manifest = make_manifest(shards={"train": (record,)})
    with pytest.raises(ValueError, match=r"is of another dataset: "):
        run(MemorySource(eight.content, manifest), tmp_path, epochs=1)


def test_a_checkpoint_of_another_objective_or_teacher_is_refused(
    eight: MemorySource, tmp_path: Path
) -> None:
    teacher = make_classifier(seed=1).eval()
    run(eight, tmp_path, epochs=1, objective=Distill(Classify(2), Teacher(teacher)),
        provenance={"teacher": "models:/t/1"})  # fmt: skip
    with pytest.raises(ValueError, match=r"of another teacher: "):
        run(eight, tmp_path, epochs=1, objective=Distill(Classify(2), Teacher(teacher)),
            provenance={"teacher": "models:/t/2"})  # fmt: skip
    with pytest.raises(ValueError, match=r"of another objective and teacher: "):
        run(eight, tmp_path, epochs=1)


def test_a_loss_that_is_no_number_ends_the_training(eight: MemorySource, tmp_path: Path) -> None:
    network = make_classifier()
    with torch.no_grad():
        next(network.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match=r"loss of tiny is nan in epoch 1: lower learning_rate"):
        run(eight, tmp_path, network=network)
    assert not (tmp_path / "last.pt").exists()


class Dying(nn.Module):
    """A classifier whose units are dead where a bias says so."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3)
        self.last = nn.Linear(4, 2)
        nn.init.constant_(self.first.bias, bias)

    def forward(self, cubes: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(cubes)).mean(dim=(2, 3, 4)))


def test_a_network_whose_units_are_dead_is_given_up(eight: MemorySource, tmp_path: Path) -> None:
    run(eight, tmp_path / "alive", network=Dying(0.0), epochs=1)
    told = r"first layer of tiny has had no gradient in all of epoch 1 .*lower learning_rate"
    with pytest.raises(DivergedError, match=told):
        run(eight, tmp_path / "dead", network=Dying(-1e4), epochs=1)


def test_segmentation_of_unlabelled_cubes_is_refused(
    unlabelled: MemorySource, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="no voxel labels"):
        run(unlabelled, tmp_path, network=TinySegmenter(), objective=Segment())


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"sees no CUDA device: use --device cpu or auto"):
        open_fabric("cuda")
    assert open_fabric("auto").device.type == "cpu"


def test_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float16 needs a GPU: use float32 or bfloat16"):
        open_fabric("cpu", "float16")


@pytest.mark.parametrize(
    ("field", "value"), [("epochs", 0), ("batch_size", 0), ("learning_rate", 0.0), ("patience", 0)]
)
def test_a_recipe_that_trains_nothing_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        make_recipe(**{field: value})


# When it stops


class Scripted(Metric):
    """A score that is read from a list, one value per validation."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values

    def update(self, output: Tensor, truth: Tensor) -> None:
        """Whatever was predicted."""

    def compute(self) -> Tensor:
        return torch.tensor(self.values.pop(0))


class ScriptedObjective(Classify):
    """Classification whose validation score is known beforehand."""

    def __init__(self, values: list[float]) -> None:
        super().__init__(2)
        object.__setattr__(self, "values", values)

    def make_scores(self) -> MetricCollection:
        return MetricCollection({"accuracy": Scripted(self.values)})  # type: ignore[attr-defined]


def test_training_stops_after_patience_and_the_best_weights_are_kept(
    eight: MemorySource, tmp_path: Path
) -> None:
    network = make_classifier()
    seen: dict[int, Weights] = {}
    _, result = run(
        eight, tmp_path, network=network, epochs=20, patience=2,
        objective=ScriptedObjective([0.1, 0.5, 0.4, 0.4, 0.9]),
        log=lambda _, epoch: seen.update({epoch: weights_of(network)}),
    )  # fmt: skip
    assert list(seen) == [1, 2, 3, 4]  # patience of 2 ends with epoch 4
    assert (result.best_epoch, result.best_score) == (2, 0.5)
    assert equal(weights_of(network), seen[2])
    assert not equal(seen[2], seen[4])


def test_patience_starts_anew_with_every_better_epoch(eight: MemorySource, tmp_path: Path) -> None:
    scores = [0.1, 0.0, 0.2, 0.1, 0.3, 0.2, 0.2, 0.9]
    _, result = run(eight, tmp_path, epochs=20, patience=2, objective=ScriptedObjective(scores))
    assert (len(result.history), result.best_epoch) == (7, 5)


def test_of_equal_scores_the_lower_loss_is_the_better_epoch(
    eight: MemorySource, tmp_path: Path
) -> None:
    objective = ScriptedObjective([0.5, 0.5, 0.5, 0.5])
    _, result = run(eight, tmp_path, epochs=4, patience=4, objective=objective)
    losses = [row["validation_loss"] for row in result.history]
    assert result.best_epoch == losses.index(min(losses)) + 1


def test_a_training_that_had_stopped_stays_stopped(eight: MemorySource, tmp_path: Path) -> None:
    _, expected = run(
        eight, tmp_path, epochs=20, patience=1, objective=ScriptedObjective([0.2, 0.1])
    )
    _, result = run(eight, tmp_path, epochs=20, patience=1, objective=ScriptedObjective([]))
    assert result.history == expected.history


def test_a_score_of_zero_throughout_still_leaves_weights(
    eight: MemorySource, tmp_path: Path
) -> None:
    _, result = run(eight, tmp_path, epochs=2, objective=ScriptedObjective([0.0, 0.0]))
    assert result.best_epoch in {1, 2}
    assert result.best_score == 0.0


def test_progress_says_how_the_training_stands(
    eight: MemorySource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("cectflow.progress.SECONDS_BETWEEN_LINES", -1.0)
    run(eight, tmp_path, epochs=3, objective=ScriptedObjective([0.25, 0.5, 0.1]))
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("fitting tiny: 1 of 3, ")
    assert first.endswith("(accuracy 0.250 at epoch 1)")
    assert second.endswith("(accuracy 0.500 at epoch 2)")

"""Two processes learn what one learns from the doubled batch; they live and die together."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import BOX, TinyClassifier, write_dataset
from torch import Tensor, nn

from cectflow.dataset import Batch, BatchSource, Dataset, Selection, Split
from cectflow.learning import fit as fitting
from cectflow.learning.fit import FitRecipe, FitResult, fit, open_fabric
from cectflow.learning.objective import Classify, Distill, Objective
from cectflow.learning.teacher import KnownLogits, Teacher
from cectflow.networks import create_network
from cectflow.networks.normalisation import NormalisePerCube
from cectflow.turns import HALF_TURNS

Rows = list[dict[str, float]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many this machine has."""
    monkeypatch.setattr(fitting, "count_cores", lambda: 2)


@dataclass
class Live:
    """A source that only one process can read, as live data are."""

    selection: Selection

    def __post_init__(self) -> None:
        self.manifest = self.selection.manifest.model_copy(
            update={"live_subtomograms": len(self.selection)}
        )

    def __len__(self) -> int:
        return len(self.selection)

    def __getstate__(self) -> None:
        msg = "live data stay where they are made"
        raise AssertionError(msg)

    def batches(self, *arguments: Any) -> Any:
        yield from self.selection.batches(*arguments)


def make_classifier(seed: int = 0) -> nn.Module:
    """Without dropout, which each process draws for itself."""
    torch.manual_seed(seed)
    network = TinyClassifier()
    network.dropout = nn.Identity()
    return NormalisePerCube(network)


class Counting(nn.Module):
    """A teacher that counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.network = make_classifier(seed=1).eval()
        self.asked = 0

    def forward(self, cubes: Tensor) -> Tensor:
        self.asked += len(cubes)
        logits: Tensor = self.network(cubes)
        return logits


def train(
    folder: Path, source: BatchSource, validation: Split, *,
    devices: int = 2, network: nn.Module | None = None, objective: Objective | None = None,
    log: Any = lambda row, epoch: None,
) -> tuple[nn.Module, FitResult]:  # fmt: skip
    network = network or make_classifier()
    recipe = FitRecipe(network="tiny", epochs=3, batch_size=10 // devices, learning_rate=0.003)
    fabric = open_fabric("cpu", "float32", devices)
    result = fit(
        network, objective or Classify(2), source, validation, recipe,
        fabric=fabric, folder=folder, log=log,
    )  # fmt: skip
    return network, result


@pytest.fixture(scope="module")
def eleven(dataset: Dataset) -> Selection:
    """Of these the last batch of ten is one cube, and one of two processes has none of it."""
    return Selection(dataset.split("train"), np.arange(11))


def close(first: Rows, second: Rows) -> bool:
    """The same numbers to rounding, but for the seconds."""
    return all(
        here.keys() == there.keys()
        and all(
            math.isclose(here[name], there[name], rel_tol=1e-4, abs_tol=1e-6)
            for name in here
            if name != "epoch_seconds"
        )
        for here, there in zip(first, second, strict=True)
    )


def test_two_processes_learn_like_one_with_the_doubled_batch_and_go_on_when_interrupted(
    dataset: Dataset, eleven: Selection, tmp_path: Path
) -> None:
    """From live data, and from a teacher that is asked once."""
    validation, teacher = dataset.split("validation"), Counting()
    sources = ((eleven, tuple(HALF_TURNS)), (validation, ("identity",)))
    known = KnownLogits(Teacher(teacher), sources, batch_size=4, device=torch.device("cpu"))
    objective = Distill(Classify(2), Teacher(teacher), known=known, weight=0.5)
    live = Live(eleven)
    alone, expected = train(tmp_path / "alone", live, validation, devices=1, objective=objective)

    class InterruptionError(Exception):
        pass

    def interrupt(row: Mapping[str, float], epoch: int) -> None:
        raise InterruptionError

    folder = tmp_path / "together"
    with pytest.raises(InterruptionError):
        train(folder, live, validation, objective=objective, log=interrupt)
    assert not active_children()
    told: list[tuple[int, dict[str, float]]] = []
    network, result = train(
        folder, live, validation, objective=objective,
        log=lambda row, epoch: told.append((epoch, row)),
    )  # fmt: skip
    assert close(result.history, expected.history)
    assert told == list(enumerate(result.history, start=1))
    assert (result.best_epoch, result.best_score) == (expected.best_epoch, expected.best_score)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert {path.name for path in folder.iterdir()} == {"best.pt", "last.pt"}
    assert teacher.asked == 4 * 11 + 12
    assert not active_children()
    with pytest.raises(ValueError, match=r"last\.pt is of another number of devices and recipe"):
        train(folder, live, validation, objective=objective, devices=1)


def test_with_batch_norm_all_processes_have_the_same_weights_and_statistics(
    dataset: Dataset, eleven: Selection, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = create_network("strided_nano", num_outputs=2, box=BOX)
    validation = dataset.split("validation")
    network, result = train(tmp_path, eleven, validation, network=network)
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    # Each process judged a part of these, by what the checkpoint holds.
    whole = next(validation.batches(12))
    loss = Classify(2)(network.eval(), whole)["loss"].item()
    judged = result.history[result.best_epoch - 1]["validation_loss"]
    assert judged == pytest.approx(loss, rel=1e-4)


class FailsOnOne(Classify):
    """What happens where a disk fails one process."""

    def __call__(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if os.environ["LOCAL_RANK"] == "1":
            msg = "00000.mrcs is truncated"
            raise ValueError(msg)
        return super().__call__(network, batch)


def test_a_failure_in_one_process_ends_the_training(
    dataset: Dataset, eleven: Selection, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"^00000\.mrcs is truncated"):
        train(tmp_path, eleven, dataset.split("validation"), objective=FailsOnOne(2))
    assert not active_children()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("devices", [0, -1, 3])
def test_more_devices_than_there_are_and_none_are_refused(devices: int) -> None:
    with pytest.raises(ValueError, match=f"devices is {devices}: expected 1 to 2, the cores of"):
        open_fabric("cpu", devices=devices)


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match="devices is 8: expected 1 to 4, the GPUs that torch sees"):
        open_fabric("cuda", "float32", 8)

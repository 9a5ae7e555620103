"""A tiny model folder, and stores with versions of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from builders import make_card, write_onnx
from servers import Servers
from stores import pristine_mlflow, working_folder
from torch import Tensor, nn

from cectflow.model_card import Cost, ModelCard, Score
from cectflow.tracking.registry import register_model
from cectflow.tracking.runs import connect, start_run

BOX = 8
NAME = "cectflow-student"


class TinyNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(1, 4, 3, padding=1)
        self.scores = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.convolution(x).relu().mean((2, 3, 4)))


@pytest.fixture(scope="session")
def card() -> ModelCard:
    return make_card(
        role="student", num_outputs=3, classes=("ribosome", "proteasome", "apoferritin"), box=BOX,
        voxel_size=13.6, scores={"accuracy": Score(value=0.9, low=0.85, high=0.94)},
        cost=Cost(parameters=127, macs=1000, subtomograms_per_s=1e3, batch_size=8, device="cpu",
                  threads=1),
        parity=1e-6, teacher="models:/cectflow-teacher/1",
    )  # fmt: skip


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, card: ModelCard) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    folder.mkdir()
    torch.manual_seed(0)
    program = torch.export.export(
        TinyNetwork().eval(),
        (torch.zeros(2, 1, BOX, BOX, BOX),),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        strict=False,
    )
    torch.export.save(program, folder / "model.pt2")
    # The registry carries this file and never runs it; one of the network takes 5 s.
    write_onnx(folder / "model.onnx")
    (folder / "card.json").write_text(card.to_json(), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def registered_store(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Path, model_folder: Path
) -> Path:
    """Database to copy, with three versions of cectflow-student; its artifacts stay in place."""
    root = tmp_path_factory.mktemp("registered")
    store = root / "mlflow.db"
    shutil.copy(empty_store, store)
    with pristine_mlflow(), working_folder(root):
        connect(f"sqlite:///{store}")
        with start_run("register") as run:
            for _ in range(3):
                register_model(run, model_folder, name=NAME)
    return store


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Path]:
    """Working folder of its own, without any store, and an MLflow that remembers nothing."""
    with pristine_mlflow(), working_folder(tmp_path):
        os.environ["CECTFLOW_CACHE"] = str(tmp_path / "models")
        yield tmp_path


@pytest.fixture
def store(lab: Path, empty_store: Path) -> str:
    """Empty store, connected."""
    shutil.copy(empty_store, lab / "mlflow.db")
    return connect()


@pytest.fixture
def registry(lab: Path, registered_store: Path) -> str:
    """Store with versions 1 to 3 of cectflow-student, none in any stage, connected."""
    shutil.copy(registered_store, lab / "mlflow.db")
    return connect()


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Servers]:
    """One server of each kind, shared by all tests: give registered models names of their own."""
    running = Servers(tmp_path_factory.mktemp("servers"), empty_store)
    with running.stack:
        yield running


@pytest.fixture
def as_project_run() -> Callable[[str], AbstractContextManager[None]]:
    """What ``mlflow run`` sets for its child."""

    @contextmanager
    def enter(run_id: str) -> Iterator[None]:
        os.environ["MLFLOW_RUN_ID"] = run_id
        try:
            yield
        finally:
            os.environ.pop("MLFLOW_RUN_ID", None)

    return enter

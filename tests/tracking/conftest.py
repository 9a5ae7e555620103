"""A tiny model folder, and stores that are made once and copied, since making one takes seconds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
import mlflow.tracking.fluent
import pytest
import torch
from builders import make_card
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
    # The registry carries this file and never reads it; a real one takes 5 s.
    (folder / "model.onnx").write_bytes(b"stands for an ONNX file")
    (folder / "card.json").write_text(card.to_json(), encoding="utf-8")
    return folder


@contextmanager
def pristine_mlflow() -> Iterator[None]:
    """Undoes whatever the body and MLflow do to the environment and to MLflow's globals."""
    before = dict(os.environ)
    for name in [name for name in before if name.startswith(("MLFLOW_", "CECTFLOW_"))]:
        del os.environ[name]
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
        mlflow.tracking.fluent._active_experiment_id = None
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True)
class Prepared:
    """Databases to copy; the artifacts of ``registered`` stay where they are."""

    empty: Path
    registered: Path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Prepared:
    root = tmp_path_factory.mktemp("stores")
    empty, registered = root / "empty.db", root / "registered.db"
    with pristine_mlflow(), working_folder(root):
        os.environ["MLFLOW_RUN_ID"] = "none"  # so that no experiment is made, for its folder stays
        connect(f"sqlite:///{empty}")
        del os.environ["MLFLOW_RUN_ID"]
        shutil.copy(empty, registered)
        connect(f"sqlite:///{registered}")
        with start_run("register") as run:
            for _ in range(3):
                register_model(run, model_folder, name=NAME)
    return Prepared(empty, registered)


@contextmanager
def working_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Path]:
    """Working folder of its own, without any store, and an MLflow that remembers nothing."""
    with pristine_mlflow(), working_folder(tmp_path):
        yield tmp_path


@pytest.fixture
def store(lab: Path, prepared: Prepared) -> str:
    """Empty store, connected."""
    shutil.copy(prepared.empty, lab / "mlflow.db")
    return connect()


@pytest.fixture
def registry(lab: Path, prepared: Prepared) -> str:
    """Store with versions 1 to 3 of cectflow-student, none in any stage, connected."""
    shutil.copy(prepared.registered, lab / "mlflow.db")
    return connect()


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

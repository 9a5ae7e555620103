"""Stores with registered versions that are really good, or fair, at telling balls by their size."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from balls import FAIR, GOOD, MeanClassifier, Register
from builders import make_card, make_trust, write_dataset
from matplotlib.figure import Figure
from stores import pristine_mlflow, working_folder

from cectflow.dataset import Dataset
from cectflow.export import export_network
from cectflow.model_card import CARD_FILE
from cectflow.tracking.registry import RegisteredVersion, register_model
from cectflow.tracking.runs import connect, start_run


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Threshold → model folder. Do not write to them."""
    root = tmp_path_factory.mktemp("exports")
    for threshold in (GOOD, FAIR):
        export_network(MeanClassifier(threshold), make_card(), root / str(threshold))
    return {threshold: root / str(threshold) for threshold in (GOOD, FAIR)}


@pytest.fixture(scope="session")
def cubes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Twelve test cubes of three fields, half of them of each class. Do not write to it."""
    return write_dataset(tmp_path_factory.mktemp("cubes"))


@pytest.fixture
def lab(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[Path]:  # fmt: skip
    """Working folder with an empty store, connected.

    Timings take no time and mean nothing, and nothing is drawn but for tests that say ``draws``.
    """
    monkeypatch.setattr("cectflow.cost.SECONDS_PER_REPEAT", 0.001)
    monkeypatch.setattr("cectflow.cost.REPEATS", 1)
    if "draws" not in request.fixturenames:
        monkeypatch.setattr("cectflow.flows.promotion_report.Pictures.draw", lambda *_: [])
        monkeypatch.setattr("cectflow.flows.teachers.draw_confusion", lambda *_: Figure())
    with pristine_mlflow(), working_folder(tmp_path):
        os.environ["CECTFLOW_CACHE"] = str(tmp_path / "cache")
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
        shutil.copy(empty_store, tmp_path / "mlflow.db")
        connect()
        yield tmp_path


@pytest.fixture
def register(lab: Path, exports: dict[float, Path], cubes: Dataset) -> Register:
    """Function that registers the next version of a role: threshold, role, changes of the card."""

    def make(
        threshold: float, role: str = "teacher", data: Dataset = cubes, **changes: Any
    ) -> RegisteredVersion:
        folder = lab / f"model-{len(list(lab.iterdir()))}"
        shutil.copytree(exports[threshold], folder)
        digest = data.manifest.content_digest()
        if role == "student":
            changes = {"teacher": "models:/cectflow-teacher/1"} | changes
        facts = {"role": role, "trust": make_trust(temperature=1.0), "dataset_digest": digest,
                 "classes": data.manifest.classes}  # fmt: skip
        card = make_card(**facts | changes)
        (folder / CARD_FILE).write_text(card.to_json(), encoding="utf-8")
        with start_run("register") as run:
            tags = {"dataset.path": str(data.folder)}
            return register_model(run, folder, name=f"cectflow-{role}", tags=tags)

    return make


@pytest.fixture
def draws() -> None:
    """The pictures of reports are drawn."""

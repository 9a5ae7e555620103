"""One store, one folder, one road of the recipe ``tiny``: what it promotes serves the rest."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from road import Road


@pytest.fixture(scope="session")
def road(tmp_path_factory: pytest.TempPathFactory) -> Road:
    folder = tmp_path_factory.mktemp("road")
    # MLflow leaves ids of experiments and runs of other tests' stores in the environment.
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment = clean | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "CECTFLOW_CACHE": str(folder / "cache"),
    }
    walk = Road(folder, "", environment)
    output = walk.mlflow_run("main", recipe="tiny", out=str(folder / "tour"), device="cpu")
    return Road(folder, output, environment)


@pytest.fixture
def by_hand(road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process work in the road's folder and store."""
    monkeypatch.chdir(road.folder)
    for name in ("MLFLOW_TRACKING_URI", "CECTFLOW_CACHE"):
        monkeypatch.setenv(name, road.environment[name])

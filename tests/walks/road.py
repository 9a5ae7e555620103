"""Entry points, run through ``mlflow run`` as a user would."""

from __future__ import annotations

import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

__all__ = ["ROOT", "Road", "find_runs", "walk_here"]

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Road:
    """What the tiny road left behind."""

    folder: Path
    output: str
    environment: dict[str, str]

    def mlflow_run(self, entry_point: str, *, code: int = 0, **parameters: str) -> str:
        """Run an entry point as a user would; returns stdout and stderr."""
        command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", entry_point]
        command += ["--env-manager", "local"]
        for name, value in parameters.items():
            command += ["-P", f"{name}={value}"]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True,
            timeout=600,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr


def walk_here(monkeypatch: pytest.MonkeyPatch, entry_point: str, **parameters: str) -> int:
    """Exit code of an entry point that this process runs: MLflow's command takes ten seconds."""
    given = [word for name, value in parameters.items()
             for word in (f"--{name.replace('_', '-')}", value)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [entry_point, *given])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"entrypoints.{entry_point}", run_name="__main__")
    return int(stop.value.code or 0)


def find_runs(road: Road) -> list[Any]:
    """All runs of the road's store, the newest first."""
    import mlflow

    client = mlflow.MlflowClient(road.environment["MLFLOW_TRACKING_URI"])
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, max_results=100, order_by=["start_time DESC"]))

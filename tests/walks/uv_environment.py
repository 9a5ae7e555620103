"""``mlflow run . --env-manager uv``; by ``make test-uv`` only: it downloads and fills some 2 GB."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_road
from road import ROOT


def test_an_entry_point_runs_in_an_environment_of_uv(tmp_path: Path) -> None:
    road = make_road(tmp_path)
    if shutil.which("uv", path=road.environment["PATH"]) is None:
        pytest.fail("uv is not on PATH: run `make test-uv`, which installs it")
    environment = road.environment | {
        "MLFLOW_ENV_ROOT": str(tmp_path / "environments"),
        "UV_CACHE_DIR": str(tmp_path / "uv"),
    }
    command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "-e", "simulate"]
    command += ["--env-manager", "uv", "-P", "recipe=tiny", "-P", f"out={tmp_path / 'data'}"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (made,) = (tmp_path / "environments").iterdir()
    assert f"{made}/bin/activate && python -m entrypoints.simulate" in done.stdout + done.stderr
    assert (tmp_path / "data" / "manifest.json").is_file()

"""What docs/cluster brings does what the page says; the real Slurm is ``make test-slurm``."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parents[1] / "docs" / "cluster"
CONFIGURABLE = {
    "partition", "account", "environment", "exports", "gpus_per_node", "gres", "mem", "modules",
    "nodes", "ntasks", "exclusive", "time", "sbatch-script-file",
}  # fmt: skip
"""Settings of mlflow-slurm 1.0.6."""


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """Stands for a virtual environment: its mlflow prints its arguments, one a line."""
    folder = tmp_path / "my venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "activate").write_text(f"PATH='{folder}/bin':$PATH\n")
    (folder / "bin" / "mlflow").write_text('#!/bin/sh\nprintf \'%s\\n\' "$OMP_NUM_THREADS" "$@"\n')
    (folder / "bin" / "mlflow").chmod(0o755)
    return folder


def bash(venv: Path, *arguments: str, code: int = 0) -> str:
    environment = os.environ | {"CECTFLOW_VENV": str(venv), "SLURM_CPUS_PER_TASK": "3"}
    done = subprocess.run(
        ["bash", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_the_script_hands_its_arguments_on_as_they_are(venv: Path) -> None:
    said = bash(venv, str(CLUSTER / "train.sbatch"), "train_teacher", "-P", "out=my runs; ls")
    assert said.splitlines() == [
        "3", "run", ".", "-e", "train_teacher", "--env-manager", "local", "-P", "out=my runs; ls",
    ]  # fmt: skip


def test_the_script_without_an_entry_point_says_how_it_is_used(venv: Path) -> None:
    said = bash(venv, str(CLUSTER / "train.sbatch"), code=2)
    assert said.startswith("usage: sbatch docs/cluster/train.sbatch ENTRY_POINT")


def test_the_plugins_settings_are_settings(venv: Path) -> None:
    settings = json.loads((CLUSTER / "slurm.json").read_text())
    assert set(settings) <= CONFIGURABLE
    # The plugin would wrap the command in quotes, which it has already.
    assert "nodes" not in settings


def test_a_virtual_environment_stands_in_for_conda(venv: Path) -> None:
    home = CLUSTER / "venv-as-conda"
    conda = str(home / "bin" / "conda")
    listed = subprocess.run([conda, "env", "list", "--json"], capture_output=True, check=True)
    assert json.loads(listed.stdout) == {"envs": []}
    subprocess.run([conda, "env", "create", "-n", "mlflow-1", "--file", "conda.yaml"], check=True)
    assert subprocess.run([conda, "install", "x"], capture_output=True, check=False).returncode == 2
    # As MLflow's conda.get_conda_command writes it into the job.
    script = f"source {home}/bin/../etc/profile.d/conda.sh && conda activate mlflow-1 1>&2 && "
    assert bash(venv, "-c", script + "command -v mlflow") == f"{venv}/bin/mlflow\n"

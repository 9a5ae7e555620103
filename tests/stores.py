"""MLflow as a test wants it: without a memory, in a folder of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["pristine_mlflow", "working_folder"]


@contextmanager
def pristine_mlflow() -> Iterator[None]:
    """Undoes whatever the body and MLflow do to the environment and to MLflow's globals."""
    import mlflow.tracking.fluent  # here: most tests do without, and it takes seconds

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


@contextmanager
def working_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)

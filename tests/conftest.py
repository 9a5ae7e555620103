"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from stores import pristine_mlflow, working_folder

# Before torch is imported: several test workers with several threads each only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data beside the project; tests that need it skip where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data folder {SHARED_DATA} is absent")
    return SHARED_DATA


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow database to copy: making one takes seconds."""
    from cectflow.tracking.runs import connect

    root = tmp_path_factory.mktemp("stores")
    with pristine_mlflow(), working_folder(root):
        os.environ["MLFLOW_RUN_ID"] = "none"  # so that no experiment is made, for its folder stays
        connect(f"sqlite:///{root}/empty.db")
    return root / "empty.db"


FIRST = (
    "test_entry_points", "test_delivery", "test_tomograms", "test_calibration", "test_live",
    "test_imaging", "test_cluster_workers", "test_pages",
)  # fmt: skip
"""Files that begin. The long walks would keep one of two workers waiting at the end; the pages take
up the road that the entry points walk meanwhile, so others come before them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long walks."""

    def place(item: pytest.Item) -> int:
        return FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST)

    items.sort(key=place)

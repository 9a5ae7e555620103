"""Fixtures that every test may use."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from once import make_once
from stores import pristine_mlflow, working_folder

# Before torch is imported: several test workers with several threads each only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MEMORY = Path("/dev/shm")
GIGABYTE = 1e9


def has_room_in_memory() -> bool:
    """Whether all tests' files, some 2 GB, may lie in memory."""
    try:
        told = Path("/proc/meminfo").read_text(encoding="ascii")
        available = 1024 * int(re.search(r"^MemAvailable: *(\d+) kB$", told, re.M)[1])  # type: ignore
        free = shutil.disk_usage(MEMORY).free
    except (OSError, TypeError):
        return False
    return free > 4 * GIGABYTE and available > 8 * GIGABYTE and os.access(MEMORY, os.W_OK)


# A new MLflow store waits for the disk a hundred times: 5 s, in memory 1 s.
if "PYTEST_DEBUG_TEMPROOT" not in os.environ and has_room_in_memory():
    os.environ["PYTEST_DEBUG_TEMPROOT"] = str(MEMORY)

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

    def make(root: Path) -> None:
        with pristine_mlflow(), working_folder(root):
            # So that no experiment is made, for its folder stays.
            os.environ["MLFLOW_RUN_ID"] = "none"
            connect(f"sqlite:///{root}/empty.db")

    return make_once("stores", make, tmp_path_factory) / "empty.db"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Give the memory back, unless a test has failed."""
    config = session.config
    if exitstatus or hasattr(config, "workerinput") or config.option.basetemp is not None:
        return
    base = config._tmp_path_factory._basetemp  # type: ignore[attr-defined]
    if base is not None and MEMORY in base.parents:
        shutil.rmtree(base, ignore_errors=True)


FIRST = (
    "test_entry_points", "test_facility", "test_delivery", "test_tomograms", "test_several_devices",
    "test_entry_points_alone", "test_pages", "test_server", "test_tilt_series", "test_calibration",
    "test_crashes", "test_cluster_workers", "test_training", "test_story", "test_live",
    "test_imaging",
)  # fmt: skip
"""Files that begin. The long walks would keep one of two workers waiting at the end; some take
up the road that the entry points walk meanwhile, so others come before them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long walks."""

    def place(item: pytest.Item) -> int:
        return FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST)

    items.sort(key=place)

"""One road of the recipe ``tiny``: what it promotes serves the rest."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from once import make_once
from road import Road

from cectflow.learning.fit import FitRecipe
from cectflow.recipe import load_recipe


@pytest.fixture(scope="session")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Road:
    """The road, walked once for all test processes; its store is a copy that stays as it is."""

    def walk(folder: Path) -> None:
        road = make_road(folder)
        said = road.mlflow_run("main", recipe="tiny", out=str(folder / "tour"), device="cpu")
        shutil.copy(folder / "mlflow.db", folder / "walked.db")
        (folder / "output.txt").write_text(said, encoding="utf-8")

    folder = make_once("walked", walk, tmp_path_factory)
    return Road(folder, (folder / "output.txt").read_text(encoding="utf-8"), {})


@pytest.fixture(scope="module")
def road(walked: Road, tmp_path_factory: pytest.TempPathFactory) -> Road:
    """The walked road in a folder and a store of a module's own, beside a short recipe."""
    folder = tmp_path_factory.mktemp("road")
    shutil.copytree(walked.folder / "tour", folder / "tour")
    shutil.copy(walked.folder / "walked.db", folder / "mlflow.db")
    (folder / "short.yaml").write_text(short_recipe(), encoding="utf-8")
    return Road(folder, walked.output, make_road(folder).environment)


@pytest.fixture
def by_hand(road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process work in the road's folder and store."""
    monkeypatch.chdir(road.folder)
    for name in ("MLFLOW_TRACKING_URI", "CECTFLOW_CACHE"):
        monkeypatch.setenv(name, road.environment[name])


def make_road(folder: Path) -> Road:
    """A road that nobody has walked."""
    # MLflow leaves ids of experiments and runs of other tests' stores in the environment.
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment = clean | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "CECTFLOW_CACHE": str(folder / "cache"),
    }
    return Road(folder, "", environment)


def short_recipe() -> str:
    """The recipe ``tiny`` with one epoch of each training, no control, and a student in int8."""
    recipe = load_recipe("tiny")

    def shortened(fit: FitRecipe) -> FitRecipe:
        return fit.model_copy(update={"epochs": 1})

    segmenter, student, whole = recipe.segmenter, recipe.student, recipe.tomogram_segmenter
    compact = recipe.student_segmenter
    assert whole is not None
    assert compact is not None
    return recipe.model_copy(
        update={
            "segmenter": segmenter.model_copy(update={"fit": shortened(segmenter.fit)}),
            "tomogram_segmenter": whole.model_copy(update={"fit": shortened(whole.fit)}),
            "student_segmenter": compact.model_copy(update={"fit": shortened(compact.fit)}),
            "student": student.model_copy(
                update={"fit": shortened(student.fit), "control": False, "variants": ("int8",)}
            ),
        }
    ).to_yaml()

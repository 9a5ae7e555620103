"""Leave-structures-out from recipe to table, in a store of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cectflow.cli import main
from cectflow.config import Config
from cectflow.dataset import open_dataset
from cectflow.learning.generalisation import Generalisation
from cectflow.recipe import Recipe, load_recipe

FOLDS = ("all", "without-barrel-bowl", "without-rod")


@pytest.fixture(scope="module")
def _own_store(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copy(empty_store, folder / "store.db")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/store.db")
        yield


def small(**changes: object) -> Recipe:
    """The recipe ``tiny`` with one short epoch."""
    recipe = load_recipe("tiny")

    def changed(config: Config, **update: object) -> Config:
        return config.model_copy(update=update)

    fit = changed(recipe.segmenter.fit, epochs=1)
    simulation = changed(recipe.simulation, fields={"train": 2, "validation": 1, "test": 2})
    return recipe.model_copy(
        update={
            "simulation": simulation, "segmenter": changed(recipe.segmenter, fit=fit), **changes,
        }
    )  # fmt: skip


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, _own_store: None) -> Path:
    """Folder of a finished study of the small recipe."""
    folder = tmp_path_factory.mktemp("study")
    path = folder / "small.yaml"
    path.write_text(small().to_yaml())
    out = folder / "out"
    command = ("evaluate", "generalisation", "--recipe", str(path), "--out", str(out))
    assert call(*command, "--device", "cpu") == 0
    return out


def test_no_training_field_holds_a_structure_that_is_left_out(study: Path) -> None:
    left_out = {"all": set(), "without-barrel-bowl": {"barrel", "bowl"}, "without-rod": {"rod"}}
    for name, absent in left_out.items():
        data = open_dataset(study / name / "dataset")
        classes = data.manifest.classes
        assert classes == ("barrel", "bowl", "rod")
        assert set(data.manifest.left_out) == absent
        for split in ("train", "validation"):
            batch = data.split(split).read(np.arange(len(data.split(split))))
            assert batch.voxel_labels is not None
            there = {classes[i - 1] for i in np.unique(batch.voxel_labels.numpy()) if i}
            assert there == set(classes) - absent, (name, split)


def test_every_network_sees_as_many_cubes_and_steps(study: Path) -> None:
    result = Generalisation.from_json((study / "generalisation.json").read_text())
    counts = [
        open_dataset(study / name / "dataset").manifest.count("train") for name in FOLDS
    ]  # fmt: skip
    assert len(set(counts)) > 1
    assert result.train_cubes == min(counts)
    assert result.folds == (("barrel", "bowl"), ("rod",))
    assert {row.name for row in result.structures} == {"barrel", "bowl", "rod"}
    assert [row.mass_kda for row in result.structures] == sorted(
        row.mass_kda for row in result.structures
    )
    test = open_dataset(study / "all/dataset").manifest
    assert result.dataset_digest == test.content_digest()
    assert sum(row.num_test for row in result.structures) == test.count("test")


def test_a_second_call_takes_up_what_is_finished(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in study.glob("*/checkpoints/*")}
    assert len(before) == 2 * len(FOLDS)
    recipe = str(study.parent / "small.yaml")
    command = ("evaluate", "generalisation", "--recipe", recipe, "--out", str(study))
    first = json.loads((study / "generalisation.json").read_text())
    assert call(*command, "--device", "cpu", "--json") == 0
    assert {path: path.stat().st_mtime_ns for path in study.glob("*/checkpoints/*")} == before
    assert json.loads(capsys.readouterr().out) == first


def test_runs_are_nested_and_hold_table_and_figure(study: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient()
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    parents = [run for run in runs if run.info.run_name == "generalisation"]
    files = {file.path for file in client.list_artifacts(parents[0].info.run_id)}
    assert {"generalisation.json", "figures", "recipe.yaml"} <= files
    metrics = parents[0].data.metrics
    result = Generalisation.from_json((study / "generalisation.json").read_text())
    assert result.ratio is not None
    assert metrics["unseen_over_seen"] == pytest.approx(result.ratio.value)
    folds = {
        run.info.run_name: run.data.tags["left_out"]
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id
    }
    assert folds == {"all": "", "without-barrel-bowl": "barrel,bowl", "without-rod": "rod"}


@pytest.mark.usefixtures("_own_store")
def test_bad_recipes_are_refused_before_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small()
    one_group = recipe.generalisation.model_copy(update={"groups": (("barrel", "bowl", "rod"),)})
    no_test = recipe.simulation.model_copy(update={"fields": {"train": 2, "validation": 1}})
    for changes, message in (
        ({"generalisation": one_group}, "expected two groups"),
        ({"simulation": no_test}, "simulation.fields names no test"),
    ):
        path = tmp_path / "bad.yaml"
        path.write_text(small(**changes).to_yaml())
        out = tmp_path / "out"
        command = ("evaluate", "generalisation", "--recipe", str(path), "--out", str(out))
        assert call(*command, "--device", "cpu") == 2
        assert message in capsys.readouterr().err
        assert not out.exists()


@pytest.mark.usefixtures("_own_store")
def test_a_dataset_is_no_folder_for_a_study(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = study / "all" / "dataset"
    before = sorted(dataset.iterdir())
    command = ("evaluate", "generalisation", "--recipe", "tiny", "--out", str(dataset))
    assert call(*command, "--device", "cpu") == 2
    assert "is a dataset itself: give another folder" in capsys.readouterr().err
    assert sorted(dataset.iterdir()) == before

"""Simulated data: pictures beside the dataset and in the run, and no part of the data."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from matplotlib.image import imread

from cectflow.dataset import open_dataset
from cectflow.flows.simulation import simulate, simulate_tomograms
from cectflow.manifest import read_manifest
from cectflow.recipe import Recipe, load_recipe
from cectflow.shards import check_dataset
from cectflow.tracking.runs import connect

PICTURES = {"field.png", "power_spectra.png", "ctf.png", "snr.png", "subtomograms.png"}


@pytest.fixture(scope="module")
def store(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Path
) -> Iterator[mlflow.MlflowClient]:
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copy(empty_store, folder / "store.db")
        uri = f"sqlite:///{folder}/store.db"
        connect(uri)
        yield mlflow.MlflowClient(uri)


def make_recipe(**changes: object) -> Recipe:
    recipe = load_recipe("tiny")
    simulation = recipe.simulation.model_copy(
        update={"fields": {"train": 2, "validation": 1}, **changes}
    )
    return recipe.model_copy(update={"simulation": simulation})


def artifacts(store: mlflow.MlflowClient, folder: str, runs: int) -> list[dict[str, int]]:
    """Name and bytes of each picture of the newest runs, the newest run first."""
    experiments = [experiment.experiment_id for experiment in store.search_experiments()]
    return [
        {
            Path(file.path).name: file.file_size
            for file in store.list_artifacts(run.info.run_id, folder)
        }
        for run in store.search_runs(experiments, max_results=runs)
    ]


def test_pictures_lie_beside_the_dataset_and_in_the_run(
    store: mlflow.MlflowClient, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    dataset = simulate(make_recipe(), folder)
    written = {path.name: path.stat().st_size for path in (folder / "figures").iterdir()}
    assert written.keys() == PICTURES
    for name in written:
        pixels = imread(folder / "figures" / name)
        assert pixels[..., :3].std() > 0.05, name
    assert artifacts(store, "figures", 1) == [written]
    assert check_dataset(folder) == ()
    digest = dataset.manifest.content_digest()

    # A second call finds the dataset finished, and draws what the first one drew.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.mrcs")}
    (folder / "figures" / "ctf.png").write_bytes(b"spoilt")
    assert simulate(make_recipe(), folder).manifest.content_digest() == digest
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.mrcs")} == before
    again = {path.name: path.stat().st_size for path in (folder / "figures").iterdir()}
    assert again == written
    assert artifacts(store, "figures", 2) == [written] * 2

    # They are no part of the data: without them nothing is amiss.
    for path in (folder / "figures").iterdir():
        path.unlink()
    (folder / "figures").rmdir()
    assert check_dataset(folder) == ()
    assert open_dataset(folder).manifest.content_digest() == digest


@pytest.mark.usefixtures("store")
def test_noise_free_data_without_a_training_split_have_their_pictures_too(tmp_path: Path) -> None:
    simulate(make_recipe(snr=None, fields={"test": 1}), tmp_path / "data")
    names = {path.name for path in (tmp_path / "data/figures").iterdir()}
    assert names == PICTURES - {"snr.png"}
    assert read_manifest(tmp_path / "data").field_records("test")[0].snr is None


def test_each_tomogram_has_a_picture_of_its_slices(
    store: mlflow.MlflowClient, tmp_path: Path
) -> None:
    recipe = load_recipe("tiny").simulation
    for count in (1, 2):
        folders = simulate_tomograms(recipe, tmp_path / "t", count=count, shape=(18, 32, 40))
    sizes = [(folder / "slices.png").stat().st_size for folder in folders]
    # A run holds the pictures of all, also of those that were there before.
    assert artifacts(store, "figures/tomo_000", 2) == [{"slices.png": sizes[0]}] * 2
    assert artifacts(store, "figures/tomo_001", 2) == [{"slices.png": sizes[1]}, {}]

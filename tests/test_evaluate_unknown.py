"""What a classifier is shown that it does not know, and what is reported of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import make_card, write_dataset

from cectflow.cli import main
from cectflow.dataset import Dataset, open_dataset
from cectflow.export import export_network
from cectflow.flows.simulation import load_structures
from cectflow.flows.unknown import _Noise
from cectflow.learning.calibration import measure_trust
from cectflow.learning.training import evaluate_folder
from cectflow.model_card import CARD_FILE
from cectflow.networks import create_network
from cectflow.networks.normalisation import NormalisePerCube
from cectflow.recipe import load_recipe
from cectflow.simulation.delivery import simulate_dataset

OWN = ("barrel", "bowl", "rod")
KINDS = ("others", "membrane", "gold", "empty")


@pytest.fixture(scope="module")
def _own_store(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copy(empty_store, folder / "store.db")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/store.db")
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Validation and test fields of the recipe ``tiny``."""
    recipe = load_recipe("tiny").simulation
    recipe = recipe.model_copy(update={"fields": {"validation": 1, "test": 2}})
    return simulate_dataset(
        recipe, load_structures(recipe), tmp_path_factory.mktemp("known") / "data"
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, data: Dataset) -> Path:
    """An untrained classifier whose card has a threshold all the same."""
    folder = tmp_path_factory.mktemp("models") / "classifier"
    card = make_card(num_outputs=3, classes=OWN, box=16, voxel_size=16.0)
    torch.manual_seed(0)
    network = NormalisePerCube(create_network("strided_micro", num_outputs=3, box=16))
    card = export_network(network, card, folder)
    trust = measure_trust(*(evaluate_folder(folder, data, s) for s in ("validation", "test")))
    card = card.model_copy(update={"trust": trust})
    (folder / CARD_FILE).write_text(card.to_json())
    return folder


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory, data: Dataset, model: Path,
              _own_store: None) -> Path:  # fmt: skip
    """Folder in which the unknown was simulated; the table was printed."""
    out = tmp_path_factory.mktemp("unknown")
    command = ("evaluate", "unknown", "--model", model, "--dataset", data.folder, "--out", out)
    assert call(*command) == 0
    return out


def test_others_are_imaged_alike_and_hold_nothing_that_is_known(
    simulated: Path, data: Dataset
) -> None:
    manifest = open_dataset(simulated / "others").manifest
    assert manifest.left_out == OWN == manifest.classes[:3]
    assert {"ring", "fork", "shell"} <= set(manifest.classes)
    for name in ("box", "voxel_size", "occupancy", "snr", "tilt_range", "jitter"):
        assert getattr(manifest, name) == getattr(data.manifest, name)
    split = open_dataset(simulated / "others").split("test")
    labels = split.read(np.arange(len(split))).voxel_labels
    assert labels is not None
    assert set(np.unique(labels.numpy())).isdisjoint({1, 2, 3})


def test_places_of_junk_are_among_the_models_own_particles(simulated: Path) -> None:
    for kind in KINDS[1:]:
        other = open_dataset(simulated / kind)
        assert other.manifest.classes == (*OWN, "junk")
        assert (other.split("test").class_ids == 4).sum() > 3, kind
        shares = other.manifest.recipe["junk"]
        assert {name for name, share in shares.items() if share} == {kind}


def test_the_report_is_the_same_for_folders_that_are_given(
    simulated: Path, data: Dataset, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("evaluate", "unknown", "--model", model, "--dataset", data.folder, "--json")
    given = [part for kind in KINDS for part in ("--against", simulated / kind)]
    assert call(*command, *given) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    kinds = {kind["name"]: kind for kind in report["kinds"]}
    assert next(iter(kinds)) == "others"
    assert {*KINDS, "noise", "others_ring", "others_fork"} <= set(kinds)
    assert report["known_cubes"] == data.manifest.count("test") == kinds["noise"]["cubes"]
    parts = [kind["cubes"] for name, kind in kinds.items() if name.startswith("others_")]
    assert sum(parts) == kinds["others"]["cubes"]
    for kind in kinds.values():
        assert set(kind["auroc"]) == {"distance", "energy", "max_logit"}
        for score in (kind["unknown"], *kind["auroc"].values()):
            assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1


def test_noise_has_the_spectrum_of_each_cube_and_no_particle(data: Dataset) -> None:
    split = data.split("test")
    first, again = (next(_Noise(split).batches(size)).subtomograms[:5] for size in (5, 8))
    torch.testing.assert_close(first, again)
    cubes = split.read(np.arange(5)).subtomograms
    amplitudes = [np.abs(np.fft.fftn(c.numpy(), axes=(2, 3, 4))) for c in (first, cubes)]
    np.testing.assert_allclose(*amplitudes, rtol=1e-3, atol=1e-2 * amplitudes[1].mean())
    correlation = np.corrcoef(first.numpy().ravel(), cubes.numpy().ravel())[0, 1]
    assert abs(correlation) < 0.5


@pytest.mark.usefixtures("_own_store")
def test_a_dataset_of_known_classes_or_another_box_is_refused(
    data: Dataset, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("evaluate", "unknown", "--model", model, "--dataset", data.folder, "--against")
    assert call(*command, data.folder) == 2
    assert "holds only barrel, bowl, rod, which this teacher knows" in capsys.readouterr().err
    assert call(*command, data.folder, "--against", data.folder) == 2
    assert "there is another 'data', rename the folder" in capsys.readouterr().err
    small = write_dataset(tmp_path / "small")
    assert call(*command, small.folder) == 2
    assert "box is 12, this teacher expects 16" in capsys.readouterr().err


@pytest.mark.usefixtures("_own_store")
def test_a_card_without_a_threshold_is_refused(
    data: Dataset, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = make_card(num_outputs=3, classes=OWN, box=16, voxel_size=16.0)
    (tmp_path / CARD_FILE).write_text(card.to_json())
    assert call("evaluate", "unknown", "--model", tmp_path, "--dataset", data.folder) == 2
    assert "states no threshold for unknown: train it again" in capsys.readouterr().err

"""Masked datasets: from plain cubes to a classifier that asks for the same segmenter again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import BOX, make_card, write_dataset

import cectflow.flows.masking as masking_module
from cectflow.cli import main
from cectflow.dataset import Dataset, open_dataset
from cectflow.export import export_network
from cectflow.flows.masking import mask_cubes_of, mask_dataset
from cectflow.flows.prediction import predict_classes
from cectflow.learning.fit import FitRecipe, open_fabric
from cectflow.learning.objective import Classify, Segment
from cectflow.learning.training import check_matches, train_network
from cectflow.manifest import ShardRecord
from cectflow.model_card import Masking, ModelCard
from cectflow.networks import create_network
from cectflow.networks.normalisation import NormalisePerCube
from cectflow.particles import read_particles
from cectflow.prediction.contract import InputOptions, load_network
from cectflow.prediction.inputs import InputFiles
from cectflow.prediction.mask import mask_neighbours
from cectflow.shards import Subtomograms, check_dataset


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "outliner"
    torch.manual_seed(0)
    network = NormalisePerCube(create_network("strided_ed_small", num_outputs=2, box=BOX))
    export_network(network, make_card(role="segmenter", task="target"), folder)
    return folder


@pytest.fixture(scope="module")
def masked(plain: Dataset, segmenter: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    out = tmp_path_factory.mktemp("masked") / "data"
    return mask_dataset(plain.folder, out, model=str(segmenter), device="cpu")


def test_each_cube_is_masked_with_its_outline_and_nothing_else_changes(
    plain: Dataset, masked: Dataset, segmenter: Path
) -> None:
    assert check_dataset(masked.folder) == ()
    network = load_network(segmenter, tasks=("target",), label="", device="cpu")
    everything = np.arange(12)
    for split in ("train", "validation", "test"):
        before, after = plain.split(split).read(everything), masked.split(split).read(everything)
        cubes = before.subtomograms.numpy()
        logits = network.infer(cubes)
        expected = mask_neighbours(cubes[:, 0], logits[:, 1] > logits[:, 0])
        np.testing.assert_array_equal(after.subtomograms[:, 0].numpy(), expected)
        assert not torch.equal(after.subtomograms, before.subtomograms)
        for name in ("voxel_labels", "instances", "class_ids", "fields"):
            assert torch.equal(getattr(after, name), getattr(before, name))
    assert masked.manifest.masked_from == plain.manifest.content_digest()
    assert masked.manifest.masking == network.masking.model_copy(update={"segmenter": "outliner"})


def test_a_broken_off_masking_goes_on_and_ends_with_the_same_bytes(
    plain: Dataset, masked: Dataset, segmenter: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    original, written = masking_module.write_shard, []

    def fail_at_the_second(folder: Path, name: str, *content: Any) -> ShardRecord:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(name)
        return original(folder, name, *content)

    monkeypatch.setattr(masking_module, "write_shard", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        mask_dataset(plain.folder, tmp_path / "out", model=str(segmenter), device="cpu")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"is incomplete: 1 of 3 .* `cectflow dataset mask` again"):
        open_dataset(tmp_path / "out")
    first = tmp_path / "out" / f"{written[0]}.mrcs"
    stamp = first.stat().st_mtime_ns
    again = mask_dataset(plain.folder, tmp_path / "out", model=str(segmenter), device="cpu")
    assert first.stat().st_mtime_ns == stamp
    assert again.manifest == masked.manifest


def test_a_folder_of_something_else_is_refused(
    plain: Dataset, masked: Dataset, segmenter: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileExistsError, match="holds another dataset: give another folder"):
        mask_dataset(plain.folder, plain.folder, model=str(segmenter), device="cpu")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        mask_dataset(plain.folder, tmp_path, model=str(segmenter), device="cpu")
    with pytest.raises(ValueError, match="masked already, with outliner: give the dataset"):
        mask_dataset(masked.folder, tmp_path / "twice", model=str(segmenter), device="cpu")
    other = write_dataset(tmp_path / "light", contrast="light")
    with pytest.raises(ValueError, match=r"outliner was trained with contrast dark, .* has light"):
        mask_dataset(other.folder, tmp_path / "out", model=str(segmenter), device="cpu")


def test_a_cube_in_which_nothing_is_outlined_stays(plain: Dataset, tmp_path: Path) -> None:
    def nothing(cubes: np.ndarray, _: Subtomograms) -> np.ndarray:
        return np.zeros(cubes.shape, bool)

    masking = Masking(segmenter="nobody", card_digest="0" * 64)
    left = mask_cubes_of(plain, tmp_path / "out", nothing, masking)
    assert left.manifest.content_digest() == plain.manifest.content_digest()


@pytest.fixture(scope="module")
def classifier(masked: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on the masked cubes."""
    trained = train_network(
        "teacher", Classify(2), masked,
        FitRecipe(network="strided_micro", epochs=1, batch_size=6, learning_rate=0.005),
        recipe_digest="e" * 64, fabric=open_fabric("cpu"),
        folder=tmp_path_factory.mktemp("teacher"), log=lambda metrics, step: None,
    )  # fmt: skip
    return trained.folder


def test_a_classifier_of_masked_cubes_asks_for_its_segmenter(
    plain: Dataset, masked: Dataset, classifier: Path, segmenter: Path, tmp_path: Path
) -> None:
    card = ModelCard.from_folder(classifier)
    assert card.masking == masked.manifest.masking
    with pytest.raises(ValueError, match=r"masking is none, this teacher expects outliner \("):
        check_matches(card, plain)
    files = InputFiles(subtomograms=str(plain.folder / "test/00000.mrcs"))
    said: list[str] = []
    with pytest.raises(ValueError, match="neighbours outliner took out: give --mask-with outliner"):
        predict_classes(str(classifier), files, tmp_path / "a.star", InputOptions(), said.append)
    predict_classes(
        str(classifier), files, tmp_path / "a.star", InputOptions(), said.append,
        mask_with=str(segmenter),
    )  # fmt: skip
    assert not [line for line in said if "warning" in line]
    assert len(read_particles(tmp_path / "a.star")) == 12


def test_another_segmenter_than_the_one_trained_with_is_told(
    plain: Dataset, classifier: Path, segmenter: Path, tmp_path: Path
) -> None:
    card = json.loads((segmenter / "card.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for path in segmenter.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "card.json").write_text(json.dumps(card | {"epochs": 7}))
    said: list[str] = []
    predict_classes(
        str(classifier), InputFiles(subtomograms=str(plain.folder / "test/00000.mrcs")),
        tmp_path / "a.star", InputOptions(), said.append, mask_with=str(other),
    )  # fmt: skip
    assert [line for line in said if "was trained on cubes masked with outliner" in line]


def test_a_segmenter_does_not_learn_from_masked_cubes(masked: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a segmenter has to see the neighbours"):
        train_network(
            "segmenter", Segment(), masked,
            FitRecipe(network="strided_ed_small", epochs=1, batch_size=6, learning_rate=0.005),
            recipe_digest="e" * 64, fabric=open_fabric("cpu"), folder=tmp_path,
            log=lambda metrics, step: None,
        )  # fmt: skip


def test_the_command_masks_a_dataset(plain: Dataset, segmenter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main(["dataset", "mask", str(plain.folder), "--model", str(segmenter), "--out", str(out)])
    assert not stop.value.code
    assert open_dataset(out).manifest.count("test") == 12

"""From a dataset folder to a model folder whose card says what the exported network can do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import BOX, CLASSES, make_card, write_dataset

from cectflow.dataset import Dataset, open_dataset
from cectflow.learning.calibration import measure_trust
from cectflow.learning.fit import FitRecipe, open_fabric
from cectflow.learning.objective import Classify, Objective, Segment
from cectflow.learning.task import SemanticLabels
from cectflow.learning.training import (
    TrainedNetwork,
    check_matches,
    evaluate_folder,
    evaluate_strangers,
    make_network,
    train_network,
)
from cectflow.model_card import ModelCard
from cectflow.runtime import RUNTIMES, RuntimeName, load_runtime
from cectflow.shards import check_dataset
from cectflow.spectrum import PowerSum
from cectflow.trust import find_unknown

LABELS = SemanticLabels.choose(CLASSES, None, merged=False)
OVERLAP = {"foreground_iou", "iou", "missed"}
RECIPE = {"epochs": 2, "batch_size": 6, "learning_rate": 0.003}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("dataset")
    made = write_dataset(folder)
    assert check_dataset(folder) == ()
    return made


def train(objective: Objective, dataset: Dataset, folder: Path, network: str) -> TrainedNetwork:
    return train_network(
        "teacher" if objective.task == "classify" else "segmenter",
        objective,
        dataset,
        FitRecipe(network=network, **RECIPE),
        recipe_digest="e" * 64,
        fabric=open_fabric("cpu"),
        folder=folder,
        log=lambda row, epoch: None,
        commit="c0ffee",
        teacher=None,
    )


@pytest.fixture(scope="module")
def _quick_costs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cectflow.cost.SECONDS_PER_COST", 0.01)
        yield


@pytest.fixture(
    scope="module",
    params=[
        (Segment(), "strided_ed_small"),
        (Segment(labels=LABELS), "ssn3d_aspp"),
        (Classify(2), "strided_micro"),
    ],
    ids=["segmenter", "tomogram-segmenter", "teacher"],
)
def trained(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    dataset: Dataset,
    _quick_costs: None,
) -> TrainedNetwork:
    """A network trained on the dataset; an ONNX export each, so they are shared."""
    objective, network = request.param
    return train(objective, dataset, tmp_path_factory.mktemp("trained"), network)


def test_the_card_is_complete(trained: TrainedNetwork, dataset: Dataset) -> None:
    card = ModelCard.from_folder(trained.folder)
    assert card == trained.card
    assert (card.box, card.voxel_size, card.classes) == (BOX, 10.0, CLASSES)
    assert card.dataset_digest == dataset.manifest.content_digest()
    assert (card.recipe_digest, card.commit) == ("e" * 64, "c0ffee")
    assert card.epochs == trained.result.best_epoch
    total = PowerSum(BOX)
    for batch in dataset.split("validation").batches(7):
        total.add(batch.subtomograms.numpy())
    np.testing.assert_allclose(card.spectrum, total.power, rtol=1e-4)
    assert card.parity is not None
    assert card.parity < 1e-4
    assert card.cost is not None
    assert card.cost.parameters > 0
    for score in card.scores.values():
        assert 0 <= score.low <= score.value <= score.high
    for name in card.scores.keys() - {"surface_distance", "hausdorff_95"}:
        assert card.scores[name].high <= 1


def test_a_segmenter_is_compared_with_trivial_methods(trained: TrainedNetwork) -> None:
    if trained.card.task == "target":
        assert set(trained.card.scores) <= {*OVERLAP, "surface_distance", "hausdorff_95"}
        assert set(trained.card.scores) >= OVERLAP
        assert set(trained.card.baselines) == {"ball", "threshold"}
        assert all(0 < score < 1 for score in trained.card.baselines.values())
    elif trained.card.task == "semantic":
        assert set(trained.card.scores) >= OVERLAP | {
            "mean_iou", "mean_dice",
            *(f"{kind}_{name}" for kind in ("iou", "dice") for name in CLASSES),
        }  # fmt: skip
        assert set(trained.card.baselines) == {"threshold"}
    else:
        assert set(trained.card.scores) == {"accuracy"}
        assert trained.card.baselines == {}


def test_the_card_of_a_classifier_says_how_sure_it_may_be(
    trained: TrainedNetwork, dataset: Dataset
) -> None:
    if trained.card.task != "classify":
        assert trained.card.trust is None
        return
    trust = trained.card.trust
    validation = evaluate_folder(trained.folder, dataset, "validation")
    assert trust == measure_trust(validation, trained.evaluation)
    assert validation.logits is not None
    assert find_unknown(validation.logits, trust).sum() == 0  # one in twenty of twelve
    assert trust.validation_cubes == 12
    assert np.shape(trust.typical.centres) == (2, 2)


def test_strangers_are_the_cubes_of_classes_that_the_card_lacks(
    trained: TrainedNetwork, tmp_path: Path
) -> None:
    if trained.card.task != "classify":
        return
    other = write_dataset(tmp_path / "other", classes=("small", "ring"))
    found = evaluate_strangers(trained.folder, other)
    assert found.class_ids.tolist() == [2] * 6
    everything = evaluate_folder(trained.folder, write_dataset(tmp_path / "same"))
    assert found.logits is not None
    assert everything.logits is not None
    # The same seeds, and every second cube is of the second class.
    np.testing.assert_allclose(found.logits, everything.logits[1::2], atol=1e-5)
    np.testing.assert_array_equal(found.fields, everything.fields[1::2])
    with pytest.raises(ValueError, match=r"test split holds only small, large, which this teacher"):
        evaluate_strangers(trained.folder, open_dataset(tmp_path / "same"))


def test_the_model_folder_gives_the_cards_scores_again(
    trained: TrainedNetwork, dataset: Dataset
) -> None:
    evaluation = evaluate_folder(trained.folder, dataset)
    for name, score in trained.card.scores.items():
        assert evaluation.interval(name) == score
    np.testing.assert_array_equal(evaluation.fields, np.arange(12) % 3)
    train_split = evaluate_folder(trained.folder, dataset, "train")
    assert len(train_split.class_ids) == 12


def test_the_folder_holds_the_model_and_the_checkpoints_and_nothing_else(
    trained: TrainedNetwork,
) -> None:
    root = trained.folder.parent
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert found == {
        "checkpoints/best.pt", "checkpoints/last.pt",
        "model/card.json", "model/model.onnx", "model/model.pt2",
    }  # fmt: skip


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_exported_semantic_network_takes_any_multiples_of_its_stride(
    trained: TrainedNetwork, runtime: RuntimeName
) -> None:
    if trained.card.task != "semantic":
        return
    infer = load_runtime(trained.folder, runtime)
    generator = np.random.default_rng(0)
    volume = generator.normal(size=(1, 1, 16, 20, 24)).astype(np.float32)
    logits = infer(volume)
    assert logits.shape == (1, 3, 16, 20, 24)
    # Its input is normalised already: other units are another input.
    assert np.abs(infer(2.0 * volume) - logits).max() > 0.01


def test_the_card_of_a_semantic_network_says_what_it_labels_and_is_shown(
    trained: TrainedNetwork,
) -> None:
    card = trained.card
    if card.task == "semantic":
        assert (card.classes, card.labels, card.num_outputs) == (CLASSES, CLASSES, 3)
        assert card.normalisation == "tomogram"
    else:
        assert (card.labels, card.normalisation) == ((), "cube")


def test_a_trained_network_is_taken_up_as_it_is(trained: TrainedNetwork, dataset: Dataset) -> None:
    objective: Objective = {
        "target": Segment(),
        "semantic": Segment(labels=LABELS),
        "classify": Classify(2),
    }[trained.card.task]
    before = {path: path.stat().st_mtime_ns for path in trained.folder.iterdir()}
    again = train(objective, dataset, trained.folder.parent, trained.card.network)
    assert again.card == trained.card
    assert again.result.history == trained.result.history
    for name, scores in trained.evaluation.scores.items():
        np.testing.assert_array_equal(again.evaluation.scores[name], scores)
    assert {path: path.stat().st_mtime_ns for path in trained.folder.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "strided_micro"}, r"model is of another network: give another folder"),
        ({"recipe_digest": "f" * 64, "teacher": "models:/t/1"}, "another teacher and recipe: "),
    ],
)
def test_a_model_of_something_else_is_not_trained_over(
    changes: dict[str, str], message: str, dataset: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "checkpoints").mkdir()
    content = {"network": "strided_small", "dataset_digest": dataset.manifest.content_digest()}
    (tmp_path / "model" / "card.json").write_text(make_card(**content).to_json())
    given = {"network": "strided_small", "recipe_digest": "e" * 64, "teacher": None} | changes
    fit_recipe = FitRecipe(network=given.pop("network"), **RECIPE)
    with pytest.raises(FileExistsError, match=message):
        train_network(
            "teacher", Classify(2), dataset, fit_recipe, fabric=open_fabric("cpu"),
            folder=tmp_path, log=lambda row, epoch: None, **given,
        )  # fmt: skip


def test_a_model_without_its_checkpoints_is_not_trained_over(
    dataset: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    content = {"network": "strided_micro", "dataset_digest": dataset.manifest.content_digest()}
    (tmp_path / "model" / "card.json").write_text(make_card(**content).to_json())
    with pytest.raises(FileExistsError, match="its checkpoints are gone"):
        train(Classify(2), dataset, tmp_path, "strided_micro")


def test_nothing_called_model_is_left_by_a_training_that_failed_at_its_end(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(network: object, card: ModelCard, folder: Path, stride: int | None) -> ModelCard:
        folder.mkdir()  # refuses what an earlier call left
        return card

    def fail(*arguments: object) -> None:
        msg = "the power is out"
        raise RuntimeError(msg)

    monkeypatch.setattr("cectflow.learning.training.export_network", export)
    monkeypatch.setattr("cectflow.learning.training.evaluate_folder", fail)
    for _ in range(2):  # the second call goes on where the first one failed
        with pytest.raises(RuntimeError, match="the power is out"):
            train(Classify(2), dataset, tmp_path, "strided_micro")
        assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("objective", "network", "kind"),
    [(Classify(2), "strided_ed_small", "classify"), (Segment(), "strided_micro", "segment")],
)
def test_a_network_of_another_task_is_refused(
    objective: Objective, network: str, kind: str, dataset: Dataset, tmp_path: Path
) -> None:
    expected = rf"'{network}' is of another task: expected one that can {kind}, "
    with pytest.raises(ValueError, match=expected):
        train(objective, dataset, tmp_path, network)
    assert list(tmp_path.iterdir()) == []


def test_windows_that_would_be_padded_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"windows are 12³; ssn3d_ed .* of 8: set box to 16"):
        train(Segment(labels=LABELS), dataset, tmp_path, "ssn3d_ed")
    assert list(tmp_path.iterdir()) == []


def test_a_semantic_network_has_no_sense_of_a_centre() -> None:
    told = FitRecipe(network="strided_ed_small", arguments={"centred": True}, **RECIPE)
    with pytest.raises(ValueError, match="in the task semantic no particle is at the centre"):
        make_network(told, "semantic", 2, 16)
    untold = FitRecipe(network="strided_ed_small", **RECIPE)
    for task, channels in (("target", 2), ("semantic", 1)):  # the second is the distance
        network = make_network(untold, task, 2, 16)
        assert next(network.parameters()).shape[1] == channels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"box": 16}, r"box is 12, this teacher expects 16"),
        ({"voxel_size": 10.2}, r"voxel size \(Å\) is 10.0, this teacher expects 10.2"),
        ({"contrast": "light"}, r"contrast is dark, this teacher expects light"),
        ({"classes": ("large", "small")}, r"classes is \('small', 'large'\), this teacher"),
    ],
)
def test_a_dataset_that_is_not_the_cards_is_refused(
    changes: dict[str, Any], message: str, dataset: Dataset
) -> None:
    with pytest.raises(ValueError, match=message):
        check_matches(make_card(**changes), dataset)


def test_a_voxel_size_within_a_hundredth_is_the_same(dataset: Dataset) -> None:
    check_matches(make_card(voxel_size=10.000001), dataset)
    check_matches(make_card(voxel_size=9.95), dataset)


def test_a_segmenter_takes_any_classes(dataset: Dataset) -> None:
    check_matches(make_card(task="target", role="segmenter", classes=("other", "ones")), dataset)

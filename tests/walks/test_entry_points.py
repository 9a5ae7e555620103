"""The long walk: the whole road through ``mlflow run``, and what it left behind."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from road import Road, find_runs, walk_here

from cectflow.dataset import open_dataset
from cectflow.model_card import ModelCard
from cectflow.particles import read_particles
from cectflow.shards import check_dataset
from cectflow.volume import read_volume

ROLES = ("segmenter", "tomogram-segmenter", "teacher", "student")

pytestmark = pytest.mark.slow


def test_main_ends_with_a_table_and_promoted_versions(road: Road) -> None:
    for line in ("segmenter, foreground IoU", "measured speed-up", "mlflow ui --backend-store-uri"):
        assert line in road.output
    for role in ROLES:
        assert f"cectflow-{role} v1 promoted to production" in road.output
    rows = read_particles(road.folder / "tour/predictions/classes.star").rows
    assert set(rows["cectflowModel"]) == {"cectflow-student/1"}
    labels = read_volume(road.folder / "tour/predictions/labels.mrc").data
    assert labels.max() <= len(rows)
    for name in ("field.png", "found.png"):
        assert (road.folder / "tour/predictions" / name).stat().st_size > 1000
    found = read_particles(road.folder / "tour/predictions/found.star").rows
    assert set(found["cectflowModel"]) == {"cectflow-tomogram-segmenter/1"}
    assert "particles found in it: precision, recall" in road.output
    card = ModelCard.from_folder(road.folder / "tour/tomogram-segmenter/model")
    assert card.picking is not None
    assert f"picks: those with a score of {card.picking.min_score:.3f} and more" in road.output
    assert found["cectflowScore"].min() >= card.picking.min_score
    recalls = {run.data.metrics.get("validation_picks_recall") for run in find_runs(road)}
    assert card.picking.recall in recalls


@pytest.mark.usefixtures("by_hand")
def test_a_second_call_for_the_same_folder_takes_up_what_is_finished(
    road: Road, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {role: road.folder / "tour" / role / "model/card.json" for role in ROLES}
    before = {role: path.stat().st_mtime_ns for role, path in models.items()}
    assert walk_here(monkeypatch, "main", recipe="tiny", out="tour", device="cpu") == 0
    output = capsys.readouterr().out
    assert {role: path.stat().st_mtime_ns for role, path in models.items()} == before
    for role in ROLES:
        assert f"cectflow-{role} v1 promoted to production" in output
        assert f"cectflow-{role} v2" not in output


@pytest.mark.usefixtures("by_hand")
def test_a_folder_of_another_road_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = walk_here(monkeypatch, "main", recipe="tiny", out="tour", device="cpu", seed="7")
    assert code == 2
    told = "holds another dataset: give another folder, or remove it first"
    assert told in capsys.readouterr().err


def test_the_run_holds_recipe_pictures_and_lineage(road: Road) -> None:
    import mlflow

    client = mlflow.MlflowClient(road.environment["MLFLOW_TRACKING_URI"])
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(experiments, max_results=100)
    distilled = next(run for run in reversed(found) if run.info.run_name == "distill")
    distilled = client.get_run(distilled.info.run_id)  # a search leaves the inputs out
    parent = client.get_run(distilled.data.tags["mlflow.parentRunId"])
    assert parent.info.status == "FINISHED"
    children = {
        run.info.run_name
        for run in found
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert children >= {"simulate", "train_segmenter", "train_teacher", "promote_student"}
    assert distilled.inputs.model_inputs, "no lineage from student to teacher"
    assert distilled.outputs.model_outputs, "the student is not an output of its run"
    assert distilled.data.metrics["labels_only_accuracy"] > 0
    assert distilled.data.metrics["temperature"] > 0
    assert {"agreement_low", "agreement_rod", "test_ece_after"} <= set(distilled.data.metrics)
    segmented = next(run for run in reversed(found) if run.info.run_name == "train_segmenter")
    for run, drawn in (
        (
            distilled,
            {
                "learning_curves",
                "confusion",
                "reliability",
                "slices",
                "groups",
                "teacher_and_student",
                "embeddings",
            },
        ),
        (segmented, {"learning_curves", "gallery", "slices", "groups"}),
    ):
        figures = {file.path for file in client.list_artifacts(run.info.run_id, "figures")}
        assert figures == {f"figures/{name}.png" for name in drawn}
    assert "recipe.yaml" in {file.path for file in client.list_artifacts(distilled.info.run_id)}


def test_the_production_student_loads_without_cectflow_and_without_pickle(road: Road) -> None:
    script = (
        "import sys, numpy as np, mlflow\n"
        "net = mlflow.pyfunc.load_model('models:/cectflow-student@production')\n"
        "cubes = np.load('cubes.npy')\n"
        "np.save('logits.npy', np.concatenate([net.predict(cubes[:1]), net.predict(cubes[1:])]))\n"
        "sys.exit('cectflow was imported' if 'cectflow' in sys.modules else 0)"
    )
    split = open_dataset(road.folder / "tour/dataset").split("test")
    cubes = next(split.batches(7)).subtomograms.numpy()
    np.save(road.folder / "cubes.npy", cubes)
    subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=road.folder,
        env=road.environment | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
    )  # fmt: skip
    from cectflow.runtime import load_runtime

    expected = load_runtime(road.folder / "tour/student/model")(cubes)
    np.testing.assert_allclose(np.load(road.folder / "logits.npy"), expected, atol=1e-4)


@pytest.mark.usefixtures("by_hand")
def test_simulate_alone(road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
    assert walk_here(monkeypatch, "simulate", recipe="tiny", out="alone") == 0
    assert check_dataset(road.folder / "alone") == ()
    digests = [
        open_dataset(road.folder / name).manifest.content_digest()
        for name in ("alone", "tour/dataset")
    ]
    assert digests[0] == digests[1], "the same recipe gave other bytes"

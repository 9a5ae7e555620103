"""The long walk: every entry point through ``mlflow run``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from road import Road

from cectflow.cli import main
from cectflow.dataset import check_dataset, open_dataset
from cectflow.model_card import ModelCard
from cectflow.particles import read_particles
from cectflow.recipe import LiveRecipe, load_recipe
from cectflow.volume import read_volume

ROLES = ("segmenter", "tomogram-segmenter", "teacher", "student")

pytestmark = pytest.mark.slow


def find_runs(road: Road) -> list[Any]:
    """All runs of the road's store, the newest first."""
    import mlflow

    client = mlflow.MlflowClient(road.environment["MLFLOW_TRACKING_URI"])
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, max_results=100, order_by=["start_time DESC"]))


def client_of(road: Road) -> Any:
    """Client of the road's store."""
    import mlflow

    return mlflow.MlflowClient(road.environment["MLFLOW_TRACKING_URI"])


def logged_files(road: Road, run: Any) -> set[str]:
    """Artifacts of a run, without what is in folders."""
    return {file.path for file in client_of(road).list_artifacts(run.info.run_id)}


def logged_epochs(road: Road, run_id: str) -> list[int]:
    """Steps at which a run logged its training loss."""
    import mlflow

    client = mlflow.MlflowClient(road.environment["MLFLOW_TRACKING_URI"])
    return [entry.step for entry in client.get_metric_history(run_id, "train_loss")]


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


def test_a_second_call_for_the_same_folder_takes_up_what_is_finished(road: Road) -> None:
    models = {role: road.folder / "tour" / role / "model/card.json" for role in ROLES}
    before = {role: path.stat().st_mtime_ns for role, path in models.items()}
    output = road.mlflow_run("main", recipe="tiny", out=str(road.folder / "tour"), device="cpu")
    assert {role: path.stat().st_mtime_ns for role, path in models.items()} == before
    for role in ROLES:
        assert f"cectflow-{role} v1 promoted to production" in output
        assert f"cectflow-{role} v2" not in output


def test_a_folder_of_another_road_is_refused(road: Road) -> None:
    output = road.mlflow_run(
        "main", recipe="tiny", out=str(road.folder / "tour"), device="cpu", seed="7", code=1
    )
    assert "holds another dataset: give another folder, or remove it first" in output


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


def test_simulate_alone(road: Road) -> None:
    road.mlflow_run("simulate", recipe="tiny", out=str(road.folder / "alone"))
    assert check_dataset(road.folder / "alone") == ()
    digests = [
        open_dataset(road.folder / name).manifest.content_digest()
        for name in ("alone", "tour/dataset")
    ]
    assert digests[0] == digests[1], "the same recipe gave other bytes"


@pytest.mark.parametrize(
    ("entry_point", "recipe"),
    # The teacher is promoted below, so it is trained to the end.
    [("train_segmenter", "short.yaml"), ("train_teacher", "tiny"), ("distill", "short.yaml")],
)
def test_each_training_works_alone(road: Road, entry_point: str, recipe: str) -> None:
    chosen: dict[str, str] = {"devices": "2"} if entry_point == "train_segmenter" else {}
    if entry_point == "distill":
        manifest = open_dataset(road.folder / "tour/dataset").manifest
        stack = road.folder / f"tour/dataset/{manifest.shards['test'][0].name}.mrcs"
        chosen = {"student": "strided_nano", "method": "dkd+hint", "unlabelled": str(stack),
                  "teacher": "cectflow-teacher/1,cectflow-student/1"}  # fmt: skip
    before = {run.info.run_id for run in find_runs(road)}
    output = road.mlflow_run(
        entry_point,
        recipe=str(road.folder / recipe) if recipe == "short.yaml" else recipe,
        device="auto",
        dataset=str(road.folder / "tour/dataset"),
        out=str(road.folder / f"alone-{entry_point}"),
        **chosen,
    )
    assert "v2: models:/cectflow-" in output
    if entry_point == "train_segmenter":
        (run,) = (run for run in find_runs(road) if run.info.run_id not in before)
        assert run.data.tags["devices"] == "2"
        assert logged_epochs(road, run.info.run_id) == [1]
        folder = road.folder / "alone-train_segmenter/segmenter/checkpoints"
        assert {path.name for path in folder.iterdir()} == {"best.pt", "last.pt"}
    if entry_point == "distill":
        card = ModelCard.from_folder(road.folder / "alone-distill/student/model")
        assert card.network == "strided_nano"
        assert card.teacher == "models:/cectflow-teacher/1,models:/cectflow-student/1"
        assert card.unlabelled_digest is not None
        assert card.variants["int8"].speedup > 0
        out = road.folder / "int8.star"
        command = [sys.executable, "-m", "cectflow", "predict", "classify", "--variant", "int8",
                   "--model", "cectflow-student/2", "--subtomograms", str(stack),
                   "--out", str(out)]  # fmt: skip
        subprocess.run(command, cwd=road.folder, env=road.environment, check=True)
        names = set(read_particles(out).rows["cectflowModel"])
        assert names == {"cectflow-student/2+int8"}
        params = [run.data.params for run in find_runs(road)]
        nano = next(p for p in params if p.get("cfg.student.fit.network") == "strided_nano")
        losses = {name: nano[f"cfg.student.soft.{name}"] for name in ("mse", "kl", "dkd", "hint")}
        assert losses == {"mse": "0.0", "kl": "0.0", "dkd": "1.0", "hint": "3000.0"}


def test_evaluate_promote_and_predict_alone(road: Road) -> None:
    assert "accuracy" in road.mlflow_run("evaluate")
    # A second version of the same recipe is as good as the first: a tie passes.
    output = road.mlflow_run("promote", role="teacher")
    assert "is in staging" in output
    # Some particles that cannot be predicted fail the command, but not the run.
    (road.folder / "cubes").mkdir()
    shutil.copy(road.folder / "tour/dataset/test/00000.mrcs", road.folder / "cubes")
    (road.folder / "cubes/torn.mrcs").write_bytes(b"no volume at all")
    out = road.folder / "alone.star"
    output = road.mlflow_run(
        "predict", code=1, subtomograms=str(road.folder / "cubes/*.mrcs"), out=str(out),
        table=str(road.folder / "alone.parquet"), block_size="16",
    )  # fmt: skip
    assert "1 of" in output
    assert "could not be predicted" in output
    rows = read_particles(out).rows
    assert rows["cectflowClassName"].iloc[-1] == "none"
    run = find_runs(road)[0]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["failed"] == 1
    assert run.data.metrics["particles"] == len(rows)
    assert run.data.metrics["per_second"] > 0
    assert run.data.tags["input_model"] == "models:/cectflow-student/1"
    assert logged_files(road, run) == {
        "alone.star", "alone.parquet", "alone_summary.png", "alone_failures.csv", "classes.json",
        "volumes.json",
    }  # fmt: skip
    (given,) = client_of(road).get_run(run.info.run_id).inputs.dataset_inputs
    assert given.dataset.name == "00000.mrcs"


def test_a_refused_promotion_fails_the_run_and_changes_nothing(road: Road) -> None:
    policy = road.folder / "strict.yaml"
    policy.write_text(
        "role: teacher\nscore: accuracy\nrules:\n"
        "  - {figure: accuracy, at_least: 1.1, why: nobody is that good}\n"
    )
    output = road.mlflow_run(
        "promote", code=1, model="cectflow-teacher/1", stage="production", policy=str(policy)
    )
    assert "stays where it is: teacher refused: accuracy is" in output


@pytest.mark.parametrize(
    ("entry_point", "parameters", "message"),
    [
        ("simulate", {"recipe": "nosuch"}, "unknown recipe 'nosuch'"),
        ("train_teacher", {"recipe": "tiny", "seed": "x"}, "seed is 'x': expected a whole number"),
        ("predict", {"subtomograms": "x", "block_size": "0"}, "block_size is 0: expected 1 or"),
        ("main", {"recipe": "tiny", "stages": "champion"}, "expected some of staging, production"),
    ],
)
def test_bad_parameters_end_with_a_clear_line(
    road: Road, entry_point: str, parameters: dict[str, str], message: str
) -> None:
    output = road.run_door(entry_point, **parameters)
    assert f"error: {message}" in output or message in output
    assert "Traceback" not in output.partition("error: ")[2].partition("\n")[0]


@pytest.mark.usefixtures("by_hand")
def test_a_student_is_distilled_from_live_data(road: Road) -> None:
    recipe = load_recipe("tiny")
    fit = recipe.student.fit.model_copy(update={"epochs": 2})
    fields = {"validation": 2, "test": 2}
    live = recipe.model_copy(
        update={
            "simulation": recipe.simulation.model_copy(update={"fields": fields}),
            "live": LiveRecipe(subtomograms_per_epoch=50),
            "student": recipe.student.model_copy(update={"fit": fit}),
        }
    )
    (road.folder / "live.yaml").write_text(live.to_yaml())
    with pytest.raises(SystemExit) as stop:
        main(["distill", "--recipe", "live.yaml", "--out", "live", "--device", "cpu"])
    assert not stop.value.code
    cards = [ModelCard.from_folder(Path("live") / name / "model")
             for name in ("student", "labels_only")]  # fmt: skip
    manifest = open_dataset(Path("live/dataset")).manifest
    assert manifest.count("train") == 0
    assert {card.dataset_digest for card in cards} == {manifest.content_digest()}
    assert {card.live_digest for card in cards} == {
        manifest.model_copy(update={"live_subtomograms": 50}).content_digest()
    }
    # A folder that is not of this recipe is refused, and nothing is trained.
    with pytest.raises(SystemExit) as stop:
        main(["distill", "--recipe", "live.yaml", "--dataset", "tour/dataset", "--out", "other"])
    assert stop.value.code == 2
    assert not Path("other/student").exists()


def test_structures_left_out_are_an_entry_point(road: Road) -> None:
    out, recipe = road.folder / "unseen", str(road.folder / "short.yaml")
    output = road.mlflow_run("generalisation", recipe=recipe, out=str(out), device="cpu")
    assert "held out in turn: barrel + bowl; rod" in output
    assert "unseen / seen" in output
    assert (out / "generalisation.png").stat().st_size > 1000

"""Every other entry point through ``mlflow run``, each alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from road import Road, find_runs, walk_here

from cectflow.cli import main
from cectflow.dataset import open_dataset
from cectflow.model_card import ModelCard
from cectflow.particles import read_particles
from cectflow.recipe import LiveRecipe, load_recipe
from cectflow.volume import Volume
from cectflow.volume_writer import write_volume

pytest_plugins = ("exported",)
pytestmark = pytest.mark.slow


def client_of(road: Road) -> Any:
    """Client of the road's store."""
    import mlflow

    return mlflow.MlflowClient(road.environment["MLFLOW_TRACKING_URI"])


def logged_files(road: Road, run: Any) -> set[str]:
    """Artifacts of a run, without what is in folders."""
    return {file.path for file in client_of(road).list_artifacts(run.info.run_id)}


def logged_epochs(road: Road, run_id: str) -> list[int]:
    """Steps at which a run logged its training loss."""
    history = client_of(road).get_metric_history(run_id, "train_loss")
    return [entry.step for entry in history]


@pytest.mark.parametrize(
    ("entry_point", "recipe"),
    [("train_segmenter", "short.yaml"), ("train_teacher", "tiny"), ("distill", "short.yaml")],
)
@pytest.mark.usefixtures("by_hand")
def test_each_training_works_alone(
    road: Road, entry_point: str, recipe: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    chosen: dict[str, str] = {"devices": "2"} if entry_point == "train_segmenter" else {}
    if entry_point == "distill":
        manifest = open_dataset(road.folder / "tour/dataset").manifest
        stack = road.folder / f"tour/dataset/{manifest.shards['test'][0].name}.mrcs"
        chosen = {"student": "strided_nano", "method": "dkd+hint", "unlabelled": str(stack),
                  "teacher": "cectflow-teacher/1,cectflow-student/1"}  # fmt: skip
    if entry_point == "train_teacher":
        # It is promoted below, so it is as good as the first: training goes on from its end.
        there = "teacher/checkpoints"
        shutil.copytree(road.folder / "tour" / there, road.folder / f"alone-{entry_point}" / there)
    before = {run.info.run_id for run in find_runs(road)}
    given = {
        "recipe": recipe if recipe == "tiny" else str(road.folder / recipe),
        "device": "auto", "dataset": str(road.folder / "tour/dataset"),
        "out": str(road.folder / f"alone-{entry_point}"), **chosen,
    }  # fmt: skip
    if entry_point == "distill":
        output = road.mlflow_run(entry_point, **given)
    else:
        assert walk_here(monkeypatch, entry_point, **given) == 0
        output = capsys.readouterr().out
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


@pytest.mark.usefixtures("by_hand")
def test_evaluate_promote_and_predict_alone(
    road: Road, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert walk_here(monkeypatch, "evaluate") == 0
    assert "accuracy" in capsys.readouterr().out
    # A second version of the same recipe is as good as the first: a tie passes.
    assert walk_here(monkeypatch, "promote", role="teacher") == 0
    assert "is in staging" in capsys.readouterr().out
    # Some particles that cannot be predicted fail the command and so the run; the output is there.
    (road.folder / "cubes").mkdir()
    shutil.copy(road.folder / "tour/dataset/test/00000.mrcs", road.folder / "cubes")
    (road.folder / "cubes/torn.mrcs").write_bytes(b"no volume at all")
    out = road.folder / "alone.star"
    output = road.mlflow_run(
        "predict", code=1, subtomograms=str(road.folder / "cubes/*.mrcs"), out=str(out),
        table=str(road.folder / "alone.parquet"), block_size="16", match_spectrum="true",
    )  # fmt: skip
    assert "1 of" in output
    assert "could not be predicted" in output
    rows = read_particles(out).rows
    assert rows["cectflowClassName"].iloc[-1] == "none"
    run = find_runs(road)[0]
    assert run.info.status == "FAILED"
    assert run.data.tags["outcome"] == "incomplete"
    assert run.data.metrics["failed"] == 1
    assert run.data.metrics["particles"] == len(rows)
    assert run.data.metrics["per_second"] > 0
    assert run.data.tags["input_model"] == "models:/cectflow-student/1"
    assert logged_files(road, run) == {
        "alone.star", "alone.parquet", "alone_summary.png", "alone_failures.csv", "classes.json",
        "spectra.json", "volumes.json",
    }  # fmt: skip
    logged = client_of(road).download_artifacts(run.info.run_id, "spectra.json")
    filters = json.loads(Path(logged).read_text())
    assert [Path(name).name for each in filters for name in each["files"]] == ["00000.mrcs"]
    assert filters[0]["particles"] == len(rows) - 1
    assert len(filters[0]["gain"]) > 1
    (given,) = client_of(road).get_run(run.info.run_id).inputs.dataset_inputs
    assert given.dataset.name == "00000.mrcs"


@pytest.mark.usefixtures("by_hand")
def test_a_night_of_tomograms_is_a_run_and_the_next_does_what_was_mended(
    road: Road, semantic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    night, labels = Path("night"), Path("night_labels")
    for folder in (night, labels):
        folder.mkdir()
    cells = Volume(np.random.default_rng(7).normal(size=(16, 24, 24)).astype(np.float32), 10.0)
    write_volume(night / "TS_1.mrc", cells)
    (night / "TS_2.mrc").write_text("half a copy")

    def predict() -> tuple[int, Any]:
        code = walk_here(
            monkeypatch, "predict", task="segment", model=str(semantic), device="cpu",
            tomogram=f"{night}/{{name}}.mrc", out=f"{labels}/{{name}}.mrc",
        )  # fmt: skip
        return code, find_runs(road)[0]

    code, run = predict()
    assert code == 4
    assert run.data.tags["outcome"] == "incomplete"
    assert (run.data.metrics["tomograms"], run.data.metrics["failed"]) == (1, 1)
    assert {"picks.star", "tomograms_failures.csv", "shares.json"} <= logged_files(road, run)
    before = (labels / "TS_1.mrc").stat().st_mtime_ns
    write_volume(night / "TS_2.mrc", cells, overwrite=True)
    code, run = predict()
    assert code == 0
    assert run.data.tags["outcome"] == "complete"
    assert (run.data.metrics["tomograms"], run.data.metrics["failed"]) == (2, 0)
    picks = read_particles(labels / "picks.star")
    assert sorted(picks.tomograms) == ["TS_1", "TS_2"]
    assert run.data.metrics["particles"] == len(picks)
    assert (labels / "TS_1.mrc").stat().st_mtime_ns == before
    (given,) = client_of(road).get_run(run.info.run_id).inputs.dataset_inputs
    assert given.dataset.name == "TS_1.mrc and 1 more"


@pytest.mark.usefixtures("by_hand")
def test_a_refused_promotion_ends_with_3_which_fails_the_run_and_changes_nothing(
    road: Road, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = road.folder / "strict.yaml"
    policy.write_text(
        "role: teacher\nscore: accuracy\nrules:\n"
        "  - {figure: accuracy, at_least: 1.1, why: nobody is that good}\n"
    )
    code = walk_here(
        monkeypatch, "promote", model="cectflow-teacher/1", stage="production", policy=str(policy)
    )
    assert code == 3
    assert "stays where it is: teacher refused: accuracy is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entry_point", "parameters", "message"),
    [
        ("simulate", {"recipe": "nosuch"}, "unknown recipe 'nosuch'"),
        ("train_teacher", {"recipe": "tiny", "seed": "x"}, "seed is 'x': expected a whole number"),
        ("predict", {"subtomograms": "x", "block_size": "0"}, "block_size is 0: expected 1 or"),
        ("main", {"recipe": "tiny", "stages": "champion"}, "expected some of staging, production"),
    ],
)
@pytest.mark.usefixtures("by_hand")
def test_bad_parameters_end_with_a_clear_line(
    entry_point: str,
    parameters: dict[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert walk_here(monkeypatch, entry_point, **parameters) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


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


@pytest.mark.usefixtures("by_hand")
def test_structures_left_out_are_an_entry_point(
    road: Road, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = road.folder / "unseen"
    code = walk_here(monkeypatch, "generalisation", recipe="short.yaml", out=str(out), device="cpu")
    assert code == 0
    output = capsys.readouterr().out
    assert "held out in turn: barrel + bowl; rod" in output
    assert "unseen / seen" in output
    assert (out / "generalisation.png").stat().st_size > 1000

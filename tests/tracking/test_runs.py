from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import mlflow
import pytest
from matplotlib.figure import Figure

import cectflow
from cectflow.config import Config
from cectflow.model_card import ModelCard
from cectflow.tracking.registry import find_version
from cectflow.tracking.runs import cectflow_commit, start_run

NAME = "cectflow-student"


def finished(run_id: str) -> mlflow.entities.Run:
    return mlflow.get_run(run_id)


def test_a_run_that_ends_well_is_finished_and_knows_the_code(store: str) -> None:
    with start_run("train", tags={"role": "teacher"}) as run:
        run.set_tags({"device": "cpu"})
    seen = finished(run.run_id)
    assert seen.info.status == "FINISHED"
    assert seen.info.run_name == "train"
    assert {"role": "teacher", "device": "cpu"}.items() <= seen.data.tags.items()
    assert seen.data.tags["cectflow.version"] == cectflow.__version__
    assert seen.data.tags["cectflow.commit"] == cectflow_commit()


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (ValueError("wrong"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(143), "KILLED"),
        (SystemExit(1), "FAILED"),
        (SystemExit(0), "FINISHED"),
    ],
)
def test_the_status_tells_how_the_run_ended(store: str, end: BaseException, status: str) -> None:
    with pytest.raises(type(end)), start_run("broken") as run:
        raise end
    assert finished(run.run_id).info.status == status
    assert mlflow.active_run() is None


STOPPED = """
import os, signal
from cectflow.tracking.runs import connect, start_run

connect()
before = signal.getsignal(signal.SIGTERM)
try:
    with start_run("stopped") as run:
        os.kill(os.getpid(), signal.SIGTERM)
except SystemExit as end:
    assert end.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    print(run.run_id)
"""


def test_sigterm_kills_the_run_and_the_old_handler_returns(store: str) -> None:
    command = [sys.executable, "-c", STOPPED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert finished(done.stdout.split()[-1]).info.status == "KILLED"


def test_a_run_in_another_thread_leaves_signals_alone(store: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def work() -> None:
        with start_run("threaded"):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_nested_runs_name_their_parent(store: str) -> None:
    with start_run("main") as parent, start_run("step", nested=True) as child:
        pass
    assert finished(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_a_second_run_must_be_nested(store: str) -> None:
    with start_run("main"), pytest.raises(ValueError, match="end it first or give nested=True"):
        start_run("other").__enter__()


def test_under_mlflow_run_the_outermost_run_is_resumed_and_keeps_its_name(
    store: str, as_project_run: Callable[[str], AbstractContextManager[None]]
) -> None:
    given = mlflow.MlflowClient().create_run("0", run_name="given").info.run_id
    mlflow.tracking.fluent._active_experiment_id = None  # a process of its own
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
    with as_project_run(given):
        cectflow.tracking.runs.connect(store)
        with start_run("train") as run, start_run("step", nested=True) as child:
            pass
    assert run.run_id == given != child.run_id
    assert finished(given).info.run_name == "given"
    assert finished(given).info.experiment_id == "0"
    assert finished(given).info.status == "FINISHED"
    assert finished(child.run_id).data.tags["mlflow.parentRunId"] == given


def test_metrics_keep_their_steps(store: str) -> None:
    with start_run("train") as run:
        for step, loss in enumerate([1.0, 0.5, 0.25]):
            run.log({"loss": loss, "epoch": step}, step)
    history = mlflow.MlflowClient().get_metric_history(run.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 0.5), (2, 0.25)]


def test_a_metric_that_mlflow_refuses_is_no_outage(store: str, lab: Path) -> None:
    with (
        start_run("train") as run,
        pytest.raises(mlflow.exceptions.MlflowException, match="Invalid value"),
    ):
        run.log({"../loss": 1.0}, 0)
    assert not (lab / ".cectflow-spool").exists()


def test_characters_that_mlflow_refuses_in_names_become_underscores(store: str) -> None:
    with start_run("judge") as run:
        run.log({"agreement_4v94#1": 0.5})
    assert finished(run.run_id).data.metrics == {"agreement_4v94_1": 0.5}


class Nested(Config):
    lr: float = 1e-3
    names: tuple[str, ...] = ("a", "b")


class Recipe(Config):
    train: Nested = Nested()
    note: str = "x" * 7000
    seed: int | None = None


def test_a_configuration_becomes_an_artifact_and_prefixed_parameters(store: str) -> None:
    with start_run("train") as run:
        run.log_config(Recipe(), "recipe")
        run.log_config(Recipe(), "recipe")
    params = finished(run.run_id).data.params
    assert params["cfg.train.lr"] == "0.001"
    assert params["cfg.train.names"] == '["a", "b"]'
    assert params["cfg.seed"] == "null"
    assert len(params["cfg.note"]) == 6000
    uri = f"runs:/{run.run_id}/recipe.yaml"
    assert Recipe.from_yaml(Path(mlflow.artifacts.download_artifacts(uri))) == Recipe()


def test_more_parameters_than_one_call_may_hold(store: str, card: ModelCard) -> None:
    baselines = {f"method {n} (trivial)": float(n) for n in range(120)}
    with start_run("train") as run:
        run.log_config(card.model_copy(update={"baselines": baselines}), "card")
    params = finished(run.run_id).data.params
    assert params["cfg.baselines.method 7 _trivial_"] == "7.0"
    assert len(params) > 130


def test_files_texts_and_figures_become_artifacts(store: str, lab: Path) -> None:
    folder = lab / "out"
    folder.mkdir()
    (folder / "a.txt").write_text("a", encoding="utf-8")
    figure = Figure()
    figure.add_subplot().plot([0, 1])
    with start_run("train") as run:
        run.log_figure(figure, "figures/curve.png")
        run.log_text("text", "note.txt")
        run.log_json({"a": [1]}, "data.json")
        run.log_files(folder, "folder")
        run.log_files(folder / "a.txt")
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            run.log_files(folder / "b.txt")
    root = Path(mlflow.artifacts.download_artifacts(run_id=run.run_id, artifact_path=""))
    names = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert names == {"a.txt", "data.json", "figures/curve.png", "folder/a.txt", "note.txt"}
    assert json.loads((root / "data.json").read_text(encoding="utf-8")) == {"a": [1]}


def test_a_dataset_is_an_input_with_its_digest(store: str) -> None:
    digest = "0123456789abcdef" * 4
    with start_run("train") as run:
        run.log_dataset("demo", digest, "/data/demo", "training")
    (given,) = finished(run.run_id).inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest) == ("demo", digest[:36])
    assert json.loads(given.dataset.source) == {"uri": "/data/demo"}
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]
    assert finished(run.run_id).data.tags["dataset.training"] == digest


def test_a_teacher_is_an_input_of_its_students_run(registry: str) -> None:
    teacher = find_version(f"{NAME}/1")
    with start_run("distil") as run:
        run.log_input_model(teacher)
    (given,) = finished(run.run_id).inputs.model_inputs
    assert f"models:/{given.model_id}" == teacher.model_uri
    assert finished(run.run_id).data.tags["input_model"] == f"models:/{NAME}/1"


def test_the_commit_is_a_digest_or_unknown() -> None:
    assert re.fullmatch(r"unknown|[0-9a-f]{40}(-dirty)?", cectflow_commit())


def test_the_commit_of_a_foreign_checkout_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "cectflow"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "other.txt").write_text("", encoding="utf-8")
    git("init", "-q")
    git("add", "other.txt")
    git("commit", "-q", "-m", "Add other")
    monkeypatch.setattr(cectflow, "__file__", str(package / "__init__.py"))
    assert cectflow_commit() == "unknown"
    git("add", "cectflow")
    git("commit", "-q", "-m", "Add cectflow")
    assert cectflow_commit() == git("rev-parse", "HEAD")
    (package / "__init__.py").write_text("edited = True\n", encoding="utf-8")
    assert cectflow_commit() == git("rev-parse", "HEAD") + "-dirty"

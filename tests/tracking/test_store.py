from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from cectflow.tracking.runs import connect
from cectflow.tracking.store import current_store, explain

CONNECT = """
import sys
from cectflow.tracking.runs import connect, start_run
connect(sys.argv[1])
with start_run("concurrent") as run:
    run.log({"loss": 1.0}, 0)
"""


def test_the_default_store_lies_in_the_working_folder_with_its_artifacts_beside_it(
    store: str, lab: Path
) -> None:
    assert store == f"sqlite:///{lab / 'mlflow.db'}"
    assert mlflow.get_tracking_uri() == store
    experiment = mlflow.get_experiment_by_name("cectflow")
    assert experiment is not None
    assert experiment.artifact_location == (lab / "mlruns" / "cectflow").as_uri()


def test_artifacts_follow_the_database_and_not_the_working_folder(store: str, lab: Path) -> None:
    elsewhere = lab / "else where"
    elsewhere.mkdir()
    os.chdir(elsewhere)
    assert connect(store, experiment="another one") == store
    with mlflow.start_run():
        mlflow.log_text("text", "note.txt")
    assert [path.name for path in (lab / "mlruns" / "another_one").rglob("*.txt")] == ["note.txt"]
    assert not list(elsewhere.iterdir())


def test_the_environment_names_the_store_where_no_argument_does(store: str, lab: Path) -> None:
    (lab / "mlflow.db").rename(lab / "other one.db")
    os.environ["MLFLOW_TRACKING_URI"] = "sqlite:///other one.db"
    assert connect() == f"sqlite:///{lab / 'other one.db'}"


def test_requests_fail_fast_unless_the_user_chose_otherwise(store: str) -> None:
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "77"
    connect()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"


@pytest.mark.parametrize("uri", ["./mlruns", "/data/mlruns", "file:///data/mlruns"])
def test_a_plain_folder_is_refused_with_the_remedy(lab: Path, uri: str) -> None:
    with pytest.raises(ValueError, match=r"is a folder.*'sqlite:///mlflow.db'"):
        connect(uri)


def test_a_file_that_is_no_database_is_refused_and_kept(lab: Path) -> None:
    (lab / "notes.db").write_text("not a database, but long enough to be one", encoding="utf-8")
    with pytest.raises(ValueError, match=r"notes.db is no sqlite database"):
        connect("sqlite:///notes.db")
    assert (lab / "notes.db").read_text(encoding="utf-8").startswith("not a database")


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_is_refused(lab: Path, uri: str) -> None:
    with pytest.raises(ValueError, match="names no database file"):
        connect(uri)


def test_an_unreachable_server_is_named_soon_and_without_its_password(lab: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:1 .*mlflow server") as caught:
        connect("http://user:secret@127.0.0.1:1")
    assert time.monotonic() - start < 5
    assert "secret" not in str(caught.value)
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_two_processes_may_start_on_a_new_store_at_once(lab: Path) -> None:
    uri = f"sqlite:///{lab / 'new' / 'mlflow.db'}"
    command = [sys.executable, "-c", CONNECT, uri]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=600)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    connect(uri)
    assert len(mlflow.search_runs(output_format="list")) == 2


def test_the_store_is_shown_without_its_password(lab: Path) -> None:
    mlflow.set_tracking_uri("https://user:secret@mlflow.example.org/path")
    assert current_store() == "https://mlflow.example.org/path"
    error = MlflowException(f"no answer from {mlflow.get_tracking_uri()}/api\n" + 1000 * "x")
    assert explain(error).startswith("no answer from https://mlflow.example.org/path/api xxx")
    assert len(explain(error)) < 310

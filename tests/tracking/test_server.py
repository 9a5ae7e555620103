"""The same road against a real server, which refuses some things that a database takes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from cectflow.tracking.promotion import history, rollback, set_stage
from cectflow.tracking.registry import find_version, register_model, resolve_model
from cectflow.tracking.runs import connect, start_run

NAME = "cectflow-student"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")]


@pytest.fixture
def server(lab: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = ["--host", "127.0.0.1", "--port", port, "--workers", "1"]
    stores = ["--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "./kept"]
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": paths, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (lab / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *address, *stores],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}", process
    finally:
        stop(process)


def wait_for(address: str) -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(address, timeout=1).close()
        except OSError:
            time.sleep(0.25)
        else:
            return
    pytest.fail(f"no server at {address} after a minute")


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def lose(process: subprocess.Popen[bytes]) -> str:
    with start_run("train") as run:
        run.log({"loss": 1.0}, 0)
        stop(process)
        for step in range(1, 20):
            run.log({"loss": 1.0}, step)
    return run.run_id


def test_the_whole_road_and_the_loss_of_the_server(
    server: tuple[str, subprocess.Popen[bytes]], model_folder: Path, lab: Path
) -> None:
    address, process = server
    assert connect(address) == address
    with start_run("register") as run:
        for _ in range(2):
            register_model(run, model_folder, name=NAME)
    for number in (1, 2):
        set_stage(find_version(f"{NAME}/{number}"), "production", verdict=None)
    assert find_version(f"models:/{NAME}/Production").version == "2"
    assert rollback(NAME).version == "1"
    assert [change["version"] for change in history(NAME)] == ["1", "2", "1"]
    folder, _ = resolve_model(NAME, cache=lab / "cache")
    assert (folder / "model.pt2").read_bytes() == (model_folder / "model.pt2").read_bytes()
    assert mlflow.models.Model.load(f"models:/{NAME}@production").signature is not None

    start = time.monotonic()
    with pytest.warns(UserWarning, match="does not answer|did not take the end"):
        run_id = lose(process)
    assert time.monotonic() - start < 30
    spool = lab / ".cectflow-spool" / f"{run_id}.jsonl"
    assert len(spool.read_text(encoding="utf-8").splitlines()) == 20
    with pytest.raises(ConnectionError, match="no MLflow server answers"):
        connect(address)

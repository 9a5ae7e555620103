from __future__ import annotations

from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException, RestException

from cectflow.tracking import spool
from cectflow.tracking.runs import connect, replay_spool, start_run


class Server:
    """Switch that makes the client's calls fail as they do when the server is gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.up = True
        self.calls = 0
        self.now = 0.0
        for name in ("log_batch", "set_terminated"):
            monkeypatch.setattr(mlflow.MlflowClient, name, self._guard(name))
        monkeypatch.setattr("cectflow.tracking.spool.time.monotonic", lambda: self.now)

    def _guard(self, name: str) -> object:
        original = getattr(mlflow.MlflowClient, name)

        def call(*args: object, **kwargs: object) -> object:
            self.calls += 1
            if not self.up:
                msg = "API request failed with exception: connection refused"
                raise MlflowException(msg)
            return original(*args, **kwargs)

        return call


@pytest.fixture
def server(store: str, monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch)


def points(run_id: str) -> list[tuple[int, float]]:
    history = mlflow.MlflowClient().get_metric_history(run_id, "loss")
    return sorted((point.step, point.value) for point in history)


def test_metrics_wait_in_the_file_and_follow_with_their_own_times(
    server: Server, lab: Path
) -> None:
    with start_run("train") as run:
        path = lab / ".cectflow-spool" / f"{run.run_id}.jsonl"
        run.log({"loss": 1.0}, 0)
        server.up = False
        with pytest.warns(UserWarning, match="does not answer; metrics of run"):
            run.log({"loss": 0.5}, 1)
        lines = path.read_text(encoding="utf-8").splitlines()
        server.up, server.now = True, 1000.0
        run.log({"loss": 0.25}, 2)
        assert not path.exists()
    assert points(run.run_id) == [(0, 1.0), (1, 0.5), (2, 0.25)]
    history = mlflow.MlflowClient().get_metric_history(run.run_id, "loss")
    assert f'"timestamp": {history[1].timestamp}' in lines[0]


def test_a_lost_server_is_asked_once_a_minute(server: Server) -> None:
    with start_run("train") as run:
        server.up = False
        with pytest.warns(UserWarning, match="does not answer"):
            run.log({"loss": 1.0}, 0)
        before = server.calls
        for step in range(1, 20):
            run.log({"loss": 1.0}, step)
        assert server.calls == before
        server.now += 61
        run.log({"loss": 1.0}, 20)
        assert server.calls == before + 1
        server.up = True
    assert len(points(run.run_id)) == 21


def lose_server(server: Server, error: Exception | None = None) -> str:
    """A run whose server is lost before its first metric, and its id."""
    with start_run("train") as run:
        server.up = False
        run.log({"loss": 1.0}, 0)
        if error is not None:
            raise error
    return run.run_id


def test_what_a_run_could_not_send_is_sent_by_the_next_one_with_its_status(
    server: Server, lab: Path
) -> None:
    with pytest.warns(UserWarning, match="does not answer|sent when the next run starts") as caught:
        run_id = lose_server(server)
    assert len(caught) == 2
    assert str(lab / ".cectflow-spool" / f"{run_id}.jsonl") in str(caught[1].message)
    assert mlflow.get_run(run_id).info.status == "RUNNING"
    server.up = True
    with start_run("next"):
        assert points(run_id) == [(0, 1.0)]
        assert mlflow.get_run(run_id).info.status == "FINISHED"
    assert not list((lab / ".cectflow-spool").glob("*.jsonl"))


def test_an_error_in_the_run_is_not_hidden_by_a_lost_server(server: Server) -> None:
    error = ValueError("the real cause")
    with (
        pytest.warns(UserWarning, match="does not answer|take"),
        pytest.raises(ValueError, match="real"),
    ):
        lose_server(server, error)


def test_the_spool_of_another_store_stays(server: Server, lab: Path) -> None:
    first = mlflow.get_tracking_uri()
    with pytest.warns(UserWarning, match=r"does not answer|sent when"):
        run_id = lose_server(server)
    server.up = True
    folder = lab / ".cectflow-spool"
    (lab / "other.db").write_bytes((lab / "mlflow.db").read_bytes())
    connect("sqlite:///other.db")
    assert replay_spool(folder) == 0
    connect(first)
    assert replay_spool(folder) == 1
    assert replay_spool(folder) == 0
    assert points(run_id) == [(0, 1.0)]


def test_a_spool_whose_run_is_gone_is_kept_with_a_warning(server: Server, lab: Path) -> None:
    gone = spool.Spool(lab / ".cectflow-spool", "0" * 32)
    server.up = False
    with pytest.warns(UserWarning, match="does not answer"):
        gone.log({"loss": 1.0}, 0)
    server.up = True
    with pytest.warns(UserWarning, match=r"refuses .*delete the file to give its metrics up"):
        assert replay_spool(lab / ".cectflow-spool") == 0
    assert gone.path.exists()


def test_a_missing_folder_holds_nothing(store: str, lab: Path) -> None:
    assert replay_spool(lab / "nowhere") == 0


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("INTERNAL_ERROR", True),
        ("TEMPORARILY_UNAVAILABLE", True),
        ("REQUEST_LIMIT_EXCEEDED", True),
        ("UNAUTHENTICATED", True),
        ("INVALID_PARAMETER_VALUE", False),
        ("RESOURCE_DOES_NOT_EXIST", False),
    ],
)
def test_an_outage_is_told_from_a_refusal(code: str, expected: bool) -> None:
    assert spool.is_outage(RestException({"error_code": code, "message": "x"})) is expected

"""The same tests against every kind of store, and what only a server does."""

from __future__ import annotations

import os
import signal
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest
from servers import KINDS, Server, Servers

from cectflow.tracking.doctor import examine_registry
from cectflow.tracking.policy import Finding, Verdict
from cectflow.tracking.promotion import archive, history, record_refusal, rollback, set_stage
from cectflow.tracking.record import Change
from cectflow.tracking.registry import find_version, list_versions, register_model, resolve_model
from cectflow.tracking.repair import find_writes, read_state
from cectflow.tracking.runs import connect, start_run

PASSED = Verdict("student", True, (Finding("speedup at least 3", "speedup", 4.0, 3.0, True),))
REFUSED = Verdict("student", False, (Finding("speedup at least 3", "speedup", 1.5, 3.0, False),))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals"),
    # Filters are the process's: one thread's end another's.
    pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning"),
]


@pytest.fixture(params=KINDS)
def name(
    request: pytest.FixtureRequest, lab: Path, servers: Servers, registered_store: Path
) -> str:
    """Registered model of its own in a store of some kind, with versions 1 to 3; connected."""
    if request.param == "sqlite":
        request.getfixturevalue("registry")
        return "cectflow-student"
    server = servers.get(request.param)
    os.environ.update(server.environment)
    connect(server.address)
    name = f"student-{uuid.uuid4().hex[:8]}"
    with start_run("register") as run:
        first = register_model(run, request.getfixturevalue("model_folder"), name=name)
    copy_version(first.name, 2)
    return name


def copy_version(name: str, times: int) -> None:
    """Further versions of the files of version 1."""
    first = find_version(f"{name}/1")
    for _ in range(times):
        mlflow.MlflowClient().create_model_version(
            name, source=first.model_uri, model_id=first.model_uri.removeprefix("models:/"),
            run_id=first.run_id, tags={k: v for k, v in first.tags.items() if "." in k},
        )  # fmt: skip


def promote(name: str, number: int, stage: str = "production") -> Change:
    return set_stage(find_version(f"{name}/{number}"), stage, verdict=PASSED)


def stages(name: str) -> list[tuple[str, ...]]:
    return [version.stages for version in list_versions(name)]


def test_stages_are_given_mirrored_recorded_and_taken_back(name: str, lab: Path) -> None:
    promote(name, 1, "staging")
    promote(name, 1)
    promote(name, 2, "staging")
    assert stages(name) == [("production",), ("staging",), ()]
    promote(name, 2)
    assert stages(name) == [("archived",), ("production",), ()]
    record_refusal(find_version(f"{name}/3"), "staging", REFUSED)
    assert stages(name)[2] == ()
    assert find_version(f"{name}/3").tags["verdict.staging"] == "refused"
    for stage in ("Production", "Archived"):
        row = mlflow.MlflowClient().search_model_versions(f"name = '{name}'")
        numbers = [str(each.version) for each in row if each.current_stage == stage]
        assert numbers == [{"Production": "2", "Archived": "1"}[stage]]
    by_alias, by_stage = (
        mlflow.models.Model.load(uri).model_id
        for uri in (f"models:/{name}@production", f"models:/{name}/Production")
    )
    assert by_alias == by_stage
    folder, version = resolve_model(name, cache=lab / "cache")
    assert version is not None
    assert (version.version, (folder / "card.json").is_file()) == ("2", True)
    assert rollback(name, reason="the new one misses apoferritin").outcome == "done"
    assert stages(name) == [("production",), ("archived",), ()]
    archive(find_version(f"{name}/2"), reason="withdrawn")
    seen = [
        (each["action"], each["stage"], each["version"], each["previous"], each["outcome"])
        for each in history(name)
    ]
    assert seen == [
        ("promote", "staging", "1", None, "done"),
        ("promote", "production", "1", None, "done"),
        ("promote", "staging", "2", None, "done"),
        ("promote", "production", "2", "1", "done"),
        ("rollback", "production", "1", "2", "done"),
        ("archive", "archived", "2", None, "done"),
    ]
    assert history(name)[4]["reason"] == "the new one misses apoferritin"
    assert [fault.kind for fault in examine_registry(name)] == []


def test_of_twenty_promotions_at_once_one_wins_and_the_record_is_true(name: str) -> None:
    copy_version(name, 17)
    promote(name, 1)
    with ThreadPoolExecutor(20) as pool:
        changes = list(pool.map(lambda number: promote(name, number), range(1, 21)))
    winner = find_version(f"{name}@production").version
    state = read_state(name)
    assert find_writes(state) == ()
    done = [each for each in state.record.changes if each.outcome == "done"]
    assert done[-1].version == winner
    # Each one's predecessor is the one before it, and no change is lost or left open.
    assert [each.previous for each in done] == [None, *(each.version for each in done[:-1])]
    assert {each.outcome for each in state.record.changes} <= {"done", "superseded"}
    assert {each.id for each in changes} < {each.id for each in state.record.changes}
    assert len(state.record.changes) == 21
    for change in changes:
        version = state.versions[change.version or ""]
        assert ("production" in version.stages) == (change.version == winner)
        if change.version != winner:
            assert version.tags.get("archived") or version.tags["superseded"] == "production"
    assert [v.mlflow_stage for v in state.versions.values()].count("Production") == 1
    assert state.versions[winner].mlflow_stage == "Production"


def test_fifty_loads_at_once_while_the_stage_changes(name: str, lab: Path) -> None:
    promote(name, 1)
    resolve_model(name, cache=lab / "cache")

    def load(_: int) -> str:
        folder, version = resolve_model(name, cache=lab / "cache")
        assert (folder / "model.pt2").is_file()
        assert version is not None
        return version.version

    with ThreadPoolExecutor(51) as pool:
        promotion = pool.submit(promote, name, 2)
        loaded = set(pool.map(load, range(50)))
        assert promotion.result().outcome == "done"
    assert loaded <= {"1", "2"}
    assert find_version(name).version == "2"


@pytest.fixture
def server(lab: Path, servers: Servers) -> Server:
    return servers.get("server")


def test_a_server_with_basic_auth_lets_no_stranger_in(lab: Path, servers: Servers) -> None:
    address = servers.get("server with basic auth").address
    with pytest.raises(mlflow.exceptions.MlflowException, match="401"):
        connect(address)


def test_a_server_that_is_lost_costs_no_metrics(server: Server, lab: Path) -> None:
    assert connect(server.address) == server.address
    start = time.monotonic()
    with pytest.warns(UserWarning, match="does not answer|did not take the end"):
        run_id = lose(server)
    assert time.monotonic() - start < 30
    spool = lab / ".cectflow-spool" / f"{run_id}.jsonl"
    assert len(spool.read_text(encoding="utf-8").splitlines()) == 20
    with pytest.raises(ConnectionError, match="no MLflow server answers"):
        connect(server.address)


def lose(server: Server) -> str:
    with start_run("train") as run:
        run.log({"loss": 1.0}, 0)
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait()
        for step in range(1, 20):
            run.log({"loss": 1.0}, step)
    return run.run_id

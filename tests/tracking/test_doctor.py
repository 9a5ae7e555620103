from __future__ import annotations

import json
import time

import mlflow
import pytest

from cectflow.cli import main
from cectflow.tracking.doctor import Fault, examine_registry
from cectflow.tracking.policy import Finding, Verdict
from cectflow.tracking.promotion import history, set_stage
from cectflow.tracking.record import begin
from cectflow.tracking.registry import find_version
from cectflow.tracking.repair import read_state

NAME = "cectflow-student"
PASSED = Verdict("student", True, (Finding("speedup at least 3", "speedup", 4.0, 3.0, True),))
REFUSED = Verdict("student", False, (Finding("speedup at least 3", "speedup", 1.5, 3.0, False),))


def kinds(faults: tuple[Fault, ...]) -> list[str]:
    return [fault.kind for fault in faults]


def promote(number: int, verdict: Verdict | None = PASSED, reason: str = "") -> None:
    set_stage(find_version(f"{NAME}/{number}"), "production", verdict=verdict, reason=reason)


def doctor(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["models", "doctor", *arguments])
    return int(stop.value.code or 0)


def test_a_sound_registry_has_no_fault(registry: str, capsys: pytest.CaptureFixture[str]) -> None:
    promote(1)
    promote(2)
    assert examine_registry(every=True) == ()
    assert doctor("--tracking-uri", registry) == 0
    assert "no fault found" in capsys.readouterr().out


def test_a_promotion_that_broke_off_before_its_alias_is_given_up(
    registry: str, capsys: pytest.CaptureFixture[str]
) -> None:
    promote(1)
    begin(NAME, "promote", "production", "2", stamp=read_state(NAME).stamp)
    assert doctor("--tracking-uri", registry, "--json") == 3
    (fault,) = json.loads(capsys.readouterr().out)
    assert fault["kind"] == "half-promotion"
    assert "the promote of v2 to production" in fault["found"]
    assert doctor("--tracking-uri", registry, "--fix") == 0
    assert "mended" in capsys.readouterr().out
    assert [each["outcome"] for each in history(NAME)] == ["done", "abandoned"]
    assert examine_registry() == ()


def test_stages_of_mlflow_and_tags_that_disagree_with_the_alias_are_mended(registry: str) -> None:
    promote(1)
    promote(2)
    client = mlflow.MlflowClient()
    with pytest.warns(FutureWarning, match="stages will be removed"):
        client.transition_model_version_stage(NAME, "3", "Production")
    client.delete_model_version_tag(NAME, "1", "archived")
    assert sorted(kinds(examine_registry())) == ["half-promotion", "mirror"]
    assert all(fault.mended for fault in examine_registry(fix=True))
    assert examine_registry() == ()
    assert find_version(f"{NAME}/3").mlflow_stage == "None"


def test_an_alias_set_by_hand_is_no_promotion(registry: str) -> None:
    mlflow.MlflowClient().set_registered_model_alias(NAME, "production", "2")
    faults = examine_registry(fix=True)
    assert [(fault.kind, fault.mended) for fault in faults] == [
        ("half-promotion", True), ("verdict", False)
    ]  # fmt: skip
    assert "from nothing to v2" in faults[0].found
    assert faults[1].remedy == f"cectflow models promote {NAME}/2 --to production"


def test_a_refused_version_may_hold_a_stage_for_a_reason_on_record_only(registry: str) -> None:
    promote(1, REFUSED, "the only one that fits")
    assert examine_registry() == ()
    mlflow.MlflowClient().set_model_version_tag(NAME, "2", "verdict.production", "refused")
    mlflow.MlflowClient().set_registered_model_alias(NAME, "production", "2")
    assert "production, though refused" in [fault.found for fault in examine_registry()]


def test_files_that_are_gone_or_changed_are_found_where_they_matter(registry: str) -> None:
    promote(1)
    client = mlflow.MlflowClient()
    client.set_model_version_tag(NAME, "1", "sha256.card.json", "0" * 64)
    assert kinds(examine_registry(NAME)) == ["digest"]
    (fault,) = examine_registry(NAME, fix=True)
    assert (fault.subject, fault.mended) == (f"{NAME} v1", False)
    empty = client.create_logged_model(experiment_id="0", name="gone")
    tags = find_version(f"{NAME}/2").tags
    client.create_model_version(NAME, source=empty.model_uri, tags=tags)
    assert kinds(examine_registry(NAME)) == ["digest"]
    assert kinds(examine_registry(NAME, every=True)) == ["digest", "missing"]


def test_runs_that_nobody_ended_are_ended_after_some_hours(registry: str) -> None:
    client = mlflow.MlflowClient()
    experiment = mlflow.get_experiment_by_name("cectflow")
    assert experiment is not None
    hour = 3_600_000
    now = int(1000 * time.time())
    old, young = (
        client.create_run(experiment.experiment_id, start_time=now - age * hour).info.run_id
        for age in (30, 3)
    )
    assert [fault.subject for fault in examine_registry()] == [old]
    assert [fault.subject for fault in examine_registry(hours=2.0, fix=True)] == [young, old]
    assert {client.get_run(run).info.status for run in (old, young)} == {"KILLED"}
    assert examine_registry(hours=2.0) == ()

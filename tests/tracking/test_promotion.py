from __future__ import annotations

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from cectflow.tracking.policy import Finding, Verdict
from cectflow.tracking.promotion import archive, history, record_refusal, rollback, set_stage
from cectflow.tracking.registry import RegisteredVersion, find_version, list_versions

NAME = "cectflow-student"
PASSED = Verdict(
    "student", True, (Finding("speedup at least 3", "speedup", 4.0, 3.0, True, "Fast."),)
)
REFUSED = Verdict(
    "student", False, (Finding("speedup at least 3", "speedup", 1.5, 3.0, False, "Fast."),)
)


def version(number: int) -> RegisteredVersion:
    return find_version(f"{NAME}/{number}")


def stages() -> list[tuple[str, ...]]:
    return [each.stages for each in list_versions(NAME)]


def mlflow_stages() -> list[str]:
    rows = mlflow.MlflowClient().search_model_versions(f"name = '{NAME}'")
    return [row.current_stage for row in sorted(rows, key=lambda row: int(row.version))]


def promote(number: int) -> None:
    set_stage(version(number), "production", verdict=PASSED)


def test_a_version_goes_from_staging_to_production_and_its_predecessor_is_archived(
    registry: str,
) -> None:
    set_stage(version(1), "staging", verdict=None)
    assert stages() == [("staging",), (), ()]
    promote(1)
    assert stages() == [("production",), (), ()]
    set_stage(version(2), "staging", verdict=None)
    assert stages() == [("production",), ("staging",), ()]
    promote(2)
    assert stages() == [("archived",), ("production",), ()]
    assert find_version(f"{NAME}@archived").version == "1"


def test_mlflows_own_stages_mirror_the_aliases(registry: str) -> None:
    set_stage(version(1), "staging", verdict=None)
    assert mlflow_stages() == ["Staging", "None", "None"]
    promote(1)
    set_stage(version(2), "staging", verdict=None)
    promote(2)
    assert mlflow_stages() == ["Archived", "Production", "None"]
    by_alias = mlflow.pyfunc.load_model(f"models:/{NAME}@production").metadata.model_id
    by_stage = mlflow.pyfunc.load_model(f"models:/{NAME}/Production").metadata.model_id
    assert f"models:/{by_alias}" == f"models:/{by_stage}" == version(2).model_uri


def test_a_mirror_that_fails_only_warns(registry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        msg = "stages are gone"
        raise MlflowException(msg)

    monkeypatch.setattr(mlflow.MlflowClient, "transition_model_version_stage", fail)
    with pytest.warns(UserWarning, match=rf"did not follow .*gone.*models:/{NAME}@production"):
        promote(1)
    assert stages()[0] == ("production",)


def test_an_mlflow_without_stages_breaks_nothing(
    registry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(mlflow.MlflowClient, "transition_model_version_stage")
    promote(1)
    promote(2)
    assert rollback(NAME).version == "1"
    assert stages() == [("production",), ("archived",), ()]


def test_the_verdict_becomes_tags(registry: str) -> None:
    promote(1)
    expected = {"verdict.production": "passed", "verdict.production.speedup": "4"}
    assert expected.items() <= version(1).tags.items()


def test_a_refused_version_stays_where_it_is_and_tells_why(registry: str) -> None:
    promote(1)
    set_stage(version(2), "staging", verdict=None)
    record_refusal(version(2), "production", REFUSED)
    assert stages() == [("production",), ("staging",), ()]
    tags = version(2).tags
    assert tags["verdict.production"] == "refused"
    assert "speedup is 1.5, expected speedup at least 3" in tags["verdict.production.refusal"]
    assert [change["version"] for change in history(NAME)] == ["1", "2"]


def test_a_refusal_is_overruled_only_with_a_reason(registry: str) -> None:
    with pytest.raises(ValueError, match=r"v1 is not set to production: .*speedup is 1\.5"):
        set_stage(version(1), "production", verdict=REFUSED)
    assert stages()[0] == ()
    set_stage(version(1), "production", verdict=REFUSED, reason="only one that fits the GPU")
    assert stages()[0] == ("production",)
    assert version(1).tags["verdict.production"] == "refused"
    assert history(NAME)[0]["reason"] == "only one that fits the GPU"


def test_the_history_tells_every_change_in_order(registry: str) -> None:
    set_stage(version(1), "staging", verdict=None, reason="first")
    promote(1)
    promote(2)
    rollback(NAME)
    seen = [
        (each["action"], each["stage"], each["version"], each["previous"]) for each in history(NAME)
    ]
    assert seen == [
        ("promote", "staging", "1", None),
        ("promote", "production", "1", None),
        ("promote", "production", "2", "1"),
        ("rollback", "production", "1", "2"),
    ]
    first, second, *_ = history(NAME)
    assert (first["reason"], first["verdict"]) == ("first", None)
    assert second["verdict"] == PASSED.digest()
    assert first["time"].endswith("+00:00")


def test_rollbacks_go_back_one_by_one_until_nothing_is_left(registry: str) -> None:
    for number in (1, 2, 3):
        promote(number)
    assert rollback(NAME).version == "2"
    assert stages() == [("archived",), ("production",), ("archived",)]
    assert rollback(NAME).version == "1"
    with pytest.raises(ValueError, match=r"production holds cectflow-student v1, and no version"):
        rollback(NAME)
    promote(3)
    assert rollback(NAME).version == "1"


def test_nothing_to_roll_back_to(registry: str) -> None:
    with pytest.raises(ValueError, match="production holds nothing, and no version held it before"):
        rollback(NAME)


def test_a_stage_moved_by_other_hands_is_put_on_record_and_restored_too(registry: str) -> None:
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(NAME, "production", "3")
    promote(1)
    assert rollback(NAME).version == "3"
    client.delete_registered_model_alias(NAME, "production")
    promote(2)
    seen = [(each["action"], each["version"], each["previous"]) for each in history(NAME)]
    assert seen == [
        ("found", "3", None),
        ("promote", "1", "3"),
        ("rollback", "3", "1"),
        ("found", None, "3"),
        ("promote", "2", None),
    ]
    assert history(NAME)[0]["reason"] == "production was moved by other hands, from nothing to v3"
    assert stages() == [("archived",), ("production",), ("archived",)]


def test_a_deleted_version_is_passed_over(registry: str) -> None:
    for number in (1, 2, 3):
        promote(number)
    mlflow.MlflowClient().delete_model_version(NAME, "2")
    assert rollback(NAME).version == "1"


def test_a_rollback_of_staging_does_not_demote_production(registry: str) -> None:
    set_stage(version(1), "staging", verdict=None)
    promote(1)
    set_stage(version(2), "staging", verdict=None)
    with pytest.raises(ValueError, match=r"v1 is in production: staging is for candidates"):
        rollback(NAME, "staging")
    with pytest.raises(ValueError, match=r"v1 is in production: staging is for candidates"):
        set_stage(version(1), "staging", verdict=None)


def test_archiving_takes_every_alias_and_no_rollback_brings_it_back(registry: str) -> None:
    promote(1)
    promote(2)
    set_stage(version(2), "archived", verdict=None, reason="withdrawn")
    assert stages() == [("archived",), ("archived",), ()]
    assert mlflow_stages()[1] == "Archived"
    assert rollback(NAME).version == "1"
    archive(version(1), reason="withdrawn too")
    with pytest.raises(ValueError, match="held it before but v1, archived since"):
        rollback(NAME)
    promote(1)
    assert stages()[0] == ("production",)


def test_a_rollback_past_an_archived_version_does_not_end_at_the_one_that_is_there(
    registry: str,
) -> None:
    for number in (3, 1, 2, 1):
        promote(number)
    archive(version(2), reason="withdrawn")
    assert rollback(NAME).version == "3"


def test_an_archive_of_a_version_without_a_stage_leaves_the_others_alone(registry: str) -> None:
    promote(1)
    archive(version(3), reason="never any good")
    assert stages() == [("production",), (), ("archived",)]


def test_a_stale_refusal_does_not_outlive_a_verdict_that_passed(registry: str) -> None:
    record_refusal(version(1), "production", REFUSED)
    promote(1)
    assert not [key for key in version(1).tags if key.endswith("refusal")]


def test_an_unknown_stage_lists_the_known_ones(registry: str) -> None:
    with pytest.raises(ValueError, match="'champion': expected staging or production or archived"):
        set_stage(version(1), "champion", verdict=None)
    with pytest.raises(ValueError, match="'archived': expected staging or production"):
        rollback(NAME, "archived")

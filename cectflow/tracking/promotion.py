"""Stages of registered versions: set, refused, rolled back, each change kept in a history.

An alias is the truth (``models:/NAME@production``). Where MLflow still has stages of its own they
mirror it (``models:/NAME/Production``), and nothing here reads them.
"""

from __future__ import annotations

import json
import secrets
import warnings
from datetime import UTC, datetime
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from cectflow.tracking.policy import Verdict
from cectflow.tracking.versions import (
    STAGES,
    RegisteredVersion,
    find_version,
    list_versions,
    stage_holder,
)

__all__ = ["history", "record_refusal", "rollback", "set_stage"]

HISTORY_TAG = "history."
REASON_LENGTH = 1000


def set_stage(
    version: RegisteredVersion, stage: str, *, verdict: Verdict | None, reason: str = ""
) -> None:
    """Give a version a stage, and write the change to the model's history.

    Written in the order tags, alias, history, mirror, so that whatever breaks off, the alias never
    precedes its verdict. A version that leaves staging for production loses ``@staging``. The
    version that held the stage before is tagged ``archived``, unless it holds another stage.
    ``archived`` takes both aliases away.

    Parameters
    ----------
    version
        Any version of a registered model.
    stage
        ``staging``, ``production`` or ``archived``.
    verdict
        Of the policy, kept as tags ``verdict.{stage}`` and ``verdict.{stage}.{figure}``; None
        where no policy was asked.
    reason
        Why, in the words of whoever did it.

    Raises
    ------
    ValueError
        If the stage is unknown, the verdict is a refusal and no reason is given against it, or
        the version is in production and asked back to staging.

    Warns
    -----
    UserWarning
        If MLflow's own stages could not follow.
    """
    _check_stage(stage, (*STAGES, "archived"))
    if verdict is not None and not verdict.passed and not reason:
        msg = f"{version.label} is not set to {stage}: {verdict.refusal}"
        raise ValueError(msg)
    current = find_version(f"{version.name}/{version.version}")
    _refuse_demotion(current, stage)
    _write_verdict(version, stage, verdict)
    details = {"verdict": verdict.digest() if verdict else None, "reason": reason}
    if stage == "archived":
        _archive(current, details)
    else:
        _assign(current, stage, "promote", details)


def record_refusal(version: RegisteredVersion, stage: str, verdict: Verdict) -> None:
    """Tag a version with the verdict that kept it out of a stage; its stages stay as they are."""
    _write_verdict(version, stage, verdict)


def history(name: str) -> tuple[dict[str, Any], ...]:
    """Past changes of a registered model's stages, oldest first.

    Each has ``time``, ``action`` (promote, rollback, archive), ``stage``, ``version``,
    ``previous`` (version that held the stage before, or None), ``verdict`` (digest, or None) and
    ``reason``.

    Raises
    ------
    ValueError
        If the name is not registered.
    """
    list_versions(name)  # says which names there are
    tags = mlflow.MlflowClient().get_registered_model(name).tags
    return tuple(json.loads(tags[key]) for key in sorted(tags) if key.startswith(HISTORY_TAG))


def rollback(name: str, stage: str = "production") -> RegisteredVersion:
    """Version that held a stage before, which now holds it again.

    Repeated, it goes further back. Versions deleted meanwhile are passed over.

    Raises
    ------
    ValueError
        If the stage is unknown, or no earlier version is.
    """
    _check_stage(stage, STAGES)
    known = {version.version: version for version in list_versions(name)}
    holder = stage_holder(name, stage)
    held = [number for number in _held(name, stage) if number in known]
    while held and holder is not None and held[-1] == holder.version:
        held.pop()
    if not held:
        now = "nothing" if holder is None else holder.label
        msg = f"cannot roll back {name}: {stage} holds {now}, and no version held it before"
        raise ValueError(msg)
    before = known[held[-1]]
    _refuse_demotion(before, stage)
    _assign(before, stage, "rollback", {"verdict": None, "reason": ""})
    return find_version(f"{name}/{before.version}")


def _check_stage(stage: str, known: tuple[str, ...]) -> None:
    if stage not in known:
        msg = f"unknown stage {stage!r}: expected {' or '.join(known)}"
        raise ValueError(msg)


def _held(name: str, stage: str) -> list[str]:
    """Holders of a stage up to now; a rollback takes away what came after the one restored."""
    held: list[str] = []
    for change in history(name):
        if change["stage"] != stage:
            continue
        number = change["version"]
        if change["action"] == "rollback" and number in held:
            while held[-1] != number:
                held.pop()
            continue
        # The version held before may owe its stage to someone else: it is in no change of ours.
        for each in (change["previous"], number):
            if each is not None and held[-1:] != [each]:
                held.append(each)
    return held


def _refuse_demotion(version: RegisteredVersion, stage: str) -> None:
    if stage == "staging" and "production" in version.stages:
        msg = f"{version.label} is in production: staging is for candidates; give another version"
        raise ValueError(msg)


def _assign(version: RegisteredVersion, stage: str, action: str, details: dict[str, Any]) -> None:
    client = mlflow.MlflowClient()
    previous = stage_holder(version.name, stage)
    if "archived" in version.stages:
        client.delete_model_version_tag(version.name, version.version, "archived")
    client.set_registered_model_alias(version.name, stage, version.version)
    if stage == "production" and "staging" in version.stages:
        client.delete_registered_model_alias(version.name, "staging")
    if previous is not None and previous.version != version.version:
        _archive_if_idle(client, previous, stage)
    change = {
        "action": action,
        "stage": stage,
        "version": version.version,
        "previous": None if previous is None else previous.version,
    }
    _append_history(version.name, change | details)
    _mirror(version, stage)


def _archive_if_idle(client: mlflow.MlflowClient, version: RegisteredVersion, lost: str) -> None:
    if not set(version.stages) & set(STAGES) - {lost}:
        client.set_model_version_tag(version.name, version.version, "archived", "true")


def _archive(version: RegisteredVersion, details: dict[str, Any]) -> None:
    client = mlflow.MlflowClient()
    client.set_model_version_tag(version.name, version.version, "archived", "true")
    for stage in set(STAGES) & set(version.stages):
        client.delete_registered_model_alias(version.name, stage)
    change = {"action": "archive", "stage": "archived", "version": version.version}
    _append_history(version.name, change | {"previous": None} | details)
    _mirror(version, "archived")


def _write_verdict(version: RegisteredVersion, stage: str, verdict: Verdict | None) -> None:
    if verdict is None:
        return
    client = mlflow.MlflowClient()
    tags = {f"verdict.{stage}.{key}": value for key, value in verdict.tags().items()}
    tags[f"verdict.{stage}"] = "passed" if verdict.passed else "refused"
    if not verdict.passed:
        tags[f"verdict.{stage}.refusal"] = verdict.refusal[:REASON_LENGTH]
    for key, value in tags.items():
        client.set_model_version_tag(version.name, version.version, key, value)


def _append_history(name: str, change: dict[str, Any]) -> None:
    time = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"time": time} | change | {"reason": change["reason"][:REASON_LENGTH]}
    # The random end keeps both of two changes that are written at once.
    key = f"{HISTORY_TAG}{len(history(name)) + 1:06d}.{secrets.token_hex(3)}"
    mlflow.MlflowClient().set_registered_model_tag(name, key, json.dumps(entry))


def _mirror(version: RegisteredVersion, stage: str) -> None:
    client = mlflow.MlflowClient()
    if not hasattr(client, "transition_model_version_stage"):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            client.transition_model_version_stage(
                version.name,
                version.version,
                stage.capitalize(),
                archive_existing_versions=stage in STAGES,
            )
    except MlflowException as error:
        msg = (
            f"{version.label} is @{stage}, but MLflow's own stage did not follow ({error}): use "
            f"models:/{version.name}@{stage}"
        )
        warnings.warn(msg, stacklevel=4)

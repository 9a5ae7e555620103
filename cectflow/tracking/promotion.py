"""Stages of registered versions: set, refused, archived, rolled back, each change on record.

An alias is the truth (``models:/NAME@production``). Where MLflow still has stages of its own they
mirror it (``models:/NAME/Production``), and nothing here reads them.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cectflow.tracking.policy import Verdict
from cectflow.tracking.record import (
    ATTEMPTS,
    REASON_LENGTH,
    Action,
    Change,
    Record,
    begin,
    close,
    write,
)
from cectflow.tracking.repair import State, observe, read_state, settle, take_away
from cectflow.tracking.versions import STAGES, RegisteredVersion

__all__ = ["archive", "find_withdrawal", "history", "record_refusal", "rollback", "set_stage"]


def set_stage(
    version: RegisteredVersion, stage: str, *, verdict: Verdict | None, reason: str = ""
) -> Change:
    """Give a version a stage, and write the change to the model's record.

    Written in the order verdict, beginning, alias, outcome, tags, mirror: whatever breaks off, the
    alias never precedes its verdict or its entry in the record, and the next command finishes the
    rest. A version that leaves staging for production loses ``@staging``. The version that held
    the stage before is tagged ``archived``, unless it holds another stage.

    Aliases have no compare-and-swap. Of promotions at the same time the one whose version the
    alias names in the end has won; the others are ``superseded``, in the record and by a tag.

    Parameters
    ----------
    version
        Any version of a registered model.
    stage
        ``staging`` or ``production``; ``archived`` is :func:`archive`.
    verdict
        Of the policy, kept as tags ``verdict.{stage}`` and ``verdict.{stage}.{figure}``; None
        where no policy was asked.
    reason
        Why, in the words of whoever did it.

    Returns
    -------
    Change
        As it is on record: ``done`` or ``superseded``.

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
    if stage == "archived":
        return archive(version, reason=reason)
    state = observe(version.name)
    _refuse_demotion(state, version, stage)
    _write_verdict(version, stage, verdict)
    digest = None if verdict is None else verdict.digest()
    return _assign(state, version, stage, "promote", digest, reason)


def archive(version: RegisteredVersion, *, reason: str) -> Change:
    """Withdraw a version: it loses every stage, and no rollback brings it back.

    Written in the order beginning, alias, outcome, tags, mirror. An archive that breaks off is
    completed by the next command.

    Parameters
    ----------
    version
        Any version of a registered model.
    reason
        Why, in the words of whoever did it.
    """
    name, number = version.name, version.version
    state = observe(name)
    id = begin(name, "archive", "archived", number, stamp=state.stamp, reason=reason)
    for stage in STAGES:
        # Another command may have finished this archive: what it took away may be given anew.
        take_away(name, stage, number, lambda now: now.record.find(id).outcome == "begun")
    close(name, id, "done", stamp=read_state(name).stamp)
    return settle(name).record.find(id)


def rollback(name: str, stage: str = "production", *, reason: str = "") -> Change:
    """Give a stage back to the version that held it before.

    Repeated, it goes further back. Versions that were archived by name, or deleted, are passed
    over.

    Raises
    ------
    ValueError
        If the stage is unknown, or no earlier version is; the message names those passed over.
    """
    _check_stage(stage, STAGES)
    state = observe(name)
    holder = state.aliases.get(stage)
    held = [number for number in _held(state.record, stage) if number in state.versions]
    withdrawn = [each for each in held if each != holder and _is_withdrawn(state.record, each)]
    held = [number for number in held if number not in withdrawn]
    while held and held[-1] == holder:
        held.pop()
    if not held:
        now = "nothing" if holder is None else f"{name} v{holder}"
        msg = f"cannot roll back {name}: {stage} holds {now}, and no version held it before"
        if withdrawn:
            named = ", ".join(f"v{number}" for number in dict.fromkeys(withdrawn))
            msg += f" but {named}, archived since"
        raise ValueError(msg)
    before = state.versions[held[-1]]
    _refuse_demotion(state, before, stage)
    return _assign(state, before, stage, "rollback", None, reason)


def record_refusal(version: RegisteredVersion, stage: str, verdict: Verdict) -> None:
    """Tag a version with the verdict that kept it out of a stage; its stages stay as they are."""
    _write_verdict(version, stage, verdict)
    settle(version.name)


def history(name: str) -> tuple[dict[str, Any], ...]:
    """Past changes of a registered model's stages, in the order in which they took effect.

    Each has what :class:`cectflow.tracking.record.Change` has.

    Raises
    ------
    ValueError
        If the name is not registered.
    """
    return tuple(asdict(change) for change in read_state(name).record.changes)


def find_withdrawal(version: RegisteredVersion) -> Change | None:
    """The archive that withdrew a version, unless it was given a stage since."""
    record = read_state(version.name).record
    done = [each for each in record.changes if each.outcome == "done"]
    own = [each for each in done if each.version == version.version]
    return own[-1] if own and own[-1].action == "archive" else None


def _check_stage(stage: str, known: tuple[str, ...]) -> None:
    if stage not in known:
        msg = f"unknown stage {stage!r}: expected {' or '.join(known)}"
        raise ValueError(msg)


def _held(record: Record, stage: str) -> list[str]:
    """Holders of a stage up to now; a rollback takes away what came after the one restored."""
    held: list[str] = []
    for change in record.changes:
        number = change.version
        if change.stage != stage or change.outcome != "done" or number is None:
            continue
        if change.action == "rollback" and number in held:
            while held[-1] != number:
                held.pop()
        elif held[-1:] != [number]:
            held.append(number)
    return held


def _is_withdrawn(record: Record, number: str) -> bool:
    done = [each for each in record.changes if each.version == number and each.outcome == "done"]
    return bool(done) and done[-1].action == "archive"


def _refuse_demotion(state: State, version: RegisteredVersion, stage: str) -> None:
    if stage == "staging" and state.aliases.get("production") == version.version:
        msg = f"{version.label} is in production: staging is for candidates; give another version"
        raise ValueError(msg)


def _assign(
    state: State,
    version: RegisteredVersion,
    stage: str,
    action: Action,
    verdict: str | None,
    reason: str,
) -> Change:
    name, number = version.name, version.version
    id = begin(name, action, stage, number, stamp=state.stamp, verdict=verdict, reason=reason)
    won = False
    for _ in range(ATTEMPTS):
        write("set_registered_model_alias", name, stage, number)
        state = read_state(name)
        if state.aliases.get(stage) == number:
            won = True
            close(name, id, "done", stamp=state.stamp)
            state = read_state(name)
        # Whoever took the alias from another version just now may have taken it from ours.
        if stage in state.aliases or _is_withdrawn(state.record, number):
            break
        if state.aliases.get("production") == number:
            break  # it was promoted further at the same time, and taken out of staging
    if not won:
        close(name, id, "superseded", stamp=state.stamp)
    return settle(name).record.find(id)


def _write_verdict(version: RegisteredVersion, stage: str, verdict: Verdict | None) -> None:
    if verdict is None:
        return
    tags = {f"verdict.{stage}.{key}": value for key, value in verdict.tags().items()}
    tags[f"verdict.{stage}"] = "passed" if verdict.passed else "refused"
    if not verdict.passed:
        tags[f"verdict.{stage}.refusal"] = verdict.refusal[:REASON_LENGTH]
    for key, value in tags.items():
        write("set_model_version_tag", version.name, version.version, key, value)
    for key in version.tags:  # of an earlier verdict, such as its refusal
        if key.startswith(f"verdict.{stage}.") and key not in tags:
            write("delete_model_version_tag", version.name, version.version, key)

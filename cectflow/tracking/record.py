"""The record of a registered model's stages: each change that was begun, and what became of it.

The record is append-only. It consists of tags of the registered model, each written once:
``history.{stamp}.{id}`` before a change is carried out, with all that its command knows, and
``history.{stamp}.{id}.{outcome}`` after it. Aliases have no compare-and-swap, so a change is
``done`` only where the alias was seen to name its version afterwards.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal

import mlflow
from mlflow.exceptions import MlflowException

__all__ = ["Action", "Change", "Outcome", "Record", "begin", "close", "read_record", "write"]

Action = Literal["promote", "rollback", "archive", "found"]
Outcome = Literal["begun", "done", "superseded", "abandoned"]

OUTCOMES: tuple[Outcome, ...] = ("done", "superseded", "abandoned")
"""Marks, the strongest first: whoever saw a version in its stage is right."""
REASON_LENGTH = 1000
ATTEMPTS = 6
CONTENTION = {"BAD_REQUEST", "TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR"}
"""What MLflow answers where two writers insert, or delete, the same row."""

_KEY = re.compile(r"history\.(?P<stamp>\d+)\.(?P<id>[0-9a-f]+)(?:\.(?P<outcome>[a-z]+))?")


@dataclass(frozen=True)
class Change:
    """One change of a stage."""

    id: str
    time: str
    """When it was begun: ISO 8601, UTC."""
    action: Action
    """``found``: the alias had been moved by other hands than cectflow's."""
    stage: str
    """``staging``, ``production`` or, of an archive, ``archived``."""
    version: str | None
    """None where a stage was found empty."""
    previous: str | None
    """Version that held the stage before, for all that is recorded; None of changes not done."""
    verdict: str | None
    """Digest of the policy's verdict."""
    reason: str
    by: str
    """User, as the system or the server knows them."""
    outcome: Outcome
    """``superseded``: another version took the stage at the same time. ``abandoned``: the command
    broke off before its version took the stage. ``begun``: it is at work, or broke off."""


@dataclass(frozen=True)
class Record:
    """What the record of one registered model says.

    Attributes
    ----------
    changes
        In the order in which they took effect; those that took none, in that of their beginnings.
    holders
        Stage → version that holds it for all that is recorded.
    once_held
        Versions that held a stage at some time, or were archived.
    stamps
        Id → when the change was begun, and when it was last seen to be in effect; of one that was
        not seen, twice when it was begun.
    stamp
        Of the latest entry, in microseconds since 1970; 0 where there is none.
    """

    changes: tuple[Change, ...] = ()
    holders: Mapping[str, str] = field(default_factory=dict)
    once_held: frozenset[str] = frozenset()
    stamps: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    stamp: int = 0

    def find(self, id: str) -> Change:
        """Change with this id."""
        return next(change for change in self.changes if change.id == id)

    def latest(self, version: str) -> Change | None:
        """Latest change that is about a version, or None."""
        return next((each for each in reversed(self.changes) if each.version == version), None)

    def overlap(self, change: Change, later: Change) -> bool:
        """Whether a change took effect after a later one was begun: their order may be wrong.

        Not the other way round: whoever begins a change has read the effects before it.
        """
        return self.stamps[later.id][0] < self.stamps[change.id][1]

    def next_stamp(self, now: int) -> int:
        """Stamp of an entry that follows all of these, at ``now`` if clocks agree."""
        return max(now, self.stamp + 1)


def read_record(tags: Mapping[str, str]) -> Record:
    """Record that the tags of a registered model hold.

    A mark is stamped between two instants at which the alias named its version: its writing, or an
    earlier reading, and a reading. So changes that overtook one another have the order of the
    alias's values, as far as clocks agree. Stamps never run backwards, whatever the clocks say:
    each is later than all that its writer had seen. Of several marks the latest counts.
    """
    begun: dict[str, tuple[int, Change]] = {}
    marks: dict[str, dict[str, int]] = {}
    stamp = 0
    for key in sorted(tags):
        match = _KEY.fullmatch(key)
        if match is None:
            continue
        at, id = int(match["stamp"]), match["id"]
        stamp = max(stamp, at)
        if match["outcome"]:
            marks.setdefault(id, {})[match["outcome"]] = at
        else:
            begun[id] = at, _parse(id, tags[key])
    placed = []
    for id, (at, change) in begun.items():
        own = marks.get(id, {})
        outcome: Outcome = next((each for each in OUTCOMES if each in own), "begun")
        placed.append((own.get("done", at), id, replace(change, outcome=outcome)))
    stamps = {id: (begun[id][0], at) for at, id, _ in placed}
    walked = _walk([change for *_, change in sorted(placed, key=lambda each: each[:2])])
    return replace(walked, stamps=stamps, stamp=stamp)


def begin(
    name: str,
    action: Action,
    stage: str,
    version: str | None,
    *,
    stamp: int,
    verdict: str | None = None,
    reason: str = "",
) -> str:
    """Id of a change that is now in the record, and not yet carried out."""
    id = secrets.token_hex(8)
    facts = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "action": action,
        "stage": stage,
        "version": version,
        "verdict": verdict,
        "reason": reason[:REASON_LENGTH],
        "by": _user(),
    }
    # A tag of 5000 characters is the longest, and an escaped character takes six.
    content = json.dumps(facts, ensure_ascii=False)
    write("set_registered_model_tag", name, f"history.{stamp:016d}.{id}", content)
    return id


def close(name: str, id: str, outcome: Outcome, *, stamp: int) -> None:
    """Mark what became of a change. Marking it twice does no harm."""
    # Who marks the same at the same stamp writes the same.
    time = datetime.fromtimestamp(stamp / 1e6, tz=UTC).isoformat(timespec="milliseconds")
    write("set_registered_model_tag", name, f"history.{stamp:016d}.{id}.{outcome}", time)


def write(method: str, *arguments: str | bool) -> None:
    """Let MLflow's client write to the registry; again where two writers met on one row."""
    client = mlflow.MlflowClient()
    for attempt in range(ATTEMPTS):
        try:
            getattr(client, method)(*arguments)
        except MlflowException as error:
            if error.error_code not in CONTENTION or attempt == ATTEMPTS - 1:
                raise
            time.sleep(0.02 * 2**attempt)
        else:
            return


def _parse(id: str, content: str) -> Change:
    facts = json.loads(content)
    return Change(
        id=id,
        time=facts["time"],
        action=facts["action"],
        stage=facts["stage"],
        version=facts["version"],
        previous=None,
        verdict=facts.get("verdict"),
        reason=facts.get("reason", ""),
        by=facts.get("by", ""),
        outcome="begun",
    )


def _walk(changes: Iterable[Change]) -> Record:
    """Changes with what held each stage before them, and where that ends."""
    holders: dict[str, str] = {}
    once_held: set[str] = set()
    walked: list[Change] = []
    for change in changes:
        if change.outcome != "done":
            walked.append(change)
            continue
        if change.action == "found" and holders.get(change.stage) == change.version:
            continue  # two commands found the same, or its own command marked it after all
        walked = [_overtaken(each, change) for each in walked]
        walked.append(replace(change, previous=holders.get(change.stage)))
        for stage in [each for each, holder in holders.items() if holder == change.version]:
            # Production takes a version out of staging, an archive out of everything.
            if change.stage != "staging":
                del holders[stage]
        if change.version is None:
            holders.pop(change.stage, None)
            continue
        once_held.add(change.version)
        if change.stage == "staging" and holders.get("production") == change.version:
            holders.pop("staging", None)  # it took the stage, and is in production all the same
        elif change.stage != "archived":
            holders[change.stage] = change.version
    return Record(tuple(walked), holders, frozenset(once_held))


def _overtaken(change: Change, later: Change) -> Change:
    if change.outcome == "begun" and change.stage == later.stage != "archived":
        return replace(change, outcome="abandoned")
    return change


def _user() -> str:
    if "MLFLOW_TRACKING_USERNAME" in os.environ:
        return os.environ["MLFLOW_TRACKING_USERNAME"]
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # containers whose user has no name
        return ""

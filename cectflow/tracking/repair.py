"""What the aliases and the record ask of everything else, and the writes that bring it about.

The alias is the truth: a repair never gives a version a stage. It marks in the record what the
aliases show, tags versions accordingly, mirrors MLflow's own stages, and completes what an archive
had begun. Each write may be repeated, and :func:`settle` reads again after it writes, so any number
of commands may repair at once: the last one that writes leaves everything in agreement.
"""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import mlflow
from mlflow.entities.model_registry import RegisteredModel
from mlflow.exceptions import MlflowException

from cectflow.tracking.record import Change, Record, begin, close, read_record, write
from cectflow.tracking.store import explain
from cectflow.tracking.versions import STAGES, RegisteredVersion, find_model, versions_of

__all__ = ["State", "Write", "find_writes", "observe", "read_state", "settle", "take_away"]

PASSES = 100
PATIENCE = (0.1, 0.2, 0.4, 0.8, 1.6, 1.6, 1.6, 1.6)
"""Seconds between readings while others are at work; up to twice as long, each one differently."""
WRITES = 6
"""After so many a state is read again: someone else may have written the rest."""
MIRROR = "transition_model_version_stage"

# Once and for the process: what `catch_warnings` sets, another thread may take away meanwhile.
warnings.filterwarnings("ignore", f".*{MIRROR}", FutureWarning)


class MirrorError(Exception):
    """MLflow's own stages did not follow."""


@dataclass(frozen=True)
class State:
    """A registered model as it was read.

    Attributes
    ----------
    model
        As MLflow has it.
    aliases
        Stage → version that its alias names.
    record
        Of the changes.
    stamp
        For what this reading shows: later than the record, and taken before the reading began.
    """

    model: RegisteredModel
    aliases: Mapping[str, str]
    record: Record
    stamp: int
    _versions: dict[str, RegisteredVersion] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """Registered name."""
        return str(self.model.name)

    @property
    def versions(self) -> dict[str, RegisteredVersion]:
        """Number → version; read when first asked for, since that is slow where they are many."""
        # Up to Python 3.11 a `cached_property` has one lock for all states: threads would wait for
        # one another's requests.
        if not self._versions:
            self._versions.update((each.version, each) for each in versions_of(self.model))
        return self._versions


@dataclass(frozen=True)
class Write:
    """One thing that is out of agreement, and what mends it."""

    kind: str
    """``record``, ``archive``, ``alias``, ``tag`` or ``mirror``."""
    why: str
    action: str
    """Method of MLflow's client; ``close`` or ``begin`` for the record."""
    arguments: tuple[str | None, ...]


def read_state(name: str) -> State:
    """State of a registered model now.

    Raises
    ------
    ValueError
        If the name is not registered; the message lists those that are.
    """
    now = time.time_ns() // 1000
    model = find_model(name)
    record = read_record(model.tags)
    aliases = {stage: str(model.aliases[stage]) for stage in STAGES if stage in model.aliases}
    return State(model, aliases, record, record.next_stamp(now))


def find_writes(state: State) -> tuple[Write, ...]:
    """Writes that a state asks for: of the record first, for the rest follows from it."""
    return (
        _archives(state) or _sightings(state) or _aliases(state) or (*_tags(state), *_mirror(state))
    )


def observe(name: str) -> State:
    """State of a registered model after the record was told what the aliases show.

    Raises
    ------
    ValueError
        If the name is not registered.
    TimeoutError
        If others change the model all the time.
    """
    before: tuple[Write, ...] = ()
    others = _Others()
    for _ in range(PASSES):
        state = read_state(name)
        found = _archives(state) or _sightings(state) or _aliases(state)
        if not found:
            return state
        if not others.awaited(state):
            _carry_out(state, _believed(found, before))
        before = found
    raise TimeoutError(_restless(name))


def settle(name: str) -> State:
    """State of a registered model after everything in it was brought into agreement.

    While other changes are at work it waits for them, so that the last one does this work for all.

    Raises
    ------
    ValueError
        If the name is not registered.
    TimeoutError
        If others change the model all the time.

    Warns
    -----
    UserWarning
        If MLflow's own stages could not follow.
    """
    mirrored = True
    before: tuple[Write, ...] = ()
    others = _Others()
    for _ in range(PASSES):
        state = read_state(name)
        found = tuple(each for each in find_writes(state) if mirrored or each.kind != "mirror")
        if not found:
            return state
        if others.awaited(state):
            continue
        chosen = _believed(found, before)
        # Whoever waited with us is at it too: each begins elsewhere, where order means nothing.
        if others.waited and chosen and all(each.kind in {"tag", "mirror"} for each in chosen):
            start = secrets.randbelow(len(chosen))
            chosen = chosen[start:] + chosen[:start]
        try:
            _carry_out(state, chosen[:WRITES])
        except MirrorError as error:
            mirrored = False
            msg = f"MLflow's own stages of {name} did not follow ({error}): use " + " or ".join(
                f"models:/{name}@{stage}" for stage in state.aliases
            )
            warnings.warn(msg, stacklevel=3)
        before = found
    raise TimeoutError(_restless(name))


class _Others:
    """Patience with other commands: what they have begun they will mostly finish themselves."""

    def __init__(self) -> None:
        self.waited = 0
        self._stamp = -1

    def awaited(self, state: State) -> bool:
        """Whether others were at work, and some time was left to them."""
        at_work = any(change.outcome == "begun" for change in state.record.changes)
        if not at_work or state.record.stamp == self._stamp or self.waited == len(PATIENCE):
            return False
        time.sleep(PATIENCE[self.waited] * (1 + secrets.randbelow(100) / 100))
        self.waited += 1
        self._stamp = state.record.stamp
        return True


def _restless(name: str) -> str:
    return (
        f"{name} did not come to rest in {PASSES} readings, others change it all the time: look "
        f"at `cectflow models doctor {name}` later"
    )


def take_away(name: str, stage: str, version: str, asked: Callable[[State], bool]) -> None:
    """Delete an alias if it names a version, and undo that if another took it meanwhile.

    A change that gave the version this stage, and was not seen yet, is marked first.

    Parameters
    ----------
    name, stage, version
        Of the alias, and what it is to name no more.
    asked
        Whether a state still asks for it: the version may have been promoted anew.
    """
    before = read_state(name)
    if before.aliases.get(stage) != version or not asked(before):
        return
    if before.record.holders.get(stage) != version:
        before = read_state(name)  # its stamp lies between two readings of the alias
        if before.aliases.get(stage) != version or not asked(before):
            return
        given = _unseen(before.record, stage, version)
        if given is not None and before.record.holders.get(stage) != version:
            close(name, given.id, "done", stamp=before.stamp)
    write("delete_registered_model_alias", name, stage)
    after = read_state(name)
    seen = {change.id for change in before.record.changes if change.outcome == "done"}
    taken = [
        change.version
        for change in after.record.changes
        if change.outcome == "done" and change.stage == stage and change.id not in seen
    ]
    if taken and taken[-1] is not None and stage not in after.aliases:
        write("set_registered_model_alias", name, stage, taken[-1])


def _believed(found: tuple[Write, ...], before: tuple[Write, ...]) -> tuple[Write, ...]:
    """Writes of one reading; those of the record only if the reading before had them too.

    A database may show an alias before the entry that was written first. And a reading's stamp,
    which the mark will have, lies between its alias and that of the reading before.
    """
    return tuple(each for each in found if each.kind != "record" or each in before)


def _carry_out(state: State, writes: tuple[Write, ...]) -> None:
    name = state.name
    for each in writes:
        texts = [argument for argument in each.arguments if argument is not None]
        if each.action == "begin":
            stage, version = each.arguments
            assert stage is not None
            id = begin(name, "found", stage, version, stamp=state.stamp, reason=each.why)
            close(name, id, "done", stamp=state.stamp)
        elif each.action == "close":
            close(name, texts[0], "done", stamp=state.stamp)
        elif each.action == "take_away":
            stage, version = texts
            take_away(name, stage, version, partial(_asks, wanted=each))
        elif each.action == MIRROR:
            _transition(name, *texts)
        else:
            write(each.action, name, *texts)


def _asks(state: State, wanted: Write) -> bool:
    return wanted in (*_archives(state), *_sightings(state), *_aliases(state))


def _transition(name: str, number: str, stage: str) -> None:
    try:
        write(MIRROR, name, number, stage)
    except MlflowException as error:
        raise MirrorError(explain(error)) from None


def _archives(state: State) -> tuple[Write, ...]:
    """What is left to do of archives that were begun."""
    writes: list[Write] = []
    for change in state.record.changes:
        number = change.version
        if change.action != "archive" or change.outcome != "begun" or number is None:
            continue
        why = f"the archive of v{number}, begun {change.time}, was not finished"
        for stage, holder in state.aliases.items():
            if holder == number:
                writes.append(Write("archive", why, "take_away", (stage, number)))
        writes.append(Write("archive", why, "close", (change.id,)))
    return tuple(writes)


def _sightings(state: State) -> tuple[Write, ...]:
    """What the aliases show, and the record does not say yet."""
    writes: list[Write] = []
    for stage in STAGES:
        holder, known = state.aliases.get(stage), state.record.holders.get(stage)
        if holder == known:
            continue
        if stage == "staging" and known is None and holder == state.aliases.get("production"):
            continue  # it is about to leave staging
        unseen, overtaken = _unseen(state.record, stage, holder), _misplaced(state, stage)
        if unseen is not None:
            why = f"v{holder} holds {stage}: the {unseen.action} of {unseen.time} was not finished"
            writes.append(Write("record", why, "close", (unseen.id,)))
        elif overtaken is not None:
            why = f"the {overtaken.action} of {overtaken.time} took effect later than is recorded"
            writes.append(Write("record", why, "close", (overtaken.id,)))
        elif stage == "staging" and holder is not None and _has_left(state.record, holder):
            why = f"v{holder} went from staging to production, and is still in staging"
            writes.append(Write("alias", why, "take_away", (stage, holder)))
        else:
            now = "nothing" if holder is None else f"v{holder}"
            then = "nothing" if known is None else f"v{known}"
            why = f"{stage} was moved by other hands, from {then} to {now}"
            writes.append(Write("record", why, "begin", (stage, holder)))
    return tuple(writes)


def _unseen(record: Record, stage: str, holder: str | None) -> Change | None:
    """Latest change that would explain a holder, and was not seen to take effect."""
    fitting = (
        change
        for change in reversed(record.changes)
        if change.stage == stage and change.version == holder and change.outcome != "done"
    )
    return None if holder is None else next(fitting, None)


def _misplaced(state: State, stage: str) -> Change | None:
    """Change that explains a holder, if those that are recorded to follow it may precede it.

    The clocks of two machines may disagree by more than two promotions at once are apart.
    """
    record, holder = state.record, state.aliases.get(stage)
    followers: list[Change] = []
    for change in reversed(record.changes):
        if change.outcome != "done":
            continue
        if holder is None:
            explains = change.action == "archive" and change.version == record.holders.get(stage)
        else:
            explains = change.stage == stage and change.version == holder
        if explains:
            return change if all(record.overlap(change, each) for each in followers) else None
        if change.stage == stage or (change.version == holder and change.stage != "staging"):
            followers.append(change)
    return None


def _has_left(record: Record, version: str) -> bool:
    """Whether a version was promoted from staging, and overtaken before staging was emptied.

    A change that is begun later empties staging first, so after it a version got there by hand.
    """
    done = [change for change in record.changes if change.outcome == "done"]
    own = [i for i, each in enumerate(done)
           if (each.stage, each.version) == ("production", version)]  # fmt: skip
    last = max(own, default=None)
    if last is None or any(each.stage == "staging" for each in done[last:]):
        return False
    following = next((each for each in done[last + 1 :] if each.stage == "production"), None)
    return following is None or record.overlap(done[last], following)


def _aliases(state: State) -> tuple[Write, ...]:
    production = state.aliases.get("production")
    if production is None or state.aliases.get("staging") != production:
        return ()
    why = f"v{production} is in production, and still in staging"
    return (Write("alias", why, "take_away", ("staging", production)),)


def _tags(state: State) -> tuple[Write, ...]:
    """Tags ``archived`` and ``superseded`` that versions lack, or have and should not."""
    writes: list[Write] = []
    for number, version in state.versions.items():
        held = number in state.aliases.values()
        if held and "archived" in version.tags:
            why = f"v{number} holds a stage, and is tagged archived"
            writes.append(Write("tag", why, "delete_model_version_tag", (number, "archived")))
        elif not held and _is_archived(state, number) and version.tags.get("archived") != "true":
            why = f"v{number} lost its stage, and is not tagged archived"
            writes.append(Write("tag", why, "set_model_version_tag", (number, "archived", "true")))
        latest = state.record.latest(number)
        stage = latest.stage if latest is not None and latest.outcome == "superseded" else None
        if version.tags.get("superseded") == stage:
            continue
        why = f"the tag superseded of v{number} does not follow the record"
        if stage is None:
            writes.append(Write("tag", why, "delete_model_version_tag", (number, "superseded")))
        else:
            writes.append(Write("tag", why, "set_model_version_tag", (number, "superseded", stage)))
    return tuple(writes)


def _mirror(state: State) -> tuple[Write, ...]:
    """Transitions of MLflow's own stages, where its client still has them; vacated stages first."""
    if not hasattr(mlflow.MlflowClient, MIRROR):
        return ()
    writes: list[Write] = []
    for number, version in state.versions.items():
        now, wanted = version.mlflow_stage, _wanted_stage(state, number)
        # A version of no stage is left alone, unless it stands in the way of one that has.
        if now == wanted or (wanted == "None" and now == "Archived"):
            continue
        why = f"MLflow has v{number} in {now}, its aliases say {wanted}"
        writes.append(Write("mirror", why, MIRROR, (number, wanted)))
    return tuple(sorted(writes, key=lambda each: (each.arguments[1] or "").lower() in STAGES))


def _wanted_stage(state: State, number: str) -> str:
    for stage in reversed(STAGES):
        if state.aliases.get(stage) == number:
            return stage.capitalize()
    archived = "archived" in state.versions[number].tags or _is_archived(state, number)
    return "Archived" if archived else "None"


def _is_archived(state: State, number: str) -> bool:
    return number in state.record.once_held

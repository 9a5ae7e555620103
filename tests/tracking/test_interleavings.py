"""Commands on one registered model at once: the record is true, whatever their order and end."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from interleaving import NAME, Actor, Killed, Registry, chooser, install, one_by_one

from cectflow.tracking.policy import Finding, Verdict
from cectflow.tracking.promotion import archive, rollback, set_stage
from cectflow.tracking.record import Change
from cectflow.tracking.repair import State, find_writes, read_state, settle
from cectflow.tracking.versions import STAGES, find_version

PASSED = Verdict("student", True, (Finding("speedup at least 3", "speedup", 4.0, 3.0, True),))
HOUR = 3_600_000_000
SEEDS = int(os.environ.get("CECTFLOW_TEST_SEEDS", "40"))
"""Interleavings of each kind; try thousands when record or repair change."""

Command = Callable[[], Change]


def promote(number: int, stage: str = "production") -> Change:
    return set_stage(find_version(f"{NAME}/{number}"), stage, verdict=PASSED)


def withdraw(number: int) -> Change:
    return archive(find_version(f"{NAME}/{number}"), reason="misses apoferritin")


@contextmanager
def registry_of(draw: random.Random) -> Iterator[Registry]:
    """Six versions: 1 was in production, 2 is, 3 is in staging."""
    registry = Registry(6)
    with pytest.MonkeyPatch.context() as patch:
        install(registry, draw, patch)
        for number, stage in ((1, "production"), (2, "production"), (3, "staging")):
            promote(number, stage)
        yield registry


def draw_promotions(draw: random.Random) -> list[Command]:
    return [partial(promote, draw.choice([3, 4, 5, 6])) for _ in range(draw.randint(3, 5))]


def draw_any(draw: random.Random) -> list[Command]:
    commands: list[Command] = []
    for _ in range(draw.randint(3, 5)):
        number = draw.randint(1, 6)
        commands += draw.choices(
            [partial(promote, number), partial(promote, number, "staging"),
             partial(rollback, NAME), partial(rollback, NAME, "staging"),
             partial(withdraw, number)],
            [40, 15, 20, 5, 20],
        )  # fmt: skip
    return commands


def check(registry: Registry, actors: Sequence[Actor]) -> None:
    """What must hold after all have ended and one more command has run."""
    for actor in actors:
        # A rollback may find nothing to go back to, and production refuse to be staged.
        if actor.error is not None and not isinstance(actor.error, Killed | ValueError):
            raise actor.error
    state = settle(NAME)
    assert find_writes(state) == ()
    assert state.aliases == dict(state.record.holders)
    assert len(set(state.aliases.values())) == len(state.aliases)
    assert registry.overwritten == []
    changes = state.record.changes
    skewed = any(actor.skew for actor in actors)
    for stage in STAGES:
        held = last_of_each(change.version for change in done_in(state, stage))
        if skewed:
            assert set(held) <= set(registry.stood[stage])
        else:
            assert is_part(held, registry.stood[stage])
        if stage in state.aliases:
            assert held[-1] == state.aliases[stage]
    # Clocks that disagree cannot tell a version left in staging from one put there again.
    found = {change.stage for change in changes if change.action == "found"}
    assert found <= ({"staging"} if skewed else set())
    if all(actor.dies_before is None for actor in actors):
        assert {change.outcome for change in changes} <= {"done", "superseded"}
        ids = {change.id for change in changes}
        assert {actor.result.id for actor in actors if actor.error is None} <= ids
    check_versions(registry, state)
    check_rollback(registry)


def check_versions(registry: Registry, state: State) -> None:
    for number, tags in registry.versions.items():
        stage = next((each for each in STAGES if state.aliases.get(each) == number), None)
        expected = {"None", "Archived"} if stage is None else {stage.capitalize()}
        assert registry.mlflow_stages[number] in expected
        archived = stage is None and number in state.record.once_held
        assert tags.get("archived") == ("true" if archived else None)
        latest = state.record.latest(number)
        lost = latest is not None and latest.outcome == "superseded"
        assert ("superseded" in tags) == lost


def check_rollback(registry: Registry) -> None:
    before = registry.aliases.get("production")
    try:
        restored = rollback(NAME)
    except ValueError:
        return  # all that stood there were archived
    assert restored.outcome == "done"
    assert restored.version in registry.stood["production"][:-1]
    assert registry.aliases["production"] == restored.version != before
    assert find_writes(read_state(NAME)) == ()


def done_in(state: State, stage: str) -> list[Change]:
    return [each for each in state.record.changes if (each.stage, each.outcome) == (stage, "done")]


def last_of_each(values: Iterable[str | None]) -> list[str | None]:
    """Two commands that gave a stage to the same version cannot tell whose tenure they see."""
    return list(reversed(dict.fromkeys(reversed(list(values)))))


def is_part(some: Sequence[Any], values: Sequence[Any]) -> bool:
    """Whether some values stand among others in that order."""
    left = iter(values)
    return all(value in left for value in some)


def explore(seed: int, draw_commands: Callable[[random.Random], list[Command]], how: str) -> None:
    draw = random.Random(seed)
    with registry_of(draw) as registry:
        actors = [Actor(command) for command in draw_commands(draw)]
        for actor in actors:
            if how == "killed" and draw.random() < 0.5:
                actor.dies_before = draw.randrange(16)
            if how == "clocks":
                actor.skew = draw.choice([0, 0, 5_000, 3 * HOUR, -3 * HOUR])
        registry.run(actors, chooser(draw))
        check(registry, actors)


@pytest.mark.parametrize("how", ["alive", "killed", "clocks"])
@pytest.mark.parametrize("draw_commands", [draw_promotions, draw_any])
def test_whatever_the_order_of_requests_the_record_is_true(
    draw_commands: Callable[[random.Random], list[Command]], how: str
) -> None:
    for seed in range(SEEDS):
        try:
            explore(seed, draw_commands, how)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


def test_three_promotions_that_stop_anywhere_for_each_other() -> None:
    """The first stops after any request, the second after any, and the third goes through."""
    for first in range(0, 32, 3):
        for second in range(0, 32, 3):
            draw = random.Random(0)
            with registry_of(draw) as registry:
                actors = [Actor(partial(promote, number)) for number in (3, 4, 5)]
                registry.run(actors, one_by_one(actors, [first, second]))
                check(registry, actors)


@pytest.mark.parametrize("stage", STAGES)
def test_what_other_hands_did_is_on_record_as_such(stage: str) -> None:
    for seed in range(8):
        draw = random.Random(seed)
        with registry_of(draw) as registry:
            others = Actor(lambda: registry.write_alias(stage, "6"))
            actors = [others, Actor(partial(promote, 4)), Actor(partial(promote, 5))]
            registry.run(actors, chooser(draw))
            state = settle(NAME)
            assert find_writes(state) == ()
            found = [each for each in state.record.changes if each.action == "found"]
            if state.aliases.get(stage) == "6":
                assert [(each.stage, each.version) for each in found][-1] == (stage, "6")
            assert {(each.stage, each.version) for each in found} <= {(stage, "6")}
            assert state.aliases == dict(state.record.holders)

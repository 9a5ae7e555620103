"""Changes of stages at once, in many orders of their single requests, some of them killed."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from mlflow.entities.model_registry import (
    ModelVersion,
    ModelVersionTag,
    RegisteredModel,
    RegisteredModelAlias,
    RegisteredModelTag,
)
from mlflow.store.entities import PagedList

from cectflow.tracking import record, repair
from cectflow.tracking.promotion import archive, rollback, set_stage
from cectflow.tracking.repair import find_writes, read_state, settle
from cectflow.tracking.versions import RegisteredVersion, find_version

NAME = "cectflow-student"
NUMBERS = ("1", "2", "3", "4")
ORDERS = 60
"""Of each combination of changes."""


class Killed(BaseException):
    """As if the process were gone."""


@dataclass
class Turns:
    """Threads of which one is at work at a time, from one request to the registry to the next."""

    choose: random.Random
    killed: dict[int, int] = field(default_factory=dict)
    """Thread → its request before which it is killed."""
    waiting: dict[int, threading.Event] = field(default_factory=dict)
    requests: dict[int, int] = field(default_factory=dict)
    paused: threading.Event = field(default_factory=threading.Event)
    local: threading.local = field(default_factory=threading.local)

    def request(self) -> None:
        """Wait for one's turn; threads that were not started here never do."""
        me = getattr(self.local, "number", None)
        if me is None:
            return
        if self.requests[me] == self.killed.get(me):
            raise Killed
        self.requests[me] += 1
        mine = self.waiting[me] = threading.Event()
        self.paused.set()
        assert mine.wait(60)

    def run(self, changes: list[Callable[[], object]]) -> dict[int, BaseException]:
        """Run all of them to their ends; what they raised."""
        raised: dict[int, BaseException] = {}

        def begin(number: int) -> None:
            self.local.number = number
            try:
                self.request()
                changes[number]()
            except BaseException as error:
                raised[number] = error
            self.paused.set()

        threads = []
        for number in range(len(changes)):
            self.requests[number] = 0
            self.paused.clear()
            threads.append(threading.Thread(target=begin, args=(number,), daemon=True))
            threads[-1].start()
            assert self.paused.wait(60)
        while self.waiting:
            number = self.choose.choice(sorted(self.waiting))
            self.paused.clear()
            self.waiting.pop(number).set()
            assert self.paused.wait(60)
        for thread in threads:
            thread.join(60)
        return raised


@dataclass
class Registry:
    """What MLflow keeps of one registered model; every call is a request, atomic as in a database.

    A transition takes other versions out of the stage, as MLflow's does on request only: ours asks
    for each by itself.
    """

    turns: Turns
    tags: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(
        default_factory=lambda: {number: {} for number in NUMBERS}
    )
    stages: dict[str, str] = field(default_factory=lambda: dict.fromkeys(NUMBERS, "None"))

    def get_registered_model(self, name: str) -> RegisteredModel:
        self.turns.request()
        assert name == NAME
        return RegisteredModel(
            name,
            tags=[RegisteredModelTag(key, value) for key, value in self.tags.items()],
            aliases=[RegisteredModelAlias(key, value) for key, value in self.aliases.items()],
        )

    def search_model_versions(self, *_: Any, **__: Any) -> PagedList[ModelVersion]:
        self.turns.request()
        return PagedList([self._version(number) for number in NUMBERS], None)

    def get_model_version(self, name: str, version: str) -> ModelVersion:
        self.turns.request()
        return self._version(version)

    def _version(self, number: str) -> ModelVersion:
        return ModelVersion(
            NAME, number, creation_timestamp=int(number), current_stage=self.stages[number],
            tags=[ModelVersionTag(key, value) for key, value in self.versions[number].items()],
        )  # fmt: skip

    def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
        self.turns.request()
        assert self.tags.get(key, value) == value or key.count(".") == 3, "the record was changed"
        self.tags[key] = value

    def set_registered_model_alias(self, name: str, alias: str, version: str) -> None:
        self.turns.request()
        self.aliases[alias] = version

    def delete_registered_model_alias(self, name: str, alias: str) -> None:
        self.turns.request()
        self.aliases.pop(alias, None)

    def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        self.turns.request()
        self.versions[version][key] = value

    def delete_model_version_tag(self, name: str, version: str, key: str) -> None:
        self.turns.request()
        self.versions[version].pop(key, None)

    def transition_model_version_stage(self, name: str, version: str, stage: str) -> None:
        self.turns.request()
        self.stages[version] = stage


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Registry]:
    """Registry for a seed of the order, in which v1 and then v2 were promoted before."""
    current: list[Registry] = []
    clock = iter(range(10**15, 10**16))

    def client() -> Registry:
        return current[-1]

    # Only changes of the model's own stages are stepped: no method is left out of the fake.
    client.transition_model_version_stage = None  # type: ignore[attr-defined]
    monkeypatch.setattr(mlflow, "MlflowClient", client)
    sleepless = SimpleNamespace(
        sleep=lambda _: current[-1].turns.request(), time_ns=lambda: 1000 * next(clock)
    )
    # Python 3.11's cached_property holds one lock for all instances while it computes.
    cached = vars(repair.State)["versions"]
    if hasattr(cached, "lock"):
        monkeypatch.setattr(cached, "lock", nullcontext())
    for module in (record, repair):
        monkeypatch.setattr(module, "time", sleepless)

    def start(seed: int) -> Registry:
        current.append(Registry(Turns(random.Random(seed))))
        for number in ("1", "2"):
            set_stage(version(number), "production", verdict=None)
        return current[-1]

    return start


def version(number: str) -> RegisteredVersion:
    return find_version(f"{NAME}/{number}")


CHANGES: dict[str, list[Callable[[], object]]] = {
    "three promotions": [
        *(lambda n=n: set_stage(version(n), "production", verdict=None) for n in ("1", "3", "4")),
    ],
    "four to both stages": [
        lambda: set_stage(version("3"), "staging", verdict=None),
        lambda: set_stage(version("4"), "staging", verdict=None),
        lambda: set_stage(version("3"), "production", verdict=None),
        lambda: set_stage(version("1"), "production", verdict=None),
    ],
    "a rollback, a promotion and an archive": [
        lambda: rollback(NAME),
        lambda: set_stage(version("3"), "production", verdict=None),
        lambda: archive(version("2"), reason="withdrawn"),
    ],
    "archives of what is promoted": [
        lambda: set_stage(version("3"), "production", verdict=None),
        lambda: archive(version("3"), reason="withdrawn"),
        lambda: set_stage(version("4"), "production", verdict=None),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kills", [0, 1, 2])
@pytest.mark.parametrize("what", CHANGES)
def test_in_whatever_order_requests_come_the_record_is_true(
    registry: Callable[[int], Registry], what: str, kills: int
) -> None:
    changes = CHANGES[what]
    found = 0
    for seed in range(ORDERS):
        store = registry(seed)
        choose = random.Random(1000 + seed)
        mortal = choose.sample(range(len(changes)), kills)
        store.turns.killed = {number: choose.randrange(12) for number in mortal}
        written = dict(store.tags)
        raised = store.turns.run(changes)
        foreseen = [each for each in raised.values() if isinstance(each, Killed | ValueError)]
        assert len(foreseen) == len(raised), f"{what}, seed {seed}: {raised}"
        state = settle(NAME)
        told = f"{what}, seed {seed}, {kills} killed: {state.record.changes}"
        assert find_writes(read_state(NAME)) == (), told
        check(store, told, broken_off=bool(kills))
        found += sum(each.action == "found" for each in state.record.changes)
        assert written.items() <= store.tags.items(), f"the record was changed: {told}"
    # An alias has no compare-and-swap: where one change deletes it and another sets it, or is
    # killed between two requests, the record may only tell what was found. That is rare.
    most = 0 if (what, kills) == ("three promotions", 0) else ORDERS // (6 if kills else 20)
    assert found <= most, f"{found} of {ORDERS} records hold what no change explains"


def check(store: Registry, told: str, *, broken_off: bool) -> None:
    """The alias, the record, tags and MLflow's own stages say the same."""
    found = read_state(NAME).record
    production = store.aliases.get("production")
    assert found.holders.get("production") == production, told
    assert found.holders.get("staging") == store.aliases.get("staging"), told
    assert production is None or store.aliases.get("staging") != production, told
    for number in NUMBERS:
        held = number in store.aliases.values()
        archived = not held and number in found.once_held
        assert (store.versions[number].get("archived") == "true") == archived, told
        stage = next((s for s, holder in store.aliases.items() if holder == number), None)
        mirrored = store.stages[number] in (stage.capitalize(),) if stage else True
        assert mirrored, told
        assert stage or store.stages[number] in ("None", "Archived"), told
    done = [
        each for each in found.changes
        if each.outcome == "done" and each.stage in ("production", "archived")
    ]  # fmt: skip
    if production is not None:
        last = [each for each in done if each.stage == "production"][-1]
        assert last.version == production, told
    if not broken_off:
        assert {each.outcome for each in found.changes} <= {"done", "superseded"}, told

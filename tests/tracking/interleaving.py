"""Commands on one registered model, interleaved request by request as a seed says.

A registry in memory stands in for MLflow's client. Before each request the command at work waits
for its turn, so a seed decides the whole interleaving, and what is found once is found again.
Reading a registered model takes two turns, since databases read its tags and then its aliases.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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

NAME = "cectflow-student"


class Killed(BaseException):
    """What ends a command before one of its writes; nothing may catch it."""


@dataclass
class Actor:
    """One command: what it does, whether it is killed before a write, how its clock goes."""

    do: Callable[[], Any]
    dies_before: int | None = None
    skew: int = 0
    """Microseconds that its clock is ahead."""
    writes: int = 0
    result: Any = None
    error: BaseException | None = None
    ended: bool = False
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


class Registry:
    """What a server holds of one registered model, and all that was ever done to it."""

    def __init__(self, versions: int) -> None:
        self.tags: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        self.versions: dict[str, dict[str, str]] = {str(n + 1): {} for n in range(versions)}
        self.mlflow_stages = dict.fromkeys(self.versions, "None")
        self.stood: dict[str, list[str | None]] = {"staging": [None], "production": [None]}
        """Stage → values of its alias, one after the other."""
        self.overwritten: list[str] = []
        """Tags of the model that were given another value, or deleted."""
        self.clock = 10**15
        self.log: list[str] = []
        self._local = threading.local()
        self._main = threading.Semaphore(0)

    def run(self, actors: Sequence[Actor], choose: Callable[[list[Actor]], Actor]) -> None:
        """Let commands work at once until all have ended; ``choose`` says whose turn it is."""
        threads = [threading.Thread(target=self._work, args=(actor,)) for actor in actors]
        for thread in threads:
            thread.start()
        while at_work := [actor for actor in actors if not actor.ended]:
            choose(at_work).turn.release()
            self._main.acquire()
        for thread in threads:
            thread.join()

    def _work(self, actor: Actor) -> None:
        self._local.actor = actor
        actor.turn.acquire()
        try:
            actor.result = actor.do()
        except BaseException as error:
            actor.error = error
        actor.ended = True
        self._main.release()

    def step(self) -> None:
        """Wait for the turn of the command that asks."""
        actor: Actor | None = getattr(self._local, "actor", None)
        self.clock += 1000
        if actor is not None:
            self._main.release()
            actor.turn.acquire()

    def now(self) -> int:
        """Nanoseconds on the clock of the command that asks."""
        actor: Actor | None = getattr(self._local, "actor", None)
        self.clock += 1
        return 1000 * (self.clock + (actor.skew if actor is not None else 0))

    def write(self, text: str) -> None:
        """Wait for the turn, and die if this is the write to die before."""
        actor: Actor | None = getattr(self._local, "actor", None)
        if actor is not None and actor.writes == actor.dies_before:
            raise Killed
        self.step()
        if actor is not None:
            actor.writes += 1
        self.log.append(f"{'-' if actor is None else id(actor) % 9973} {text}")

    def write_alias(self, stage: str, number: str) -> None:
        """Move an alias by other hands than cectflow's."""
        self.write(f"alias {stage} {number}, by hand")
        self.set_alias(stage, number)

    def set_alias(self, stage: str, number: str | None) -> None:
        if number is None:
            self.aliases.pop(stage, None)
        else:
            self.aliases[stage] = number
        if self.stood[stage][-1] != number:
            self.stood[stage].append(number)


def client_of(registry: Registry) -> type:
    """MLflow's client, as far as the registry's modules use it."""

    class Client:
        def get_registered_model(self, name: str) -> RegisteredModel:
            registry.step()
            tags = [RegisteredModelTag(*each) for each in registry.tags.items()]
            registry.step()
            aliases = [RegisteredModelAlias(*each) for each in registry.aliases.items()]
            return RegisteredModel(name, tags=tags, aliases=aliases)

        def search_model_versions(self, *_: object, **__: object) -> Any:
            registry.step()

            class Page(list):  # type: ignore[type-arg]
                token = None

            return Page(self._row(number) for number in registry.versions)

        def get_model_version(self, _: str, number: str) -> ModelVersion:
            registry.step()
            return self._row(number)

        def _row(self, number: str) -> ModelVersion:
            return ModelVersion(
                NAME, number, 0, current_stage=registry.mlflow_stages[number],
                tags=[ModelVersionTag(*each) for each in registry.versions[number].items()],
                aliases=[a for a, n in registry.aliases.items() if n == number],
            )  # fmt: skip

        def set_registered_model_tag(self, _: str, key: str, value: str) -> None:
            registry.write(f"tag {key} {value}")
            if registry.tags.get(key, value) != value:
                registry.overwritten.append(key)
            registry.tags[key] = value

        def set_registered_model_alias(self, _: str, alias: str, number: str) -> None:
            registry.write(f"alias {alias} {number}")
            registry.set_alias(alias, number)

        def delete_registered_model_alias(self, _: str, alias: str) -> None:
            registry.write(f"delete alias {alias}")
            registry.set_alias(alias, None)

        def set_model_version_tag(self, _: str, number: str, key: str, value: str) -> None:
            registry.write(f"v{number} tag {key} {value}")
            registry.versions[number][key] = value

        def delete_model_version_tag(self, _: str, number: str, key: str) -> None:
            registry.write(f"v{number} delete tag {key}")
            registry.versions[number].pop(key, None)

        def transition_model_version_stage(self, _: str, number: str, stage: str) -> None:
            registry.write(f"v{number} stage {stage}")
            registry.mlflow_stages[number] = stage

    return Client


def install(registry: Registry, random: random.Random, patch: pytest.MonkeyPatch) -> None:
    """Put a registry in the place of MLflow's client, and its clock in that of the system's."""
    patch.setattr(mlflow, "MlflowClient", client_of(registry))
    patch.setattr(time, "time_ns", registry.now)
    patch.setattr(time, "sleep", lambda _: registry.step())
    patch.setattr("secrets.randbelow", random.randrange)
    patch.setattr("secrets.token_hex", lambda n: f"{random.randrange(256**n):0{2 * n}x}")


def chooser(random: random.Random) -> Callable[[list[Actor]], Actor]:
    """Whose turn it is: by lot at each request, or one command for a while, then another."""
    stay = random.choice([0.0, 0.5, 0.8, 0.95])
    last: list[Actor] = []

    def choose(at_work: list[Actor]) -> Actor:
        if not (last and last[0] in at_work and random.random() < stay):
            last[:] = [random.choice(at_work)]
        return last[0]

    return choose


def one_by_one(actors: Sequence[Actor], lengths: Sequence[int]) -> Callable[[list[Actor]], Actor]:
    """Each for so many requests, the last to its end, then the others in the reverse order."""
    left = list(lengths)

    def choose(at_work: list[Actor]) -> Actor:
        for actor, number in zip(actors, range(len(left)), strict=False):
            if left[number] > 0 and actor in at_work:
                left[number] -= 1
                return actor
        return at_work[-1]

    return choose

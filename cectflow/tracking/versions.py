"""Registered versions: what the registry calls them, which there are, and which one is meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import mlflow
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from cectflow.model_card import Role, Task
from cectflow.tracking.store import current_store

__all__ = [
    "PREFIX",
    "ROLE_NAMES",
    "STAGES",
    "RegisteredVersion",
    "check_name",
    "find_version",
    "list_versions",
    "newest_version",
    "registered_name",
    "role_name",
    "stage_holder",
]

PREFIX = "cectflow"
ROLE_NAMES = {
    "segmenter/target": "segmenter",
    "segmenter/semantic": "tomogram-segmenter",
    "teacher/classify": "teacher",
    "student/classify": "student",
    "student/target": "student-segmenter",
    "student/semantic": "student-tomogram-segmenter",
}
"""What a role is called with its task: in commands, policies, folders and registered names."""

STAGES = ("staging", "production")
"""Stages that are aliases; ``archived`` is a tag."""

FORMS = "NAME, NAME@stage, NAME/VERSION or a models:/ URI of these"
NAME_FORM = r"\w[\w.-]{0,127}"
"""Of a registered name: no path leads out of its folder, no command takes it for an option."""
_ARGUMENT = re.compile(
    rf"(?:models:/)?(?P<name>{NAME_FORM})"
    r"(?:@(?P<alias>[\w.-]+)|/(?P<version>\d{1,9})|/(?P<stage>[A-Za-z]+))?",
    re.ASCII,
)
PAGE = 1000
"""Registered models, or versions, of one request."""


@dataclass(frozen=True)
class RegisteredVersion:
    """One version of a registered model, as it was when it was looked up."""

    name: str
    version: str
    run_id: str
    """Of the run that made it; empty where the registry does not say."""
    model_uri: str
    """Of the files: ``models:/m-...`` for versions that cectflow registered."""
    stages: tuple[str, ...]
    """``staging``, ``production`` and other aliases it holds, and ``archived``."""
    tags: dict[str, str] = field(default_factory=dict)
    created: str = ""
    """ISO 8601, UTC."""

    @property
    def uri(self) -> str:
        """``models:/NAME/VERSION``, which means this version for ever."""
        return f"models:/{self.name}/{self.version}"

    @property
    def label(self) -> str:
        """``NAME v3``, for people."""
        return f"{self.name} v{self.version}"


def role_name(role: Role, task: Task) -> str:
    """What a role is called with its task, such as ``tomogram-segmenter``.

    Raises
    ------
    ValueError
        If the role has no such task.
    """
    name = ROLE_NAMES.get(f"{role}/{task}")
    if name is None:
        msg = f"no registered name for a {role} of task {task!r}: expected {', '.join(ROLE_NAMES)}"
        raise ValueError(msg)
    return name


def registered_name(role: Role, task: Task, prefix: str = PREFIX) -> str:
    """Name under which the networks of a role are registered: ``cectflow-`` and its name.

    Raises
    ------
    ValueError
        If the role has no such task, or the prefix holds other characters than letters, digits,
        ``-``, ``_`` and ``.``.
    """
    return check_name(f"{prefix}-{role_name(role, task)}")


def check_name(name: str) -> str:
    """Name itself, when the registry and a ``models:/`` URI can both carry it.

    Raises
    ------
    ValueError
        If it is empty, longer than 128 characters, begins with ``-`` or ``.``, or holds other
        characters than letters, digits, ``-``, ``_`` and ``.``.
    """
    if not re.fullmatch(NAME_FORM, name, re.ASCII):
        msg = (
            f"registered name {name[:200]!r} may hold letters, digits, '-', '_' and '.' only, at "
            f"most 128 of them, and begins with none of the signs"
        )
        raise ValueError(msg)
    return name


def find_version(argument: str) -> RegisteredVersion:
    """Version that an argument means; a bare name means its version in production.

    Parameters
    ----------
    argument
        ``NAME``, ``NAME@stage``, ``NAME/VERSION``, or a ``models:/`` URI of these, also in
        MLflow's own spelling ``models:/NAME/Production``.

    Raises
    ------
    ValueError
        If the argument has another form, or the registry has no such name, stage or version; the
        message lists what it has.
    """
    match = _ARGUMENT.fullmatch(argument)
    if match is None:
        msg = f"{argument!r} names no registered version: expected {FORMS}"
        raise ValueError(msg)
    name, number = match["name"], match["version"]
    stage = match["alias"] or (match["stage"] or "production").lower()
    if number is None and stage == "archived":
        archived = [v for v in list_versions(name) if stage in v.stages]
        found = archived[-1] if archived else None
    else:
        found = _look_up(name, number, stage)
    if found is None:
        wanted = f"version in stage {stage!r}" if number is None else f"version {number}"
        msg = f"{name} has no {wanted}: expected {_choices(list_versions(name))}"
        raise ValueError(msg)
    return found


def list_versions(name: str | None = None) -> tuple[RegisteredVersion, ...]:
    """Versions of one registered model, or of all, by name and rising number.

    Names with their aliases and versions with their tags take a request each per thousand, however
    many models there are.

    Raises
    ------
    ValueError
        If the name is not registered; the message lists those that are.
    """
    wanted = "" if name is None else f"name = '{check_name(name)}'"
    models = {model.name: model for model in _all_models(wanted)}
    if name is not None and name not in models:
        known = ", ".join(sorted(model.name for model in _all_models())) or "none yet"
        msg = f"no registered model {name!r} in {current_store()}; registered: {known}"
        raise ValueError(msg)
    versions = [
        _describe(row, models[row.name].aliases) for row in _all_rows(wanted) if row.name in models
    ]
    return tuple(sorted(versions, key=lambda version: (version.name, int(version.version))))


def newest_version(name: str) -> RegisteredVersion:
    """Version of a registered model with the highest number.

    Raises
    ------
    ValueError
        If the name is not registered or has no version.
    """
    versions = list_versions(name)
    if not versions:
        msg = f"{name} has no version"
        raise ValueError(msg)
    return versions[-1]


def stage_holder(name: str, stage: str) -> RegisteredVersion | None:
    """Version of a registered model that holds a stage now, or None."""
    return _look_up(check_name(name), None, stage)


def _look_up(name: str, number: str | None, alias: str) -> RegisteredVersion | None:
    """Version of a number, or of an alias, without a list of all the others; None: not there."""
    client = mlflow.MlflowClient()
    try:
        if number is None:
            row = client.get_model_version_by_alias(name, alias)
        else:
            row = client.get_model_version(name, str(int(number)))
    except MlflowException as error:
        # Of an unknown alias the database says INVALID_PARAMETER_VALUE.
        if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise
        return None
    if number is None and alias not in row.aliases:  # `latest`, which MLflow makes up
        return None
    return _describe(row, dict.fromkeys(row.aliases, row.version))


def _all_models(wanted: str = "") -> Iterator[RegisteredModel]:
    client = mlflow.MlflowClient()
    token = None
    while True:
        page = client.search_registered_models(wanted, max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _all_rows(wanted: str) -> Iterator[ModelVersion]:
    client = mlflow.MlflowClient()
    token = None
    while True:
        page = client.search_model_versions(wanted, max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _describe(row: ModelVersion, aliases: Mapping[str, str | int]) -> RegisteredVersion:
    # The SQL store counts versions in int, the REST one in str.
    number, tags = str(int(row.version)), dict(row.tags)
    held = [alias for alias, holder in aliases.items() if str(holder) == number]
    stages = [stage for stage in STAGES if stage in held]
    stages += sorted(set(held) - set(stages))
    if tags.get("archived") == "true":
        stages.append("archived")
    created = datetime.fromtimestamp(row.creation_timestamp / 1000, tz=UTC)
    return RegisteredVersion(
        name=row.name,
        version=number,
        run_id=row.run_id or "",
        model_uri=row.source or "",
        stages=tuple(stages),
        tags=tags,
        created=created.isoformat(timespec="seconds"),
    )


def _choices(versions: tuple[RegisteredVersion, ...]) -> str:
    held = [f"{v.name}@{stage}" for v in versions for stage in v.stages if stage != "archived"]
    numbers = [f"{version.name}/{version.version}" for version in versions]
    return ", ".join(held + numbers) or "none, it has no version"

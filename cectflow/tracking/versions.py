"""Registered versions: what the registry calls them, which there are, and which one is meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
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
    "find_model",
    "find_version",
    "list_versions",
    "newest_version",
    "registered_name",
    "role_name",
    "stage_holder",
    "versions_of",
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
    mlflow_stage: str = "None"
    """Of MLflow's own stages, which mirror ours; ``None`` also where MLflow has none any more."""

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
    row = _find_row(name, None if number is None else str(int(number)), stage)
    if row is not None:
        return _describe(row, row.aliases)
    # There is none: a listing, which is slow where versions are many, tells what there is.
    versions = list_versions(name)
    if number is not None:
        wanted, found = f"version {number}", [v for v in versions if v.version == str(int(number))]
    else:
        wanted, found = f"version in stage {stage!r}", [v for v in versions if stage in v.stages]
        if stage == "archived":
            found = found[-1:]
    if len(found) != 1:
        msg = f"{name} has no {wanted}: expected {_choices(versions)}"
        raise ValueError(msg)
    return found[0]


def list_versions(name: str | None = None) -> tuple[RegisteredVersion, ...]:
    """Versions of one registered model, or of all, by name and rising number.

    Names with their aliases and versions with their tags take a request each per thousand, however
    many models there are.

    Raises
    ------
    ValueError
        If the name is not registered; the message lists those that are.
    """
    if name is not None:
        return versions_of(find_model(name))
    models = {model.name: model for model in _all_models()}
    rows = [row for row in _all_rows() if row.name in models]
    versions = [_describe(row, _held(models[row.name], row)) for row in rows]
    return tuple(sorted(versions, key=lambda version: (version.name, int(version.version))))


def find_model(name: str) -> RegisteredModel:
    """Registered model as MLflow has it: its aliases and tags, read at once.

    Raises
    ------
    ValueError
        If the name is not registered; the message lists those that are.
    """
    try:
        return mlflow.MlflowClient().get_registered_model(check_name(name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    known = ", ".join(sorted(model.name for model in _all_models())) or "none yet"
    msg = f"no registered model {name!r} in {current_store()}; registered: {known}"
    raise ValueError(msg)


def versions_of(model: RegisteredModel) -> tuple[RegisteredVersion, ...]:
    """Versions of a registered model by rising number, with the aliases that were read with it."""
    versions = [_describe(row, _held(model, row)) for row in _all_rows(f"name = '{model.name}'")]
    return tuple(sorted(versions, key=lambda version: int(version.version)))


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
    """Version of a registered model that holds a stage now, or None.

    Raises
    ------
    ValueError
        If the name is not registered; the message lists those that are.
    """
    number = find_model(name).aliases.get(stage)
    return None if number is None else find_version(f"{name}/{number}")


def _find_row(name: str, number: str | None, stage: str) -> ModelVersion | None:
    client = mlflow.MlflowClient()
    try:
        if number is not None:
            return client.get_model_version(name, number)
        row = client.get_model_version_by_alias(name, stage)
        return row if stage in row.aliases else None  # MLflow takes `latest` for an alias
    except MlflowException as error:
        if error.error_code not in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise
    return None


def _all_models() -> Iterator[RegisteredModel]:
    client = mlflow.MlflowClient()
    token = None
    while True:
        page = client.search_registered_models(max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _all_rows(wanted: str = "") -> Iterator[ModelVersion]:
    client = mlflow.MlflowClient()
    token = None
    while True:
        page = client.search_model_versions(wanted, max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _held(model: RegisteredModel, row: ModelVersion) -> list[str]:
    """Aliases of a version: a search leaves them out of its rows."""
    return [alias for alias, number in model.aliases.items() if str(number) == str(row.version)]


def _describe(row: ModelVersion, held: Sequence[str]) -> RegisteredVersion:
    # The SQL store counts versions in int, the REST one in str.
    number, tags = str(row.version), dict(row.tags)
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
        mlflow_stage=getattr(row, "current_stage", None) or "None",
    )


def _choices(versions: tuple[RegisteredVersion, ...]) -> str:
    held = [f"{v.name}@{stage}" for v in versions for stage in v.stages if stage != "archived"]
    numbers = [f"{version.name}/{version.version}" for version in versions]
    return ", ".join(held + numbers) or "none, it has no version"

"""What is wrong in a registry, found by looking at everything in it; mended where that is safe."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import mlflow
from mlflow.entities import Run, RunStatus

from cectflow.tracking.record import close
from cectflow.tracking.registry import resolve_model
from cectflow.tracking.repair import State, find_writes, read_state, settle
from cectflow.tracking.versions import STAGES, RegisteredVersion, list_versions

__all__ = ["Fault", "examine_registry"]

PAGE = 500  # runs per request

KINDS = {
    "record": "half-promotion",
    "archive": "half-promotion",
    "alias": "half-promotion",
    "tag": "half-promotion",
    "mirror": "mirror",
}
"""What a write of :mod:`.repair` is called here."""


class Fault(NamedTuple):
    """One thing that is wrong."""

    kind: str
    """``half-promotion``, ``mirror``, ``verdict``, ``missing``, ``digest`` or ``run``."""
    subject: str
    """Model, version or run."""
    found: str
    remedy: str
    """What to do about it."""
    mended: bool = False


def examine_registry(
    name: str | None = None, *, fix: bool = False, every: bool = False, hours: float = 24.0
) -> tuple[Fault, ...]:
    """Faults of one registered model, or of all and of the runs.

    Found are changes of stages that broke off, MLflow's own stages that disagree with the
    aliases, versions in a stage whose policy was never asked or refused them, files that are gone
    or are not those that were registered, and runs that have been RUNNING for long.

    Parameters
    ----------
    name
        Registered name; by default all, and the runs of all experiments.
    fix
        Mend what can be mended: changes of stages are finished or given up, and runs ended as
        KILLED. What was lost stays lost.
    every
        Verify the files of every version, which fetches them all; by default of those in a stage.
    hours
        After which a RUNNING run counts as stuck.

    Raises
    ------
    ValueError
        If the name is not registered.
    """
    names = sorted({version.name for version in list_versions(name)})
    faults: list[Fault] = []
    for each in names:
        faults += _examine_stages(each, fix=fix)
        state = read_state(each)
        faults += _examine_verdicts(state)
        faults += _examine_files(state, every=every)
    if name is None:
        faults += _examine_runs(hours, fix=fix)
    return tuple(faults)


def _examine_stages(name: str, *, fix: bool) -> Iterator[Fault]:
    state = read_state(name)
    asked = find_writes(state)
    if fix:
        state = settle(name)
    left = find_writes(state)
    for write in asked:
        remedy = f"cectflow models doctor {name} --fix"
        yield Fault(KINDS[write.kind], name, write.why, remedy, write not in left)
    for change in state.record.changes:
        if change.outcome != "begun" or change.action == "archive":
            continue
        found = (
            f"the {change.action} of v{change.version} to {change.stage}, begun {change.time}, "
            f"is not finished"
        )
        remedy = "wait if it is at work; else cectflow models doctor --fix, and promote again"
        if fix:
            close(name, change.id, "abandoned", stamp=state.stamp)
        yield Fault("half-promotion", name, found, remedy, fix)


def _examine_verdicts(state: State) -> Iterator[Fault]:
    for stage in STAGES:
        number = state.aliases.get(stage)
        if number is None or number not in state.versions:
            continue
        version = state.versions[number]
        verdict = version.tags.get(f"verdict.{stage}")
        if verdict == "passed" or _was_overruled(state, stage, number):
            continue
        found = f"{stage} without a verdict" if verdict is None else f"{stage}, though {verdict}"
        remedy = f"cectflow models promote {state.name}/{number} --to {stage}"
        yield Fault("verdict", version.label, found, remedy)


def _was_overruled(state: State, stage: str, number: str) -> bool:
    """Whether a refused version was given its stage for a reason that is on record."""
    return any(
        change.reason and change.action == "promote" and change.outcome == "done"
        for change in state.record.changes
        if change.stage == stage and change.version == number
    )


def _examine_files(state: State, *, every: bool) -> Iterator[Fault]:
    for version in state.versions.values():
        if every or version.version in state.aliases.values():
            yield from _examine_version(version)


def _examine_version(version: RegisteredVersion) -> Iterator[Fault]:
    with tempfile.TemporaryDirectory(prefix="cectflow-doctor-") as scratch:
        # A cache of its own: the user's would hide what became of the stored files.
        try:
            resolve_model(version.uri, cache=Path(scratch))
        except FileNotFoundError as error:
            yield Fault("missing", version.label, str(error), "restore the artifacts of a backup")
        except ValueError as error:
            remedy = f"cectflow models archive {version.name}/{version.version} --reason ..."
            yield Fault("digest", version.label, str(error), remedy)


def _examine_runs(hours: float, *, fix: bool) -> Iterator[Fault]:
    client = mlflow.MlflowClient()
    before = int(1000 * (time.time() - 3600 * hours))
    for run in _runs(f"attributes.status = 'RUNNING' and attributes.start_time < {before}"):
        if fix:
            client.set_terminated(run.info.run_id, RunStatus.to_string(RunStatus.KILLED))
        started = datetime.fromtimestamp(run.info.start_time / 1000, tz=UTC)
        found = f"RUNNING since {started.isoformat(timespec='seconds')}: {run.info.run_name}"
        remedy = "wait if it is at work; else cectflow models doctor --fix ends it as KILLED"
        yield Fault("run", run.info.run_id, found, remedy, fix)


def _runs(condition: str) -> list[Run]:
    client = mlflow.MlflowClient()
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs(experiments, condition, max_results=PAGE, page_token=token)
        runs += page
        token = page.token
        if not token:
            return runs

"""Metrics that outlive a lost server: spooled to a local file, replayed when it answers again.

Replaying a point twice is harmless: MLflow keeps one point per key, step, time and value.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric
from mlflow.exceptions import ERROR_CODE_TO_HTTP_STATUS, MlflowException

from cectflow.tracking.store import current_store, exclusive_lock, explain

__all__ = ["SPOOL_FOLDER", "Spool", "is_outage", "replay_spool"]

SPOOL_FOLDER = ".cectflow-spool"
PAUSE = 60.0
"""Seconds without another attempt after a failed one, which itself costs a few seconds."""

Record = dict[str, Any]


class Spool:
    """Way of one run's metrics to the server, by way of a local file while it does not answer.

    Parameters
    ----------
    folder
        Where the spool files lie; made when the first one is needed.
    run_id
        The run.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        self.path = folder / f"{run_id}.jsonl"
        self._run_id = run_id
        self._silent_until = 0.0

    def log(self, metrics: Mapping[str, float | int], step: int | None) -> None:
        """Send metrics, after those that wait in the file; while the server is gone they join it.

        Raises
        ------
        MlflowException
            If the server answers, but refuses the metrics.
        """
        now = int(time.time() * 1000)
        records: list[Record] = [
            {"key": key, "value": float(value), "step": step or 0, "timestamp": now}
            for key, value in metrics.items()
        ]
        if time.monotonic() < self._silent_until:
            self._append(records)
            return
        try:
            self.flush()
            _send(self._run_id, records)
        except MlflowException as error:
            if not is_outage(error):
                raise
            self._append(records)
            if not self._silent_until:
                self._warn(error)
            self._silent_until = time.monotonic() + PAUSE
        else:
            self._silent_until = 0.0

    def flush(self) -> None:
        """Send whatever waits in the file."""
        if self.path.exists():
            _replay_file(self.path)

    def keep_status(self, status: str) -> None:
        """Add the run's end to the file, so that the replay also ends the run."""
        self._append([{"status": status, "end_time": int(time.time() * 1000)}])

    def _append(self, records: Sequence[Record]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        store = {"store": current_store(), "run_id": self._run_id}
        lines = "".join(json.dumps(store | record) + "\n" for record in records)
        with exclusive_lock(_lock(self.path)), self.path.open("a", encoding="utf-8") as file:
            file.write(lines)

    def _warn(self, error: MlflowException) -> None:
        msg = (
            f"{current_store()} does not answer; metrics of run {self._run_id} go to {self.path} "
            f"and follow once it is back ({explain(error)})"
        )
        warnings.warn(msg, stacklevel=4)


def replay_spool(folder: Path) -> int:
    """How many metric points waited in a spool folder and are now in the current store.

    Files of other stores stay; so do files that the store refuses, for instance because their run
    was deleted, with a warning. Where the server does not answer, everything stays.

    Parameters
    ----------
    folder
        Usually ``.cectflow-spool`` in the working folder.
    """
    sent = 0
    for path in sorted(folder.glob("*.jsonl")):
        try:
            sent += _replay_file(path)
        except MlflowException as error:
            if is_outage(error):
                break
            msg = (
                f"{current_store()} refuses {path} ({explain(error)}): delete the file to give "
                f"its metrics up"
            )
            warnings.warn(msg, stacklevel=2)
    return sent


def is_outage(error: MlflowException) -> bool:
    """Whether the server is gone, overloaded or locks us out, rather than refusing the content."""
    status = ERROR_CODE_TO_HTTP_STATUS.get(error.error_code, 500)
    return status >= 500 or status in {401, 403, 408, 429}


def _replay_file(path: Path) -> int:
    # The lock is held while sending: a line appended meanwhile by the run itself must not be lost.
    with exclusive_lock(_lock(path)):
        if not path.exists():
            return 0
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        store = current_store()
        here = [line for line in lines if line["store"] == store]
        if not here:
            return 0
        points = [line for line in here if "key" in line]
        _send(here[0]["run_id"], points)
        for line in here:
            if "status" in line:
                client = mlflow.MlflowClient()
                client.set_terminated(line["run_id"], line["status"], line["end_time"])
        _replace(path, [line for line in lines if line["store"] != store])
    return len(points)


def _replace(path: Path, lines: Sequence[Record]) -> None:
    if not lines:
        path.unlink()
        return
    fresh = path.with_suffix(".tmp")
    fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(fresh, path)


def _send(run_id: str, points: Sequence[Record]) -> None:
    metrics = [
        Metric(point["key"], point["value"], point["timestamp"], point["step"]) for point in points
    ]
    client = mlflow.MlflowClient()
    for start in range(0, len(metrics), 1000):  # MLflow's limit per call
        client.log_batch(run_id, metrics=metrics[start : start + 1000])


def _lock(path: Path) -> Path:
    return path.parent / "lock"

"""Changes of stages, each killed before each of its writes in turn; run by test_crashes.

``python crash.py FOLDER NAME CHANGE...`` leaves ``FOLDER/CHANGE-{k}.db``, copies of
``CHANGE.db`` in which the change was killed by SIGKILL before its write number k, and the writes of
the whole change as ``CHANGE.json``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import mlflow

from cectflow.tracking.policy import Finding, Verdict
from cectflow.tracking.promotion import archive, rollback, set_stage
from cectflow.tracking.versions import find_version

READS = ("get_", "search_", "list_", "load_", "download_", "_")
"""Whatever else MLflow's client offers counts as a write, so that a new one cannot be missed."""
VERDICT = Verdict("student", True, (Finding("speedup at least 3", "speedup", 4.0, 3.0, True),))


def change_stages(change: str, name: str) -> None:
    if change == "promote":
        set_stage(find_version(f"{name}/2"), "production", verdict=VERDICT, reason="better")
    elif change == "rollback":
        rollback(name, reason="worse")
    else:
        archive(find_version(f"{name}@production"), reason="withdrawn")


def kill_before(number: int, writes: list[str]) -> None:
    """Let the client of this process count its writes, and die before one of them."""
    for method in [each for each in dir(mlflow.MlflowClient) if not each.startswith(READS)]:
        original = getattr(mlflow.MlflowClient, method)

        def counted(self, *arguments, _name=method, _original=original, **options):  # type: ignore
            if len(writes) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            writes.append(f"{_name} {' '.join(str(each) for each in arguments[1:])}")
            return _original(self, *arguments, **options)

        setattr(mlflow.MlflowClient, method, counted)


def kill_everywhere(folder: Path, name: str, change: str) -> None:
    number = 0
    while True:
        copy = folder / f"{change}-{number}.db"
        shutil.copy(folder / f"{change}.db", copy)
        child = os.fork()
        if child == 0:
            writes: list[str] = []
            # A store that the parent never opens: no connection is shared with it.
            mlflow.set_tracking_uri(f"sqlite:///{copy}")
            kill_before(number, writes)
            change_stages(change, name)
            (folder / f"{change}.json").write_text(json.dumps(writes), encoding="utf-8")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                sys.exit(f"{change} failed before write {number}")
            return
        number += 1


def main() -> None:
    folder, name, *changes = sys.argv[1:]
    shutil.copy(Path(folder) / f"{changes[0]}.db", Path(folder) / "warm.db")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/warm.db")
    find_version(f"{name}/1")  # the first statement costs a second, here it is paid once
    for change in changes:
        kill_everywhere(Path(folder), name, change)


if __name__ == "__main__":
    main()

"""Changes of stages that were killed: the next command finishes them, or leaves no trace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest

from cectflow.tracking.doctor import examine_registry
from cectflow.tracking.promotion import rollback, set_stage
from cectflow.tracking.registry import find_version
from cectflow.tracking.repair import find_writes, read_state, settle
from cectflow.tracking.runs import connect

NAME = "cectflow-student"

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")

STEPS = {
    "promote": ("set_model_version_tag 2 verdict.production", "set_registered_model_tag history.",
                "set_registered_model_alias production 2", "set_registered_model_tag history.",
                "delete_registered_model_alias staging", "set_model_version_tag 1 archived",
                "transition_model_version_stage 1 Archived",
                "transition_model_version_stage 2 Production"),
    "rollback": ("set_registered_model_tag history.", "set_registered_model_alias production 2",
                 "set_registered_model_tag history.", "set_model_version_tag 3 archived",
                 "transition_model_version_stage 2 Production"),
    "archive": ("set_registered_model_tag history.", "delete_registered_model_alias production",
                "set_registered_model_tag history.", "set_model_version_tag 1 archived",
                "transition_model_version_stage 1 Archived"),
}  # fmt: skip
"""Writes that must come, in this order, whatever comes between them."""


def prepare(change: str) -> None:
    def promote(number: int, stage: str = "production") -> None:
        set_stage(find_version(f"{NAME}/{number}"), stage, verdict=None)

    promote(1)
    if change == "promote":
        promote(2, "staging")
    if change == "rollback":
        promote(2)
        promote(3)


@pytest.fixture(params=STEPS)
def killed(
    request: pytest.FixtureRequest, lab: Path, registered_store: Path
) -> tuple[str, list[str]]:
    """Change that was killed before each write in turn, in stores 0.db, 1.db ..; the writes."""
    shutil.copy(registered_store, lab / "before.db")
    connect(f"sqlite:///{lab}/before.db")
    prepare(request.param)
    script = Path(__file__).with_name("crash.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    done = subprocess.run(
        [sys.executable, str(script), str(lab / "before.db"), NAME, request.param, str(lab)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return request.param, json.loads((lab / "writes.json").read_text(encoding="utf-8"))


def test_after_a_kill_at_any_write_the_next_command_leaves_a_consistent_registry(
    killed: tuple[str, list[str]], lab: Path
) -> None:
    change, writes = killed
    position = 0
    for step in STEPS[change]:
        words = step.split()
        found = [
            i
            for i in range(position, len(writes))
            if writes[i].startswith(words[0])
            and all(any(part.startswith(word) for part in writes[i].split()) for word in words)
        ]
        assert found, f"{step} is missing after {writes[:position]}"
        position = found[0] + 1
    outcomes = [check_repair(change, lab / f"{number}.db") for number in range(len(writes) + 1)]
    # Before the alias moves nothing has happened, afterwards everything: there is no way back.
    assert outcomes == sorted(outcomes)
    assert (outcomes[0], outcomes[-1]) == (False, True)


def check_repair(change: str, store: Path) -> bool:
    """Whether the change took effect; after two commands at once, and both at rest."""
    mlflow.set_tracking_uri(f"sqlite:///{store}")
    candidate = "3" if change == "promote" else "1" if change == "rollback" else "2"
    with ThreadPoolExecutor(2) as pool:
        repair = pool.submit(settle, NAME)
        promotion = pool.submit(
            set_stage, find_version(f"{NAME}/{candidate}"), "staging", verdict=None
        )
        repair.result()
        assert promotion.result().outcome == "done"
    state = read_state(NAME)
    assert find_writes(state) == ()
    holder = state.aliases.get("production")
    (own,) = [each for each in state.record.changes if each.reason] or [None]
    if own is None or own.outcome == "begun":
        assert holder == {"promote": "1", "rollback": "3", "archive": "1"}[change]
    else:
        assert own.outcome == "done"
        assert holder == {"promote": "2", "rollback": "2", "archive": None}[change]
        assert own.previous == {"promote": "1", "rollback": "3", "archive": None}[change]
    assert state.record.holders.get("production") == holder
    in_production = [v.version for v in state.versions.values() if v.mlflow_stage == "Production"]
    assert in_production == ([] if holder is None else [holder])
    faults = examine_registry(NAME, fix=True)
    assert all(fault.mended for fault in faults if fault.kind != "verdict")
    assert {each.outcome for each in read_state(NAME).record.changes} <= {"done", "abandoned"}
    if change == "promote":
        assert set_stage(find_version(f"{NAME}/2"), "production", verdict=None).outcome == "done"
        assert rollback(NAME).version == "1"
    return own is not None and own.outcome == "done"

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
from stores import pristine_mlflow, working_folder

from cectflow.tracking.doctor import examine_registry
from cectflow.tracking.promotion import rollback, set_stage
from cectflow.tracking.registry import find_version
from cectflow.tracking.repair import find_writes, read_state, settle

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


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, registered_store: Path) -> Path:
    """Stores ``CHANGE-{k}.db`` in which a change was killed before its write k; writes as JSON."""
    folder = tmp_path_factory.mktemp("killed")
    with pristine_mlflow(), working_folder(folder):
        for change in STEPS:
            shutil.copy(registered_store, folder / f"{change}.db")
            mlflow.set_tracking_uri(f"sqlite:///{folder}/{change}.db")
            prepare(change)
        script = Path(__file__).with_name("crash.py")
        command = [sys.executable, str(script), str(folder), NAME, *STEPS]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.usefixtures("lab")
@pytest.mark.parametrize("change", STEPS)
def test_after_a_kill_at_any_write_the_next_command_leaves_a_consistent_registry(
    change: str, killed: Path
) -> None:
    writes = json.loads((killed / f"{change}.json").read_text(encoding="utf-8"))
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
    outcomes = [
        check_repair(change, killed / f"{change}-{number}.db") for number in range(len(writes) + 1)
    ]
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
    took_effect = own is not None and own.outcome == "done"
    if change == "promote" and not took_effect:
        assert set_stage(find_version(f"{NAME}/2"), "production", verdict=None).outcome == "done"
    if change == "promote":
        assert rollback(NAME).version == "1"
    return took_effect

"""The journal of a prediction: what it gives back, and what it refuses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cectflow.prediction.asking import Answers
from cectflow.prediction.journal import (
    Journal,
    begun_outputs,
    journal_folder,
    open_journal,
)

PLAN: dict[str, object] = {"model": "a/1", "card": "a" * 64, "contrast": "dark"}
ANSWERS = Answers(
    np.array([[1.0, 2.0], [np.nan, np.nan], [0.5, -1e30]], np.float32),
    np.array([0.25, np.nan, -1.0], np.float32),
    {1: "x.mrcs: Ångström — holds “values” that are not finite"},
)


def leave(
    out: Path, *, plan: dict[str, object] = PLAN, blocks: int = 1, outputs: tuple[Path, ...] = ()
) -> Path:
    """Journal of a run that was broken off."""
    try:
        with open_journal(out, plan, anew=False, outputs=outputs) as journal:
            for number in range(blocks):
                journal.record(number, ANSWERS.to_arrays())
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        return journal_folder(out)


def test_what_was_recorded_is_read_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.record(7, ANSWERS.to_arrays())
    journal.record(12345678, ANSWERS.to_arrays())
    (tmp_path / "0note.npz").write_text("another's")
    assert journal.finished() == {7, 12345678}
    found = journal.read(7, partial(Answers.from_arrays, count=3))
    assert found is not None
    np.testing.assert_array_equal(found.logits, ANSWERS.logits)
    np.testing.assert_array_equal(found.lightness, ANSWERS.lightness)
    assert found.faults == ANSWERS.faults
    assert journal.read(7, partial(Answers.from_arrays, count=4)) is None
    assert journal.read(8, partial(Answers.from_arrays, count=3)) is None
    journal.forget(7)
    journal.forget(7)
    assert journal.finished() == {12345678}


@settings(
    max_examples=200, derandomize=True, database=None, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    place=st.floats(0, 1), patch=st.binary(min_size=1, max_size=8), cut=st.none() | st.floats(0, 1)
)
def test_a_damaged_block_is_no_answer_and_no_crash(
    tmp_path: Path, place: float, patch: bytes, cut: float | None
) -> None:
    journal = Journal(tmp_path)
    journal.record(0, ANSWERS.to_arrays())
    path = tmp_path / "0000000.npz"
    content = bytearray(path.read_bytes())
    start = int(place * (len(content) - 1))
    content[start : start + len(patch)] = patch
    path.write_bytes(content if cut is None else content[: int(cut * len(content))])
    found = journal.read(0, partial(Answers.from_arrays, count=3))
    if found is not None:  # what is unsaid by the damage is as it was
        np.testing.assert_array_equal(found.logits, ANSWERS.logits)
        assert found.faults == ANSWERS.faults


def test_the_folder_is_gone_after_a_clean_end_and_kept_after_another(tmp_path: Path) -> None:
    out = tmp_path / "out.star"
    with open_journal(out, PLAN, anew=False) as journal:
        journal.record(0, ANSWERS.to_arrays())
    assert [*tmp_path.iterdir()] == []
    folder = leave(out, blocks=2)
    assert [*tmp_path.iterdir()] == [folder]
    with open_journal(out, PLAN, anew=False) as journal:
        assert journal.finished() == {0, 1}
    assert [*tmp_path.iterdir()] == []
    leave(out, blocks=0)  # nothing is lost with it
    assert [*tmp_path.iterdir()] == []


def test_anew_drops_what_was_finished_and_asks_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.star"
    leave(out)
    with open_journal(out, {"model": "b/1"}, anew=True) as journal:
        assert journal.finished() == frozenset()


def test_a_change_is_named_with_what_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out.star"
    leave(out)
    changed = {**PLAN, "contrast": "light", "card": "b" * 64, "rescale": True}
    expected = r"another card, contrast \(dark, now light\), rescale \(None, now True\): give the"
    with (
        pytest.raises(ValueError, match=expected),
        open_journal(out, changed, anew=False),
    ):
        pass
    assert Journal(journal_folder(out)).finished() == {0}  # a refusal costs nothing


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"plan": 3, "outputs": []}'])
def test_a_damaged_plan_is_refused_with_the_remedy(tmp_path: Path, content: str) -> None:
    out = tmp_path / "out.star"
    (leave(out) / "plan.json").write_text(content)
    assert begun_outputs(out) == frozenset()
    with (
        pytest.raises(ValueError, match=r"plan.json, .*is damaged: start anew with --overwrite"),
        open_journal(out, PLAN, anew=False),
    ):
        pass


def test_outputs_of_an_unfinished_run_are_known_and_added_to(tmp_path: Path) -> None:
    out = tmp_path / "out.star"
    assert begun_outputs(out) == frozenset()
    for names in (("out.star",), ("out.star", "t.csv"), ("out.star",)):
        leave(out, outputs=tuple(tmp_path / name for name in names))
    assert begun_outputs(out) == {tmp_path / "out.star", tmp_path / "t.csv"}
    plan = json.loads((journal_folder(out) / "plan.json").read_text())
    assert plan["plan"] == PLAN


def test_one_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out.star"
    with open_journal(out, PLAN, anew=False) as journal:
        journal.record(0, ANSWERS.to_arrays())
        with (
            pytest.raises(BlockingIOError, match=r"another process is at work on .*out.star"),
            open_journal(out, PLAN, anew=True),
        ):
            pass
        assert journal.finished() == {0}

from __future__ import annotations

import json
import random

import pytest

from cectflow.tracking.record import Record, read_record

FACTS = {"time": "2026-01-01T00:00:00.000+00:00", "verdict": None, "reason": "", "by": "me"}


def entry(stamp: int, id: str, action: str, stage: str, version: str | None) -> dict[str, str]:
    facts = FACTS | {"action": action, "stage": stage, "version": version}
    return {f"history.{stamp:016d}.{id}": json.dumps(facts)}


def mark(stamp: int, id: str, outcome: str) -> dict[str, str]:
    return {f"history.{stamp:016d}.{id}.{outcome}": "2026-01-01T00:00:00.000+00:00"}


def seen(record: Record) -> list[tuple[str | None, str | None, str]]:
    return [(each.version, each.previous, each.outcome) for each in record.changes]


def test_tags_of_others_are_no_part_of_the_record() -> None:
    assert read_record({"history": "x", "history.of.mine": "y", "team": "z"}) == Record()


def test_a_change_without_a_mark_is_begun_until_the_stage_has_another_holder() -> None:
    tags = entry(1, "a", "promote", "production", "1")
    assert seen(read_record(tags)) == [("1", None, "begun")]
    tags |= entry(2, "b", "promote", "staging", "2") | mark(3, "b", "done")
    assert seen(read_record(tags))[0] == ("1", None, "begun")
    tags |= entry(4, "c", "promote", "production", "3") | mark(5, "c", "done")
    assert seen(read_record(tags)) == [
        ("1", None, "abandoned"), ("2", None, "done"), ("3", None, "done")
    ]  # fmt: skip


def test_changes_that_overtook_one_another_stand_in_the_order_of_their_effect() -> None:
    tags = entry(1, "a", "promote", "production", "1") | entry(2, "b", "promote", "production", "2")
    tags |= mark(3, "b", "done") | mark(4, "a", "done")
    record = read_record(tags)
    assert seen(record) == [("2", None, "done"), ("1", "2", "done")]
    assert record.holders == {"production": "1"}


def test_whoever_saw_a_version_in_its_stage_is_right_and_its_own_command_knows_when() -> None:
    tags = entry(1, "a", "promote", "production", "1") | entry(1, "b", "promote", "production", "2")
    tags |= mark(2, "a", "done") | mark(3, "b", "done")
    tags |= mark(4, "a", "superseded") | mark(5, "a", "abandoned")
    assert seen(read_record(tags)) == [("1", None, "done"), ("2", "1", "done")]
    assert read_record(tags | mark(6, "a", "done")).holders == {"production": "1"}


def test_production_takes_a_version_out_of_staging_and_an_archive_out_of_all() -> None:
    tags = entry(1, "a", "promote", "staging", "1") | mark(2, "a", "done")
    assert read_record(tags).holders == {"staging": "1"}
    tags |= entry(3, "b", "promote", "production", "1") | mark(4, "b", "done")
    assert read_record(tags).holders == {"production": "1"}
    tags |= entry(5, "c", "archive", "archived", "1") | mark(6, "c", "done")
    record = read_record(tags)
    assert (record.holders, record.once_held) == ({}, frozenset("1"))


def test_the_record_does_not_depend_on_the_order_in_which_a_store_gives_tags() -> None:
    tags: dict[str, str] = {}
    for number in range(20):
        tags |= entry(2 * number, f"{number:02x}", "promote", "production", str(number))
        tags |= mark(2 * number + 1, f"{number:02x}", "done")
    shuffled = list(tags.items())
    random.Random(0).shuffle(shuffled)
    assert read_record(dict(shuffled)) == read_record(tags)


@pytest.mark.parametrize("now", [0, 10, 10**17])
def test_a_stamp_is_later_than_all_that_was_seen_whatever_the_clock_says(now: int) -> None:
    record = read_record(entry(5, "a", "promote", "production", "1") | mark(9, "a", "done"))
    assert record.next_stamp(now) == max(10, now)

from __future__ import annotations

import math
from pathlib import Path

import pytest

from cectflow.config import list_named_files
from cectflow.tracking.policy import Policy, Rule, judge, load_policy
from cectflow.tracking.versions import ROLE_NAMES

POLICY = Policy(
    role="student",
    score="accuracy",
    rules=(
        Rule(figure="retention", at_least=0.98, why="Students keep what teachers know."),
        Rule(figure="speedup", at_least=3.0, why="Students are fast."),
        Rule(figure="parity", at_most=0.001, why="Runtimes agree."),
    ),
)
STUDENT = {"accuracy": 0.9, "retention": 0.99, "speedup": 4.0, "parity": 1e-6}


@pytest.mark.parametrize(("key", "name"), ROLE_NAMES.items())
def test_every_role_has_a_policy_that_asks_for_parity_and_gives_reasons(
    key: str, name: str
) -> None:
    policy = load_policy(name)
    assert policy.role == key.partition("/")[0]
    assert "parity" in {rule.figure for rule in policy.rules}
    assert all(rule.why.endswith(".") for rule in policy.rules)


def test_the_policies_are_package_data() -> None:
    assert list_named_files("policies") == tuple(sorted(ROLE_NAMES.values()))


def test_figures_that_keep_every_bound_pass() -> None:
    verdict = judge(POLICY, STUDENT, incumbent=None)
    assert verdict.passed
    assert verdict.refusal == ""
    assert [row[3] for row in verdict.table()] == ["passed"] * 3


def test_a_bound_itself_passes() -> None:
    figures = STUDENT | {"retention": 0.98, "speedup": 3, "parity": 0.001}
    assert judge(POLICY, figures, incumbent=None).passed


def test_a_refusal_names_rule_figure_threshold_and_reason() -> None:
    verdict = judge(POLICY, STUDENT | {"speedup": 1.7}, incumbent=None)
    assert not verdict.passed
    assert verdict.refusal.startswith(
        "student refused: speedup is 1.7, expected speedup at least 3 (Students are fast.)"
    )
    assert ("speedup", "1.7", "speedup at least 3", "refused") in verdict.table()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("figure", ["speedup", "parity"])
def test_a_figure_that_is_no_finite_number_is_refused(figure: str, value: float) -> None:
    verdict = judge(POLICY, STUDENT | {figure: value}, incumbent=None)
    assert not verdict.passed
    assert f"{figure} is missing" in verdict.refusal


def test_a_missing_figure_is_refused() -> None:
    figures = {name: value for name, value in STUDENT.items() if name != "parity"}
    verdict = judge(POLICY, figures, incumbent=None)
    assert "parity is missing, expected parity at most 0.001" in verdict.refusal


def test_a_tie_with_the_version_in_the_stage_passes_and_less_is_refused() -> None:
    assert judge(POLICY, STUDENT, incumbent={"accuracy": 0.9}).passed
    worse = judge(POLICY, STUDENT, incumbent={"accuracy": 0.91})
    assert "accuracy is 0.9, expected accuracy at least 0.91" in worse.refusal


def test_an_incumbent_without_the_score_is_refused() -> None:
    assert not judge(POLICY, STUDENT, incumbent={}).passed


def test_the_digest_follows_the_figures() -> None:
    first = judge(POLICY, STUDENT, incumbent=None)
    assert first.digest() == judge(POLICY, STUDENT, incumbent=None).digest()
    assert first.digest() != judge(POLICY, STUDENT | {"speedup": 5}, incumbent=None).digest()


@pytest.mark.parametrize("bounds", [{}, {"at_least": 1.0, "at_most": 2.0}])
def test_a_rule_has_exactly_one_bound(bounds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="exactly one of at_least and at_most"):
        Rule(figure="speedup", why="Because.", **bounds)


def test_a_policy_of_ones_own_is_read_from_its_path(tmp_path: Path) -> None:
    path = tmp_path / "strict.yaml"
    path.write_text(load_policy("teacher").to_yaml().replace("0.8", "0.95"), encoding="utf-8")
    assert load_policy(str(path)).rules[0].at_least == 0.95


def test_an_unknown_policy_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown policy 'pupil'.*segmenter, student, .*teacher"):
        load_policy("pupil")


def test_a_policy_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text("role: teacher\nscore: accuracy\nrules: []\nrule: []\n", encoding="utf-8")
    with pytest.raises(ValueError, match="rule: no such key"):
        Policy.from_yaml(path)

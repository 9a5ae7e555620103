from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest

from cectflow.config import list_named_files
from cectflow.model_card import Task
from cectflow.tracking.policy import (
    VERDICT_HEADER,
    Evidence,
    Policy,
    Requirement,
    Rule,
    Target,
    Verdict,
    judge,
    load_policy,
)
from cectflow.tracking.policy_figures import list_figures, refuse_unknown_figure
from cectflow.tracking.versions import ROLE_NAMES

SPEED = "speedup.cpu.onnxruntime"
POLICY = Policy(
    role="student",
    score="accuracy",
    rules=(
        Rule(figure="retention", at_least=0.98, why="Students keep what teachers know."),
        Rule(figure="speedup", at_least=3.0, device="cpu", runtime="onnxruntime",
             why="Students are fast."),
        Rule(figure="parity", at_most=0.001, why="Runtimes agree."),
    ),
)  # fmt: skip
STUDENT = {"accuracy": 0.9, "retention": 0.99, SPEED: 4.0, "parity": 1e-6}
INCUMBENT = {"incumbent_accuracy": 0.9, "gain": 0.0, "gain_low": -0.1, "gain_high": 0.1}


def verdict(
    figures: dict[str, float], *rules: Rule, stage: Target = "staging", **evidence: Any
) -> Verdict:
    policy = POLICY.model_copy(update={"rules": rules}) if rules else POLICY
    return judge(policy, stage, Evidence(figures, **evidence))


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


def test_the_shipped_policies_suit_what_they_are_for() -> None:
    for key, name in ROLE_NAMES.items():
        role, _, task = key.partition("/")
        policy = load_policy(name)
        policy.check_suits(policy.role, cast("Task", task), ("a", "b"))
        assert policy.role == role
        assert {"dataset", "recipe"} <= {each.known for each in policy.lineage}
        assert ("teacher" in {each.known for each in policy.lineage}) == (role == "student")


def test_figures_that_keep_every_bound_pass() -> None:
    found = verdict(STUDENT)
    assert found.passed
    assert found.refusal == ""
    assert [row[-1] for row in found.table()] == ["passed"] * 3


def test_a_bound_itself_passes() -> None:
    assert verdict(STUDENT | {"retention": 0.98, SPEED: 3.0, "parity": 0.001}).passed


def test_a_refusal_names_rule_figure_threshold_and_reason() -> None:
    found = verdict(STUDENT | {SPEED: 1.7}, notes={SPEED: "EPYC, 1 threads"})
    assert not found.passed
    assert found.refusal.startswith(
        "student refused: speedup.cpu.onnxruntime is 1.7, expected speedup at least 3 on cpu with "
        "onnxruntime (EPYC, 1 threads; Students are fast.)"
    )
    bound = "speedup at least 3 on cpu with onnxruntime"
    assert (SPEED, "1.7", "", "", bound, "refused") in found.table()


def test_the_table_shows_candidate_teacher_and_incumbent_with_intervals() -> None:
    figures = {
        "accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95, "teacher_accuracy": 0.92,
        **INCUMBENT,
    }  # fmt: skip
    rules = (
        Rule(figure="accuracy", at_least=0.5, why="A floor."),
        Rule(figure="teacher_accuracy", at_least=0.5, why="A floor."),
        Rule(figure="incumbent_accuracy", at_least=0.5, why="A floor."),
    )
    rows = verdict(figures, *rules, incumbent="cectflow-student v1").table()
    assert VERDICT_HEADER == ("figure", "candidate", "teacher", "incumbent", "bound", "outcome")
    assert [row[1:4] for row in rows] == [
        ("0.9 (0.8 to 0.95)", "0.92", "0.9"),
        ("", "0.92", ""),
        ("", "", "0.9"),
        ("0 (-0.1 to 0.1)", "", "0.9"),
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("figure", [SPEED, "parity"])
def test_a_figure_that_is_no_finite_number_is_refused(figure: str, value: float) -> None:
    found = verdict(STUDENT | {figure: value})
    assert not found.passed
    assert f"{figure} is missing" in found.refusal


def test_a_missing_figure_is_refused_with_the_cause() -> None:
    figures = {name: value for name, value in STUDENT.items() if name != "parity"}
    found = verdict(figures, notes={"parity": "not measured: no disk"})
    assert "parity is missing, expected parity at most 0.001 (not measured: no disk" in (
        found.refusal
    )


def test_a_rule_is_asked_on_the_way_to_its_stages_only() -> None:
    rule = Rule(figure="accuracy", at_least=0.99, stages=("production",), why="Strict.")
    assert verdict(STUDENT, rule, stage="staging").findings == ()
    assert not verdict(STUDENT, rule, stage="production").passed


def test_a_tie_with_the_version_in_the_stage_passes_and_less_is_refused() -> None:
    # That the interval of a tie reaches below 0 does not refuse.
    assert verdict(STUDENT | INCUMBENT, incumbent="cectflow-student v1").passed
    worse = verdict(STUDENT | INCUMBENT | {"gain": -0.01}, incumbent="cectflow-student v1")
    assert (
        "gain is -0.01, expected gain at least 0: accuracy no worse than that of "
        "cectflow-student v1"
    ) in worse.refusal
    strict = Rule(figure="gain_low", at_least=-0.05, why="No risk.")
    assert not verdict(STUDENT | INCUMBENT, strict, incumbent="cectflow-student v1").passed


def test_a_gain_that_was_not_measured_is_refused() -> None:
    assert not verdict(STUDENT, incumbent="cectflow-student v1").passed


def test_what_a_version_does_not_have_is_not_asked() -> None:
    rules = (
        Rule(figure="gain_low", at_least=0.0, why="."),
        Rule(figure="incumbent_accuracy", at_least=0.0, why="."),
        Rule(figure="variant_difference", at_least=0.0, why="."),
        Rule(figure="int8_parity", at_most=0.0, why="."),
    )
    found = verdict(STUDENT, *rules, variants=("bfloat16",))
    assert [each.outcome for each in found.findings] == [
        "not asked", "not asked", "refused", "not asked",
    ]  # fmt: skip
    assert verdict(STUDENT, *rules).passed
    assert set(verdict(STUDENT, *rules).tags()) == {"policy"}


def test_an_ancestor_that_is_not_known_is_refused() -> None:
    policy = POLICY.model_copy(
        update={"rules": (), "lineage": (Requirement(known="commit", why="It must be found."),)}
    )
    assert not judge(policy, "staging", Evidence({})).passed
    unclean = judge(policy, "staging", Evidence({}, lineage={"commit": (False, "abc-dirty")}))
    assert "commit is not known (abc-dirty; It must be found.)" in unclean.refusal
    assert judge(policy, "staging", Evidence({}, lineage={"commit": (True, "abc")})).passed


def test_tags_hold_figures_under_names_that_mlflow_takes_and_the_context() -> None:
    rule = Rule(figure="accuracy_4v94#1", at_least=0.5, why="A floor.")
    found = verdict({"accuracy_4v94#1": 0.75}, rule, context={"dataset": "d" * 64})
    digest = POLICY.model_copy(update={"rules": (rule,)}).digest()
    assert found.tags() == {"accuracy_4v94_1": "0.75", "dataset": "d" * 64, "policy": digest}


def test_the_digest_follows_the_figures() -> None:
    assert verdict(STUDENT).digest() == verdict(STUDENT).digest()
    assert verdict(STUDENT).digest() != verdict(STUDENT | {SPEED: 5.0}).digest()


def test_a_misspelled_figure_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    rule = "{figure: retenton, at_least: 0.9, why: Because.}"
    path.write_text(f"role: student\nscore: accuracy\nrules: [{rule}]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"unknown figure 'retenton': expected one of") as refused:
        load_policy(str(path))
    for words in ("worst_class", "ece", "variant_parity", "did you mean retention"):
        assert words in str(refused.value)


def test_figures_of_classes_are_known_by_pattern_and_by_name() -> None:
    any_class = list_figures("teacher", "classify")
    refuse_unknown_figure("accuracy_ribosome_low", any_class)
    named = list_figures("teacher", "classify", ("ribosome",))
    refuse_unknown_figure("accuracy_ribosome", named)
    with pytest.raises(ValueError, match="accuracy_proteasome"):
        refuse_unknown_figure("accuracy_proteasome", named)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"figure": "speedup", "at_least": 2.0}, "needs device and runtime"),
        ({"figure": "parity", "at_most": 2.0, "device": "cpu"}, "is not timed"),
        ({"figure": "parity", "at_most": math.nan}, "finite"),
    ],
)
def test_rules_that_say_nothing_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(why="Because.", **content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": "hausdorff_95"}, "unknown score 'hausdorff_95'"),
        ({"role": "teacher", "lineage": (Requirement(known="teacher", why="."),), "rules": ()},
         "a teacher has no teacher"),
    ],
)  # fmt: skip
def test_policies_that_cannot_judge_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(**{"role": "student", "score": "accuracy", "rules": ()} | change)


@pytest.mark.parametrize("bounds", [{}, {"at_least": 1.0, "at_most": 2.0}])
def test_a_rule_has_exactly_one_bound(bounds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="exactly one of at_least and at_most"):
        Rule(figure="parity", why="Because.", **bounds)


def test_a_policy_of_ones_own_is_read_from_its_path(tmp_path: Path) -> None:
    path = tmp_path / "strict.yaml"
    path.write_text(
        load_policy("teacher").to_yaml().replace("at_least: 0.8", "at_least: 0.95"),
        encoding="utf-8",
    )
    assert load_policy(str(path)).rules[0].at_least == 0.95


def test_an_unknown_policy_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown policy 'pupil'.*segmenter, student, .*teacher"):
        load_policy("pupil")


def test_a_policy_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text("role: teacher\nscore: accuracy\nrules: []\nrule: []\n", encoding="utf-8")
    with pytest.raises(ValueError, match="rule: no such key"):
        Policy.from_yaml(path)


def test_the_policy_of_the_page_is_valid(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/registry.md").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(page.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    policy = load_policy(str(path))
    policy.check_suits("student", "classify", ("ribosome", "proteasome"))
    assert policy.timings(["staging"]) == (("cuda", "torch"),)

"""Promotion from measurement to stage: earned, refused, rehearsed, overruled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from balls import FAIR, GOOD, Register
from builders import write_dataset

from cectflow.cli import main
from cectflow.dataset import Dataset
from cectflow.flows.promotion import promote
from cectflow.model_card import Score, VariantFigures
from cectflow.tracking.policy_figures import list_figures, refuse_unknown_figure
from cectflow.tracking.promotion import history
from cectflow.tracking.versions import find_version

ONE = Score(value=1.0, low=1.0, high=1.0)


def policy(folder: Path, *rules: str, role: str = "teacher", more: str = "") -> str:
    """Path of a policy with these rules; each is `figure: ..., bound`."""
    lines = "".join(f"  - {{{rule}, why: Because.}}\n" for rule in rules)
    path = folder / "mine.yaml"
    path.write_text(f"role: {role}\nscore: accuracy\n{more}rules:\n{lines}", encoding="utf-8")
    return str(path)


def registry_state(name: str) -> dict[str, Any]:
    """All that a promotion could change."""
    client = mlflow.MlflowClient()
    model = client.get_registered_model(name)
    versions = client.search_model_versions(f"name = '{name}'")
    return {
        "tags": dict(model.tags),
        "aliases": {key: str(value) for key, value in model.aliases.items()},
        "versions": {str(v.version): (dict(v.tags), v.current_stage) for v in versions},
    }


def runs_of(name: str) -> list[Any]:
    client = mlflow.MlflowClient()
    experiments = [each.experiment_id for each in client.search_experiments()]
    return list(client.search_runs(experiments, f"attributes.run_name = '{name}'"))


def test_a_version_that_earns_it_is_promoted_with_verdict_figures_and_report(
    register: Register, cubes: Dataset
) -> None:
    register(GOOD)
    (promotion,) = promote("cectflow-teacher", "production")
    assert promotion.outcome == "promoted"
    tags = find_version("cectflow-teacher@production").tags
    assert tags["verdict.production"] == "passed"
    assert tags["verdict.production.worst_class"] == "1"
    assert tags["verdict.production.dataset"] == cubes.manifest.content_digest()
    (run,) = runs_of("promote_teacher")
    assert tags["verdict.production.run"] == run.info.run_id
    assert run.data.metrics["accuracy_small"] == 1.0
    files = {each.path for each in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
    assert {"report-production.html", "verdict-production.json", "policy.yaml"} <= files
    told = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/verdict-production.json")
    assert told["figures"]["parity"] < 1e-3
    assert told["outcome"] == "promoted"


def test_every_figure_that_is_measured_may_be_named_and_the_reverse(register: Register) -> None:
    register(FAIR)
    register(GOOD, role="student")
    register(FAIR, role="student")
    promote("cectflow-student/1", "staging", force=True, reason="to have one in the stage")
    (promotion,) = promote("cectflow-student/2", "staging", dry_run=True)
    known = list_figures("student", "classify", ("small", "large"))
    timed = {f"{name}.cpu.onnxruntime": name
             for name in ("latency_ms", "subtomograms_per_s", "speedup")}  # fmt: skip
    measured = {timed.get(name, name) for name in promotion.figures}
    for name in measured:
        if not any(part in name for part in (".cpu.", "labels")):
            refuse_unknown_figure(name, known)
    siblings = {name for name in known if name.startswith(("int8", "bfloat16", "variant"))}
    assert set(known) - siblings <= measured


def test_a_worse_version_is_refused_by_the_paired_gain_and_stays_where_it_is(
    register: Register,
) -> None:
    register(GOOD)
    register(FAIR)
    (first,) = promote("cectflow-teacher/1", "production")
    before = registry_state("cectflow-teacher")["aliases"]
    (second,) = promote("cectflow-teacher/2", "production", policy="teacher")
    assert (first.outcome, second.outcome) == ("promoted", "refused")
    gain = next(each for each in second.verdict.findings if each.figure == "gain")
    assert gain.value == pytest.approx(-1 / 6)
    # Two of three fields lose a cube of four; a resample may be of these alone, or of the third.
    assert (gain.low, gain.high) == (-0.25, 0.0)
    assert gain.incumbent == 1.0
    assert "accuracy no worse than that of cectflow-teacher v1" in second.verdict.refusal
    assert registry_state("cectflow-teacher")["aliases"] == before == {"production": "1"}
    assert (
        "gain is -0.166667" in find_version("cectflow-teacher/2").tags["verdict.production.refusal"]
    )


def test_a_tie_passes_and_both_are_measured_on_the_same_cubes(register: Register) -> None:
    register(GOOD)
    register(GOOD)
    promote("cectflow-teacher/1", "production")
    (second,) = promote("cectflow-teacher/2", "production")
    assert second.outcome == "promoted"
    assert second.figures["gain"] == second.figures["gain_low"] == 0.0
    assert find_version("cectflow-teacher/1").stages == ("archived",)


@pytest.mark.parametrize(("bound", "outcome"), [("0.6", "promoted"), ("0.7", "refused")])
def test_floors_of_classes_say_on_how_many_subtomograms_they_rest(
    register: Register, lab: Path, bound: str, outcome: str
) -> None:
    register(FAIR)
    rules = policy(lab, f"figure: worst_class, at_least: {bound}")
    (promotion,) = promote("cectflow-teacher", "staging", policy=rules)
    assert promotion.outcome == outcome
    (finding,) = promotion.verdict.findings
    assert finding.value == pytest.approx(4 / 6)
    assert finding.note == "large: 6 subtomograms of 3 fields"


def test_a_class_without_a_test_subtomogram_has_no_floor(register: Register, lab: Path) -> None:
    data = write_dataset(lab / "three", classes=("small", "large", "rare"))
    register(GOOD, data=data, num_outputs=3)
    rules = policy(lab, "figure: worst_class, at_least: 0.1", "figure: smallest_class, at_least: 1")
    (promotion,) = promote("cectflow-teacher", "staging", policy=rules)
    assert "worst_class is missing" in promotion.verdict.refusal
    assert "no test subtomogram of rare" in promotion.verdict.refusal
    assert "smallest_class is 0" in promotion.verdict.refusal


def test_a_device_that_is_not_here_is_not_measured_and_refuses(
    register: Register, lab: Path
) -> None:
    register(GOOD)
    rule = "figure: latency_ms, at_most: 1000000, device: {}, runtime: {}"
    rules = policy(lab, rule.format("cpu", "torch"), rule.format("cuda", "openvino"))
    (promotion,) = promote("cectflow-teacher", "staging", policy=rules)
    outcomes = {each.figure: each.outcome for each in promotion.verdict.findings}
    assert outcomes == {"latency_ms.cpu.torch": "passed", "latency_ms.cuda.openvino": "refused"}
    assert "latency_ms.cuda.openvino is missing" in promotion.verdict.refusal
    assert "not measured: " in promotion.verdict.refusal


def test_a_sibling_in_lower_precision_that_cannot_be_measured_refuses(register: Register) -> None:
    figures = VariantFigures(
        score=ONE, difference=ONE, parity=0.1, speedup=2.0, runtime="openvino", threads=1
    )
    register(GOOD, variants={"int8": figures})  # the card promises what the folder does not have
    (promotion,) = promote("cectflow-teacher", "staging")
    assert "variant_difference is missing" in promotion.verdict.refusal
    assert "has no int8" in promotion.verdict.refusal


def test_a_student_of_a_registered_teacher_keeps_what_it_knows_or_is_refused(
    register: Register,
) -> None:
    register(GOOD)
    register(FAIR, role="student")
    (promotion,) = promote("cectflow-student", "staging")
    refused = [each.figure for each in promotion.verdict.findings if not each.passed]
    assert {"retention"} <= set(refused) <= {"retention", "speedup.cpu.onnxruntime"}
    assert promotion.figures["retention"] == pytest.approx(10 / 12)
    assert (promotion.figures["retention_low"], promotion.figures["retention_high"]) == (0.75, 1)
    teacher = next(e for e in promotion.verdict.findings if e.figure == "lineage.teacher")
    assert teacher.passed
    assert teacher.note.startswith("cectflow-teacher v1 ")


def test_a_teacher_that_is_gone_refuses_its_student(register: Register) -> None:
    register(GOOD, role="student")
    (promotion,) = promote("cectflow-student", "staging")
    assert "retention is missing, expected retention at least 0.98" in promotion.verdict.refusal
    assert "no registered model 'cectflow-teacher'" in promotion.verdict.refusal
    assert "teacher is not known" in promotion.verdict.refusal


def test_the_git_commit_may_be_required(register: Register, lab: Path) -> None:
    register(GOOD, commit="a" * 40)
    register(GOOD, commit="a" * 40 + "-dirty")
    more = "lineage: [{known: commit, why: Because.}]\n"
    rules = policy(lab, "figure: accuracy, at_least: 0.5", more=more)
    clean, dirty = (
        promote(f"cectflow-teacher/{number}", "staging", policy=rules, dry_run=True)[0]
        for number in (1, 2)
    )
    assert clean.verdict.passed
    assert "commit is not known (aaaaaaaaaaaa, not a clean git commit" in dirty.verdict.refusal


@pytest.mark.parametrize(("choice", "outcome"), [("accept", "promoted"), ("refuse", "refused")])
def test_a_version_in_the_stage_that_serves_other_data(
    register: Register, lab: Path, choice: str, outcome: str
) -> None:
    other = write_dataset(lab / "other", classes=("round", "flat"))
    register(GOOD, data=other)
    register(GOOD)
    promote("cectflow-teacher/1", "production")
    rules = policy(lab, "figure: accuracy, at_least: 0.5", more=f"incomparable: {choice}\n")
    (promotion,) = promote("cectflow-teacher/2", "production", policy=rules)
    assert promotion.outcome == outcome
    assert "classes is" in promotion.note
    if outcome == "promoted":
        assert "classes is" in history("cectflow-teacher")[-1]["reason"]


@pytest.mark.parametrize("threshold", [GOOD, FAIR])
def test_a_dry_run_writes_nothing_but_a_run_that_says_so(
    register: Register, threshold: float
) -> None:
    register(GOOD)
    register(threshold)
    promote("cectflow-teacher/1", "staging")
    before = registry_state("cectflow-teacher")
    (promotion,) = promote(
        "cectflow-teacher/2", "staging", dry_run=True, force=True, reason="to see"
    )
    assert promotion.outcome == "dry run"
    assert promotion.verdict.passed == (threshold == GOOD)
    assert registry_state("cectflow-teacher") == before
    dry = [run for run in runs_of("promote_teacher") if run.data.tags.get("dry_run") == "true"]
    assert len(dry) == 1


@pytest.mark.parametrize("reason", ["", "  "])
def test_force_without_a_reason_is_refused_before_any_work(register: Register, reason: str) -> None:
    register(FAIR)
    with pytest.raises(ValueError, match="--force needs --reason"):
        promote("cectflow-teacher", "staging", force=True, reason=reason)
    assert runs_of("promote_teacher") == []


def test_force_is_recorded_with_reason_and_refusal(register: Register) -> None:
    register(GOOD)
    register(FAIR)
    promote("cectflow-teacher/1", "production")
    (promotion,) = promote(
        "cectflow-teacher/2", "production", force=True, reason="fits the old camera"
    )
    assert promotion.outcome == "forced"
    version = find_version("cectflow-teacher@production")
    assert version.version == "2"
    assert version.tags["verdict.production"] == "refused"
    assert "gain is -0.166667" in version.tags["verdict.production.refusal"]
    assert version.tags["verdict.production.forced"] == "fits the old camera"
    assert history("cectflow-teacher")[-1]["reason"] == "forced: fits the old camera"


def test_a_refusal_ends_the_way_through_the_stages(register: Register, lab: Path) -> None:
    register(FAIR)
    strict = "figure: accuracy, at_least: 0.9, stages: [{}]"
    (only,) = promote(
        "cectflow-teacher", "staging", "production", policy=policy(lab, strict.format("staging"))
    )
    assert (only.stage, only.outcome) == ("staging", "refused")
    both = promote(
        "cectflow-teacher", "staging", "production", policy=policy(lab, strict.format("production"))
    )
    assert [each.outcome for each in both] == ["promoted", "refused"]
    assert find_version("cectflow-teacher/1").stages == ("staging",)


def test_data_that_were_changed_judge_nothing(register: Register, lab: Path) -> None:
    data = write_dataset(lab / "data")
    register(GOOD, data=data)
    stack = next((lab / "data" / "test").glob("00000.mrcs"))
    content = bytearray(stack.read_bytes())
    content[-1] ^= 1
    stack.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"is not what its manifest says.*digest differs"):
        promote("cectflow-teacher", "staging")
    assert runs_of("promote_teacher") == []


@pytest.mark.parametrize(
    ("rule", "role", "message"),
    [
        ("figure: accurcy, at_least: 0.5", "teacher", "did you mean accuracy"),
        ("figure: accuracy_huge, at_least: 0.5", "teacher", "unknown figure 'accuracy_huge'"),
        ("figure: foreground_iou, at_least: 0.5", "teacher", "a teacher of the task classify"),
        ("figure: accuracy, at_least: 0.5", "student", "for a student, this is a teacher"),
    ],
)
def test_a_policy_that_does_not_suit_is_refused_before_any_work(
    register: Register, lab: Path, rule: str, role: str, message: str
) -> None:
    register(GOOD)
    with pytest.raises(ValueError, match=message):
        promote("cectflow-teacher", "staging", policy=policy(lab, rule, role=role))
    assert runs_of("promote_teacher") == []


def test_the_command_prints_table_or_json_and_exits_with_the_verdict(
    register: Register, capsys: pytest.CaptureFixture[str]
) -> None:
    register(FAIR)
    register(GOOD)

    def call(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main(["models", "promote", "cectflow-teacher", *arguments])
        return int(stop.value.code or 0), capsys.readouterr().out

    code, out = call("1", "--to", "production", "--dry-run", "--json")
    told = json.loads(out[out.index("{") :])
    assert (code, told["model"], told["outcome"]) == (3, "models:/cectflow-teacher/1", "dry run")
    floor = next(each for each in told["findings"] if each["figure"] == "accuracy_low")
    assert (floor["threshold"], floor["outcome"]) == (0.8, "refused")
    assert floor["value"] == told["figures"]["accuracy_low"]
    code, out = call("--to", "staging")
    assert code == 0
    assert "candidate  teacher  incumbent  bound" in " ".join(out.split()).replace(" ", "  ")
    assert "cectflow-teacher v2 is in staging" in out


def test_the_score_of_pooled_voxels_is_compared_in_pairs() -> None:
    from cectflow.learning.scores import Evaluation

    def evaluation(hits: list[int]) -> Evaluation:
        counts = np.zeros((4, 2, 2), np.int64)
        counts[:, 1, 1], counts[:, 1, 0] = hits, 10 - np.array(hits)
        rows = np.arange(4)
        return Evaluation({}, rows, None, rows // 2, counts, ("particle",))

    better, worse = evaluation([10, 8, 10, 8]), evaluation([9, 7, 9, 7])
    gain = better.difference(worse, "mean_iou")
    # Every field loses as much: the interval has no width, however far apart its cubes are.
    assert [gain.value, gain.low, gain.high] == pytest.approx([0.1, 0.1, 0.1])
    same = better.difference(better, "mean_iou")
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)

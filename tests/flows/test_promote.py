"""Promotion from measurement to stage: earned, refused, rehearsed, overruled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from balls import FAIR, GOOD, Register
from builders import BOX, make_card, make_trust, write_dataset
from torch import Tensor, nn

from cectflow.cli import main
from cectflow.dataset import Dataset
from cectflow.export import export_network
from cectflow.flows.promotion import promote
from cectflow.learning.variants import make_variants
from cectflow.model_card import CARD_FILE, Score, Variant, VariantFigures
from cectflow.networks.normalisation import NormalisePerCube
from cectflow.quantise import quantise
from cectflow.runtime import INT8_FILE, check_variant
from cectflow.tracking.policy_figures import list_figures, refuse_unknown_figure
from cectflow.tracking.promotion import archive, history
from cectflow.tracking.registry import register_model
from cectflow.tracking.runs import start_run
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


def test_a_class_without_a_test_subtomogram_has_no_floor(register: Register, lab: Path) -> None:
    data = write_dataset(lab / "three", classes=("small", "large", "rare"))
    register(GOOD, data=data, num_outputs=3)
    rules = policy(lab, "figure: worst_class, at_least: 0.1", "figure: smallest_class, at_least: 1")
    (promotion,) = promote("cectflow-teacher", "staging", policy=rules)
    assert "worst_class is missing" in promotion.verdict.refusal
    assert "no test subtomogram of rare" in promotion.verdict.refusal
    assert "smallest_class is 0" in promotion.verdict.refusal


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


def test_a_tie_passes_a_worse_version_is_refused_rehearsed_and_overruled(
    register: Register,
) -> None:
    register(GOOD)
    register(GOOD)
    register(FAIR)
    promote("cectflow-teacher/1", "production")
    (tie,) = promote("cectflow-teacher/2", "production")
    assert tie.outcome == "promoted"
    assert tie.figures["gain"] == tie.figures["gain_low"] == 0.0
    assert find_version("cectflow-teacher/1").stages == ("archived",)

    before = registry_state("cectflow-teacher")
    (dry,) = promote("cectflow-teacher/3", "production", dry_run=True, force=True, reason="to see")
    assert (dry.outcome, dry.verdict.passed) == ("dry run", False)
    assert registry_state("cectflow-teacher") == before
    (marked,) = [run for run in runs_of("promote_teacher") if "dry_run" in run.data.tags]
    assert marked.data.tags["dry_run"] == "true"

    (worse,) = promote("cectflow-teacher/3", "production")
    assert worse.outcome == "refused"
    gain = next(each for each in worse.verdict.findings if each.figure == "gain")
    assert gain.value == pytest.approx(-1 / 6)
    # Two of three fields lose a cube of four; a resample may be of these alone, or of the third.
    assert (gain.low, gain.high, gain.incumbent) == (-0.25, 0.0, 1.0)
    assert "accuracy no worse than that of cectflow-teacher v2" in worse.verdict.refusal
    assert registry_state("cectflow-teacher")["aliases"] == before["aliases"] == {"production": "2"}
    tags = find_version("cectflow-teacher/3").tags
    assert "gain is -0.166667" in tags["verdict.production.refusal"]

    with pytest.raises(ValueError, match="--force needs --reason"):
        promote("cectflow-teacher/3", "production", force=True, reason="  ")
    (forced,) = promote("cectflow-teacher/3", "production", force=True, reason="the old camera")
    assert forced.outcome == "forced"
    version = find_version("cectflow-teacher@production")
    assert version.version == "3"
    assert version.tags["verdict.production"] == "refused"
    assert "gain is -0.166667" in version.tags["verdict.production.refusal"]
    assert version.tags["verdict.production.forced"] == "the old camera"
    assert history("cectflow-teacher")[-1]["reason"] == "forced: the old camera"


def test_rules_on_classes_devices_siblings_and_commit_pass_and_refuse(
    register: Register, lab: Path
) -> None:
    figures = VariantFigures(
        score=ONE, difference=ONE, parity=0.1, speedup=2.0, runtime="openvino", threads=1
    )
    # The card promises a sibling that the folder does not have.
    register(FAIR, variants={"int8": figures}, commit="a" * 40 + "-dirty")
    latency = "figure: latency_ms, at_most: 1000000, device: {}, runtime: {}"
    rules = policy(
        lab, "figure: worst_class, at_least: 0.6", "figure: worst_class_low, at_least: 0.6",
        latency.format("cpu", "torch"), latency.format("cuda", "openvino"),
        "figure: variant_difference, at_least: -1", "figure: bfloat16_parity, at_most: 0",
        "figure: parameters, at_most: 4", "figure: macs, at_most: 1",
        more="lineage: [{known: commit, why: Because.}, {known: dataset, why: Because.}]\n",
    )  # fmt: skip
    (promotion,) = promote("cectflow-teacher", "staging", policy=rules)
    found = {each.figure: each for each in promotion.verdict.findings}
    assert {name: each.outcome for name, each in found.items()} == {
        "worst_class": "passed", "worst_class_low": "refused",
        "latency_ms.cpu.torch": "passed", "latency_ms.cuda.openvino": "refused",
        "variant_difference": "refused", "bfloat16_parity": "not asked",
        "parameters": "passed", "macs": "refused",
        "lineage.commit": "refused", "lineage.dataset": "passed",
    }  # fmt: skip
    assert found["worst_class"].value == pytest.approx(4 / 6)
    assert found["worst_class"].note == "large: 6 subtomograms of 3 fields"
    for words in (
        "latency_ms.cuda.openvino is missing", "not measured: ", "has no int8",
        "commit is not known (aaaaaaaaaaaa, not a clean git commit", "macs is 2, expected",
    ):  # fmt: skip
        assert words in promotion.verdict.refusal


def test_what_was_archived_by_name_comes_back_for_a_reason_only(register: Register) -> None:
    register(GOOD)
    register(GOOD)
    promote("cectflow-teacher/1", "production")
    promote("cectflow-teacher/2", "production")
    # Its predecessor was archived by nobody.
    promote("cectflow-teacher/1", "production")
    archive(find_version("cectflow-teacher/1"), reason="trained on the wrong map")
    with pytest.raises(
        ValueError, match=r"v1 was archived on .* \(trained on the wrong map\).*--re"
    ):
        promote("cectflow-teacher/1", "staging", dry_run=True)
    (again,) = promote("cectflow-teacher/1", "staging", reason="it was the right map")
    assert again.outcome == "promoted"
    (further,) = promote("cectflow-teacher/1", "production")
    assert further.outcome == "promoted"


@pytest.mark.parametrize("arguments", [("cectflow-teacher", "x"), ("cectflow-teacher/1", "1")])
def test_a_version_that_is_no_number_is_told_apart_from_a_stage(
    lab: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["models", "promote", *arguments])
    assert stop.value.code == 2
    assert (
        f"give NAME VERSION, such as cectflow-student 2, or NAME/2; got {' '.join(arguments)}"
        in (" ".join(capsys.readouterr().err.split()))
    )


class Darkness(nn.Module):
    """Tells large balls by how dark the normalised cube is, with layers that have siblings."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(1, 1, 3, padding=1)
        nn.init.dirac_(self.convolution.weight)
        self.convolution.weight.data *= -1
        nn.init.constant_(self.convolution.bias, -1.0)
        self.score = nn.Linear(1, 2)
        self.score.weight.data = torch.tensor([[-200.0], [200.0]])
        self.score.bias.data = torch.tensor([28.0, -28.0])  # small ones have 0.11, large ones 0.17

    def forward(self, cubes: Tensor) -> Tensor:
        return self.score(self.convolution(cubes).relu().mean((1, 2, 3, 4))[:, None])


def test_siblings_are_measured_anew_whatever_the_card_says(
    register: Register, lab: Path, cubes: Dataset
) -> None:
    register(GOOD)
    variants: list[Variant] = ["int8", "bfloat16"]
    try:
        check_variant("bfloat16")
    except ValueError:  # not on this CPU
        variants.remove("bfloat16")
    folder = lab / "student"
    card = make_card(
        role="student", teacher="models:/cectflow-teacher/1", trust=make_trust(temperature=1.0),
        dataset_digest=cubes.manifest.content_digest(),
    )  # fmt: skip
    card = export_network(NormalisePerCube(Darkness()), card, folder)
    card = card.model_copy(update={"variants": make_variants(folder, cubes, variants)})
    (folder / CARD_FILE).write_text(card.to_json(), encoding="utf-8")
    with start_run("distil") as run:
        register_model(run, folder, name="cectflow-student")
        (folder / INT8_FILE).unlink()
        # Calibrated on noise, which is darker than 1 here and there, it knows no large ball.
        noise = np.random.default_rng(0).uniform(size=(16, 1, BOX, BOX, BOX))
        quantise(folder, noise.astype(np.float32))
        register_model(run, folder, name="cectflow-student")
    rules = policy(
        lab, "figure: retention, at_least: 0.98", "figure: variant_difference, at_least: -0.02",
        *(f"figure: {each}_parity, at_most: 5" for each in variants),
        "figure: variant_agreement, at_least: 0.995", role="student",
    )  # fmt: skip
    honest, boastful = (
        promote(f"cectflow-student/{number}", "staging", policy=rules, dataset=cubes.folder)[0]
        for number in (1, 2)
    )
    assert honest.outcome == "promoted"
    for variant in variants:
        assert honest.figures[f"{variant}_difference"] == card.variants[variant].difference.value
        assert honest.figures[f"{variant}_parity"] > 0
        assert honest.figures[f"{variant}_agreement"] == card.variants[variant].agreement == 1.0
    assert boastful.outcome == "refused"
    assert boastful.figures["int8_difference"] == pytest.approx(-1 / 2)
    assert boastful.figures["variant_agreement"] == pytest.approx(1 / 2)
    assert "variant_difference is -0.5" in boastful.verdict.refusal
    assert find_version("cectflow-student@staging").version == "1"


def test_a_version_in_the_stage_that_serves_other_data_is_the_policys_to_decide(
    register: Register, lab: Path
) -> None:
    register(GOOD, data=write_dataset(lab / "other", classes=("round", "flat")))
    register(GOOD)
    promote("cectflow-teacher/1", "production")
    outcomes = {}
    for choice in ("refuse", "accept"):
        rules = policy(lab, "figure: accuracy, at_least: 0.5", more=f"incomparable: {choice}\n")
        (promotion,) = promote("cectflow-teacher/2", "production", policy=rules)
        outcomes[choice] = promotion.outcome
        assert "classes is" in promotion.note
    assert outcomes == {"refuse": "refused", "accept": "promoted"}
    assert "classes is" in history("cectflow-teacher")[-1]["reason"]

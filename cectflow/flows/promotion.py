"""Judging registered versions: evaluation, promotion and its refusal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cectflow.cost import measure_throughputs
from cectflow.dataset import Dataset, open_dataset
from cectflow.export import measure_parity
from cectflow.flows.evaluation import log_evaluation
from cectflow.flows.teachers import compare_with_teachers, resolve_teachers
from cectflow.flows.training import DATASET_TAG
from cectflow.learning.breakdown import Group
from cectflow.learning.scores import Evaluation, baselines
from cectflow.learning.task import SemanticLabels
from cectflow.learning.training import check_matches, evaluate_folder
from cectflow.model_card import ModelCard, Score
from cectflow.timing import Candidate
from cectflow.tracking.policy import Policy, Verdict, judge, load_policy
from cectflow.tracking.promotion import record_refusal, set_stage
from cectflow.tracking.registry import resolve_model
from cectflow.tracking.runs import Run, start_run
from cectflow.tracking.versions import (
    PREFIX,
    ROLE_NAMES,
    RegisteredVersion,
    find_version,
    newest_version,
    role_name,
    stage_holder,
)

__all__ = ["Promotion", "Report", "evaluate_model", "judged_dataset", "newest_of_role", "promote"]

Target = Literal["staging", "production"]


@dataclass(frozen=True, eq=False)
class Promotion:
    """What became of a request for promotion.

    Attributes
    ----------
    version
        As it is now, stages included.
    stage
        That was asked for.
    verdict
        Of the role's policy.
    figures
        All that were measured for it.
    note
        What the verdict does not say, such as an incumbent that could not be compared.
    """

    version: RegisteredVersion
    stage: Target
    verdict: Verdict
    figures: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True, eq=False)
class Report:
    """What a network is worth on a test split.

    Attributes
    ----------
    scores
        With intervals over fields.
    baselines
        Foreground IoU of trivial methods on the same cubes; empty for classifiers.
    groups
        Accuracy or foreground IoU by structure, occupancy and SNR.
    """

    scores: dict[str, Score]
    baselines: dict[str, float]
    groups: tuple[Group, ...]


def evaluate_model(model: str, dataset: Path | None, *, nested: bool = False) -> Report:
    """Scores of a registered version or model folder on a dataset's test split, logged as a run."""
    folder, version = resolve_model(model)
    data = judged_dataset(version, dataset)
    card = ModelCard.from_folder(folder)
    check_matches(card, data)
    with start_run("evaluate", tags={"role": card.role}, nested=nested) as run:
        if version is not None:
            run.log_input_model(version)
        run.log_dataset(
            data.manifest.kind, data.manifest.content_digest(), str(data.folder.resolve()), "test"
        )
        evaluation = evaluate_folder(folder, data)
        trivial = _trivial_methods(card, data)
        groups = log_evaluation(run, folder, card, data, evaluation, trivial)
        run.log({f"baseline_{name}_iou": value for name, value in trivial.items()})
    return Report(evaluation.summary(), trivial, groups)


def _trivial_methods(card: ModelCard, data: Dataset) -> dict[str, float]:
    labels = None
    if card.task == "semantic":
        labels = SemanticLabels.of_card(card, data.manifest.classes)
    return baselines(data.split("test"), card.task, labels)


def promote(
    model: str,
    *stages: Target,
    policy: str | None = None,
    dataset: Path | None = None,
    nested: bool = False,
) -> tuple[Promotion, ...]:
    """Promotion of a version to a stage, or through several, if its role's policy allows it.

    Every figure is measured here and now on one frozen test split: the candidate's, its
    teacher's, and that of the version now in the stage. A refused version stays where it is, and
    no later stage is tried; the verdict becomes tags of the version either way.

    Parameters
    ----------
    model
        NAME/VERSION or a ``models:/`` URI; a bare NAME means its newest version.
    stages
        ``staging``, ``production`` or both, in order.
    policy
        Name or path; by default that of the role and task.
    dataset
        Folder; by default the one that the version was trained on, found by its tag and digest.
    nested
        Inside an open run.

    Returns
    -------
    tuple of Promotion
        One for each stage that was tried.
    """
    version = find_version(model) if _names_a_version(model) else newest_version(model)
    folder, _ = resolve_model(version.uri)
    card = ModelCard.from_folder(folder)
    data = judged_dataset(version, dataset)
    rules = load_policy(policy or role_name(card.role, card.task))
    promotions = []
    with start_run(f"promote_{card.role}", tags={"role": card.role}, nested=nested) as run:
        run.log_input_model(version)
        figures = _measure(run, card, folder, data, evaluate_folder(folder, data))
        run.log(figures)
        for stage in stages:
            promotion = _decide(run, version, stage, rules, figures, data)
            promotions.append(promotion)
            if not promotion.verdict.passed:
                break
    return tuple(promotions)


def _decide(
    run: Run,
    version: RegisteredVersion,
    stage: Target,
    policy: Policy,
    figures: Mapping[str, float],
    data: Dataset,
) -> Promotion:
    """Judge for one stage, and write down what was decided."""
    incumbent, note = _incumbent_figures(version, stage, data)
    verdict = judge(policy, figures, incumbent=incumbent)
    content = {"version": version.uri, "passed": verdict.passed, "note": note}
    run.log_json({**content, "findings": verdict.table()}, f"verdict-{stage}.json")
    if verdict.passed:
        set_stage(version, stage, verdict=verdict, reason=note)
    else:
        record_refusal(version, stage, verdict)
    run.set_tags({f"verdict.{stage}": verdict.refusal or "passed"})
    return Promotion(find_version(version.uri), stage, verdict, figures, note)


def newest_of_role(role: str) -> str:
    """URI of the newest version of a role's registered model, such as ``tomogram-segmenter``.

    Raises
    ------
    ValueError
        If the role is unknown or nothing is registered under its name.
    """
    if role not in ROLE_NAMES.values():
        msg = f"unknown role {role!r}: expected {', '.join(ROLE_NAMES.values())}"
        raise ValueError(msg)
    return newest_version(f"{PREFIX}-{role}").uri


def _measure(
    run: Run, card: ModelCard, folder: Path, data: Dataset, evaluation: Evaluation
) -> dict[str, float]:
    """Figures of the candidate that policies may judge."""
    figures = {"parity": measure_parity(folder)}
    for name, score in evaluation.summary().items():
        figures |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
    trivial = _trivial_methods(card, data)
    if trivial:
        figures |= {f"baseline_{name}_iou": value for name, value in trivial.items()}
        figures["iou_margin"] = figures["foreground_iou"] - max(trivial.values())
    if card.role == "student":
        figures |= _measure_against_teacher(run, card, folder, data, evaluation)
    return figures


def _measure_against_teacher(
    run: Run, card: ModelCard, folder: Path, data: Dataset, evaluation: Evaluation
) -> dict[str, float]:
    if card.teacher is None:
        return {}
    teachers = resolve_teachers(card.teacher)
    compared = compare_with_teachers(run, card, evaluation, teachers, teachers.evaluate(data))
    student_rate, *teacher_rates = measure_throughputs(
        [Candidate(folder=each) for each in (folder, *teachers.folders)]
    )
    # An ensemble asks one member after the other.
    teacher_rate = 1.0 / sum(1.0 / rate for rate in teacher_rates)
    return compared | {
        "speedup": student_rate / teacher_rate,
        "subtomograms_per_s": student_rate,
        "teacher_subtomograms_per_s": teacher_rate,
    }


def _incumbent_figures(
    version: RegisteredVersion, stage: Target, data: Dataset
) -> tuple[dict[str, float] | None, str]:
    """Scores of the version now in the stage on the same data, and what hinders the comparison."""
    holder = stage_holder(version.name, stage)
    if holder is None or holder.version == version.version:
        return None, ""
    folder, _ = resolve_model(holder.uri)
    try:
        check_matches(ModelCard.from_folder(folder), data)
    except ValueError as error:
        return None, f"not compared with {holder.label}, which serves other data: {error}"
    evaluation = evaluate_folder(folder, data)
    return {name: score.value for name, score in evaluation.summary().items()}, ""


def judged_dataset(version: RegisteredVersion | None, dataset: Path | None) -> Dataset:
    """The dataset given, or the one that the version was trained on, its digest verified."""
    if dataset is not None:
        return open_dataset(dataset)
    path = None if version is None else version.tags.get(DATASET_TAG)
    if version is None or path is None:
        msg = "no dataset is known for this model: give one with --dataset"
        raise ValueError(msg)
    try:
        data = open_dataset(Path(path))
    except FileNotFoundError:
        msg = f"{version.label} was trained on {path}, which is gone: give one with --dataset"
        raise FileNotFoundError(msg) from None
    folder, _ = resolve_model(version.uri)
    expected, found = ModelCard.from_folder(folder).dataset_digest, data.manifest.content_digest()
    if found != expected:
        msg = (
            f"{path} has the digest {found[:12]}…, {version.label} was trained on "
            f"{expected[:12]}…: give the dataset with --dataset"
        )
        raise ValueError(msg)
    return data


def _names_a_version(model: str) -> bool:
    name = model.removeprefix("models:/")
    return "/" in name or "@" in name

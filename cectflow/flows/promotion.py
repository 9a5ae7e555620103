"""Judging registered versions: evaluation, promotion and its refusal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cectflow.dataset import Dataset, open_dataset
from cectflow.flows.evaluation import log_evaluation
from cectflow.flows.evidence import (
    Measured,
    compare_with_incumbent,
    judge_incumbent,
    measure,
    trivial_methods,
)
from cectflow.flows.judged import Judged
from cectflow.flows.promotion_report import Outcome, Pictures, Promotion, write_report
from cectflow.learning.breakdown import Group
from cectflow.learning.training import check_matches, evaluate_folder
from cectflow.manifest import SplitName
from cectflow.model_card import ModelCard, Score
from cectflow.shards import check_files
from cectflow.tracking.lineage import DATASET_TAG
from cectflow.tracking.policy import Evidence, Target, judge, load_policy
from cectflow.tracking.promotion import find_withdrawal, record_refusal, set_stage
from cectflow.tracking.registry import resolve_model
from cectflow.tracking.runs import start_run
from cectflow.tracking.versions import (
    PREFIX,
    ROLE_NAMES,
    RegisteredVersion,
    find_version,
    newest_version,
    role_name,
    stage_holder,
)

__all__ = [
    "Promotion",
    "Report",
    "Target",
    "evaluate_model",
    "judged_dataset",
    "newest_of_role",
    "promote",
]

TAG_LENGTH = 5000
"""Characters of a tag of a run that every store takes."""
JUDGING_SPLITS: tuple[SplitName, ...] = ("validation", "test")
"""Test judges; validation gives the cubes on which siblings in lower precision are compared."""


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
        trivial = trivial_methods(card, data)
        groups = log_evaluation(run, folder, card, data, evaluation, trivial)
        run.log({f"baseline_{name}_iou": value for name, value in trivial.items()})
    return Report(evaluation.summary(), trivial, groups)


def promote(
    model: str,
    *stages: Target,
    policy: str | None = None,
    dataset: Path | None = None,
    dry_run: bool = False,
    force: bool = False,
    reason: str = "",
    nested: bool = False,
) -> tuple[Promotion, ...]:
    """Promotion of a version to a stage, or through several, if its role's policy allows it.

    Every figure is measured here and now on one frozen test split, whose files are compared with
    the digests of its manifest: the candidate's, its teacher's, and those of the version now in
    the stage. A refused version stays where it is, and no later stage is tried; the verdict
    becomes tags of the version either way, and a page of the run (``report-{stage}.html``).

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
    dry_run
        Measure and judge; write no tag, stage or history. The run is tagged ``dry_run``.
    force
        Set the stage against a refusal.
    reason
        Why, for the history; ``force`` needs one, and a version that was archived by name.
    nested
        Inside an open run.

    Returns
    -------
    tuple of Promotion
        One for each stage that was tried.

    Raises
    ------
    ValueError
        Before any work: force, or an archived version, without a reason, a policy that does not
        suit the network, a version in production asked back to staging, or files of the dataset
        that were changed.
    FileNotFoundError
        If dataset or model are gone.
    """
    reason = reason.strip()
    if force and not reason:
        msg = "--force needs --reason: what is set against its policy is recorded with the cause"
        raise ValueError(msg)
    version = find_version(model) if _names_a_version(model) else newest_version(model)
    if "staging" in stages and "production" in version.stages:
        msg = f"{version.label} is in production: staging is for candidates; give another version"
        raise ValueError(msg)
    withdrawal = find_withdrawal(version)
    if withdrawal is not None and not reason:
        msg = (
            f"{version.label} was archived on {withdrawal.time[:10]} ({withdrawal.reason}), which "
            f"no measurement may show: say with --reason why it is to have a stage again"
        )
        raise ValueError(msg)
    folder, _ = resolve_model(version.uri)
    card = ModelCard.from_folder(folder)
    rules = load_policy(policy or role_name(card.role, card.task))
    data = judged_dataset(version, dataset)
    check_matches(card, data)
    named = card.labels if card.task == "semantic" else data.manifest.classes
    rules.check_suits(card.role, card.task, named)
    _refuse_changed(data)
    rivals = _Rivals(version, card, data)
    tags = {"role": card.role} | ({"dry_run": "true"} if dry_run else {})
    promotions: list[Promotion] = []
    with start_run(f"promote_{card.role}", tags=tags, nested=nested) as run:
        run.log_input_model(version)
        run.log_config(rules, "policy")
        digest = data.manifest.content_digest()
        run.log_dataset(data.manifest.kind, digest, str(data.folder.resolve()), "test")
        measured = measure(run, version, folder, data, rules, stages, rivals.judged(stages))
        run.log(measured.evidence.figures)
        pictures = Pictures(measured, data)
        for stage in stages:
            evidence, rival = rivals.compare(measured, stage, rules.score)
            verdict = judge(rules, stage, evidence)
            overruled = force and not verdict.passed
            if overruled:
                context = {**verdict.context, "forced": reason}
                verdict = replace(verdict, context=context)
            promotion = Promotion(
                version, stage, verdict, evidence.figures,
                note=f"not compared: {evidence.incomparable}" if evidence.incomparable else "",
                outcome="dry run" if dry_run else "refused",
                reason=f"forced: {reason}" if overruled else reason,
                report=f"runs:/{run.run_id}/report-{stage}.html",
            )  # fmt: skip
            page = write_report(promotion, measured, rival, rules, data, pictures)
            run.log_text(page, f"report-{stage}.html")
            run.set_tags({f"verdict.{stage}": verdict.refusal[:TAG_LENGTH] or "passed"})
            promotions.append(promotion if dry_run else _settle(promotion))
            run.log_json(promotions[-1].facts(), f"verdict-{stage}.json")
            if not promotion.granted:
                break
    return tuple(promotions)


def _settle(promotion: Promotion) -> Promotion:
    """Write down what was decided, and set the stage unless it is a refusal."""
    version, stage, verdict = promotion.version, promotion.stage, promotion.verdict
    if not promotion.granted:
        record_refusal(version, stage, verdict)
        return replace(promotion, version=find_version(version.uri))
    reason = "; ".join(each for each in (promotion.reason, promotion.note) if each)
    change = set_stage(version, stage, verdict=verdict, reason=reason)
    outcome: Outcome = "promoted" if verdict.passed else "forced"
    if change.outcome == "superseded":  # another promotion was at work at the same time
        outcome = "superseded"
    return replace(promotion, version=find_version(version.uri), outcome=outcome)


class _Rivals:
    """Versions in the stages, each judged once on the candidate's test split."""

    def __init__(self, version: RegisteredVersion, card: ModelCard, data: Dataset) -> None:
        self._version, self._card, self._data = version, card, data
        self._found: dict[str, Judged | str] = {}

    def judged(self, stages: Sequence[Target]) -> list[Judged]:
        """Those that could be judged, each once."""
        found = {each.label: each for stage in stages
                 if isinstance(each := self._of(stage)[1], Judged)}  # fmt: skip
        return list(found.values())

    def compare(
        self, measured: Measured, stage: Target, score: str
    ) -> tuple[Evidence, Judged | None]:
        """Evidence with the version now in a stage, which is looked up again, and that version."""
        label, rival = self._of(stage)
        if rival is None:
            return measured.evidence, None
        evidence = compare_with_incumbent(measured, rival, label, score)
        return evidence, rival if isinstance(rival, Judged) else None

    def _of(self, stage: Target) -> tuple[str, Judged | str | None]:
        holder = stage_holder(self._version.name, stage)
        if holder is None or holder.version == self._version.version:
            return "", None
        if holder.label not in self._found:
            self._found[holder.label] = judge_incumbent(holder, self._card, self._data)
        return holder.label, self._found[holder.label]


def _refuse_changed(data: Dataset) -> None:
    """Refuse a dataset whose files are not those that its digest stands for."""
    faults = [fault for split in JUDGING_SPLITS for fault in check_files(data, split)]
    if faults:
        msg = (
            f"{data.folder} is not what its manifest says, so it judges nothing: "
            f"{'; '.join(faults[:3])}; restore it, or give another with --dataset"
        )
        raise ValueError(msg)


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

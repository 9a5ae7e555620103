"""Evidence for a promotion: all that a policy may ask, measured here and now on one test split."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cectflow.cost import count_program, weigh_files
from cectflow.dataset import Dataset
from cectflow.export import measure_parity
from cectflow.flows.judged import Judged, with_ends
from cectflow.flows.race import figures_of_timing, time_networks, timed_figures
from cectflow.flows.teachers import Teachers, compare_with_teachers, resolve_teachers
from cectflow.learning.calibration import measure_reliability
from cectflow.learning.scores import baselines
from cectflow.learning.task import SemanticLabels
from cectflow.learning.training import check_matches, evaluate_folder
from cectflow.learning.variants import judge_variants
from cectflow.model_card import ModelCard, Timing, Variant
from cectflow.runtime import INT8_FILE
from cectflow.tracking.lineage import teacher_uri
from cectflow.tracking.policy import Ancestor, Evidence, Policy, Target
from cectflow.tracking.policy_figures import ends
from cectflow.tracking.registry import resolve_model
from cectflow.tracking.runs import Run
from cectflow.tracking.versions import RegisteredVersion
from cectflow.trust import probabilities_of

__all__ = ["Measured", "compare_with_incumbent", "judge_incumbent", "measure", "trivial_methods"]

Found = tuple[dict[str, float], dict[str, str]]
"""Figures, and notes on them."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured of a candidate and its teacher, whatever the stage.

    Attributes
    ----------
    candidate, teacher
        The networks; no teacher where there is none or it cannot be had.
    evidence
        Without the version in a stage.
    timings
        Label of a network, device and runtime → its timing; by turns where they share both.
    """

    candidate: Judged
    teacher: Judged | None
    evidence: Evidence
    timings: Mapping[tuple[str, str, str], Timing] = field(default_factory=dict)


def measure(
    run: Run,
    version: RegisteredVersion,
    folder: Path,
    data: Dataset,
    policy: Policy,
    stages: Sequence[Target],
    incumbents: Sequence[Judged],
) -> Measured:
    """Figures of a candidate that policies may judge, but for those of a version in a stage.

    Parameters
    ----------
    run
        Receives the confusion matrices of student and teacher.
    version, folder
        Of the candidate.
    data
        Its test split judges, its validation split gives the cubes on which siblings in lower
        precision are compared.
    policy, stages
        Say on which devices and runtimes it is timed.
    incumbents
        Versions now in the stages, which are timed with it.
    """
    answers = evaluate_folder(folder, data)
    candidate = Judged.of(version.label, (folder,), answers, data.manifest)
    rarest = min(each.subtomograms for each in candidate.classes)
    teacher, of_teacher, taught = _measure_teacher(run, version, candidate, data)
    timings, not_timed = time_networks(candidate, teacher, incumbents, policy.timings(stages))
    figures, notes = _merge(
        (candidate.figures(), candidate.notes()),
        ({"smallest_class": float(rarest)}, {}),
        ({"parity": measure_parity(folder)}, {}),
        (_measure_margin(candidate, data), {}),
        (_measure_cost(folder), {}),
        _measure_calibration(candidate),
        _measure_siblings(candidate, data),
        of_teacher,
        timed_figures(candidate, teacher, timings),
        ({}, not_timed),
    )
    evidence = Evidence(
        figures=figures,
        notes=notes,
        lineage=_trace(candidate.card) | {"teacher": taught},
        variants=_carried(candidate),
        context={"dataset": data.manifest.content_digest(), "run": run.run_id},
    )
    return Measured(candidate, teacher, evidence, timings)


def compare_with_incumbent(
    measured: Measured, incumbent: Judged | str, label: str, score: str
) -> Evidence:
    """Evidence with what the version now in the stage makes of the same subtomograms.

    Parameters
    ----------
    measured
        Of the candidate.
    incumbent
        The other version on the same test split, or why it could not be judged on it.
    label
        Of the other version.
    score
        Of the policy, which is compared in pairs.
    """
    evidence = measured.evidence
    if isinstance(incumbent, str):
        return _extended(evidence, {}, {}, label, incumbent)
    figures = {f"incumbent_{name}": value for name, value in incumbent.figures().items()}
    notes = {f"incumbent_{name}": said for name, said in incumbent.notes().items()}
    for (timed, device, runtime), timing in measured.timings.items():
        if timed == label:
            figures |= figures_of_timing(timing, "incumbent_", f"{device}.{runtime}")
    gain = measured.candidate.evaluation.difference(incumbent.evaluation, score)
    return _extended(evidence, figures | with_ends("gain", gain), notes, label, "")


def judge_incumbent(version: RegisteredVersion, card: ModelCard, data: Dataset) -> Judged | str:
    """The version now in a stage on the same test split, or why it cannot be judged there.

    Parameters
    ----------
    version
        In the stage.
    card
        Of the candidate: what the two answer must be the same.
    data
        Whose test split judges.

    Raises
    ------
    ValueError, FileNotFoundError
        If its files are not those that were registered, or are gone.
    """
    folder, _ = resolve_model(version.uri)
    other = ModelCard.from_folder(folder)
    try:
        check_matches(other, data)
    except ValueError as error:
        return str(error)
    if (other.task, other.labels) != (card.task, card.labels):
        return (
            f"it answers {other.task} with labels {', '.join(other.labels) or 'none'}, the "
            f"candidate {card.task} with {', '.join(card.labels) or 'none'}"
        )
    return Judged.of(version.label, (folder,), evaluate_folder(folder, data), data.manifest)


def trivial_methods(card: ModelCard, data: Dataset) -> dict[str, float]:
    """Foreground IoU of trivial methods on a test split; empty for classifiers."""
    labels = None
    if card.task == "semantic":
        labels = SemanticLabels.of_card(card, data.manifest.classes)
    return baselines(data.split("test"), card.task, labels)


def _merge(*found: Found) -> Found:
    """All figures and all notes of several pairs of both."""
    figures: dict[str, float] = {}
    notes: dict[str, str] = {}
    for some_figures, some_notes in found:
        figures |= some_figures
        notes |= some_notes
    return figures, notes


def _extended(
    evidence: Evidence, figures: Mapping[str, float], notes: Mapping[str, str], label: str,
    incomparable: str,
) -> Evidence:  # fmt: skip
    return Evidence(
        figures={**evidence.figures, **figures},
        notes={**evidence.notes, **notes},
        lineage=evidence.lineage,
        variants=evidence.variants,
        incumbent=label,
        incomparable=incomparable,
        context=evidence.context,
    )


def _measure_margin(candidate: Judged, data: Dataset) -> dict[str, float]:
    """Of a segmenter, over trivial methods."""
    trivial = trivial_methods(candidate.card, data)
    if not trivial:
        return {}
    own = float(candidate.evaluation.scores["foreground_iou"].mean())
    named = {f"baseline_{name}_iou": value for name, value in trivial.items()}
    return named | {"iou_margin": own - max(trivial.values())}


def _measure_cost(folder: Path) -> dict[str, float]:
    parameters, macs = count_program(folder)
    heaviest = max(weigh_files(folder).values())
    return {"parameters": float(parameters), "macs": float(macs), "weights_mb": heaviest / 1e6}


def _measure_teacher(
    run: Run, version: RegisteredVersion, candidate: Judged, data: Dataset
) -> tuple[Judged | None, Found, tuple[bool, str]]:
    """The teacher of a student, figures and notes, and whether it is known.

    A teacher that cannot be had leaves its figures missing, so that every rule on them refuses.
    """
    card = candidate.card
    if card.role != "student":
        return None, ({}, {}), (False, f"a {card.role} has none")
    missing = ("agreement", *ends("retention"))
    if card.teacher is None:
        said = "the card names no teacher"
        return None, ({}, dict.fromkeys(missing, said)), (False, said)
    try:
        # Of a version that was pushed here the card names the teacher as another store does.
        teachers = resolve_teachers(teacher_uri(version) or card.teacher)
        answers = teachers.evaluate(data)
    except (ValueError, FileNotFoundError) as error:
        said = f"the teacher {card.teacher} cannot be had: {error}"
        return None, ({}, dict.fromkeys(missing, said)), (False, said)
    label = " + ".join(each.label for each in teachers.versions) or teachers.uri
    teacher = Judged.of(label, teachers.folders, answers, data.manifest)
    figures = {f"teacher_{name}": value for name, value in teacher.figures().items()}
    notes = {f"teacher_{name}": said for name, said in teacher.notes().items()}
    try:
        figures |= compare_with_teachers(run, card, candidate.evaluation, teachers, answers)
    except ValueError as error:  # a teacher that is never right: nothing can be retained
        notes |= dict.fromkeys(missing, str(error))
    return teacher, (figures, notes), _trace_teachers(teachers)


def _measure_calibration(candidate: Judged) -> Found:
    evaluation, trust = candidate.evaluation, candidate.card.trust
    if evaluation.logits is None:
        return {}, {}
    if trust is None:
        return {}, {"ece": "the card states no temperature"}
    probabilities = probabilities_of(evaluation.logits, trust.temperature)
    error = measure_reliability(probabilities, evaluation.class_ids).error
    return {"ece": error}, {"ece": f"at the card's temperature {trust.temperature:.3g}"}


def _carried(candidate: Judged) -> tuple[Variant, ...]:
    """Siblings in lower precision: those of the card, and one whose file is there all the same."""
    carried = dict.fromkeys(candidate.card.variants)
    if (candidate.folders[0] / INT8_FILE).is_file():
        carried |= {"int8": None}
    return tuple(carried)


def _measure_siblings(candidate: Judged, data: Dataset) -> Found:
    """Of every sibling in lower precision that the version carries; all must be measurable."""
    carried = _carried(candidate)
    if not carried:
        return {}, {}
    try:
        siblings = judge_variants(candidate.folders[0], data, carried)
    except (ValueError, FileNotFoundError) as error:
        names = [f"{name}_{what}" for name in (*carried, "variant")
                 for what in (*ends("difference"), "parity", "agreement")]  # fmt: skip
        return {}, dict.fromkeys(names, f"not measured: {error}")
    figures: dict[str, float] = {}
    for variant, sibling in siblings.items():
        figures |= with_ends(f"{variant}_difference", sibling.difference)
        figures[f"{variant}_parity"] = sibling.parity
        if sibling.agreement is not None:
            figures[f"{variant}_agreement"] = sibling.agreement
    for end in ends("difference"):
        figures[f"variant_{end}"] = min(figures[f"{variant}_{end}"] for variant in carried)
    figures["variant_parity"] = max(figures[f"{variant}_parity"] for variant in carried)
    agreements = [figures[f"{v}_agreement"] for v in carried if f"{v}_agreement" in figures]
    if agreements:
        figures["variant_agreement"] = min(agreements)
    worst = (*ends("variant_difference"), "variant_parity", "variant_agreement")
    return figures, dict.fromkeys(worst, f"of {', '.join(carried)}")


def _trace(card: ModelCard) -> dict[Ancestor, tuple[bool, str]]:
    commit = re.fullmatch(r"[0-9a-f]{40}", card.commit) is not None
    found: dict[Ancestor, tuple[bool, str]] = {
        "commit": (commit, f"{card.commit[:12]}{'' if commit else ', not a clean git commit'}")
    }
    digests: dict[Ancestor, str] = {"dataset": card.dataset_digest, "recipe": card.recipe_digest}
    for name, digest in digests.items():
        known = re.fullmatch(r"[0-9a-f]{64}", digest) is not None
        found[name] = (known, f"{digest[:12]}…" if known else f"{digest!r} is no sha256")
    return found


def _trace_teachers(teachers: Teachers) -> tuple[bool, str]:
    """Whether all are registered; their files were verified when they were fetched."""
    registered = len(teachers.versions) == len(teachers.folders)
    if not registered:
        return False, f"{teachers.uri} is not registered"
    digests = [digest[:12] for digest in teachers.digest().split()]
    pairs = zip(teachers.versions, digests, strict=True)
    return True, ", ".join(f"{version.label} {digest}…" for version, digest in pairs)

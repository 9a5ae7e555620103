"""Promotion policies: what a network must have earned, judged rule by rule on measured figures.

A :class:`Policy` is a YAML file, :func:`load_policy` reads it, :func:`judge` gives a
:class:`Verdict` on :class:`Evidence`. Nothing here measures anything and nothing here talks to
MLflow; the figures that rules may name are told by :mod:`.policy_figures`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

from pydantic import Field, model_validator

from cectflow.config import Config, find_named_file
from cectflow.model_card import Role, Task
from cectflow.runtime import RuntimeName
from cectflow.tracking.policy_figures import (
    BETTER_HIGHER,
    TIMED,
    ends,
    list_figures,
    refuse_unknown_figure,
    subject_of,
)

__all__ = [
    "VERDICT_HEADER",
    "Ancestor",
    "Evidence",
    "Finding",
    "Policy",
    "Requirement",
    "Rule",
    "Target",
    "Verdict",
    "judge",
    "load_policy",
]

Target = Literal["staging", "production"]
"""A stage that a version is promoted to."""
TARGETS: tuple[Target, ...] = get_args(Target)
Ancestor = Literal["commit", "dataset", "recipe", "teacher"]
"""What a version descends from: a clean git commit, the digests of dataset and recipe, teachers."""
LINEAGE = "lineage."
"""Before the name of an ancestor in findings."""
VERDICT_HEADER = ("figure", "candidate", "teacher", "incumbent", "bound", "outcome")


class Rule(Config):
    """One figure and the bound that it must keep."""

    figure: str
    """Of :mod:`.policy_figures`."""
    at_least: float | None = Field(None, allow_inf_nan=False)
    at_most: float | None = Field(None, allow_inf_nan=False)
    device: Literal["cpu", "cuda"] | None = None
    """Of figures that are timed; they name runtime and device."""
    runtime: RuntimeName | None = None
    stages: tuple[Target, ...] = TARGETS
    """On the way to which the rule is asked."""
    why: str
    """A sentence for whoever is refused."""

    @model_validator(mode="after")
    def _holds_one_bound(self) -> Rule:
        if (self.at_least is None) == (self.at_most is None):
            msg = f"rule on {self.figure!r} needs exactly one of at_least and at_most"
            raise ValueError(msg)
        named = self.device is not None and self.runtime is not None
        if self.figure in TIMED and not named:
            msg = (
                f"rule on {self.figure!r} needs device and runtime, such as device: cpu, runtime: "
                f"onnxruntime: it holds for them only"
            )
            raise ValueError(msg)
        if self.figure not in TIMED and (self.device or self.runtime):
            msg = f"{self.figure!r} is not timed, only {', '.join(TIMED)} name device and runtime"
            raise ValueError(msg)
        return self

    @property
    def key(self) -> str:
        """Name of the figure among what was measured: ``speedup.cpu.onnxruntime``."""
        if self.device is None:
            return self.figure
        return f"{self.figure}.{self.device}.{self.runtime}"


class Requirement(Config):
    """Something that a version must be known to descend from."""

    known: Ancestor
    stages: tuple[Target, ...] = TARGETS
    why: str


class Policy(Config):
    """What a role must show before it is promoted."""

    role: Role
    score: str
    """Figure that must not fall below that of the version now in the stage; a tie passes."""
    incomparable: Literal["refuse", "accept"] = "refuse"
    """What follows where the version in the stage does not take the data that the candidate is
    judged on: its box, voxel size or classes are others."""
    lineage: tuple[Requirement, ...] = ()
    rules: tuple[Rule, ...]

    @model_validator(mode="after")
    def _names_known_figures(self) -> Policy:
        if self.score not in BETTER_HIGHER:
            msg = f"unknown score {self.score!r}: expected one of {', '.join(BETTER_HIGHER)}"
            raise ValueError(msg)
        known = [name for task in get_args(Task) for name in list_figures(self.role, task)]
        for rule in self.rules:
            refuse_unknown_figure(rule.figure, known)
        if self.role != "student" and any(each.known == "teacher" for each in self.lineage):
            msg = f"a {self.role} has no teacher: leave it out of lineage"
            raise ValueError(msg)
        return self

    def check_suits(self, role: Role, task: Task, classes: Sequence[str]) -> None:
        """Refuse a network whose figures are not those that the policy judges, before any work.

        Parameters
        ----------
        role, task
            Of the network.
        classes
            Of a semantic segmenter its labels.

        Raises
        ------
        ValueError
            If the role is another, or a figure is none of such a network.
        """
        if role != self.role:
            msg = f"the policy is for a {self.role}, this is a {role}: give another with --policy"
            raise ValueError(msg)
        known = list_figures(role, task, classes)
        for name in (self.score, *(rule.figure for rule in self.rules)):
            try:
                refuse_unknown_figure(name, known)
            except ValueError as error:
                msg = f"the policy does not suit a {role} of the task {task}: {error}"
                raise ValueError(msg) from None

    def timings(
        self, stages: Sequence[Target]
    ) -> tuple[tuple[Literal["cpu", "cuda"], RuntimeName], ...]:
        """Devices and runtimes for which rules on the way to these stages ask, each pair once."""
        asked = [
            (rule.device, rule.runtime)
            for rule in self.rules
            if set(rule.stages) & set(stages) and rule.device and rule.runtime
        ]
        return tuple(dict.fromkeys(asked))


@dataclass(frozen=True, eq=False)
class Evidence:
    """What was measured of a candidate, its teacher and the version now in the stage.

    Attributes
    ----------
    figures
        By name, or by :attr:`Rule.key`; those of the teacher begin with ``teacher_``, those of the
        version in the stage with ``incumbent_``. What could not be measured is missing.
    notes
        Figure → what it was measured on, or why it is missing.
    lineage
        Whether each ancestor is known, and what is known of it.
    variants
        Siblings in lower precision that the candidate carries.
    incumbent
        Label of the version now in the stage; empty where there is none, or it is the candidate.
    incomparable
        Why that one could not be judged on the same data; empty where it was.
    context
        What else a verdict is to record: digest of the dataset, id of the run.
    """

    figures: Mapping[str, float | int]
    notes: Mapping[str, str] = field(default_factory=dict)
    lineage: Mapping[Ancestor, tuple[bool, str]] = field(default_factory=dict)
    variants: tuple[str, ...] = ()
    incumbent: str = ""
    incomparable: str = ""
    context: Mapping[str, str] = field(default_factory=dict)

    def number(self, figure: str) -> float:
        """A figure; NaN where it is missing or infinite."""
        value = float(self.figures.get(figure, math.nan))
        return value if math.isfinite(value) else math.nan


@dataclass(frozen=True)
class Finding:
    """One rule applied to one figure; a figure that is missing has the value NaN."""

    rule: str
    """The rule in words: ``speedup at least 3``."""
    figure: str
    value: float
    threshold: float
    passed: bool
    why: str = ""
    note: str = ""
    """What was measured, or why it could not be, or why the rule is not asked."""
    asked: bool = True
    """Not asked: about a stage that is empty, or siblings that the version does not carry."""
    low: float = math.nan
    high: float = math.nan
    """Ends of the figure's 95 % interval, where it has one."""
    teacher: float = math.nan
    """The same figure of the teacher, where it has one."""
    incumbent: float = math.nan
    """The same figure of the version now in the stage, where it has one."""

    @property
    def outcome(self) -> str:
        """``passed``, ``refused`` or ``not asked``."""
        if not self.asked:
            return "not asked"
        return "passed" if self.passed else "refused"


@dataclass(frozen=True)
class Verdict:
    """What a policy says of one version."""

    role: str
    passed: bool
    findings: tuple[Finding, ...]
    context: Mapping[str, str] = field(default_factory=dict)
    """Digests of policy and dataset, and the run that measured."""

    @property
    def refusal(self) -> str:
        """Rule, figure and threshold of everything that failed; empty when all passed."""
        failed = [finding for finding in self.findings if not finding.passed]
        if not failed:
            return ""
        return f"{self.role} refused: " + "; ".join(_complaint(finding) for finding in failed)

    def table(self) -> tuple[tuple[str, str, str, str, str, str], ...]:
        """Rows under :data:`VERDICT_HEADER`, as text."""
        return tuple(_row(finding) for finding in self.findings)

    def notes(self) -> tuple[tuple[str, str], ...]:
        """Figure and what there is to say of it besides the table, in its order."""
        return tuple(
            (each.figure, each.note)
            for each in self.findings
            if each.note and not each.figure.startswith(LINEAGE)
        )

    def tags(self) -> dict[str, str]:
        """What a version is tagged with below ``verdict.{stage}``: figures and context."""
        figures = {
            re.sub(r"[^\w\-. ]", "_", each.figure): f"{each.value:.6g}"
            for each in self.findings
            if each.asked
        }
        return figures | dict(self.context)

    def digest(self) -> str:
        """Hexadecimal sha256 of the verdict with all its figures."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def load_policy(name_or_path: str) -> Policy:
    """Policy read from a YAML file of one's own, or by a role's name from those cectflow brings.

    Raises
    ------
    ValueError
        If the name is unknown (the message lists the known ones) or the file is not valid: also
        if a rule is about a figure that nothing measures.
    """
    return Policy.from_yaml(find_named_file(name_or_path, "policies"))


def judge(policy: Policy, stage: Target, evidence: Evidence) -> Verdict:
    """Verdict on what was measured of one version.

    Fails closed: a figure that is missing, NaN or infinite is refused, and so is an ancestor that
    is not known. No regression: the mean over subtomograms of the policy's score, less that of the
    version now in the stage on the same ones, must not be below 0. A tie passes; that the interval
    of the difference reaches below 0 is told and does not refuse, for then a version as good as
    the one in the stage would be refused too. A rule on ``gain_low`` asks for more.

    The comparison is plain, not ``mlflow.validate_evaluation_results``: that one imports MLflow
    (1.5 s), knows neither intervals nor pairs, gives back no reason and no list of what passed,
    and cannot say "not below the version in the stage, a tie passes" or "98 % of the teacher".
    The only rules that it can express, one figure and one bound, are one line here.

    Parameters
    ----------
    policy
        The rules.
    stage
        On the way to which it is asked.
    evidence
        All measured on one frozen test split.
    """
    findings = [_apply(rule, evidence) for rule in policy.rules if stage in rule.stages]
    findings += [_trace(each, evidence) for each in policy.lineage if stage in each.stages]
    if evidence.incumbent:
        findings.append(_no_regression(policy, evidence))
    passed = all(finding.passed for finding in findings)
    context = {**evidence.context, "policy": policy.digest()}
    return Verdict(policy.role, passed, tuple(findings), context)


def _apply(rule: Rule, evidence: Evidence) -> Finding:
    value = evidence.number(rule.key)
    if rule.at_least is not None:
        words, threshold, kept = "at least", rule.at_least, value >= rule.at_least
    else:
        assert rule.at_most is not None
        words, threshold, kept = "at most", rule.at_most, value <= rule.at_most
    text = f"{rule.figure} {words} {threshold:.6g}"
    if rule.device is not None:
        text += f" on {rule.device} with {rule.runtime}"
    moot = _why_not_asked(rule.figure, evidence)
    _, low, high = (evidence.number(end) for end in ends(rule.key))
    return Finding(
        text, rule.key, value, threshold, bool(moot) or kept, rule.why,
        note=moot or evidence.notes.get(rule.key, ""), asked=not moot, low=low, high=high,
        teacher=evidence.number(f"teacher_{rule.key}"),
        incumbent=evidence.number(f"incumbent_{rule.key}"),
    )  # fmt: skip


def _why_not_asked(figure: str, evidence: Evidence) -> str:
    """Why a figure is none of this version; empty where it is."""
    subject = subject_of(figure)
    if subject == "incumbent" and not evidence.incumbent:
        return "no other version is in the stage"
    if subject == "incumbent" and evidence.incomparable:
        return f"{evidence.incumbent} cannot be compared; see gain"
    if subject == "variant" and not evidence.variants:
        return "it carries no sibling in lower precision"
    if subject in ("bfloat16", "int8") and subject not in evidence.variants:
        return f"it carries no sibling in {subject}"
    return ""


def _trace(requirement: Requirement, evidence: Evidence) -> Finding:
    name = requirement.known
    known, words = evidence.lineage.get(name, (False, "not known"))
    return Finding(
        f"{name} known", f"{LINEAGE}{name}", float(known), 1.0, known, requirement.why, note=words
    )


def _no_regression(policy: Policy, evidence: Evidence) -> Finding:
    score = policy.score
    text = f"gain at least 0: {score} no worse than that of {evidence.incumbent}"
    why = "A promotion must not make the stage worse."
    if evidence.incomparable:
        accepted = policy.incomparable == "accept"
        note = f"not compared with {evidence.incumbent}: {evidence.incomparable}"
        return Finding(
            text, "gain", math.nan, 0.0, accepted, why, note=note, asked=not accepted
        )  # fmt: skip
    value, low, high = (evidence.number(name) for name in ends("gain"))
    before = evidence.number(f"incumbent_{score}")
    own, other = _number(evidence.number(score)), _number(before)
    note = f"{score} is {own}, that of {evidence.incumbent} {other}, paired over fields"
    return Finding(
        text, "gain", value, 0.0, value >= 0, why, note=note, low=low, high=high, incumbent=before
    )


def _complaint(finding: Finding) -> str:
    if finding.figure.startswith(LINEAGE):
        said = f"{finding.figure.removeprefix(LINEAGE)} is not known"
    else:
        value = "missing" if math.isnan(finding.value) else f"{finding.value:.6g}"
        said = f"{finding.figure} is {value}, expected {finding.rule}"
    remarks = [each for each in (finding.note, finding.why) if each]
    return said + (f" ({'; '.join(remarks)})" if remarks else "")


def _row(finding: Finding) -> tuple[str, str, str, str, str, str]:
    own = _number(finding.value)
    if math.isfinite(finding.low) and math.isfinite(finding.high):
        own += f" ({_number(finding.low)} to {_number(finding.high)})"
    others = ["" if math.isnan(v) else _number(v) for v in (finding.teacher, finding.incumbent)]
    subject = subject_of(finding.figure)
    if not finding.asked:
        own = ""
    elif finding.figure.startswith(LINEAGE):
        own = finding.note
    elif subject == "teacher":
        own, others[0] = "", own
    elif subject == "incumbent" and finding.figure not in ends("gain"):
        own, others[1] = "", own
    return finding.figure, own, others[0], others[1], finding.rule, finding.outcome


def _number(value: float) -> str:
    return "missing" if math.isnan(value) else f"{value:.4g}"

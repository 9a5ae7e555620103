"""Promotion policies: what a network must have earned, judged rule by rule on measured figures.

A :class:`Policy` is a YAML file, :func:`load_policy` reads it, :func:`judge` gives a
:class:`Verdict`. Nothing here measures anything and nothing here talks to MLflow.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from pydantic import model_validator

from cectflow.config import Config, find_named_file
from cectflow.model_card import Role

__all__ = ["Finding", "Policy", "Rule", "Verdict", "judge", "load_policy"]


class Rule(Config):
    """One figure and the bound that it must keep."""

    figure: str
    at_least: float | None = None
    at_most: float | None = None
    why: str
    """A sentence for whoever is refused."""

    @model_validator(mode="after")
    def _holds_one_bound(self) -> Rule:
        if (self.at_least is None) == (self.at_most is None):
            msg = f"rule on {self.figure!r} needs exactly one of at_least and at_most"
            raise ValueError(msg)
        return self


class Policy(Config):
    """What a role must show before it is promoted."""

    role: Role
    score: str
    """Figure that must not fall below that of the version now in the stage; a tie passes."""
    rules: tuple[Rule, ...]


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


@dataclass(frozen=True)
class Verdict:
    """What a policy says of one version."""

    role: str
    passed: bool
    findings: tuple[Finding, ...]

    @property
    def refusal(self) -> str:
        """Rule, figure and threshold of everything that failed; empty when all passed."""
        failed = [finding for finding in self.findings if not finding.passed]
        if not failed:
            return ""
        return f"{self.role} refused: " + "; ".join(_complaint(finding) for finding in failed)

    def table(self) -> tuple[tuple[str, str, str, str], ...]:
        """Rows of figure, value, rule and outcome, as text."""
        return tuple(
            (
                finding.figure,
                _number(finding.value),
                finding.rule,
                "passed" if finding.passed else "refused",
            )
            for finding in self.findings
        )

    def digest(self) -> str:
        """Hexadecimal sha256 of the verdict with all its figures."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def load_policy(name_or_path: str) -> Policy:
    """Policy read from a YAML file of one's own, or by a role's name from those cectflow brings.

    Raises
    ------
    ValueError
        If the name is unknown (the message lists the known ones) or the file is not valid.
    """
    return Policy.from_yaml(find_named_file(name_or_path, "policies"))


def judge(
    policy: Policy,
    figures: Mapping[str, float | int],
    *,
    incumbent: Mapping[str, float | int] | None,
) -> Verdict:
    """Verdict on the figures of one version.

    Fails closed: a figure that is missing, NaN or infinite is refused. The comparison is plain,
    not ``mlflow.validate_evaluation_results``: that one imports MLflow (1.5 s), knows no reason
    to give back, and cannot say "not below the version in the stage, a tie passes".

    Parameters
    ----------
    policy
        The rules.
    figures
        Measured on the frozen test split, by name.
    incumbent
        The same figures of the version now in the stage; None where the stage is empty, or holds
        this very version.
    """
    findings = [_apply(rule, figures) for rule in policy.rules]
    if incumbent is not None:
        findings.append(_no_regression(policy.score, figures, incumbent))
    return Verdict(policy.role, all(finding.passed for finding in findings), tuple(findings))


def _apply(rule: Rule, figures: Mapping[str, float | int]) -> Finding:
    value = _finite(figures, rule.figure)
    if rule.at_least is not None:
        words, threshold, passed = "at least", rule.at_least, value >= rule.at_least
    else:
        assert rule.at_most is not None
        words, threshold, passed = "at most", rule.at_most, value <= rule.at_most
    text = f"{rule.figure} {words} {_number(threshold)}"
    return Finding(text, rule.figure, value, threshold, passed, rule.why)


def _no_regression(
    figure: str, figures: Mapping[str, float | int], incumbent: Mapping[str, float | int]
) -> Finding:
    value, before = _finite(figures, figure), _finite(incumbent, figure)
    text = f"{figure} at least {_number(before)}, that of the version now in the stage"
    why = "A promotion must not make the stage worse."
    return Finding(text, figure, value, before, value >= before, why)


def _finite(figures: Mapping[str, float | int], figure: str) -> float:
    # NaN compares false with everything, so it fails whichever bound the rule states.
    value = float(figures.get(figure, math.nan))
    return value if math.isfinite(value) else math.nan


def _complaint(finding: Finding) -> str:
    return f"{finding.figure} is {_number(finding.value)}, expected {finding.rule}" + (
        f" ({finding.why})" if finding.why else ""
    )


def _number(value: float) -> str:
    return "missing" if math.isnan(value) else f"{value:.6g}"

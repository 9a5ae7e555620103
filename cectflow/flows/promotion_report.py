"""A promotion told: in one line, as JSON, and as one HTML page that opens without a network."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure

from cectflow.dataset import Dataset
from cectflow.flows.evaluation import draw_samples
from cectflow.flows.evidence import Measured
from cectflow.flows.judged import ClassScore, Judged
from cectflow.learning.figures import (
    draw_comparison,
    draw_confusion,
    draw_intervals,
    draw_latencies,
    draw_voxel_confusion,
)
from cectflow.model_card import Score
from cectflow.tracking.policy import VERDICT_HEADER, Finding, Policy, Target, Verdict
from cectflow.tracking.policy_figures import CLASS_SCORES, ends
from cectflow.tracking.versions import RegisteredVersion

__all__ = ["Outcome", "Pictures", "Promotion", "write_report"]

Outcome = Literal["promoted", "forced", "refused", "superseded", "dry run"]
TEMPLATE = "promotion_report.html"
DPI = 100


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
    outcome
        ``superseded``: another version took the stage at the same time.
    reason
        Of whoever asked.
    report
        URI of the page.
    """

    version: RegisteredVersion
    stage: Target
    verdict: Verdict
    figures: Mapping[str, float | int]
    note: str = ""
    outcome: Outcome = "promoted"
    reason: str = ""
    report: str = ""

    @property
    def granted(self) -> bool:
        """Whether the policy allows it, or it was overruled."""
        return self.verdict.passed or "forced" in self.verdict.context

    def summary(self) -> str:
        """What became of it, in one line."""
        label, held = self.version.label, ", ".join(self.version.stages)
        if self.outcome == "promoted":
            return f"{label} is in {held}"
        if self.outcome == "forced":
            return (
                f"{label} is in {held}, against its policy ({self.reason}): {self.verdict.refusal}"
            )
        if self.outcome == "superseded":
            return f"{label} is not in {self.stage}: another version took it at the same time"
        if self.outcome == "refused":
            return f"{label} stays where it is: {self.verdict.refusal}"
        would = "would be promoted" if self.verdict.passed else self.verdict.refusal
        if self.granted and not self.verdict.passed:
            would = f"would be forced against: {self.verdict.refusal}"
        return f"dry run, nothing is changed: {label} to {self.stage}: {would}"

    def facts(self) -> dict[str, Any]:
        """For JSON; a figure that is missing is None."""
        findings = [
            {**{k: _plain(v) for k, v in asdict(each).items()}, "outcome": each.outcome}
            for each in self.verdict.findings
        ]
        return {
            "model": self.version.uri,
            "stage": self.stage,
            "outcome": self.outcome,
            "passed": self.verdict.passed,
            "refusal": self.verdict.refusal,
            "stages": self.version.stages,
            "reason": self.reason,
            "note": self.note,
            "findings": findings,
            "figures": {name: _plain(value) for name, value in self.figures.items()},
            **self.verdict.context,
            "digest": self.verdict.digest(),
            "report": self.report,
        }


class Caption(NamedTuple):
    """Of a picture."""

    title: str
    text: str


CONFUSION = Caption("Confusion", "Rows are the truth.")
RATIOS = Caption(
    "Retention and gain", "Intervals from a paired bootstrap over fields; bounds of rules in red."
)
CLASSES = Caption("Classes", "A class of few subtomograms has a wide interval.")
LATENCY = Caption("Latency", "Measured by turns, for this promotion.")
SAMPLES = Caption("Samples", "Test subtomograms: right and wrong, or best, median and worst.")


class Pictures:
    """Pictures of a page as PNG in base64; those that no stage changes are drawn once.

    Parameters
    ----------
    measured, data
        What was measured, and on what.
    """

    def __init__(self, measured: Measured, data: Dataset) -> None:
        self._measured, self._data = measured, data
        self._drawn: dict[tuple[str, str], str] = {}

    def draw(self, verdict: Verdict, incumbent: Judged | None) -> list[tuple[Caption, str]]:
        """All pictures of one stage.

        Parameters
        ----------
        verdict
            On the way to the stage.
        incumbent
            The version now in it, where it was judged.
        """
        measured, own = self._measured, self._measured.candidate
        networks = _networks(measured, incumbent)
        rival = incumbent.label if incumbent else ""
        # What a picture depends on besides the candidate, and how it is drawn.
        drawn: list[tuple[Caption, str, Callable[[], Figure | None]]] = [
            (CONFUSION, rival, lambda: _draw_confusion(networks)),
            (RATIOS, verdict.digest(), lambda: _draw_ratios(measured, verdict)),
            (CLASSES, rival, lambda: _draw_classes(networks)),
            (LATENCY, rival, lambda: _draw_latency(measured, networks)),
            (SAMPLES, "",
             lambda: draw_samples(own.folders[0], own.card, self._data, own.evaluation)),
        ]  # fmt: skip
        for caption, key, draw in drawn:
            if (caption.title, key) not in self._drawn:
                self._drawn[caption.title, key] = _encode(draw)
        pictures = [(caption, self._drawn[caption.title, key]) for caption, key, _ in drawn]
        return [(caption, picture) for caption, picture in pictures if picture]


def write_report(
    promotion: Promotion,
    measured: Measured,
    incumbent: Judged | None,
    policy: Policy,
    data: Dataset,
    pictures: Pictures,
) -> str:
    """The page of a verdict: HTML with its pictures in it and without scripts.

    Whatever comes from users, names of classes among it, is escaped; the page itself forbids
    browsers to fetch anything or to run anything.

    Parameters
    ----------
    promotion
        As it is judged, before its stage is set.
    measured, incumbent
        The networks.
    policy
        That judged.
    data
        Whose test split judged.
    pictures
        Of ``measured``.
    """
    verdict = promotion.verdict
    # Everything is escaped, whatever the name of the template.
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    source = resources.files("cectflow.flows").joinpath(TEMPLATE).read_text(encoding="utf-8")
    networks, notes = _networks(measured, incumbent), dict(verdict.notes())
    return environment.from_string(source).render(
        title=f"{promotion.version.label} to {promotion.stage}",
        passed=promotion.granted,
        outcome=_outcome(promotion),
        remarks=[each for each in (verdict.refusal, promotion.reason, promotion.note) if each],
        header=VERDICT_HEADER,
        findings=[
            (_mark(finding), row, _remark(finding, notes))
            for finding, row in zip(verdict.findings, verdict.table(), strict=True)
        ],
        facts=_describe(promotion, measured, policy, data),
        pictures=pictures.draw(verdict, incumbent),
        networks=[_title(role, network) for role, network in networks.items()],
        classes=_rows(list(networks.values())),
        figures=[(name, f"{value:.6g}") for name, value in promotion.figures.items()],
    )


def _mark(finding: Finding) -> str:
    """Style of an outcome."""
    if not finding.passed:
        return "refused"
    return "passed" if finding.asked else "note"


def _remark(finding: Finding, notes: Mapping[str, str]) -> str:
    return " — ".join(each for each in (notes.get(finding.figure, ""), finding.why) if each)


def _outcome(promotion: Promotion) -> str:
    dry = "dry run, nothing is changed: " if promotion.outcome == "dry run" else ""
    if promotion.verdict.passed:
        return f"{dry}the policy allows it"
    return f"{dry}the policy refuses it" + (", and is overruled" if promotion.granted else "")


def _describe(
    promotion: Promotion, measured: Measured, policy: Policy, data: Dataset
) -> list[tuple[str, str]]:
    card, manifest, context = measured.candidate.card, data.manifest, promotion.verdict.context
    evidence, fields = measured.evidence, len(manifest.field_records("test"))
    return [
        ("candidate", f"{promotion.version.label}: {card.network}, {card.role}, {card.task}"),
        ("teacher", measured.teacher.label if measured.teacher else card.teacher or "none"),
        ("policy", f"{policy.role}, score {policy.score}, digest {context['policy']}"),
        ("dataset", f"{data.folder}, digest {context['dataset']}"),
        ("test split", f"{manifest.count('test')} subtomograms of {fields} fields"),
        ("run", context["run"]),
        *((f"lineage: {name}", said) for name, (_, said) in evidence.lineage.items()),
        ("cectflow", f"commit {card.commit} trained it"),
        *((f"timed: {key.partition('.')[2]}", said) for key, said in evidence.notes.items()
          if key.startswith("latency_ms.")),
    ]  # fmt: skip


def _networks(measured: Measured, incumbent: Judged | None) -> dict[str, Judged]:
    """Role in the promotion → network."""
    networks = {"candidate": measured.candidate}
    if measured.teacher is not None:
        networks["teacher"] = measured.teacher
    if incumbent is not None:
        networks["in the stage"] = incumbent
    return networks


def _title(role: str, network: Judged) -> str:
    return f"{role}: {network.label}"


def _rows(networks: Sequence[Judged]) -> list[list[str]]:
    first = networks[0].classes
    return [
        [each.name, str(each.subtomograms), str(each.fields)]
        + [_words(_of_class(network, each.name)) for network in networks]
        for each in first
    ]


def _of_class(network: Judged, name: str) -> Score | None:
    return next((each.score for each in network.classes if each.name == name), None)


def _words(score: Score | None) -> str:
    if score is None:
        return "none"
    return f"{score.value:.3f} ({score.low:.3f} to {score.high:.3f})"


def _draw_confusion(networks: Mapping[str, Judged]) -> Figure | None:
    own = networks["candidate"].evaluation
    classes = [each.name for each in networks["candidate"].classes]
    if own.predicted is not None:
        predicted = {
            _title(role, network): network.evaluation.predicted
            for role, network in networks.items()
            if network.evaluation.predicted is not None
        }
        return draw_confusion(own.class_ids, predicted, classes)
    voxels = {
        _title(role, network): network.evaluation.counts.sum(axis=0)
        for role, network in networks.items()
        if network.evaluation.counts is not None
    }
    return draw_voxel_confusion(voxels, own.labels) if voxels else None


def _draw_ratios(measured: Measured, verdict: Verdict) -> Figure | None:
    figures = {each.figure: each for each in verdict.findings}
    panels: dict[str, tuple[Score, float, dict[str, float]]] = {}
    numbers = measured.evidence.figures
    if "retention" in numbers:
        value, low, high = (numbers[name] for name in ends("retention"))
        score = Score(value=float(value), low=float(low), high=float(high))
        panels["retention: student over teacher"] = (score, 1.0, _bounds(figures, "retention"))
    gain = figures.get("gain")
    if gain is not None and math.isfinite(gain.value):
        score = Score(value=gain.value, low=gain.low, high=gain.high)
        panels["gain over the version in the stage"] = (score, 0.0, _bounds(figures, "gain"))
    return draw_intervals(panels) if panels else None


def _bounds(findings: Mapping[str, Finding], figure: str) -> dict[str, float]:
    return {
        found.rule.partition(":")[0]: found.threshold
        for name, found in findings.items()
        if name in ends(figure)
    }


def _draw_classes(networks: Mapping[str, Judged]) -> Figure:
    own = networks["candidate"]
    names = [_counted(each) for each in own.classes]
    scores = {
        _title(role, network): [_of_class(network, each.name) for each in own.classes]
        for role, network in networks.items()
    }
    return draw_comparison(names, scores, CLASS_SCORES[own.card.task][0].replace("_", " "))


def _counted(each: ClassScore) -> str:
    return f"{each.name} ({each.subtomograms})"


def _draw_latency(measured: Measured, networks: Mapping[str, Judged]) -> Figure | None:
    timings = {
        f"{_title(role, network)}\n{device}, {runtime}": timing
        for (label, device, runtime), timing in measured.timings.items()
        for role, network in networks.items()
        if network.label == label
    }
    return draw_latencies(timings) if timings else None


def _encode(draw: Callable[[], Figure | None]) -> str:
    """A picture as PNG in base64; empty where there is none."""
    # Names of classes are no mathematics: "$" in them would be read as such, and may not parse.
    with mpl.rc_context({"text.parse_math": False}):
        figure = draw()
        if figure is None:
            return ""
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _plain(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value

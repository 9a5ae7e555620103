"""Unknown cubes: how well a classifier's logits tell them from those of its own classes."""

from __future__ import annotations

from typing import get_args

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from cectflow.config import Config
from cectflow.learning.calibration import bootstrap_auroc
from cectflow.learning.scores import Evaluation, bootstrap_score
from cectflow.model_card import Score, Trust, UnknownScore
from cectflow.trust import find_unknown, score_known

__all__ = ["StrangerKind", "UnknownReport", "judge_kind", "judge_known"]


class StrangerKind(Config):
    """What a classifier says of one kind of cubes that are about none of its classes."""

    name: str
    cubes: int
    unknown: Score
    """Share that is called ``unknown``."""
    auroc: dict[UnknownScore, Score]
    """Of each score: the chance that a known cube has a higher one."""


class UnknownReport(Config):
    """How a classifier tells known cubes from others. Intervals are 95 %, over fields."""

    score: UnknownScore
    """The one that decides."""
    threshold: float
    known_cubes: int
    true_positive_rate: Score
    """Share of the known test cubes that are not called ``unknown``."""
    accuracy: Score
    """Of all of them."""
    accuracy_of_passed: Score | None
    """Of those that are not called ``unknown``; None: all are."""
    kinds: tuple[StrangerKind, ...] = ()

    def figures(self) -> dict[str, float]:
        """Flat: name → number, for runs."""
        named = {"true_positive_rate": self.true_positive_rate, "accuracy": self.accuracy}
        if self.accuracy_of_passed is not None:
            named["accuracy_of_passed"] = self.accuracy_of_passed
        for kind in self.kinds:
            named[f"unknown_{kind.name}"] = kind.unknown
            named |= {f"auroc_{score}_{kind.name}": found for score, found in kind.auroc.items()}
        flat: dict[str, float] = {}
        for name, score in named.items():
            flat |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
        return flat


def judge_known(trust: Trust, known: Evaluation) -> UnknownReport:
    """What a classifier says of cubes of its own classes."""
    assert known.logits is not None
    passed, right = ~find_unknown(known.logits, trust), known.scores["accuracy"]
    return UnknownReport(
        score=trust.unknown_score,
        threshold=trust.unknown_threshold,
        known_cubes=len(right),
        true_positive_rate=bootstrap_score(passed.astype(np.float64), known.fields),
        accuracy=bootstrap_score(right, known.fields),
        accuracy_of_passed=(
            bootstrap_score(right[passed], known.fields[passed]) if passed.any() else None
        ),
    )


def judge_kind(
    name: str,
    trust: Trust,
    known: Evaluation,
    logits: Float[NDArray[np.float32], "n class"],
    fields: Int[NDArray[np.int64], " n"],
) -> StrangerKind:
    """What a classifier says of one kind of other cubes.

    Parameters
    ----------
    name
        Of the kind.
    trust
        Of the classifier's card.
    known
        Cubes of its own classes, for comparison.
    logits, fields
        Of the other cubes.
    """
    assert known.logits is not None
    scores: tuple[UnknownScore, ...] = get_args(UnknownScore)
    auroc = {
        kind: bootstrap_auroc(
            score_known(known.logits, kind, trust.typical), known.fields,
            score_known(logits, kind, trust.typical), fields,
        )
        for kind in scores
    }  # fmt: skip
    unknown = find_unknown(logits, trust).astype(np.float64)
    return StrangerKind(
        name=name, cubes=len(logits), unknown=bootstrap_score(unknown, fields), auroc=auroc
    )

"""Calibration: the temperature of a classifier's probabilities, and its threshold for ``unknown``.

Both come from the validation split; the test split only says what they are worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

from cectflow.learning.scores import Evaluation, bootstrap_score, resample_fields, sum_over_fields
from cectflow.model_card import Score, Trust, TypicalLogits, UnknownScore
from cectflow.trust import probabilities_of, score_known

__all__ = [
    "Reliability",
    "bootstrap_auroc",
    "choose_threshold",
    "describe_logits",
    "fit_temperature",
    "measure_reliability",
    "measure_trust",
]

TEMPERATURES = (0.1, 10.0)
"""Lowest and highest that is tried."""
NUM_BINS = 15
"""Of confidence, as in Guo et al. 2017."""
REFUSED_OF_KNOWN = 20
"""One in so many validation cubes is refused: a true-positive rate of 95 %."""
SCORE: UnknownScore = "distance"
"""Of the three in :func:`~cectflow.trust.score_known`: docs/prediction.md has the comparison."""
LEAST_SPREAD = 1e-6
"""Of a logit, in its units, where all validation cubes of a class have the same."""


@dataclass(frozen=True, eq=False)
class Reliability:
    """How often a classifier is right, by how sure it is: bins of equal width over (0, 1].

    Attributes
    ----------
    counts
        Cubes of each bin.
    confidence, accuracy
        Means over the cubes of each bin; NaN where it is empty.
    """

    counts: Int[NDArray[np.int64], " bin"]
    confidence: Float[NDArray[np.float64], " bin"]
    accuracy: Float[NDArray[np.float64], " bin"]

    @property
    def error(self) -> float:
        """Expected calibration error: mean over cubes of their bin's |accuracy - confidence|."""
        gaps = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float((self.counts * gaps).sum() / self.counts.sum())


def fit_temperature(
    logits: Float[NDArray[np.floating[Any]], "n class"], class_ids: Int[NDArray[np.int64], " n"]
) -> float:
    """Temperature at which the probabilities of validation cubes are most likely.

    Guo et al. 2017 (arXiv 1706.04599, section 4.2): the negative log-likelihood of softmax(z / T)
    is convex in 1 / T. Where every cube is classified right it falls towards T = 0, at which a
    network is certain of everything: cubes without an error do not tell how often there is one,
    and the temperature stays 1. Else it is kept within :data:`TEMPERATURES`.

    Parameters
    ----------
    logits
        Of validation cubes.
    class_ids
        Truth, from 1.
    """
    given = logits.astype(np.float64)
    true = given[np.arange(len(given)), class_ids - 1]
    if (true == given.max(axis=1)).all():
        return 1.0

    def loss(sharpness: float) -> float:
        return float((logsumexp(sharpness * given, axis=1) - sharpness * true).mean())

    lowest, highest = TEMPERATURES
    found = minimize_scalar(loss, bounds=(1.0 / highest, 1.0 / lowest), method="bounded")
    return 1.0 / float(found.x)


def measure_reliability(
    probabilities: Float[NDArray[np.float64], "n class"], class_ids: Int[NDArray[np.int64], " n"]
) -> Reliability:
    """Confidence and accuracy of classified cubes, in bins of confidence.

    Parameters
    ----------
    probabilities
        Of each class.
    class_ids
        Truth, from 1.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) + 1 == class_ids
    bins = np.clip(np.ceil(confidence * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    counts = np.bincount(bins, minlength=NUM_BINS)
    means = []
    for values in (confidence, right.astype(np.float64)):
        sums = np.bincount(bins, weights=values, minlength=NUM_BINS)
        means.append(np.where(counts > 0, sums / np.maximum(counts, 1), np.nan))
    return Reliability(counts, *means)


def describe_logits(
    logits: Float[NDArray[np.floating[Any]], "n class"], class_ids: Int[NDArray[np.int64], " n"]
) -> TypicalLogits:
    """Where the logits of validation cubes lie, and how far each of them spreads.

    Parameters
    ----------
    logits
        Of validation cubes.
    class_ids
        Truth, from 1. A class without cubes has no place.
    """
    given = logits.astype(np.float64)
    found, owner = np.unique(class_ids, return_inverse=True)
    centres = np.stack([given[class_ids == number].mean(axis=0) for number in found])
    spread = np.sqrt(((given - centres[owner]) ** 2).mean(axis=0))
    return TypicalLogits(
        centres=tuple(tuple(row) for row in centres.tolist()),
        spread=tuple(np.maximum(spread, LEAST_SPREAD).tolist()),
    )


def choose_threshold(scores: Float[NDArray[np.float64], " n"]) -> float:
    """Highest threshold that at least 95 % of validation cubes reach."""
    return float(np.sort(scores)[len(scores) // REFUSED_OF_KNOWN])


def measure_trust(validation: Evaluation, test: Evaluation, kind: UnknownScore = SCORE) -> Trust:
    """What the card of a classifier says of its probabilities and of ``unknown``.

    Parameters
    ----------
    validation
        Of the exported network: gives temperature and threshold.
    test
        Likewise: says what they are worth.
    kind
        Score that tells the unknown from the known.
    """
    assert validation.logits is not None
    assert test.logits is not None
    temperature = fit_temperature(validation.logits, validation.class_ids)
    before, after = (
        measure_reliability(probabilities_of(test.logits, t), test.class_ids).error
        for t in (1.0, temperature)
    )
    typical = describe_logits(validation.logits, validation.class_ids)
    threshold = choose_threshold(score_known(validation.logits, kind, typical))
    passed = score_known(test.logits, kind, typical) >= threshold
    return Trust(
        temperature=temperature,
        ece_before=before,
        ece_after=after,
        typical=typical,
        unknown_score=kind,
        unknown_threshold=threshold,
        true_positive_rate=bootstrap_score(passed.astype(np.float64), test.fields),
        validation_cubes=len(validation.class_ids),
    )


def bootstrap_auroc(
    known: Float[NDArray[np.float64], " n"],
    known_fields: Int[NDArray[np.int64], " n"],
    unknown: Float[NDArray[np.float64], " m"],
    unknown_fields: Int[NDArray[np.int64], " m"],
) -> Score:
    """Area under the receiver operating characteristic, with its interval over resampled fields.

    It is the chance that a known cube scores higher than an unknown one, ties counting half (Mann
    and Whitney 1947). The fields of the two are resampled independently.

    Parameters
    ----------
    known, unknown
        Scores of cubes of the network's classes, and of others.
    known_fields, unknown_fields
        Fields that they are from.
    """
    wins = sum_over_fields(_wins_of_fields(known, known_fields, unknown).T, unknown_fields).T
    counts = [sum_over_fields(np.ones(len(f)), f) for f in (known_fields, unknown_fields)]
    draws = [resample_fields(len(c), seed) for seed, c in enumerate(counts)]
    pairs = (draws[0] @ counts[0]) * (draws[1] @ counts[1])
    drawn = ((draws[0] @ wins) * draws[1]).sum(axis=1) / pairs
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = wins.sum() / (len(known) * len(unknown))
    return Score(value=float(value), low=float(low), high=float(high))


def _wins_of_fields(
    known: NDArray[np.float64], fields: NDArray[np.int64], unknown: NDArray[np.float64]
) -> Float[NDArray[np.float64], "field m"]:
    """Over how many of the field's known cubes each unknown one loses; a tie is half a loss."""
    rows = []
    for field in np.unique(fields):
        mine = np.sort(known[fields == field])
        below = sum(np.searchsorted(mine, unknown, side) for side in ("left", "right")) / 2
        rows.append(len(mine) - below)
    return np.stack(rows)

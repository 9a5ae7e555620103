"""Trust: how sure a classifier may be of its logits, and when it had better say ``unknown``.

What is measured for it is in the card (:class:`~cectflow.model_card.Trust`); how it is measured,
in :mod:`cectflow.learning.calibration`. Nothing here needs torch: prediction does without.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from cectflow.model_card import Trust, TypicalLogits, UnknownScore

__all__ = ["find_unknown", "probabilities_of", "score_known"]


def probabilities_of(
    logits: Float[NDArray[np.floating[Any]], "n class"], temperature: float = 1.0
) -> Float[NDArray[np.float64], "n class"]:
    """Softmax of logits over a temperature; the most probable class is the same at any."""
    scaled = logits.astype(np.float64) / temperature
    shifted = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    probabilities: NDArray[np.float64] = shifted / shifted.sum(axis=1, keepdims=True)
    return probabilities


def score_known(
    logits: Float[NDArray[np.floating[Any]], "n class"], kind: UnknownScore, typical: TypicalLogits
) -> Float[NDArray[np.float64], " n"]:
    """How much each cube looks like one of the classes; the higher, the more.

    Parameters
    ----------
    logits
        Of the network, before any temperature.
    kind
        ``energy``: log of the sum of their exponentials, the negative free energy (Liu et al.
        2020, arXiv 2010.03759, eq. 4 with T = 1). ``max_logit``: the largest of them (Hendrycks
        et al. 2019, arXiv 1911.11132). ``distance``: minus the squared Mahalanobis distance of the
        logits from the nearest class, per logit, with one diagonal covariance for all classes
        (Lee et al. 2018, arXiv 1807.03888, who take the features before the logits): 0 in the
        middle of a class, -1 at one standard deviation in every logit. It alone also refuses
        logits that are too high for any class.
    typical
        For ``distance``.
    """
    given = logits.astype(np.float64)
    score: NDArray[np.float64]
    if kind == "energy":
        score = np.logaddexp.reduce(given, axis=1)
    elif kind == "max_logit":
        score = given.max(axis=1)
    else:
        away, centres = given / typical.spread, np.array(typical.centres) / typical.spread
        # |a - c|^2 by a product of matrices: no array of rows x classes x logits.
        squared = (away**2).sum(axis=1)[:, None] - 2 * away @ centres.T + (centres**2).sum(axis=1)
        score = -np.maximum(squared, 0.0).min(axis=1) / given.shape[1]
    return score


def find_unknown(
    logits: Float[NDArray[np.floating[Any]], "n class"], trust: Trust
) -> Bool[NDArray[np.bool_], " n"]:
    """Which cubes look like none of the classes."""
    score = score_known(logits, trust.unknown_score, trust.typical)
    # Logits that are not a number are like no class's.
    unknown: NDArray[np.bool_] = ~(score >= trust.unknown_threshold)
    return unknown

"""What a network's answers mean by its card: class, probability, doubt, and the unknown."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from cectflow.model_card import ModelCard
from cectflow.trust import find_unknown, probabilities_of

__all__ = ["Judgement", "judge"]

ROWS_AT_ONCE = 1 << 14
"""Whose logits are judged together."""


@dataclass(frozen=True, eq=False)
class Judgement:
    """What logits mean by a card.

    Attributes
    ----------
    class_ids
        The most probable class from 1; 0 where there is no prediction.
    probabilities
        Calibrated where the card has a temperature, 0 where there is no prediction.
    of_class
        That of the most probable class.
    entropy
        Of the probabilities in nats; 0 is sure, the logarithm of the number of classes is not.
    unknown
        Whether the particle looks like none of the classes; None where the card has no threshold.
    """

    class_ids: NDArray[np.int64]
    probabilities: Float[NDArray[np.float32], "n class"]
    of_class: Float[NDArray[np.float64], " n"]
    entropy: Float[NDArray[np.float64], " n"]
    unknown: NDArray[np.bool_] | None


def judge(logits: Float[NDArray[np.float32], "n class"], card: ModelCard) -> Judgement:
    """Classes, probabilities and verdicts of logits; those that are no numbers have none."""
    count = len(logits)
    judgement = Judgement(
        np.zeros(count, np.int64), np.zeros(logits.shape, np.float32), np.zeros(count),
        np.zeros(count), None if card.trust is None else np.zeros(count, np.bool_),
    )  # fmt: skip
    for start in range(0, count, ROWS_AT_ONCE):  # what is computed takes many times their memory
        _judge_rows(logits, card, judgement, slice(start, start + ROWS_AT_ONCE))
    return judgement


def _judge_rows(
    logits: NDArray[np.float32], card: ModelCard, judgement: Judgement, rows: slice
) -> None:
    missing = np.asarray(np.isnan(logits[rows]).all(axis=1))
    given = np.where(missing[:, None], np.float32(0.0), logits[rows])
    trust = card.trust
    probabilities = probabilities_of(given, 1.0 if trust is None else trust.temperature)
    probabilities[missing] = 0.0
    lost = -np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
    judgement.class_ids[rows] = np.where(missing, 0, probabilities.argmax(axis=1) + 1)
    judgement.probabilities[rows] = probabilities
    judgement.of_class[rows] = probabilities.max(axis=1)
    judgement.entropy[rows] = (probabilities * lost).sum(axis=1)
    if trust is not None and judgement.unknown is not None:
        judgement.unknown[rows] = find_unknown(given, trust) & ~missing

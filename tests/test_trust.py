"""Probabilities at a temperature, and scores that tell cubes of unknown classes."""

from __future__ import annotations

import numpy as np
import pytest
from builders import make_trust

from cectflow.model_card import TypicalLogits, UnknownScore
from cectflow.trust import find_unknown, probabilities_of, score_known

LOGITS = np.array([[0.0, np.log(3.0)], [200.0, -800.0]], np.float32)
TYPICAL = TypicalLogits(centres=((4.0, 0.0), (0.0, 4.0)), spread=(1.0, 2.0))


def test_probabilities_are_a_softmax_at_a_temperature() -> None:
    np.testing.assert_allclose(probabilities_of(LOGITS), [[0.25, 0.75], [1.0, 0.0]], atol=1e-7)
    root = np.sqrt(3.0)
    at_two = probabilities_of(LOGITS, 2.0)[0]
    np.testing.assert_allclose(at_two, [1 / (1 + root), root / (1 + root)], rtol=1e-6)
    assert probabilities_of(LOGITS, 1e9)[0] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("energy", [np.log(4.0), 200.0]),
        ("max_logit", [np.log(3.0), 200.0]),
        # (0 - 0)² and ((log 3 - 4) / 2)², halved; then from the first class: 196² and (800 / 2)².
        ("distance", [-(((np.log(3.0) - 4) / 2) ** 2) / 2, -(196.0**2 + 400.0**2) / 2]),
    ],
)
def test_scores_follow_their_formulas(kind: UnknownScore, expected: list[float]) -> None:
    np.testing.assert_allclose(score_known(LOGITS, kind, TYPICAL), expected, rtol=1e-6)


def test_only_the_distance_refuses_logits_that_are_too_high() -> None:
    known, gold = np.array([[4.0, 0.0]]), np.array([[40.0, 0.0]])
    for kind in ("energy", "max_logit"):
        assert score_known(gold, kind, TYPICAL) > score_known(known, kind, TYPICAL)
    assert score_known(known, "distance", TYPICAL) == 0.0
    assert score_known(gold, "distance", TYPICAL) < -100


def test_a_cube_at_the_threshold_is_known() -> None:
    trust = make_trust(unknown_score="max_logit", unknown_threshold=2.0)
    logits = np.array([[2.0, 0.0], [1.99, 1.99], [0.0, 5.0]])
    assert find_unknown(logits, trust).tolist() == [False, True, False]


def test_a_cube_whose_logits_are_no_numbers_is_unknown() -> None:
    trust = make_trust(unknown_score="max_logit", unknown_threshold=2.0)
    assert find_unknown(np.array([[np.nan, np.nan], [3.0, 0.0]]), trust).tolist() == [True, False]

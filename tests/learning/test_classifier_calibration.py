"""Temperature, reliability, threshold and AUROC follow their definitions and references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu
from torchmetrics.functional.classification import multiclass_calibration_error

from cectflow.learning.calibration import (
    LEAST_SPREAD,
    TEMPERATURES,
    bootstrap_auroc,
    choose_threshold,
    describe_logits,
    fit_temperature,
    measure_reliability,
    measure_trust,
)
from cectflow.learning.scores import Evaluation
from cectflow.trust import find_unknown, probabilities_of

GENERATOR = np.random.default_rng(0)


def draw_logits(number: int, temperature: float) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits of four classes, and labels drawn from their softmax at a temperature."""
    logits = GENERATOR.normal(0.0, 4.0, (number, 4)).astype(np.float32)
    shares = probabilities_of(logits, temperature).cumsum(axis=1)
    labels = (GENERATOR.random((number, 1)) > shares).sum(axis=1) + 1
    return logits, labels.clip(max=4)


def judged(logits: NDArray[np.float32], class_ids: NDArray[np.int64]) -> Evaluation:
    predicted = logits.argmax(axis=1) + 1
    right = (predicted == class_ids).astype(np.float64)
    fields = np.arange(len(logits)) % 5
    return Evaluation({"accuracy": right}, class_ids, predicted, fields, logits=logits)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_drawn_labels_is_found_again(temperature: float) -> None:
    logits, labels = draw_logits(20_000, temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


def test_logits_scaled_by_a_factor_have_a_temperature_scaled_by_it() -> None:
    logits, labels = draw_logits(500, 1.5)
    found = fit_temperature(logits, labels)
    assert fit_temperature(2.0 * logits, labels) == pytest.approx(2.0 * found, rel=1e-3)


def test_without_an_error_there_is_no_temperature_to_be_found() -> None:
    logits = np.array([[3.0, 1.0], [0.0, 0.5]], np.float32)
    assert fit_temperature(logits, np.array([1, 2])) == 1.0


def test_the_temperature_is_bounded() -> None:
    barely = np.tile(np.array([[0.09, 0.0]], np.float32), (99, 1))
    barely[0] = [0.0, 1e-5]  # the only error, and hardly one
    lowest, highest = TEMPERATURES
    assert fit_temperature(barely, np.ones(99, np.int64)) == pytest.approx(lowest, rel=0.01)
    assert fit_temperature(barely, np.full(99, 2)) == pytest.approx(highest, rel=0.01)


def test_reliability_by_hand() -> None:
    probabilities = np.array([[0.62, 0.38], [0.66, 0.34], [0.35, 0.65], [1.0, 0.0]])
    found = measure_reliability(probabilities, np.array([1, 2, 2, 1]))
    assert found.counts.tolist() == [0] * 9 + [3, 0, 0, 0, 0, 1]
    assert found.accuracy[9] == pytest.approx(2 / 3)
    assert found.confidence[9] == pytest.approx((0.62 + 0.66 + 0.65) / 3)
    assert found.error == pytest.approx(3 / 4 * abs(2 / 3 - 1.93 / 3))


def test_the_calibration_error_is_that_of_torchmetrics() -> None:
    logits, labels = draw_logits(2000, 2.0)
    probabilities = probabilities_of(logits)
    expected = multiclass_calibration_error(
        torch.from_numpy(probabilities), torch.from_numpy(labels - 1), num_classes=4, n_bins=15
    )
    error = measure_reliability(probabilities, labels).error
    assert error == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize(("number", "expected"), [(20, 1.0), (19, 0.0), (100, 5.0), (1, 0.0)])
def test_at_least_95_of_100_validation_cubes_pass(number: int, expected: float) -> None:
    scores = GENERATOR.permutation(np.arange(number, dtype=np.float64))
    threshold = choose_threshold(scores)
    assert threshold == expected
    assert (scores >= threshold).mean() >= 0.95


def test_where_logits_lie_by_hand() -> None:
    logits = np.array([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]], np.float32)
    found = describe_logits(logits, np.array([1, 1, 3]))
    assert found.centres == ((2.0, 0.0), (0.0, 5.0))  # class 2 has no cubes
    assert found.spread == (pytest.approx(np.sqrt(2 / 3)), LEAST_SPREAD)


def test_an_overconfident_classifier_is_calibrated_by_its_validation_cubes() -> None:
    validation, test = (judged(*draw_logits(4000, 2.5)) for _ in range(2))
    trust = measure_trust(validation, test)
    assert trust.ece_after < 0.3 * trust.ece_before
    assert trust.temperature == pytest.approx(2.5, rel=0.1)
    assert trust.validation_cubes == 4000
    assert validation.logits is not None
    assert find_unknown(validation.logits, trust).mean() == pytest.approx(0.05, abs=1e-3)
    assert trust.true_positive_rate.value == pytest.approx(0.95, abs=0.02)
    assert trust.true_positive_rate.low < trust.true_positive_rate.value


def test_the_area_is_that_of_the_receiver_operating_characteristic() -> None:
    known = GENERATOR.normal(1.0, 1.0, 200).round(1)  # with ties
    unknown = GENERATOR.normal(0.0, 1.0, 90).round(1)
    fields = GENERATOR.integers(6, size=200), GENERATOR.integers(4, size=90)
    found = bootstrap_auroc(known, fields[0], unknown, fields[1])
    assert found.value == pytest.approx(mannwhitneyu(known, unknown).statistic / (200 * 90))
    assert found.low < found.value < found.high
    assert found == bootstrap_auroc(known, fields[0], unknown, fields[1])


def test_areas_of_what_is_apart_and_of_what_is_the_same() -> None:
    scores, fields = np.arange(6.0), np.array([0, 0, 1, 1, 2, 2])
    above = bootstrap_auroc(scores + 10, fields, scores, fields)
    assert (above.value, above.low, above.high) == (1.0, 1.0, 1.0)
    assert bootstrap_auroc(scores, fields, scores + 10, fields).value == 0.0
    assert bootstrap_auroc(scores, fields, scores, fields).value == pytest.approx(0.5)


def test_agreement_is_of_what_is_said_and_not_of_what_is_true() -> None:
    truth = np.array([1, 1, 2, 2, 2])
    fields = np.array([0, 1, 0, 1, 1])
    said = [np.array([1, 2, 2, 1, 1]), np.array([1, 1, 2, 1, 2])]
    student, teacher = (Evaluation({}, truth, words, fields) for words in said)
    found = student.agreement(teacher, ("small", "large", "absent"))
    assert {name: score.value for name, score in found.items()} == {
        "agreement": pytest.approx(3 / 5), "agreement_small": 0.5,
        "agreement_large": pytest.approx(2 / 3),
    }  # fmt: skip
    assert found["agreement"].low < 3 / 5 < found["agreement"].high
    assert student.agreement(student, ("small",))["agreement"].low == 1.0

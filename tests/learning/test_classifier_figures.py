"""Pictures of classifiers show the numbers that they are drawn from."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from matplotlib.figure import Figure

from cectflow.learning.calibration import NUM_BINS, Reliability
from cectflow.learning.figures import (
    draw_confusion,
    draw_embeddings,
    draw_known_scores,
    draw_reliability,
)


def save(figure: Figure) -> None:
    figure.savefig(BytesIO(), format="png", dpi=50)


def test_confusion_matrices_side_by_side_are_in_percent_of_each_true_class() -> None:
    truth = np.array([1, 1, 1, 1, 2, 2, 3])
    said = {"teacher": np.array([1, 1, 1, 2, 2, 2, 1]), "student": truth}
    figure = draw_confusion(truth, said, ("a", "b", "c"))
    teacher, student = figure.axes
    shares = np.asarray(teacher.images[0].get_array())
    np.testing.assert_allclose(shares, [[75, 25, 0], [0, 100, 0], [100, 0, 0]])
    np.testing.assert_allclose(np.asarray(student.images[0].get_array()), 100 * np.eye(3))
    assert [label.get_text() for label in teacher.get_yticklabels()] == ["a (4)", "b (2)", "c (1)"]
    assert [label.get_text() for label in teacher.get_xticklabels()] == ["a", "b", "c"]
    assert [text.get_text() for text in teacher.texts] == ["75", "25", "100", "100"]
    assert student.get_title().startswith("student")
    save(figure)


def test_a_class_without_subtomograms_has_an_empty_row() -> None:
    figure = draw_confusion(np.array([1, 1]), {"tiny": np.array([1, 2])}, ("a", "b"))
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[50, 50], [0, 0]])
    save(figure)


def test_embeddings_keep_neighbours_and_are_drawn_alike_twice() -> None:
    generator = np.random.default_rng(0)
    class_ids = np.repeat(np.array([1, 2]), 12)
    near = generator.normal(size=(24, 5)).astype(np.float32)
    apart = near + 30.0 * (class_ids == 2)[:, None].astype(np.float32)
    first, second = (
        draw_embeddings({"mixed": near, "apart": apart}, class_ids, ("a", "b")) for _ in range(2)
    )
    for one, other in zip(first.axes, second.axes, strict=True):
        groups = [np.transpose(line.get_data()) for line in one.lines]
        assert [len(group) for group in groups] == [12, 12]
        for group, line in zip(groups, other.lines, strict=True):
            np.testing.assert_array_equal(group, np.transpose(line.get_data()))
    shown = np.concatenate([np.transpose(line.get_data()) for line in first.axes[1].lines])
    distances = np.linalg.norm(shown[:, None] - shown[None], axis=-1) + 1e9 * np.eye(24)
    np.testing.assert_array_equal(class_ids[distances.argmin(axis=1)], class_ids)
    assert [axes.get_title() for axes in first.axes] == ["mixed", "apart"]
    save(first)


def test_embeddings_of_too_few_cubes_are_refused() -> None:
    with pytest.raises(ValueError, match="3 cubes have no neighbourhoods"):
        draw_embeddings({"x": np.zeros((3, 2), np.float32)}, np.array([1, 1, 2]), ("a", "b"))


def test_a_reliability_diagram_shows_bins_and_error() -> None:
    counts = np.zeros(NUM_BINS, np.int64)
    confidence, accuracy = np.full((2, NUM_BINS), np.nan)
    counts[[9, 14]], confidence[[9, 14]], accuracy[[9, 14]] = (1, 3), (0.64, 0.98), (1.0, 2 / 3)
    found = Reliability(counts, confidence, accuracy)
    figure = draw_reliability({"before": found, "after": found}, "tiny")
    top, _, bottom, _ = figure.axes
    assert top.get_title() == f"before: error {(0.36 + 3 * (0.98 - 2 / 3)) / 4:.3f}"
    drawn = np.asarray(top.lines[1].get_xydata())
    np.testing.assert_allclose(drawn[[9, 14]], [[0.64, 1.0], [0.98, 2 / 3]])
    assert bottom.patches[0].get_data().values.tolist() == [0.0] * 9 + [0.25, 0, 0, 0, 0, 0.75]
    save(figure)


def test_known_scores_are_cumulative_and_the_threshold_is_a_line() -> None:
    scores = {"known": np.arange(4.0), "gold": np.array([-1.0, -1000.0])}
    figure = draw_known_scores(scores, 0.5, "tiny")
    (axes,) = figure.axes
    known, gold, threshold = axes.lines
    assert [known.get_label(), gold.get_label()] == ["known (4)", "gold (2)"]
    np.testing.assert_allclose(known.get_ydata(), [0, 0.25, 0.5, 0.75, 1])
    assert set(np.asarray(threshold.get_xdata())) == {0.5}
    assert axes.get_xlim()[0] == -7.0  # what lies far away is not drawn
    save(figure)

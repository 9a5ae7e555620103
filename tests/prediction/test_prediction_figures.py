"""The summary picture: what is in it."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from cectflow.prediction.figures import Example, draw_classes


def texts(figure: Figure) -> list[str]:
    """All that is written in a figure, its legend too."""
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def examples(*probabilities: float) -> list[Example]:
    section = np.random.default_rng(0).normal(size=(8, 8))
    return [Example(section, probability) for probability in probabilities]


def test_classes_with_particles_have_rows_and_the_others_are_named() -> None:
    figure = draw_classes(
        {"rod": np.array([0.4]), "bowl": np.array([0.9, 0.8]), "ring": np.zeros(0)},
        {"rod": examples(0.4), "bowl": examples(0.9, 0.8), "ring": []},
        voxel_size=10.0,
        unknown={
            "rod": np.array([True]),
            "bowl": np.array([False, False]),
            "ring": np.zeros(0, bool),
        },
        missing=3,
        title="student/1",
    )
    labels = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert labels == ["bowl", "rod"], "the most frequent comes first"
    written = texts(figure)
    assert "student/1: 3 particles, 3 not predicted" in written
    assert {"0.40", "0.80", "0.90", "unknown", "no particle is called ring"} <= set(written)


def test_a_model_that_knows_no_unknown_and_nothing_predicted_are_drawn() -> None:
    figure = draw_classes({"rod": np.zeros(0)}, {"rod": []}, voxel_size=10.0, missing=2)
    written = texts(figure)
    assert "0 particles, 2 not predicted" in written
    assert "unknown" not in written

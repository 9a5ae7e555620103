"""Pictures of what classifiers make of a test split; see :mod:`cectflow.figures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cectflow.learning.calibration import NUM_BINS, Reliability, measure_reliability
from cectflow.model_card import Score, Timing
from cectflow.trust import probabilities_of

__all__ = [
    "draw_calibration",
    "draw_comparison",
    "draw_confusion",
    "draw_embeddings",
    "draw_intervals",
    "draw_known_scores",
    "draw_latencies",
    "draw_reliability",
    "draw_sweep",
    "draw_voxel_confusion",
]


def draw_confusion(
    truth: Int[NDArray[np.int64], " n"],
    predicted: Mapping[str, Int[NDArray[np.int64], " n"]],
    classes: Sequence[str],
) -> Figure:
    """Confusion matrices in percent of each true class (rows), side by side.

    Parameters
    ----------
    truth
        Class ids from 1.
    predicted
        Title of a matrix → class ids that a network gave.
    classes
        Names in the order of the ids.
    """
    edge = 2.2 + 0.5 * len(classes)
    figure = Figure(figsize=((edge + 0.6) * len(predicted), edge), layout="constrained")
    panels = figure.subplots(1, len(predicted), squeeze=False)[0]
    for axes, (title, answers) in zip(panels, predicted.items(), strict=True):
        _draw_matrix(axes, truth, answers, classes)
        axes.set_title(f"{title}\n% of each true class", fontsize=10)
    return figure


def draw_voxel_confusion(
    counts: Mapping[str, Int[NDArray[np.int64], "truth predicted"]], labels: Sequence[str]
) -> Figure:
    """Confusion matrices of voxels in percent of each true label (rows), side by side.

    Parameters
    ----------
    counts
        Title of a matrix → voxels by true and predicted label, background first.
    labels
        Names from 1 on.
    """
    names = ["background", *labels]
    edge = 2.2 + 0.5 * len(names)
    figure = Figure(figsize=((edge + 0.6) * len(counts), edge), layout="constrained")
    panels = figure.subplots(1, len(counts), squeeze=False)[0]
    for axes, (title, voxels) in zip(panels, counts.items(), strict=True):
        _draw_counts(axes, voxels.astype(np.float64), names, names)
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_title(f"{title}\n% of the voxels of each true label", fontsize=10)
    return figure


def _draw_matrix(
    axes: Axes, truth: NDArray[np.int64], predicted: NDArray[np.int64], classes: Sequence[str]
) -> None:
    counts = np.zeros((len(classes), len(classes)))
    np.add.at(counts, (truth - 1, predicted - 1), 1.0)
    names = [f"{name} ({int(n)})" for name, n in zip(classes, counts.sum(axis=1), strict=True)]
    _draw_counts(axes, counts, names, classes)
    axes.set(xlabel="predicted", ylabel="true (number)")


def _draw_counts(
    axes: Axes, counts: NDArray[np.float64], rows: Sequence[str], columns: Sequence[str]
) -> None:
    shares = 100.0 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.5:
            colour = "white" if share > 55 else "black"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)


def draw_comparison(
    names: Sequence[str], networks: Mapping[str, Sequence[Score | None]], score: str
) -> Figure:
    """A score of several networks by class, with intervals.

    Parameters
    ----------
    names
        Of the classes, from top to bottom.
    networks
        Label → score in each class; None where there is none.
    score
        Label of the abscissa.
    """
    figure = Figure(figsize=(7.0, 1.4 + 0.45 * len(names)), layout="constrained")
    axes = figure.subplots()
    for number, (label, scores) in enumerate(networks.items()):
        shift = 0.2 * (number - (len(networks) - 1) / 2)
        found = [(row + shift, s) for row, s in enumerate(scores) if s is not None]
        _draw_intervals(axes, [row for row, _ in found], [s for _, s in found], f"C{number}", label)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel=f"{score}, 95 % over fields", ylim=(len(names) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_intervals(
    panels: Mapping[str, tuple[Score, float, Mapping[str, float]]],
) -> Figure:
    """Figures with their intervals, each beside what it is compared with.

    Parameters
    ----------
    panels
        Title → figure; the value at which two networks are alike; rule in words → its bound.
    """
    figure = Figure(figsize=(7.0, 1.5 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (title, (score, alike, bounds)) in zip(rows, panels.items(), strict=True):
        _draw_intervals(axes, [0.0], [score], "C0", "measured, 95 % over fields")
        axes.axvline(alike, color="grey", ls=":", lw=1, label="alike")
        for number, (rule, bound) in enumerate(bounds.items()):
            axes.axvline(bound, color="C3", ls=("--", "-.", ":")[number % 3], lw=1, label=rule)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_yticks([])
        axes.margins(x=0.1)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def draw_latencies(timings: Mapping[str, Timing]) -> Figure:
    """Time that a batch takes, with quartiles over repeats.

    Parameters
    ----------
    timings
        Name of a bar → what was measured, from top to bottom.
    """
    figure = Figure(figsize=(7.0, 0.9 + 0.45 * len(timings)), layout="constrained")
    axes = figure.subplots()
    for row, timing in enumerate(timings.values()):
        value = timing.latency_ms
        spread = [[value - timing.latency_ms_low], [timing.latency_ms_high - value]]
        axes.barh(row, value, 0.6, color="C0", xerr=spread, capsize=3)
        axes.annotate(f"{value:.3g} ms", (timing.latency_ms_high, row), (6, 0),
                      textcoords="offset points", va="center", fontsize=8)  # fmt: skip
    axes.set_yticks(range(len(timings)), list(timings))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    batches = {timing.batch_size for timing in timings.values()}
    axes.set_xlabel(f"ms a batch of {', '.join(map(str, sorted(batches)))}, median and quartiles")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_intervals(
    axes: Axes, rows: Sequence[float], scores: Sequence[Score], colour: str, label: str
) -> None:
    values = np.array([score.value for score in scores])
    # Of a few fields a mean may lie outside the interval of its own resamples.
    low = np.maximum(values - [score.low for score in scores], 0.0)
    high = np.maximum([score.high for score in scores] - values, 0.0)
    axes.errorbar(values, rows, xerr=(low, high), fmt="o", ms=5, capsize=3, color=colour,
                  label=label)  # fmt: skip


def draw_embeddings(
    panels: Mapping[str, Float[NDArray[np.float32], "n _"]],
    class_ids: Int[NDArray[np.int64], " n"],
    classes: Sequence[str],
) -> Figure:
    """Embeddings of the same cubes in the plane, side by side: which classes a network mixes up.

    Projected by t-SNE (van der Maaten and Hinton 2008) from their first two principal components;
    who is whose neighbour means something, distances between groups do not.

    Parameters
    ----------
    panels
        Title of a plane → embedding of each cube.
    class_ids
        True class of each, from 1.
    classes
        Names in the order of the ids.

    Raises
    ------
    ValueError
        If there are fewer than 4 cubes.
    """
    from sklearn import manifold  # 1 s

    project: Any = manifold.TSNE
    number = len(class_ids)
    if number < 4:
        msg = f"{number} cubes have no neighbourhoods to draw: expected 4 or more"
        raise ValueError(msg)
    figure = Figure(figsize=(4.4 * len(panels) + 1.4, 4.4), layout="constrained")
    axes_of = figure.subplots(1, len(panels), squeeze=False)[0]
    colours = colormaps["tab20"](np.arange(len(classes)) % 20)
    for axes, (title, features) in zip(axes_of, panels.items(), strict=True):
        method = project(init="pca", perplexity=min(30.0, (number - 1) / 3), random_state=0)
        plane = method.fit_transform(features)
        for class_id, (name, colour) in enumerate(zip(classes, colours, strict=True), start=1):
            x, y = plane[class_ids == class_id].T
            axes.plot(x, y, "o", color=colour, ms=3, mew=0, alpha=0.8, label=name)
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=10)
    figure.legend(
        *axes_of[0].get_legend_handles_labels(), loc="outside right upper", frameon=False,
        fontsize=8, markerscale=2,
    )  # fmt: skip
    return figure


def draw_reliability(panels: Mapping[str, Reliability], title: str) -> Figure:
    """Reliability diagrams: accuracy against confidence, with the share of cubes in each bin.

    Parameters
    ----------
    panels
        Title of a diagram → what it shows, such as before and after calibration.
    title
        Over all of them.
    """
    figure = Figure(figsize=(3.6 * len(panels), 4.0), layout="constrained")
    columns = figure.subplots(2, len(panels), squeeze=False, sharex=True, height_ratios=[3, 1]).T
    edges = np.arange(NUM_BINS + 1) / NUM_BINS
    for (top, bottom), (name, found) in zip(columns, panels.items(), strict=True):
        top.plot([0, 1], [0, 1], color="grey", ls="--", lw=1, label="calibrated")
        top.plot(found.confidence, found.accuracy, ".-", label="measured")
        top.set_title(f"{name}: error {found.error:.3f}", fontsize=10)
        top.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
        top.legend(frameon=False, fontsize=8, loc="upper left")
        bottom.stairs(found.counts / found.counts.sum(), edges, fill=True, color="0.7")
        bottom.set(xlabel="confidence", ylabel="share", ylim=(0, 1.02))
        for axes in (top, bottom):
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_calibration(
    logits: Float[NDArray[np.float32], "n c"],
    class_ids: Int[NDArray[np.int64], " n"],
    temperature: float,
    title: str,
) -> Figure:
    """Reliability diagrams of a classifier without and with its temperature.

    Parameters
    ----------
    logits, class_ids
        Of the same cubes; true classes from 1.
    temperature
        That divides the logits.
    title
        Over both.
    """
    panels = {
        name: measure_reliability(probabilities_of(logits, value), class_ids)
        for name, value in (("as trained", 1.0), (f"at temperature {temperature:.2f}", temperature))
    }
    return draw_reliability(panels, title)


def draw_known_scores(
    scores: Mapping[str, Float[NDArray[np.float64], " n"]], threshold: float, title: str
) -> Figure:
    """Cumulative distribution, for each kind of cubes, of the score that tells the unknown.

    Parameters
    ----------
    scores
        Kind → score of each of its cubes; the first kind is the known one.
    threshold
        Below it a cube is ``unknown``.
    title
        Over the picture.
    """
    figure = Figure(figsize=(6.5, 4.0), layout="constrained")
    axes = figure.subplots()
    for kind, values in scores.items():
        axes.ecdf(values, label=f"{kind} ({len(values)})")
    axes.axvline(threshold, color="grey", ls="--", lw=1, label="unknown below")
    # A gold bead may be a hundred times as far away as all that is of interest.
    highest = float(next(iter(scores.values())).max())
    axes.set_xlim(left=threshold - 3.0 * (highest - threshold))
    axes.set(xlabel="score", ylabel="share of cubes below", ylim=(0, 1))
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10)
    return figure


def draw_sweep(
    settings: Sequence[Mapping[str, float]], scores: Sequence[float], monitor: str
) -> Figure:
    """Validation score against each setting, one dot a trial, the best one marked.

    Parameters
    ----------
    settings
        Name → value of each trial.
    scores
        Of the best epoch of each.
    monitor
        Name of the score.
    """
    names = list(settings[0])
    figure = Figure(figsize=(3.4 * len(names), 3.2), layout="constrained")
    best = int(np.argmax(scores))
    for axes, name in zip(
        figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True
    ):
        values = [trial[name] for trial in settings]
        axes.plot(values, scores, "o", color="C0", ms=5, alpha=0.6)
        axes.plot(values[best], scores[best], "o", color="C1", ms=8, label="best")
        axes.set_xlabel(name.replace("_", " "))
        if name != "weight":
            axes.set_xscale("log")
        axes.spines[["top", "right"]].set_visible(False)
    first = figure.axes[0]
    first.set_ylabel(f"{monitor}, validation")
    first.legend(frameon=False)
    return figure

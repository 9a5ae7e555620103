"""Figures: every picture that cectflow logs.

Each function returns a matplotlib figure, drawn without a display; no global state is touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from cectflow.files import replacing

__all__ = [
    "draw_field",
    "draw_generalisation",
    "draw_groups",
    "draw_learning_curves",
    "draw_radial_power",
    "draw_scale_bar",
    "draw_slices",
    "draw_tomogram",
    "write_figure",
]

FIGURE_DPI = 100
LABEL_COLOUR = "#ff7f0e"
PREDICTION_COLOUR = "#17becf"
LOG_SPAN = 30.0
"""Ratio of the largest to the smallest loss above which the axis is logarithmic."""
LOG_SPAN_OF_GROUPS = 4.0
"""Ratio of the largest to the smallest abscissa above which :func:`draw_groups` takes its
logarithm."""
SCALE_BAR_FRACTION = 0.3
LABEL_COLOURS = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#BBBBBB",
    "#882255", "#44AA99", "#999933", "#AA4499", "#332288", "#DDCC77", "#117733", "#CC6677",
    "#EE8866", "#AAAA00", "#77AADD", "#FFAABB",
)  # fmt: skip
"""Of voxel labels on black: Okabe and Ito's, which colour-blind eyes tell apart, then Tol's."""
LABELS_IN_LEGEND = 12
TITLE_CHARACTERS = 21
"""That fit over a panel of :func:`draw_slices` in the usual size; longer titles are set smaller."""


def write_figure(figure: Figure, path: Path, *, overwrite: bool = False) -> None:
    """Write a figure as a PNG.

    Raises
    ------
    FileExistsError
        If the file exists and is not to be overwritten.
    """
    with replacing(path, overwrite=overwrite) as temporary:
        figure.savefig(temporary, format="png", dpi=FIGURE_DPI)


def draw_learning_curves(history: Sequence[Mapping[str, float]], title: str) -> Figure:
    """Loss terms (left) and validation scores (right) against the epoch.

    Parameters
    ----------
    history
        One row per epoch, as ``fit`` gives it.
    title
        Over both panels.
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    epochs = np.arange(1, len(history) + 1)
    for name in history[0] if history else ():
        if name in {"learning_rate", "epoch_seconds"}:
            continue
        kind, _, term = name.partition("_")
        is_loss = kind == "train" or term == "loss"
        axes = losses if is_loss else scores
        label = name.replace("_", " ").replace("iou", "IoU")
        # A single epoch is a dot: a line through one point would not be seen.
        axes.plot(epochs, [row[name] for row in history], ".-" if len(epochs) < 15 else "-",
                  label=label)  # fmt: skip
    drawn = np.concatenate([line.get_ydata() for line in losses.get_lines()] or [np.ones(1)])
    if drawn.min() > 0 and drawn.max() > LOG_SPAN * drawn.min():
        losses.set_yscale("log")
    losses.set(xlabel="epoch", ylabel="loss")
    scores.set(xlabel="epoch", ylabel="score", ylim=(0, 1.02))
    for axes in (losses, scores):
        axes.set_xlim(0.5, max(len(history), 1) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure


def draw_slices(
    cubes: Shaped[NDArray[Any], "n z y x"],
    labels: Shaped[NDArray[Any], "n z y x"] | None,
    predicted: Shaped[NDArray[Any], "n z y x"] | None,
    *,
    voxel_size: float,
    titles: Sequence[str],
) -> Figure:
    """Central slices of cubes in xy (top) and xz (bottom), with outlines and a scale bar.

    Parameters
    ----------
    cubes
        Subtomograms; each is shown with its own grey scale.
    labels, predicted
        Foreground (non-zero) outlined in orange and cyan.
    voxel_size
        In Å, for the scale bar.
    titles
        One per cube.
    """
    number = len(cubes)
    outlines = [
        (volume, name, colour)
        for volume, name, colour in (
            (labels, "truth", LABEL_COLOUR),
            (predicted, "prediction", PREDICTION_COLOUR),
        )
        if volume is not None
    ]
    height = 3.9 if outlines else 3.6
    figure = Figure(figsize=(1.7 * number + 0.4, height), layout="constrained")
    panels = figure.subplots(2, number, squeeze=False)
    for column in range(number):
        for row, plane in enumerate(("xy", "xz")):
            axes = panels[row, column]
            _draw_plane(axes, _central(cubes[column], plane))
            for volume, _, colour in outlines:
                _outline(axes, _central(volume[column], plane), colour)
            if column == 0:
                axes.set_ylabel(plane)
        title = titles[column]
        size = 9 * min(1.0, TITLE_CHARACTERS / max(len(title), 1))
        panels[0, column].set_title(title, fontsize=max(size, 4))
    draw_scale_bar(panels[0, 0], voxel_size)
    if outlines:
        handles = [Line2D([], [], color=colour, label=name) for _, name, colour in outlines]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8
        )
    return figure


def draw_groups(
    panels: Mapping[str, Sequence[tuple[str, float, tuple[float, float, float]]]],
    score: str,
    title: str,
    *,
    reference: float | None = None,
) -> Figure:
    """A score against what subtomograms have in common, one panel for each such property.

    Parameters
    ----------
    panels
        Label of the abscissa → groups: name to be written beside it, or empty; abscissa; score
        with the ends of its interval. A property without groups is said to be unknown.
    score
        Label of the ordinate.
    title
        Over all panels.
    reference
        Score of the best trivial method, drawn as a line.
    """
    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    for axes, (label, groups) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        places = np.array([place for _, place, _ in groups])
        scores = np.array([values for _, _, values in groups]).reshape(-1, 3).T
        if len(groups):
            value, low, high = scores
            axes.errorbar(
                places, value, (value - low, high - value), fmt="o", capsize=3,
                color=PREDICTION_COLOUR, label="mean, 95 % over fields",
            )  # fmt: skip
        else:
            axes.text(0.5, 0.5, "unknown", transform=axes.transAxes, ha="center")
        for name, place, (height, _, _) in groups:
            axes.annotate(name, (place, height), (4, 4), textcoords="offset points", fontsize=7)
        if reference is not None:
            axes.axhline(reference, color="grey", ls="--", lw=1, label="best trivial method")
        if len(groups) and places.min() > 0 and places.max() > LOG_SPAN_OF_GROUPS * places.min():
            axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.set(xlabel=label, ylabel=score, ylim=(0, 1.05))
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.suptitle(title, fontsize=10)
    return figure


def draw_field(
    panels: Sequence[tuple[str, Shaped[NDArray[Any], "z y x"], str]],
    *,
    voxel_size: float,
    title: str = "",
    classes: Sequence[str] = (),
) -> Figure:
    """Volumes of one field side by side, central xy slices above xz slices: the road in a row.

    Parameters
    ----------
    panels
        Title, volume and kind of each column: ``grey`` (density, dark or bright) or ``labels``
        (integers, 0 black; 20 colours, then they repeat).
    voxel_size
        In Å, for the scale bar.
    title
        Over all of them.
    classes
        Names of the labels from 1, for a legend of their colours.
    """
    depth, height, width = panels[0][1].shape
    across = 3.0 * len(panels) + 0.2
    columns = max(1, int(across / (0.09 * max(map(len, classes), default=0) + 0.5)))
    extra = 0.3 * bool(title) + 0.22 * -(-len(classes) // columns)
    size = (across, 3.0 * (height + depth) / width + 0.5 + extra)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(
        2, len(panels), squeeze=False, gridspec_kw={"height_ratios": [height, depth]}
    )
    for column, (name, volume, kind) in enumerate(panels):
        for row, plane in enumerate(("xy", "xz")):
            axes = grid[row, column]
            slice_ = _central(volume, plane)
            if kind == "grey":
                _draw_plane(axes, slice_)
            else:
                colours = np.ma.masked_where(slice_ == 0, (slice_ - 1) % len(LABEL_COLOURS))
                axes.imshow(
                    colours, cmap=ListedColormap(LABEL_COLOURS), vmin=-0.5,
                    vmax=len(LABEL_COLOURS) - 0.5, origin="lower", interpolation="nearest",
                )  # fmt: skip
                axes.set_facecolor("black")
                axes.set_xticks([])
                axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(f"{plane} slice:  {plane[1]} →")
        grid[0, column].set_title(name, fontsize=10)
        grid[1, column].set_xlabel("x →")
    draw_scale_bar(grid[0, 0], voxel_size)
    if title:
        figure.suptitle(title, fontsize=11)
    if classes:
        handles = [
            Patch(color=LABEL_COLOURS[number % len(LABEL_COLOURS)], label=name)
            for number, name in enumerate(classes)
        ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9
        )
    return figure


def draw_tomogram(
    volume: Shaped[NDArray[Any], "z y x"],
    labels: Shaped[NDArray[Any], "z y x"],
    positions_zyx: Float[NDArray[np.float64], "n 3"],
    class_ids: Int[NDArray[np.int64], " n"],
    names: Sequence[str],
    *,
    voxel_size: float,
    title: str,
    depth: float = 50.0,
) -> Figure:
    """Central xy (top) and xz slices of a tomogram, plain (left) and with labels and picks.

    Parameters
    ----------
    volume, labels
        May be memory-mapped: only the slices are read.
    positions_zyx, class_ids
        Of picks, in voxels; those within ``depth`` of a slice are marked.
    names
        Of the labels, from 1.
    voxel_size
        In Å.
    title
        Over the panels.
    depth
        In Å.
    """
    num_z, height, width = volume.shape
    ratio = num_z / height
    figure = Figure(figsize=(11, 5.5 * height / width * (1 + ratio) + 1.0), layout="constrained")
    panels = figure.subplots(2, 2, squeeze=False, gridspec_kw={"height_ratios": [1, ratio]})
    colours = [_label_colour(number) for number in range(1, len(names) + 1)]
    for row, (plane, axis, across) in enumerate((("xy", 0, 1), ("xz", 1, 0))):
        near = np.abs(positions_zyx[:, axis] - volume.shape[axis] // 2) * voxel_size <= depth
        outlined = _central(labels, plane)
        for column in (0, 1):
            axes = panels[row, column]
            _draw_plane(axes, _central(volume, plane))
            axes.set_ylabel(plane if column == 0 else "")
            if column == 0:
                continue
            for number, colour in enumerate(colours, start=1):
                _outline(axes, outlined == number, colour)
                chosen = positions_zyx[near & (class_ids == number)]
                axes.plot(chosen[:, 2], chosen[:, across], "+", color=colour, markersize=6)
            axes.set_xlim(-0.5, width - 0.5)
            axes.set_ylim(-0.5, outlined.shape[0] - 0.5)
    draw_scale_bar(panels[0, 0], voxel_size)
    panels[0, 0].set_title(title, fontsize=10)
    panels[0, 1].set_title(
        f"labels, and picks within {depth:g} Å of the slice" if len(positions_zyx) else "labels",
        fontsize=10,
    )
    handles = [
        Line2D([], [], color=colour, marker="+", label=name)
        for name, colour in zip(names, colours, strict=True)
    ][:LABELS_IN_LEGEND]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


def draw_radial_power(
    frequencies: Float[NDArray[np.float64], " shell"],
    real: tuple[Float[NDArray[np.float64], " shell"], Float[NDArray[np.float64], " shell"]],
    simulated: tuple[Float[NDArray[np.float64], " shell"], Float[NDArray[np.float64], " shell"]],
    *,
    voxel_size: float,
    title: str,
) -> Figure:
    """Radial power of simulated and real subtomograms (left), and their ratio (right).

    Parameters
    ----------
    frequencies
        Cycles per voxel.
    real, simulated
        Power and its standard error, per shell; the mean over all frequencies is 1.
    voxel_size
        In Å.
    title
        Over both panels.
    """
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = frequencies / voxel_size
    for (power, error), label, colour in (
        (real, "real", "black"),
        (simulated, "simulated", LABEL_COLOUR),
    ):
        left.errorbar(x, power, 2 * error, fmt=".-", color=colour, label=label, lw=1, capsize=2)
    left.set_yscale("log")
    left.set(xlabel="spatial frequency (Å⁻¹)", ylabel="power (mean over all frequencies = 1)")
    left.legend(frameon=False, fontsize=8)
    ratio = simulated[0] / real[0]
    error = ratio * np.hypot(real[1] / real[0], simulated[1] / simulated[0])
    right.axhspan(0.85, 1.15, color="0.9")
    right.axhline(1.0, color="black", lw=0.8)
    right.errorbar(x, ratio, 2 * error, fmt=".", color=LABEL_COLOUR, capsize=2)
    right.set(xlabel="spatial frequency (Å⁻¹)", ylabel="simulated / real power")
    right.set_ylim(0.0, max(2.0, 1.1 * float((ratio + 2 * error).max())))
    right.text(0.98, 0.03, "bars: 2 standard errors; grey: 15 %", transform=right.transAxes,
               ha="right", fontsize=8)  # fmt: skip
    for axes in (left, right):
        axes.set_xlim(0.0, 0.52 / voxel_size)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure


def draw_generalisation(
    names: Sequence[str],
    overlaps: Mapping[str, Float[NDArray[np.float64], "3 structure"]],
    ratios: Mapping[str, Float[NDArray[np.float64], "3 structure"]],
    *,
    title: str,
) -> Figure:
    """Foreground IoU of each structure as bars (top), and ratios of it (bottom), with intervals.

    Parameters
    ----------
    names
        Of the structures, in the order in which they are drawn.
    overlaps
        Name of a network or trivial method → value, lower and upper end of its interval for each
        structure; an interval that is its value is not drawn.
    ratios
        The same of ratios; NaN where there is none.
    title
        Over both panels.
    """
    figure = Figure(figsize=(3.0 + 0.75 * len(names), 6.0), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[3, 2])
    places = np.arange(len(names), dtype=np.float64)
    width = 0.8 / max(len(overlaps), 1)
    for number, (label, (values, lows, highs)) in enumerate(overlaps.items()):
        shifted = places + (number - (len(overlaps) - 1) / 2) * width
        top.bar(shifted, values, 0.92 * width, color=f"C{number}", label=label)
        wide = highs > lows
        if wide.any():
            reach = np.stack([values - lows, highs - values])[:, wide]
            top.errorbar(shifted[wide], values[wide], np.maximum(reach, 0.0), fmt="none",
                         ecolor="black", elinewidth=1, capsize=2)  # fmt: skip
    top.set(ylabel="foreground IoU", ylim=(0, 1))
    bottom.axhline(1.0, color="black", lw=0.8)
    for number, (label, (values, lows, highs)) in enumerate(ratios.items()):
        shifted = places + (number - (len(ratios) - 1) / 2) * 0.2
        reach = np.maximum(np.stack([values - lows, highs - values]), 0.0)
        bottom.errorbar(shifted, values, reach, fmt="o", color=f"C{number}", ms=5, capsize=3,
                        label=label)  # fmt: skip
    bottom.set(ylabel="ratio of IoU", ylim=(0, max(1.2, bottom.get_ylim()[1])))
    bottom.set_xticks(places, names, rotation=35, ha="right")
    for axes in (top, bottom):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure


def _label_colour(number: int) -> str:
    """Colour of a label, from 1; after ten they repeat, but for the first, which stands out."""
    return PREDICTION_COLOUR if number == 1 else f"C{(number - 1) % 9}"


def _central(volume: NDArray[Any], plane: str) -> NDArray[Any]:
    """Slice through the centre voxel n//2: xy at constant z, xz at constant y."""
    middle: NDArray[Any] = (
        volume[volume.shape[0] // 2] if plane == "xy" else volume[:, volume.shape[1] // 2]
    )
    return middle


def _draw_plane(axes: Axes, plane: NDArray[Any]) -> None:
    values = np.asarray(plane, np.float32)
    low, high = np.percentile(values, [1, 99])
    if high <= low:  # mostly one value: the extremes, and grey if it is constant
        low, high = values.min(), values.max()
    margin = 0.0 if high > low else max(1.0, abs(high))
    low, high = low - margin, high + margin
    # A hot pixel may be 1e38, and matplotlib multiplies it.
    shown = np.clip(values, -1e30, 1e30)
    axes.imshow(shown, cmap="gray", vmin=low, vmax=high, origin="lower")
    axes.set_xticks([])
    axes.set_yticks([])


def _outline(axes: Axes, plane: NDArray[Any], colour: str) -> None:
    mask = np.asarray(plane) > 0
    if not mask.any() or mask.all():
        return
    # A rim of background closes the outline of what a face cuts.
    mask = np.pad(mask, 1)
    limits = axes.get_xlim(), axes.get_ylim()
    y, x = (np.arange(length) - 1 for length in mask.shape)
    axes.contour(x, y, mask.astype(np.float32), levels=[0.5], colors=[colour], linewidths=1.2)
    axes.set(xlim=limits[0], ylim=limits[1])


def draw_scale_bar(axes: Axes, voxel_size: float) -> None:
    """Bar of a round length, about a third of the width, at the lower left."""
    low, high = axes.get_xlim()
    width = (high - low) * voxel_size * SCALE_BAR_FRACTION
    unit = 10 ** np.floor(np.log10(width))
    length = max(step * unit for step in (1, 2, 5) if step * unit <= width)
    x, y = low + 0.06 * (high - low), axes.get_ylim()[0] + 0.08 * (high - low)
    rim = [withStroke(linewidth=4.5, foreground="black")]
    axes.plot(
        [x, x + length / voxel_size], [y, y], color="white", linewidth=3, path_effects=rim,
        solid_capstyle="butt",
    )  # fmt: skip
    axes.text(
        x, y + 0.04 * (high - low), f"{length / 10:g} nm", color="white", fontsize=8, va="bottom",
        path_effects=[withStroke(linewidth=2, foreground="black")],
    )  # fmt: skip

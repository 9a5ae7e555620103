"""Figures of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from cectflow.figures import draw_scale_bar

__all__ = ["Example", "draw_classes"]

BARS = np.linspace(0.0, 1.0, 21)
KNOWN_COLOUR, UNKNOWN_COLOUR = "0.45", "#D55E00"
SMALL, USUAL = 8, 9
"""Font sizes in points."""
ROW, HEAD = 0.92, 1.05
"""Heights in inches: of a class, and of titles and legend together."""


@dataclass(frozen=True, eq=False)
class Example:
    """A cube's section, and how sure the network is of it."""

    section: Float[NDArray[np.floating[Any]], "y x"]
    probability: float


def draw_classes(
    probabilities: Mapping[str, Float[NDArray[np.float64], " n"]],
    examples: Mapping[str, Sequence[Example]],
    *,
    voxel_size: float,
    unknown: Mapping[str, Bool[NDArray[np.bool_], " n"]] | None = None,
    missing: int = 0,
    title: str = "",
) -> Figure:
    """Particles of each class, how sure of them the network is, and some cubes of each.

    A row for each class that has particles, the most frequent first; the others are named below.

    Parameters
    ----------
    probabilities
        Class name → those of the particles that are called so.
    examples
        Class name → sections, the surest first.
    voxel_size
        Of the sections in Å.
    unknown
        Class name → which of its particles look like none of the classes; None where the network
        cannot tell.
    missing
        Particles that could not be predicted.
    title
        What was classified and by which model.
    """
    names = sorted(
        (name for name, values in probabilities.items() if len(values)),
        key=lambda name: -len(probabilities[name]),
    )
    columns = max((len(examples[name]) for name in names), default=0)
    figure = Figure(
        figsize=(4.4 + ROW * max(columns, 1), HEAD + ROW * max(len(names), 1)),
        layout="constrained",
    )
    grid = figure.subplots(
        max(len(names), 1), 2 + max(columns, 1), squeeze=False,
        width_ratios=[1.5, 1.5, *[ROW] * max(columns, 1)],
    )  # fmt: skip
    for axes in grid.flat:
        axes.set_axis_off()
    largest = len(probabilities[names[0]]) if names else 1
    for row, name in zip(grid, names, strict=False):
        values = probabilities[name]
        strange = np.zeros(len(values), np.bool_) if unknown is None else unknown[name]
        _draw_count(row[0], name, len(values), int(strange.sum()), largest)
        _draw_histogram(row[1], values, strange, is_last=name == names[-1])
        for panel, example in zip(row[2:], examples[name], strict=False):
            _draw_example(panel, example)
    grid[0, 0].set_title("particles", fontsize=USUAL)
    grid[0, 1].set_title("probability", fontsize=USUAL)
    if columns:
        # As wide as several panels: a title would widen its own.
        grid[0, 2].text(
            0, 1.06, "from the surest to the most doubtful; probability below",
            transform=grid[0, 2].transAxes, fontsize=USUAL, va="bottom", in_layout=False,
        )  # fmt: skip
        draw_scale_bar(grid[0, 2], voxel_size)
    total = sum(map(len, probabilities.values()))
    lost = f", {missing:,} not predicted" if missing else ""
    figure.suptitle(f"{title}{': ' if title else ''}{total:,} particles{lost}", fontsize=10)
    _draw_legend(figure, tuple(name for name in probabilities if name not in names), unknown)
    return figure


def _draw_count(axes: Axes, name: str, count: int, strange: int, largest: int) -> None:
    axes.set_axis_on()
    axes.barh(0, count - strange, color=KNOWN_COLOUR, height=0.5)
    axes.barh(0, strange, left=count - strange, color=UNKNOWN_COLOUR, height=0.5)
    axes.set(xlim=(0, 1.45 * largest), ylim=(-0.5, 0.5), yticks=[], xticks=[])
    axes.text(count + 0.04 * largest, 0, f"{count:,}", va="center", fontsize=SMALL)
    axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=USUAL)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _draw_histogram(
    axes: Axes,
    values: Float[NDArray[np.float64], " n"],
    strange: Bool[NDArray[np.bool_], " n"],
    *,
    is_last: bool,
) -> None:
    axes.set_axis_on()
    axes.hist(
        [values[~strange], values[strange]], BARS.tolist(), stacked=True,
        color=[KNOWN_COLOUR, UNKNOWN_COLOUR],
    )  # fmt: skip
    axes.set(xlim=(0, 1), yticks=[], xticks=[0, 0.5, 1])
    axes.tick_params(labelsize=SMALL, labelbottom=is_last)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_example(axes: Axes, example: Example) -> None:
    section = example.section
    low, high = np.quantile(section, (0.01, 0.99))
    axes.imshow(section, cmap="gray", vmin=low, vmax=high, origin="lower")
    axes.text(
        0.5, -0.04, f"{example.probability:.2f}", transform=axes.transAxes, ha="center", va="top",
        fontsize=SMALL,
    )  # fmt: skip


def _draw_legend(
    figure: Figure, empty: tuple[str, ...], unknown: Mapping[str, object] | None
) -> None:
    """Colours, and the classes that no particle is called."""
    handles = [Patch(color=KNOWN_COLOUR, label="looks like its class")]
    if unknown is None:
        handles = []
    else:
        handles.append(Patch(color=UNKNOWN_COLOUR, label="unknown"))
    if empty:
        more = f" and {len(empty) - 8} more" if len(empty) > 8 else ""
        handles.append(Patch(alpha=0, label=f"no particle is called {', '.join(empty[:8])}{more}"))
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=len(handles), frameon=False,
            fontsize=SMALL,
        )  # fmt: skip

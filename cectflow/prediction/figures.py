"""Figures of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

__all__ = ["draw_classes"]

BARS = [number / 20 for number in range(21)]
GREY = "0.4"
SMOOTHING = 1.0
"""Of sections, sigma in voxels: the noise of a single voxel hides what is larger."""
NAMES_IN_NOTE = 8
"""Of classes without a particle; more are counted."""


def draw_classes(
    probabilities: Mapping[str, Float[NDArray[np.float64], " n"]],
    examples: Mapping[str, Sequence[Float[NDArray[np.floating[Any]], "y x"]]],
    *,
    voxel_size: float,
    title: str = "",
    notes: Sequence[str] = (),
) -> Figure:
    """Particles of each class, how sure of them the network is, and some cubes of each.

    The most frequent class comes first; those without a particle are named below.

    Parameters
    ----------
    probabilities
        Class name → those of the particles that are called so.
    examples
        Class name → sections ``(y, x)``, the surest first.
    voxel_size
        Of the sections in Å.
    title
        Over the figure.
    notes
        What else is to be said of the particles, a few words each; after the title.
    """
    found = sorted(
        (name for name, values in probabilities.items() if len(values)),
        key=lambda name: -len(probabilities[name]),
    )
    absent = [name for name in probabilities if name not in found]
    columns = max((len(sections) for sections in examples.values()), default=0)
    rows = max(len(found), 1)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, wspace=0.01, hspace=0.02)
    figure = Figure(figsize=(5.6 + 0.95 * columns, 1.3 + 0.95 * rows), layout=layout)
    grid = figure.subplots(
        rows, 2 + max(columns, 1), squeeze=False,
        width_ratios=[1.8, 1.8, *[1.0] * max(columns, 1)],
    )  # fmt: skip
    largest = max(map(len, probabilities.values()), default=1) or 1
    for axes, name in zip(grid, found, strict=False):
        values = probabilities[name]
        _draw_count(axes[0], name, len(values), largest)
        _draw_probabilities(axes[1], values)
        for panel, section in zip(axes[2:], examples[name], strict=False):
            _draw_section(panel, section)
        for panel in axes[2:]:
            panel.set_axis_off()
    if not found:
        for panel in grid.flat:
            panel.set_axis_off()
    else:
        grid[0, 0].set_title("particles", fontsize=9)
        grid[0, 1].set_title("probability", fontsize=9)
        grid[-1, 1].tick_params(labelbottom=True)
    if columns:
        edge = next(iter(s for e in examples.values() for s in e)).shape[-1] * voxel_size
        what = f"the surest, {edge:.0f} Å wide, smoothed"
        grid[0, 2].set_title(what, fontsize=9, loc="left")
    total = sum(map(len, probabilities.values()))
    said = [f"{total:,} particles", *notes]
    figure.suptitle(f"{title}: {', '.join(said)}" if title else ", ".join(said), fontsize=10)
    if absent:
        more = f" and {len(absent) - NAMES_IN_NOTE} more" if len(absent) > NAMES_IN_NOTE else ""
        named = ", ".join(absent[:NAMES_IN_NOTE])
        figure.supxlabel(f"no particle: {named}{more}", fontsize=8, color=GREY)
    return figure


def _draw_count(axes: Axes, name: str, count: int, largest: int) -> None:
    axes.barh(0, count, color=GREY, height=0.5)
    axes.set(xlim=(0, 1.45 * largest), ylim=(-0.5, 0.5), yticks=[], xticks=[])
    axes.text(count + 0.03 * largest, 0, f"{count:,}", va="center", fontsize=8)
    axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _draw_probabilities(axes: Axes, values: Float[NDArray[np.float64], " n"]) -> None:
    """Histogram with its mean; the numbers along the axis are shown by the last class alone."""
    axes.hist(values, BARS, color=GREY)
    axes.set(xlim=(0, 1), yticks=[], xticks=[0, 0.5, 1])
    axes.text(
        0.03, 0.92, f"mean {values.mean():.2f}", fontsize=7, va="top", transform=axes.transAxes
    )
    axes.tick_params(labelsize=7, labelbottom=False)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_section(axes: Axes, section: Float[NDArray[np.floating[Any]], "y x"]) -> None:
    smooth = gaussian_filter(np.asarray(section, np.float64), SMOOTHING)
    low, high = np.quantile(smooth, (0.01, 0.99))
    axes.imshow(smooth, cmap="gray", vmin=low, vmax=high, origin="lower")

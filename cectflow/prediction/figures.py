"""Figures of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from numpy.typing import NDArray

__all__ = ["draw_classes"]

BARS = np.linspace(0.0, 1.0, 21)


def draw_classes(
    probabilities: Mapping[str, Float[NDArray[np.float64], " n"]],
    examples: Mapping[str, Sequence[Float[NDArray[np.floating[Any]], "y x"]]],
    *,
    voxel_size: float,
    missing: int = 0,
) -> Figure:
    """Particles of each class, how sure of them the network is, and some cubes of each.

    Parameters
    ----------
    probabilities
        Class name → those of the particles that are called so.
    examples
        Class name → sections ``(y, x)``, the surest first.
    voxel_size
        Of the sections in Å.
    missing
        Particles that could not be predicted.
    """
    names = list(probabilities)
    columns = max((len(sections) for sections in examples.values()), default=0)
    rows = max(len(names), 1)
    figure = Figure(figsize=(5.0 + 1.0 * columns, 0.9 + 0.9 * rows), layout="constrained")
    grid = figure.subplots(
        rows, 2 + max(columns, 1), squeeze=False,
        width_ratios=[1.6, 1.6, *[1.0] * max(columns, 1)],
    )  # fmt: skip
    largest = max((len(values) for values in probabilities.values()), default=1) or 1
    for axes, name in zip(grid, names, strict=False):
        values = probabilities[name]
        axes[0].barh(0, len(values), color="0.4", height=0.5)
        axes[0].set(xlim=(0, 1.35 * largest), ylim=(-0.5, 0.5), yticks=[], xticks=[])
        axes[0].text(len(values) + 0.03 * largest, 0, f"{len(values):,}", va="center", fontsize=8)
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axes[0].spines[["top", "right", "bottom"]].set_visible(False)
        axes[1].hist(values, BARS, color="0.4")
        axes[1].set(xlim=(0, 1), yticks=[])
        axes[1].tick_params(labelsize=6)
        axes[1].spines[["top", "right", "left"]].set_visible(False)
        for place, panel in enumerate(axes[2:]):
            panel.set_axis_off()
            if place < len(examples[name]):
                section = examples[name][place]
                low, high = np.quantile(section, (0.01, 0.99))
                panel.imshow(section, cmap="gray", vmin=low, vmax=high, origin="lower")
    grid[0, 0].set_title("particles", fontsize=9)
    grid[0, 1].set_title("probability", fontsize=9)
    if columns:
        edge = next(iter(s for e in examples.values() for s in e)).shape[-1] * voxel_size
        grid[0, 2].set_title(f"surest, {edge:.0f} Å wide", fontsize=9, loc="left")
    total = sum(len(values) for values in probabilities.values())
    lost = f", {missing:,} not predicted" if missing else ""
    figure.suptitle(f"{total:,} particles{lost}", fontsize=10)
    return figure

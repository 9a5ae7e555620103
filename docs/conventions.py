"""Picture of docs/conventions.md: one particle, and what each convention writes of it.

The numbers are computed by cectflow, not typed. To be run from the root of the clone::

    python docs/conventions.py docs/images/conventions.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from cectflow.figures import write_figure
from cectflow.placement import coordinate_columns
from cectflow.tomogram_table import TomogramInfo

INFO = TomogramInfo((14, 10, 8), 5.0, 2.0)
"""Small enough to see its voxels; seven of them along x, so that the centre is none of them."""
PARTICLE_ZYX = np.array([[2.0, 1.0, 5.0]])
PARTICLE, ORIGIN, GRID = "#0072B2", "#D55E00", "#BBBBBB"


def draw_conventions() -> Figure:
    """Central plane of a tomogram four times: grid, origin and numbers of each convention."""
    figure = Figure(figsize=(9.5, 6.9), layout="constrained")
    axes = figure.subplots(2, 2)
    voxel, pixel = 10.0, 5.0
    draw_panel(axes[0, 0], "RELION 3, Warp export, CSV", "relion3", voxel, "voxels of 10 Å")
    draw_panel(axes[0, 1], "RELION 4", "relion4", pixel, "unbinned pixels of 5 Å")
    draw_panel(axes[1, 0], "M (wrpCoordinateX1)", "m", None, "Å")
    draw_panel(axes[1, 1], "RELION 5", "relion5", None, "Å")
    figure.suptitle(
        "One particle of a tomogram of 14 x 10 x 8 unbinned pixels of 5 Å, at binning 2\n"
        "(z is counted likewise: voxel 2)",
        fontsize=11,
    )
    return figure


def draw_panel(axes: Axes, title: str, convention: Any, cell: float | None, unit: str) -> None:
    """One convention; the axes are angstrom from the centre of voxel 0."""
    x, y = (float(value) for value in PARTICLE_ZYX[0, :0:-1] * 10.0)
    width, height, _ = INFO.extent_xyz
    edge = cell or 5.0
    low = -edge / 2
    origin = (width / 2, height / 2) if convention == "relion5" else (0.0, 0.0)
    if cell is not None:
        for number in range(round(width / cell) + 1):
            axes.plot([low + number * cell] * 2, [low, low + height], color=GRID, lw=0.7)
        for number in range(round(height / cell) + 1):
            axes.plot([low, low + width], [low + number * cell] * 2, color=GRID, lw=0.7)
    axes.add_patch(Rectangle((low, low), width, height, fill=False, lw=1.4))
    axes.add_patch(Circle((x, y), 3.2, fill=False, lw=2.4, color=PARTICLE))
    axes.plot(*origin, "o", color=ORIGIN, ms=8)
    arrow = {"arrowstyle": "->", "color": ORIGIN, "lw": 1.6}
    axes.annotate("", xy=(x, origin[1]), xytext=origin, arrowprops=arrow)
    axes.annotate("", xy=(x, y), xytext=(x, origin[1]), arrowprops={**arrow, "shrinkB": 9})
    names = {
        "relion4": "the centre of pixel 0, which is that of voxel 0",
        "relion5": f"half the unbinned size: {width / 2:g}, {height / 2:g} Å",
    }
    where = names.get(convention, "the centre of voxel 0")
    numbers = numbers_of(convention)
    axes.set_title(f"{title}\nx = {numbers[0]:g},  y = {numbers[1]:g}   ({unit})", fontsize=11)
    axes.set_xlabel(f"counted from {where}", fontsize=9.5, color=ORIGIN)
    axes.set_xlim(-6, width)
    axes.set_ylim(-6, height)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def numbers_of(convention: Any) -> tuple[float, float]:
    """X and y of the particle as the convention writes them."""
    assert INFO.voxel_size is not None
    assert INFO.shape is not None
    if convention == "m":
        x, y = (float(value) for value in PARTICLE_ZYX[0, :0:-1] * INFO.voxel_size)
        return x, y
    columns = coordinate_columns(
        PARTICLE_ZYX, convention, voxel_size=INFO.voxel_size, shape=INFO.shape, info=INFO
    )  # fmt: skip
    x, y = (float(values[0]) for name, values in columns.items() if "X" in name or "Y" in name)
    return x, y


def main() -> None:
    """Draw and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="PNG; replaced where it exists")
    write_figure(draw_conventions(), parser.parse_args().out, overwrite=True)


if __name__ == "__main__":
    main()

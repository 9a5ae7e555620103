"""Contrast: whether particles look darker or lighter than their surroundings, and a warning."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from cectflow.model_card import ModelCard
from cectflow.prediction.contract import InputOptions

__all__ = ["ContrastWatch", "measure_lightness"]

JUDGED_CUBES = 64
"""Of which the contrast can be judged."""
SMALLEST = 1e-6
"""Deviation of what is not constant, over the difference that it is to measure."""
CERTAIN = 5.0
"""Standard errors by which particles must look inverted to be called so."""


def measure_lightness(
    cubes: Float[NDArray[np.float32], "n 1 z y x"],
) -> Float[NDArray[np.float32], " n"]:
    """By how much a cube's middle is lighter than its first and last section, in their deviations.

    Not a number where those are constant, as padding is.
    """
    edge = cubes.shape[-1]
    inner = slice(edge // 2 - max(1, edge // 10), edge // 2 + max(1, edge // 10) + 1)
    core = cubes[:, 0, inner, inner, inner]
    faces = np.stack([cubes[:, 0, 0], cubes[:, 0, -1]], axis=1)
    axes, exact = (1, 2, 3), np.float64  # in which no sum of float32 overflows
    difference = core.mean(axis=axes, dtype=exact) - faces.mean(axis=axes, dtype=exact)
    deviation = faces.std(axis=axes, dtype=exact)
    lightness = np.full(len(cubes), np.nan)
    np.divide(difference, deviation, out=lightness, where=deviation > SMALLEST * abs(difference))
    return lightness.astype(np.float32)


class ContrastWatch:
    """Warns once where particles look lighter than their surroundings to the network."""

    def __init__(
        self, card: ModelCard, options: InputOptions, report: Callable[[str], None]
    ) -> None:
        self._sign = 1.0 if card.contrast == "dark" else -1.0
        self._given = options.contrast
        self._report = report
        self._count, self._sum, self._squares = 0, 0.0, 0.0
        self._told = False

    def see(self, lightness: Float[NDArray[np.float32], " n"]) -> None:
        """Take the cubes of a piece into account."""
        finite = lightness[np.isfinite(lightness)]
        values = self._sign * finite.astype(np.float64)
        self._count += len(values)
        self._sum += float(values.sum())
        self._squares += float(np.square(values).sum())
        if self._told or self._count < JUDGED_CUBES:
            return
        mean = self._sum / self._count
        error = (max(self._squares / self._count - mean**2, 0.0) / self._count) ** 0.5
        if mean > CERTAIN * error:
            self._told = True
            other = "light" if self._given == "dark" else "dark"
            self._report(
                f"warning: particles look {'lighter' if self._sign > 0 else 'darker'} than their "
                f"surroundings ({mean:.2f} ± {error:.2f} deviations in {self._count} cubes), as "
                f"if the contrast were inverted: the input was said to be {self._given}; if it is "
                f"not, start anew with --contrast {other} --overwrite"
            )

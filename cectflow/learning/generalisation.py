"""Generalisation: how well a segmenter finds structures that it never saw (paper (a)).

The structures are left out group by group (:func:`make_folds`); of each, :func:`compare_folds`
compares the network that never saw it with one that saw all, on the same cubes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from cectflow.config import Config
from cectflow.dataset import Selection, Split
from cectflow.learning.scores import (
    Evaluation,
    baseline_ball,
    baseline_threshold,
    bootstrap_ratio,
    bootstrap_score,
)
from cectflow.model_card import Score

__all__ = ["Generalisation", "StructureResult", "compare_folds", "make_folds"]

SCORE = "foreground_iou"


class StructureResult(Config):
    """Foreground IoU of one structure, by networks that saw it and by one that did not."""

    name: str
    mass_kda: float
    held_out_with: tuple[str, ...]
    """The structures that were left out together with it, itself included."""
    num_test: int
    """Test cubes about it."""
    seen: Score
    """Of the network that was trained with all structures."""
    unseen: Score
    """Of the network that never saw its group."""
    ratio: Score | None
    """``unseen`` over ``seen``, paired over fields; None where the latter is 0."""
    control: Score | None
    """A second training with all structures, over ``seen``; None without one, or as ``ratio``."""
    ball: float
    """Of the centred ball that is best for this very structure."""
    threshold: float
    """Of the threshold that is best for this very structure."""


class Generalisation(Config):
    """What leaving structures out showed. Intervals are 95 %, over fields of the test split."""

    network: str
    seed: int
    classes: tuple[str, ...]
    folds: tuple[tuple[str, ...], ...]
    """The groups that were held out, in order."""
    train_cubes: int
    """Per epoch, the same for every network."""
    epochs: int
    """The same for every network."""
    recipe_digest: str
    dataset_digest: str
    """Of the test data, which hold all structures."""
    structures: tuple[StructureResult, ...]
    """By mass, the smallest first."""
    ratio: Score | None
    """Mean IoU over structures, each by the network that never saw it, over the mean IoU of the
    network that saw all: every structure counts alike. None where the latter is 0."""
    control: Score | None
    """The same of the second training with all structures."""

    @property
    def smallest(self) -> StructureResult | None:
        """The structure that suffers most from being left out."""
        known = [row for row in self.structures if row.ratio is not None]
        return min(known, key=lambda row: row.ratio.value if row.ratio else np.inf, default=None)

    def figures(self) -> dict[str, float]:
        """Flat: name → number, for runs and benchmarks."""
        flat = {"train_cubes": float(self.train_cubes)}
        named = {"unseen_over_seen": self.ratio, "control_over_seen": self.control}
        if self.smallest is not None:
            named["unseen_over_seen_smallest"] = self.smallest.ratio
        for row in self.structures:
            named |= {f"iou_seen_{row.name}": row.seen, f"iou_unseen_{row.name}": row.unseen}
            named |= {f"unseen_over_seen_{row.name}": row.ratio}
            flat |= {f"iou_ball_{row.name}": row.ball, f"iou_threshold_{row.name}": row.threshold}
        for name, score in named.items():
            if score is not None:
                flat |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
        return flat


def make_folds(
    structures: Sequence[str], groups: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], ...]:
    """Groups of structures that are held out together, in the order of the structures.

    Parameters
    ----------
    structures
        All of them.
    groups
        Homologous ones; names of others are passed over. A structure in no group is one.

    Raises
    ------
    ValueError
        If there is only one group: nothing would be left to train on.
    """
    of_structure = {name: tuple(group) for group in groups for name in group}
    folds: dict[tuple[str, ...], None] = {}
    for name in structures:
        group = of_structure.get(name, (name,))
        folds[tuple(other for other in structures if other in group)] = None
    if len(folds) < 2:
        msg = (
            f"all structures ({', '.join(structures)}) are held out together: expected two groups "
            f"at least, nothing would be left to train on"
        )
        raise ValueError(msg)
    return tuple(folds)


def compare_folds(
    test: Split,
    seen: Evaluation,
    unseen: Mapping[tuple[str, ...], Evaluation],
    control: Evaluation | None,
    masses_kda: Mapping[str, float],
) -> tuple[tuple[StructureResult, ...], Score | None, Score | None]:
    """Results of the structures, lightest first, the overall ratio and that of the control.

    Parameters
    ----------
    test
        The cubes that all evaluations are about.
    seen
        By the network that was trained with all structures.
    unseen
        Held-out structures → by the network that was trained without them. The structures of all
        keys together are those that are compared.
    control
        By the second network that was trained with all structures.
    masses_kda
        Of each structure.

    Raises
    ------
    ValueError
        If the test data have no cube about one of the structures.
    """
    classes, fields = test.manifest.classes, test.fields
    reference = seen.scores[SCORE]
    again = None if control is None else control.scores[SCORE]
    judged, weights = np.zeros(len(test)), np.zeros(len(test))
    rows = []
    for held_out, evaluation in unseen.items():
        for name in held_out:
            mine = test.class_ids == classes.index(name) + 1
            number = int(mine.sum())
            if not number:
                msg = f"no test cube is about {name}: give more test fields"
                raise ValueError(msg)
            judged[mine], weights[mine] = evaluation.scores[SCORE][mine], 1.0 / number
            cubes = Selection(test, np.flatnonzero(mine))
            rows.append(
                StructureResult(
                    name=name,
                    mass_kda=float(masses_kda[name]),
                    held_out_with=held_out,
                    num_test=number,
                    seen=bootstrap_score(reference[mine], fields[mine]),
                    unseen=bootstrap_score(judged[mine], fields[mine]),
                    ratio=_ratio(judged, reference, mine * 1.0, fields),
                    control=None if again is None else _ratio(again, reference, mine * 1.0, fields),
                    ball=baseline_ball(cubes)[0],
                    threshold=baseline_threshold(cubes)[0],
                )
            )
    return (
        tuple(sorted(rows, key=lambda row: row.mass_kda)),
        _ratio(judged, reference, weights, fields),
        None if again is None else _ratio(again, reference, weights, fields),
    )


def _ratio(
    values: Float[NDArray[np.float64], " n"],
    reference: Float[NDArray[np.float64], " n"],
    weights: Float[NDArray[np.float64], " n"],
    fields: NDArray[np.int64],
) -> Score | None:
    """Ratio of two weighted means; None where the reference is 0 throughout."""
    counted: Bool[NDArray[np.bool_], " n"] = weights > 0
    if not (weights * reference).any():
        return None
    values, reference = values * weights, reference * weights
    return bootstrap_ratio(values[counted], reference[counted], fields[counted])

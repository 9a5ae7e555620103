"""A score broken down by structure, occupancy and SNR: where a network is good and where not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from cectflow.learning.scores import Evaluation, bootstrap_score
from cectflow.manifest import Manifest, SplitName
from cectflow.model_card import Score

__all__ = ["Group", "break_down"]

MOST_GROUPS = 4
FEWEST_FIELDS = 2
"""Of a group: one field has no interval."""


@dataclass(frozen=True)
class Group:
    """Subtomograms that share something, and their score.

    Attributes
    ----------
    by
        ``structure``, ``occupancy`` or ``SNR``.
    name
        The structure, or the range of the fields' values.
    position
        Mass in kDa, or the mean of the fields' values; None where the mass is not known.
    number
        Of subtomograms.
    score
        With its interval over fields.
    """

    by: str
    name: str
    position: float | None
    number: int
    score: Score


def break_down(
    evaluation: Evaluation, manifest: Manifest, name: str, split: SplitName = "test"
) -> tuple[Group, ...]:
    """Groups of subtomograms by the structure at their centre, by occupancy and by SNR.

    Occupancy and SNR are those measured in the fields. Fields in the order of their values make
    up to four groups of equal numbers of fields; a value that no field states gives none.

    Parameters
    ----------
    evaluation
        Of the whole split.
    manifest
        Of its dataset.
    name
        Of a score per subtomogram.
    split
        That was evaluated.
    """
    values = evaluation.scores[name]
    usable = np.isfinite(values)

    def group(by: str, title: str, position: float | None, member: NDArray[np.bool_]) -> Group:
        chosen = member & usable
        score = bootstrap_score(values[chosen], evaluation.fields[chosen])
        return Group(by, title, position, int(chosen.sum()), score)

    groups = [
        group("structure", title, manifest.masses_kda.get(title), evaluation.class_ids == class_id)
        for class_id, title in enumerate(manifest.classes, start=1)
        if (usable & (evaluation.class_ids == class_id)).any()
    ]
    records = manifest.field_records(split)
    measured: Mapping[str, list[float | None]] = {
        "occupancy": [record.occupancy for record in records],
        "SNR": [record.snr for record in records],
    }
    for by, found in measured.items():
        for title, position, member in _ranges(found, evaluation.fields):
            if (member & usable).any():
                groups.append(group(by, title, position, member))
    return tuple(groups)


def _ranges(
    found: list[float | None], fields: NDArray[np.int64]
) -> list[tuple[str, float, Bool[NDArray[np.bool_], " n"]]]:
    """Title, mean value and members of groups of fields with rising values."""
    if None in found:
        return []
    values = np.array(found, np.float64)
    order = np.argsort(values, kind="stable")
    number = int(np.clip(len(values) // FEWEST_FIELDS, 1, MOST_GROUPS))
    ranges = []
    for members in np.array_split(order, number):
        low, high = (f"{values[members].min():.3g}", f"{values[members].max():.3g}")
        title = low if low == high else f"{low} to {high}"
        ranges.append((title, float(values[members].mean()), np.isin(fields, members)))
    return ranges

"""Comparison of two models: what their cards, scores, costs, recipes and data say differently."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cectflow.model_card import CARD_FILE, ModelCard, Score
from cectflow.tracking.bundle import RECIPE_FILE, open_model_folder
from cectflow.tracking.lineage import logged_text
from cectflow.tracking.registry import read_card
from cectflow.tracking.versions import find_version

__all__ = ["compare"]

APART = {"scores", "cost"}
"""Sections of a card that are compared by themselves."""
COSTS = ("parameters", "macs", "subtomograms_per_s", "device", "threads", "batch_size")


@dataclass(frozen=True, eq=False)
class _Subject:
    """One of the two: its name, card, recipe and what is known of its dataset."""

    label: str
    card: ModelCard
    recipe: str | None
    dataset: Mapping[str, Any] | None


def compare(first: str, second: str) -> dict[str, Any]:
    """What differs between two models, as JSON can hold it.

    Parameters
    ----------
    first, second
        Whatever :func:`~cectflow.tracking.registry.resolve_model` takes, folders and bundles too.

    Returns
    -------
    dict
        ``models`` (their names); ``card`` and ``dataset``: rows of ``field``, ``first``,
        ``second``; ``scores``: name → both with their intervals, ``difference`` (second less first)
        and ``apart`` (whether the intervals do not meet); ``cost``: name → both and their ratio;
        ``recipe``: lines of a unified diff, None where one of the texts is unknown.

    Raises
    ------
    ValueError
        If there is no such model.
    """
    a, b = _subject(first), _subject(second)
    cards = [subject.card.model_dump(mode="json", exclude=APART) for subject in (a, b)]
    data = [_flat({} if subject.dataset is None else subject.dataset) for subject in (a, b)]
    return {
        "models": [a.label, b.label],
        "card": _rows(_flat(cards[0]), _flat(cards[1])),
        "scores": _scores(a.card, b.card),
        "cost": _costs(a.card, b.card),
        "recipe": _recipe_lines(a, b),
        "dataset": _rows(*data),
    }


def _subject(argument: str) -> _Subject:
    path = Path(argument).expanduser()
    if (path / CARD_FILE).is_file():
        label, recipe = open_model_folder(path), path / RECIPE_FILE
        text = recipe.read_text(encoding="utf-8") if recipe.is_file() else None
        return _Subject(label, ModelCard.from_folder(path), text, None)
    version = find_version(argument)
    texts: dict[str, str | None] = {"recipe.yaml": None, "dataset.json": None}
    if version.run_id:
        texts = {file: logged_text(version.run_id, file) for file in texts}
    dataset = texts["dataset.json"]
    return _Subject(
        version.label, read_card(version), texts["recipe.yaml"],
        None if dataset is None else json.loads(dataset),
    )  # fmt: skip


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _rows(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"field": field, "first": first.get(field), "second": second.get(field)}
        for field in {**first, **second}
        if first.get(field) != second.get(field)
    ]


def _scores(first: ModelCard, second: ModelCard) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in {**first.scores, **second.scores}:
        a, b = first.scores.get(name), second.scores.get(name)
        both: dict[str, Any] = {"first": _interval(a), "second": _interval(b)}
        if a is not None and b is not None:
            both |= {"difference": b.value - a.value, "apart": a.high < b.low or b.high < a.low}
        found[name] = both
    return found


def _interval(score: Score | None) -> dict[str, float] | None:
    return None if score is None else score.model_dump()


def _costs(first: ModelCard, second: ModelCard) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in COSTS:
        a, b = (None if card.cost is None else getattr(card.cost, name) for card in (first, second))
        found[name] = {"first": a, "second": b}
        if name in COSTS[:3] and a and b:
            found[name]["ratio"] = b / a
    return found


def _recipe_lines(first: _Subject, second: _Subject) -> list[str] | None:
    if first.recipe is None or second.recipe is None:
        return None
    return list(
        difflib.unified_diff(
            first.recipe.splitlines(), second.recipe.splitlines(), first.label, second.label,
            lineterm="", n=2,
        )
    )  # fmt: skip

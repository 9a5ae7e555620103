"""Variants: siblings of a network in lower precision, each made, timed and judged against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from cectflow.cost import BATCH_SIZE, measure_throughputs
from cectflow.dataset import Dataset
from cectflow.learning.task import MONITORS, network_input
from cectflow.learning.training import evaluate_folder
from cectflow.model_card import ModelCard, Score, Variant, VariantFigures
from cectflow.quantise import quantise
from cectflow.runtime import RuntimeName
from cectflow.timing import Candidate

__all__ = ["Sibling", "judge_variants", "make_variants"]

NUM_CUBES = 128
"""Of the validation split, on which int8 is calibrated and parity is measured."""
RUNTIME: RuntimeName = "openvino"
"""In which variants are judged and predict: no other is faster in them."""


@dataclass(frozen=True, eq=False)
class Sibling:
    """What a variant loses, measured against float32 in the same runtime.

    Attributes
    ----------
    score, difference, parity, agreement
        As in :class:`~cectflow.model_card.VariantFigures`.
    """

    score: Score
    difference: Score
    parity: float
    agreement: float | None


def make_variants(
    folder: Path, dataset: Dataset, variants: Sequence[Variant]
) -> dict[Variant, VariantFigures]:
    """Add variants to a model folder, and measure each against its float32 network.

    Parameters
    ----------
    folder
        A model folder; ``int8`` becomes a file in it.
    dataset
        Its validation split calibrates, its test split judges.
    variants
        ``bfloat16``, ``int8``.
    """
    if not variants:
        return {}
    if "int8" in variants:
        quantise(folder, _cubes(folder, dataset))
    threads = torch.get_num_threads()
    candidates = [_candidate(folder, variant) for variant in ("float32", *variants)]
    rates = measure_throughputs(candidates)
    siblings = judge_variants(folder, dataset, variants)
    return {
        variant: VariantFigures(
            score=siblings[variant].score,
            difference=siblings[variant].difference,
            parity=siblings[variant].parity,
            agreement=siblings[variant].agreement,
            speedup=rate / rates[0],
            runtime=RUNTIME,
            threads=threads,
        )
        for variant, rate in zip(variants, rates[1:], strict=True)
    }


def judge_variants(
    folder: Path, dataset: Dataset, variants: Sequence[Variant]
) -> dict[Variant, Sibling]:
    """What each variant that a model folder carries loses on the test split.

    Parameters
    ----------
    folder, dataset, variants
        As of :func:`make_variants`; nothing is added to the folder.

    Raises
    ------
    FileNotFoundError
        If the folder lacks the file of a variant.
    ValueError
        If this machine cannot compute in a variant.
    """
    name = MONITORS[ModelCard.from_folder(folder).task]
    cubes = _cubes(folder, dataset)
    reference = evaluate_folder(folder, dataset, runtime=RUNTIME)
    found = {}
    for variant in variants:
        evaluation = evaluate_folder(folder, dataset, runtime=RUNTIME, variant=variant)
        same = None
        if evaluation.predicted is not None and reference.predicted is not None:
            same = float((evaluation.predicted == reference.predicted).mean())
        found[variant] = Sibling(
            evaluation.interval(name),
            evaluation.difference(reference, name),
            _largest_difference(_candidate(folder, "float32"), _candidate(folder, variant), cubes),
            same,
        )
    return found


def _candidate(folder: Path, variant: Variant) -> Candidate:
    return Candidate(folder=folder, runtime=RUNTIME, variant=variant)


def _cubes(folder: Path, dataset: Dataset) -> Float[NDArray[np.float32], "n 1 z y x"]:
    """Of the validation split, as the network is shown them."""
    generator = torch.Generator().manual_seed(0)
    batch = next(dataset.split("validation").batches(NUM_CUBES, generator))
    return network_input(batch, ModelCard.from_folder(folder).task).numpy()


def _largest_difference(
    exact: Candidate, rough: Candidate, cubes: Float[NDArray[np.float32], "n 1 z y x"]
) -> float:
    """Of the logits of two candidates."""
    first, second = (candidate.load(torch.get_num_threads()) for candidate in (exact, rough))
    batches = np.array_split(cubes, -(-len(cubes) // BATCH_SIZE))
    return max(float(np.abs(first(batch) - second(batch)).max()) for batch in batches)

"""Variants: siblings of a network in lower precision, each made, timed and judged against it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from cectflow.cost import BATCH_SIZE, measure_throughputs
from cectflow.dataset import Dataset
from cectflow.learning.task import MONITORS, network_input
from cectflow.learning.training import evaluate_folder
from cectflow.model_card import ModelCard, Variant, VariantFigures
from cectflow.quantise import quantise
from cectflow.runtime import RuntimeName
from cectflow.timing import Candidate

__all__ = ["make_variants"]

NUM_CUBES = 128
"""Of the validation split, on which int8 is calibrated and parity is measured."""
RUNTIME: RuntimeName = "openvino"
"""In which variants are judged and predict: no other is faster in them."""


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
    card = ModelCard.from_folder(folder)
    reference = evaluate_folder(folder, dataset, runtime=RUNTIME)
    generator = torch.Generator().manual_seed(0)
    batch = next(dataset.split("validation").batches(NUM_CUBES, generator))
    cubes = network_input(batch, card.task).numpy()
    if "int8" in variants:
        quantise(folder, cubes)
    score_name = MONITORS[card.task]
    threads = torch.get_num_threads()
    candidates = [
        Candidate(folder=folder, runtime=RUNTIME, variant=variant)
        for variant in ("float32", *variants)
    ]
    rates = measure_throughputs(candidates)
    figures = {}
    for candidate, rate in zip(candidates[1:], rates[1:], strict=True):
        evaluation = evaluate_folder(folder, dataset, runtime=RUNTIME, variant=candidate.variant)
        figures[candidate.variant] = VariantFigures(
            score=evaluation.interval(score_name),
            difference=evaluation.difference(reference, score_name),
            parity=_largest_difference(candidates[0], candidate, cubes),
            speedup=rate / rates[0],
            runtime=RUNTIME,
            threads=threads,
        )
    return figures


def _largest_difference(
    exact: Candidate, rough: Candidate, cubes: Float[NDArray[np.float32], "n 1 z y x"]
) -> float:
    """Of the logits of two candidates."""
    first, second = (candidate.load(torch.get_num_threads()) for candidate in (exact, rough))
    batches = np.array_split(cubes, -(-len(cubes) // BATCH_SIZE))
    return max(float(np.abs(first(batch) - second(batch)).max()) for batch in batches)

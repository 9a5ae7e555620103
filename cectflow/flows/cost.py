"""What a network costs on this machine: latency and memory by runtime, variant and batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cectflow.cost import weigh_files
from cectflow.model_card import Cost, ModelCard, Variant
from cectflow.runtime import RuntimeName
from cectflow.timing import list_candidates, time_alone
from cectflow.tracking.registry import resolve_model
from cectflow.tracking.runs import start_run

__all__ = ["evaluate_cost"]


def evaluate_cost(
    model: str,
    *,
    runtimes: Sequence[RuntimeName],
    variants: Sequence[Variant],
    batch_sizes: Sequence[int],
    threads: int | None,
    seconds: float,
    report: Callable[[str], None],
) -> Cost:
    """Cost of a registered version or model folder on this machine's CPU, logged as a run.

    Each timing has a process of its own. They follow one another, so on a machine that does other
    work they cannot be divided by one another; the speed-ups in the card were measured by turns.

    Parameters
    ----------
    model
        Registered model or model folder.
    runtimes, variants, batch_sizes
        All that the model and the machine have of them are timed.
    threads
        Of every runtime; None: as many as torch takes.
    seconds
        For each timing, after its warm-up.
    report
        Told of each timing as it begins.

    Raises
    ------
    ValueError
        If the model has no measured cost, or none of the runtimes and variants is there.
    """
    folder, version = resolve_model(model)
    card = ModelCard.from_folder(folder)
    candidates = list_candidates(folder, tuple(runtimes), tuple(variants))
    if card.cost is None or not candidates:
        missing = "cost in its card" if card.cost is None else "such runtime and variant here"
        msg = f"{model} has no {missing}: expected a trained model, and runtimes that are installed"
        raise ValueError(msg)
    number = threads or torch.get_num_threads()
    timings = []
    with start_run("evaluate_cost", tags={"role": card.role}) as run:
        if version is not None:
            run.log_input_model(version)
        for candidate in candidates:
            for batch_size in batch_sizes:
                report(f"{candidate.runtime} {candidate.variant}, batches of {batch_size}")
                timing = time_alone(candidate, batch_size, number, seconds=seconds)
                timings.append(timing)
                name = f"{candidate.runtime}_{candidate.variant}_{batch_size}"
                run.log({f"{name}_latency_ms": timing.latency_ms})
        update = {"weights_bytes": weigh_files(folder), "timings": tuple(timings)}
        cost = card.cost.model_copy(update=update)
        run.log_json(cost.model_dump(mode="json"), "cost.json")
    return cost

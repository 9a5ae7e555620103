"""Entry point ``sweep``: which temperature, weight and learning rate suit a student."""

from __future__ import annotations

from entrypoints.distill import PARAMETERS as OF_DISTILL
from entrypoints.door import Parameters, chosen, integer, tell, walk


def story(given: Parameters) -> None:
    """Train the students, and name the recipe with the best settings."""
    from cectflow.flows.sweep import sweep
    from cectflow.flows.unlabelled import find_unlabelled
    from cectflow.tracking.runs import connect
    from entrypoints.input_options import read_input_options
    from entrypoints.training_request import read_request

    request = read_request(given)
    trials = integer(given, "trials")
    recipe, folder = request.prepare("sweep", tell, with_students=False)
    connect()
    outcome = sweep(
        recipe, folder, request.hardware, trials=20 if trials is None else trials,
        teacher=given["teacher"] or "cectflow-teacher@production", student=given["student"],
        method=given["method"], dataset=request.dataset,
        unlabelled=find_unlabelled(given["unlabelled"], read_input_options(given), tell),
        allow_weak_teacher=chosen(given, "allow_weak_teacher", ("false", "true")) == "true",
        report=tell,
    )  # fmt: skip
    best = outcome.trials[0]
    tell(f"best: {outcome.monitor} {best.score:.4f}; cectflow distill {outcome.advice}")


if __name__ == "__main__":
    walk("sweep", ("trials", *OF_DISTILL), story)

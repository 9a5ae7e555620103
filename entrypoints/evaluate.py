"""Entry point ``evaluate``: a model's scores on a test split."""

from __future__ import annotations

from pathlib import Path

from cectflow.flows.promotion import evaluate_model
from cectflow.tracking.runs import connect
from entrypoints.door import Parameters, walk


def story(given: Parameters) -> None:
    """Evaluate, and print each score with its interval."""
    connect()
    dataset = Path(given["dataset"]) if given["dataset"] else None
    scores = evaluate_model(given["model"] or "cectflow-student@production", dataset)
    for name, score in scores.items():
        print(f"{name} {score.value:.4f} ({score.low:.4f} to {score.high:.4f})")


if __name__ == "__main__":
    walk("evaluate", ("model", "dataset"), story)

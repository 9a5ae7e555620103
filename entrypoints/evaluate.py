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
    report = evaluate_model(given["model"] or "cectflow-student@production", dataset)
    groups = {f"  {group.by} {group.name}": group.score for group in report.groups}
    for name, score in (report.scores | groups).items():
        print(f"{name} {score.value:.4f} ({score.low:.4f} to {score.high:.4f})")
    for name, value in report.baselines.items():
        print(f"best {name} {value:.4f} (trivial method, foreground IoU)")


if __name__ == "__main__":
    walk("evaluate", ("model", "dataset"), story)

"""The whole road of the recipe ``demo``, over several seeds: accuracy, IoU, speed-up, size."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.report import parse_options, write_report
from cectflow.flows.road import walk_road
from cectflow.flows.simulation import choose_recipe
from cectflow.flows.training import Hardware
from cectflow.tracking.runs import connect

RECIPE = "demo"
SEEDS = (0, 1, 2)
REPORTED = (
    "segmenter_fg_iou",
    "segmenter_baseline_fg_iou",
    "teacher_accuracy",
    "student_accuracy",
    "student_labels_only_accuracy",
    "retention",
    "speedup_cpu",
    "parameters_ratio",
    "tomogram_accuracy",
)


def main() -> None:
    """Walk the road once per seed in a store of its own; write means, and the spread over seeds.

    A seed changes structures' poses, noise and the networks' starts alike. ``NAME_low`` and
    ``NAME_high`` are the lowest and the highest seed.
    """
    options = parse_options(__doc__ or "")
    seeds = SEEDS[:1] if options.quick else SEEDS
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        connect(f"sqlite:///{scratch}/mlflow.db")
        for seed in seeds:
            recipe = choose_recipe(RECIPE, seed=seed)
            folder = Path(scratch) / f"seed-{seed}"
            report = walk_road(
                recipe, folder, Hardware(device="cpu", workers=2),
                stages=("staging", "production"), report=print,
            )  # fmt: skip
            rows.append(report.figures)
    figures: dict[str, float] = {"seeds": len(seeds)}
    for name in REPORTED:
        values = [row[name] for row in rows if name in row]
        if values:
            figures[name] = float(np.mean(values))
            figures |= {f"{name}_low": min(values), f"{name}_high": max(values)}
    write_report(options.json, figures, quick=options.quick)


if __name__ == "__main__":
    main()

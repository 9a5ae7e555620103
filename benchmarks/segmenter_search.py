"""Which stem, width and depth of our segmenters pay: foreground IoU per unit of compute."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.report import parse_options, write_report
from cectflow.cost import count_macs, count_parameters
from cectflow.dataset import Dataset, open_dataset
from cectflow.execution import single_thread
from cectflow.flows.simulation import load_structures
from cectflow.learning.fit import FitRecipe, fit, open_fabric
from cectflow.learning.losses import SegmentationLoss
from cectflow.learning.objective import Segment
from cectflow.learning.scores import evaluate
from cectflow.networks.normalisation import NormalisePerCube
from cectflow.networks.ours import StridedSegmenter
from cectflow.simulation.delivery import simulate_dataset
from cectflow.simulation.recipe import SimulationRecipe

RECIPE = SimulationRecipe(
    include=("barrel", "bowl", "rod", "horseshoe", "shell", "dumbbell", "discs"),
    box=24,
    voxel_size=15.0,
    field_shape=(48, 64, 64),
    fields={"train": 18, "validation": 2, "test": 6},
    occupancy=0.1,
    blur=10.5,
    jitter=15.0,
    snr=(0.1, 0.1),
)
EPOCHS, BATCH_SIZE, LEARNING_RATE = 2, 16, 0.005
CANDIDATES: dict[str, dict[str, Any]] = {
    # The stem's stride: about the same channels from its grid on.
    "full": {"stem": 1, "widths": (8, 24, 48), "depth": (1, 2)},
    "half": {"stem": 2, "widths": (16, 32, 64), "depth": (1, 2)},
    "quarter": {"stem": 4, "widths": (32, 64), "depth": (2,)},
    # Width.
    "full_wide": {"stem": 1, "widths": (16, 48, 96), "depth": (1, 2)},
    "quarter_wide": {"stem": 4, "widths": (64, 96), "depth": (2,)},
    "half_wide": {"stem": 2, "widths": (24, 48, 96), "depth": (1, 2)},
    "half_wider": {"stem": 2, "widths": (32, 64, 128), "depth": (1, 2)},
    # Depth: blocks of a level, number of levels.
    "half_deep": {"stem": 2, "widths": (16, 32, 64), "depth": (2, 3)},
    "half_wider_deep": {"stem": 2, "widths": (32, 64, 128), "depth": (2, 3)},
    "full_deep": {"stem": 1, "widths": (8, 16, 32, 64), "depth": (1, 1, 2)},
    "half_shallow": {"stem": 2, "widths": (24, 48), "depth": (2,)},
    # The decoder's width.
    "half_slender": {
        "stem": 2, "widths": (24, 48, 96), "depth": (1, 2), "decoder": (8, 24),
    },
}  # fmt: skip
BOX_OF_COST = 40


def main() -> None:
    """Train every candidate on the same cubes, in the same order, on one thread.

    For each candidate

    - ``iou_…``: foreground IoU per subtomogram on the test split, task ``target``, with its 95 %
      interval over fields; the recipe is ``RECIPE``, two passes over 18 fields, one seed;
    - ``gmac_…``, ``parameters_…``: of one cube of 40³;
    - ``ms_…``: process time of the training per cube of 24³ that was shown.

    ``cubes`` is the number of cubes shown to each. ``--quick`` takes three candidates and a sixth
    of the cubes.
    """
    options = parse_options(__doc__ or "")
    recipe, names = RECIPE, list(CANDIDATES)
    if options.quick:
        recipe = recipe.model_copy(update={"fields": RECIPE.fields | {"train": 3}})
        names = names[:3]
    with single_thread(), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        simulate_dataset(recipe, load_structures(recipe), folder / "data")
        dataset = open_dataset(folder / "data")
        figures: dict[str, float] = {"cubes": float(EPOCHS * len(dataset.split("train")))}
        for name in names:
            figures |= _measure(name, dataset, folder / name)
            print(name, {key: round(figures[f"{key}_{name}"], 4) for key in ("iou", "gmac", "ms")})
    write_report(options.json, figures, quick=options.quick)


def _measure(name: str, dataset: Dataset, folder: Path) -> dict[str, float]:
    torch.manual_seed(0)
    anatomy = CANDIDATES[name]
    network: nn.Module = NormalisePerCube(StridedSegmenter(2, RECIPE.box, **anatomy))
    train = dataset.split("train")
    recipe = FitRecipe(
        network=name, epochs=EPOCHS, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE
    )
    objective = Segment(SegmentationLoss(cross_entropy=1.0, dice=1.0))
    start = time.process_time()
    fit(
        network, objective, train, dataset.split("validation"), recipe,
        fabric=open_fabric("cpu"), folder=folder, log=lambda metrics, step: None,
    )  # fmt: skip
    seconds = time.process_time() - start
    score = evaluate(network.eval(), dataset.split("test"), "target").interval("foreground_iou")
    return {
        f"iou_{name}": score.value,
        f"iou_{name}_low": score.low,
        f"iou_{name}_high": score.high,
        f"gmac_{name}": count_macs(network, BOX_OF_COST) / 1e9,
        f"parameters_{name}": float(count_parameters(network)),
        f"ms_{name}": 1e3 * seconds / (EPOCHS * len(train)),
    }


if __name__ == "__main__":
    main()

"""Does masking the neighbours help a classifier? Accuracy with and without, small scale."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.report import parse_options, write_report
from benchmarks.segmenter_search import RECIPE
from cectflow.dataset import Batch, BatchSource, Manifest, open_dataset
from cectflow.execution import single_thread
from cectflow.flows.simulation import load_structures
from cectflow.learning.fit import FitRecipe, fit, open_fabric
from cectflow.learning.losses import SegmentationLoss
from cectflow.learning.objective import Classify, Objective, Segment
from cectflow.learning.scores import evaluate
from cectflow.learning.task import target_mask
from cectflow.networks import create_network
from cectflow.networks.normalisation import NormalisePerCube
from cectflow.prediction.mask import mask_neighbours
from cectflow.simulation.delivery import simulate_dataset

SEGMENTER, CLASSIFIER = "strided_ed_small", "strided_micro"
Outline = Callable[[Batch], Tensor]


class Masked:
    """A source whose cubes are masked as they come."""

    def __init__(self, source: BatchSource, outline: Outline) -> None:
        self.source, self.outline = source, outline

    @property
    def manifest(self) -> Manifest:
        """Of the source."""
        return self.source.manifest

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """Batches of the source, masked."""
        for batch in self.source.batches(batch_size, generator):
            cubes = mask_neighbours(
                batch.subtomograms[:, 0].numpy(), self.outline(batch).numpy() == 1
            )
            yield Batch(
                torch.from_numpy(cubes)[:, None], batch.voxel_labels, batch.instances,
                batch.class_ids, batch.fields,
            )  # fmt: skip


def main() -> None:
    """Train a segmenter and a classifier on one crowded recipe; classify cubes masked and not.

    - ``accuracy_plain``: the classifier on cubes as they are;
    - ``accuracy_masked``: the same classifier on cubes masked with the segmenter's outlines;
    - ``accuracy_truth``: masked with the true outlines: what masking could give it at best;
    - ``accuracy_retrained``: a classifier trained on cubes masked with the segmenter's outlines,
      asked about such cubes;
    - ``iou``: of the segmenter. Each with its 95 % interval over fields.

    ``--quick`` takes a sixth of the cubes.
    """
    options = parse_options(__doc__ or "")
    fields = {"train": 3 if options.quick else 18, "validation": 2, "test": 8}
    recipe = RECIPE.model_copy(update={"fields": fields})
    with single_thread(), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        simulate_dataset(recipe, load_structures(recipe), folder / "data")
        dataset = open_dataset(folder / "data")
        train, validation, test = (dataset.split(s) for s in ("train", "validation", "test"))
        classify = Classify(len(dataset.manifest.classes))
        segmenter = _train(
            SEGMENTER,
            Segment(SegmentationLoss(cross_entropy=1.0, dice=1.0)),
            train,
            validation,
            folder,
        )

        def found(batch: Batch) -> Tensor:
            with torch.inference_mode():
                logits: Tensor = segmenter(batch.subtomograms)
            return logits.argmax(dim=1)

        plain = _train(CLASSIFIER, classify, train, validation, folder)
        masked = _train(
            CLASSIFIER, classify, Masked(train, found),
            Masked(validation, found), folder / "masked",
        )  # fmt: skip
        asked: dict[str, tuple[nn.Module, BatchSource]] = {
            "plain": (plain, test),
            "masked": (plain, Masked(test, found)),
            "truth": (plain, Masked(test, target_mask)),
            "retrained": (masked, Masked(test, found)),
        }
        figures: dict[str, float] = {"cubes": float(len(train))}
        scores = {"iou": evaluate(segmenter, test, "target").interval("foreground_iou")}
        for name, (network, source) in asked.items():
            evaluation = evaluate(network, source, "classify")
            scores[f"accuracy_{name}"] = evaluation.interval("accuracy")
        for name, score in scores.items():
            figures |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
            print(name, np.round([score.value, score.low, score.high], 3))
    write_report(options.json, figures, quick=options.quick)


def _train(
    name: str, objective: Objective, train: BatchSource, validation: BatchSource, folder: Path
) -> nn.Module:
    torch.manual_seed(0)
    num_outputs = 2 if objective.task == "target" else len(train.manifest.classes)
    network = NormalisePerCube(create_network(name, num_outputs=num_outputs, box=RECIPE.box))
    epochs = 2 if objective.task == "target" else 3
    recipe = FitRecipe(
        network=name, epochs=epochs, batch_size=16 if epochs == 2 else 32, learning_rate=0.005
    )
    fit(
        network, objective, train, validation, recipe,
        fabric=open_fabric("cpu"), folder=folder / name, log=lambda metrics, step: None,
    )  # fmt: skip
    return network.eval()


if __name__ == "__main__":
    main()

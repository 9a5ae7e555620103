"""Does masking the neighbours help a classifier? Accuracy with and without, small scale."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.report import parse_options, write_report
from benchmarks.segmenter_search import RECIPE
from cectflow.dataset import BatchSource, open_dataset
from cectflow.execution import single_thread
from cectflow.flows.masking import mask_cubes_of
from cectflow.flows.simulation import load_structures
from cectflow.learning.fit import FitRecipe, fit, open_fabric
from cectflow.learning.losses import SegmentationLoss
from cectflow.learning.objective import Classify, Objective, Segment
from cectflow.learning.scores import evaluate
from cectflow.model_card import Masking
from cectflow.networks import create_network
from cectflow.networks.normalisation import NormalisePerCube
from cectflow.shards import Subtomograms
from cectflow.simulation.delivery import simulate_dataset

SEGMENTER, CLASSIFIER = "strided_ed_small", "strided_micro"


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

        def found(cubes: NDArray[np.float32], _: Subtomograms) -> NDArray[np.bool_]:
            with torch.inference_mode():
                logits = segmenter(torch.from_numpy(cubes)[:, None])
            return np.asarray((logits[:, 1] > logits[:, 0]).numpy())

        def true(_: NDArray[np.float32], content: Subtomograms) -> NDArray[np.bool_]:
            assert content.instances is not None
            return np.asarray(content.instances == 1)

        masked, ideal = (
            mask_cubes_of(dataset, folder / name, outline, _named(name))
            for name, outline in (("masked", found), ("ideal", true))
        )
        plain = _train(CLASSIFIER, classify, train, validation, folder)
        retrained = _train(
            CLASSIFIER, classify, masked.split("train"), masked.split("validation"),
            folder / "retrained",
        )  # fmt: skip
        asked: dict[str, tuple[nn.Module, BatchSource]] = {
            "plain": (plain, test),
            "masked": (plain, masked.split("test")),
            "truth": (plain, ideal.split("test")),
            "retrained": (retrained, masked.split("test")),
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


def _named(outlines: str) -> Masking:
    return Masking(segmenter=f"{SEGMENTER}, {outlines}", card_digest="none")


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

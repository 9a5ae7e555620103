"""Which stem, width, depth and block of our students pay: accuracy against measured time."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.classifiers import (
    BOX_OF_COST,
    Bench,
    choose_bench,
    draw_front,
    untrained_card,
)
from benchmarks.report import parse_options, write_report
from cectflow.cost import count_macs, count_parameters, measure_throughputs
from cectflow.dataset import Dataset
from cectflow.export import export_network
from cectflow.files import replacing
from cectflow.learning.fit import FitRecipe, fit, open_fabric
from cectflow.learning.objective import Classify
from cectflow.learning.scores import evaluate
from cectflow.networks.blocks import normed_convolution
from cectflow.networks.normalisation import NormalisePerCube
from cectflow.networks.ours import StridedClassifier
from cectflow.timing import Candidate


def plain(inputs: int, outputs: int, *, stride: int) -> nn.Module:
    """One 3³ convolution with batch norm and ReLU: half the depth, nothing to go round it."""
    return nn.Sequential(normed_convolution(inputs, outputs, stride=stride), nn.ReLU(inplace=True))


def separable(inputs: int, outputs: int, *, stride: int) -> nn.Module:
    """A 3³ convolution within each channel, then 1³ across them: a twentieth of the weights."""
    depthwise = nn.Conv3d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False)
    return nn.Sequential(
        depthwise, nn.BatchNorm3d(inputs), nn.ReLU(inplace=True),
        normed_convolution(inputs, outputs, kernel=1), nn.ReLU(inplace=True),
    )  # fmt: skip


CANDIDATES: dict[str, dict[str, Any]] = {
    "nano": {"widths": (8, 16, 24)},
    "micro": {"widths": (16, 32, 40)},
    "small": {"widths": (24, 64, 96)},
    # The stem's stride.
    "stem_3": {"stem": 3, "widths": (16, 32, 40)},
    "stem_4": {"stem": 4, "widths": (16, 40)},
    "stem_4_wide": {"stem": 4, "widths": (32, 48)},
    # Width: at the stem, where the grid is finest, or below.
    "narrow_stem": {"widths": (8, 32, 48)},
    "wide_stem": {"widths": (24, 32, 32)},
    # Depth: levels, blocks of a level.
    "shallow": {"widths": (16, 48)},
    "four_levels": {"widths": (8, 16, 32, 40)},
    "two_blocks": {"widths": (12, 24, 32), "depth": 2},
    "small_two_blocks": {"widths": (16, 48, 64), "depth": 2},
    # Blocks.
    "plain": {"widths": (16, 32, 56), "block": plain},
    "plain_deep": {"widths": (16, 32, 40), "block": plain, "depth": 2},
    "separable": {"widths": (16, 64, 160), "block": separable, "depth": 2},
}
"""Those of a name are the catalogue's; ``small_two_blocks`` is as large as ``small``, the others
about as large as ``micro``: 56 to 163 thousand weights."""

IN_FLOAT32 = ("four_levels",)
"""Whose last grid, 2³, is smaller than its kernels: torch has wrong gradients there in bfloat16."""


def main() -> None:
    """Train every candidate from labels on the same cubes, in the same order.

    The dataset, its folder ``--work`` and ``--quick`` are those of ``benchmarks.distillation``.
    For each candidate

    - ``accuracy_…``: on the test split, SNR 0.01 to 0.1, with its 95 % interval over fields;
    - ``ms_…``: of one cube of 40³, onnxruntime, batches of 16, all by turns in one run;
    - ``mmac_…``, ``parameters_…``: of the same cube.

    ``cubes`` is the number of cubes shown to each, in one seed. The figure beside the table shows
    accuracy against time; its line joins those that no other beats in both. With ``--candidates``
    a few are looked at again, with another ``--seed`` or more ``--epochs``: their accuracies alone.
    """
    options = parse_options(main.__doc__ or "", _add_options)
    bench = choose_bench(options)
    data = bench.data()
    epochs = 1 if options.quick else options.epochs
    figures = {"cubes": float(epochs * len(data.split("train"))), "seed": float(options.seed)}
    for name in options.candidates or CANDIDATES:
        figures |= _accuracy(bench, name, data, epochs, options.seed)
        print(name, round(figures[f"accuracy_{name}"], 4), flush=True)
    if options.candidates is None:
        figures |= _costs(bench, data)
    write_report(options.json, figures, quick=options.quick)
    if options.candidates is None:
        points = {name: (figures[f"ms_{name}"], name) for name in CANDIDATES}
        draw_front(points, figures).savefig(options.json.with_suffix(".png"), dpi=130)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, required=True, help="folder to work in and go on in")
    parser.add_argument("--candidates", nargs="+", choices=tuple(CANDIDATES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=2)
    parser.set_defaults(device="cpu", precision="bfloat16", workers=2)


def _network(name: str, data: Dataset, box: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    classes = len(data.manifest.classes)
    return NormalisePerCube(StridedClassifier(classes, box, **CANDIDATES[name]))


def _anatomy(name: str) -> str:
    told = {key: getattr(value, "__name__", value) for key, value in CANDIDATES[name].items()}
    return str(sorted(told.items()))


def _accuracy(bench: Bench, name: str, data: Dataset, epochs: int, seed: int) -> dict[str, float]:
    """Of a training that an earlier run finished, where there is one."""
    folder = bench.folder / "search" / name
    recipe = FitRecipe(network=name, epochs=epochs, batch_size=32, learning_rate=0.004, seed=seed)
    content = f"{recipe.digest()} {_anatomy(name)} {data.manifest.content_digest()}"
    identity = hashlib.sha256(content.encode()).hexdigest()
    folder = folder / identity[:16]
    finished = folder / "scores.json"
    if not finished.is_file():
        network = _network(name, data, bench.plan.box, seed)
        fit(
            network, Classify(len(data.manifest.classes)), data.split("train"),
            data.split("validation"), recipe,
            fabric=open_fabric("cpu", "float32" if name in IN_FLOAT32 else bench.precision),
            folder=folder,
            log=lambda metrics, step: None,
        )  # fmt: skip
        found = evaluate(network.eval(), data.split("test"), "classify").interval("accuracy")
        with replacing(finished) as temporary:
            temporary.write_text(found.to_json(), encoding="utf-8")
    score = json.loads(finished.read_text(encoding="utf-8"))
    return {
        f"accuracy_{name}": score["value"],
        f"accuracy_{name}_low": score["low"],
        f"accuracy_{name}_high": score["high"],
    }


def _costs(bench: Bench, data: Dataset) -> dict[str, float]:
    """Time and size at 40³; weights make no difference to either."""
    figures, folders = {}, []
    for name in CANDIDATES:
        network = _network(name, data, BOX_OF_COST)
        identity = hashlib.sha256(_anatomy(name).encode()).hexdigest()
        folder = bench.folder / "search" / name / f"{BOX_OF_COST}-{identity[:16]}"
        if not folder.is_dir():
            export_network(network, untrained_card(name, data.manifest), folder)
        folders.append(folder)
        figures[f"mmac_{name}"] = count_macs(network, BOX_OF_COST) / 1e6
        figures[f"parameters_{name}"] = float(count_parameters(network))
    rates = measure_throughputs([Candidate(folder=folder) for folder in folders])
    return figures | {f"ms_{n}": 1e3 / rate for n, rate in zip(CANDIDATES, rates, strict=True)}


if __name__ == "__main__":
    main()

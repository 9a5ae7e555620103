"""Export: a network to a model folder (model.pt2, model.onnx, card.json), and their parity."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cectflow.files import appearing, refuse_existing_folder
from cectflow.model_card import CARD_FILE, ModelCard
from cectflow.networks import network_info
from cectflow.runtime import ONNX_FILE, PT2_FILE, load_runtime

__all__ = ["export_network", "measure_parity"]

PARITY_CUBES = 3


def export_network(network: nn.Module, card: ModelCard, folder: Path) -> ModelCard:
    """Write a model folder and return its card, with the parity measured.

    Parameters
    ----------
    network
        Cubes ``(n, 1, z, y, x)`` in the card's contrast → logits, normalisation included.
        It is exported in evaluation mode, with a dynamic batch. A semantic segmenter, which takes
        normalised windows of tomograms, also takes any multiples of its stride.
    card
        Without parity.
    folder
        Absent or empty; it appears when complete.

    Raises
    ------
    FileExistsError
        If the folder exists and is not empty.
    """
    refuse_existing_folder(folder)
    network = network.cpu().eval()
    # A batch of two: torch.export takes a dimension of one for a constant.
    example = torch.zeros(2, 1, card.box, card.box, card.box)
    shapes = {0: torch.export.Dim("batch")}
    if card.task == "semantic":
        stride = network_info(card.network).stride
        for axis, name in enumerate(("depth", "height", "width"), start=2):
            shapes[axis] = stride * torch.export.Dim(name)
    with appearing(folder) as temporary:
        program = torch.export.export(network, (example,), dynamic_shapes=(shapes,), strict=False)
        torch.export.save(program, temporary / PT2_FILE)
        _export_onnx(network, example, shapes, temporary / ONNX_FILE)
        (temporary / CARD_FILE).write_text(card.to_json(), encoding="utf-8")
        finished = card.model_copy(update={"parity": measure_parity(temporary)})
        (temporary / CARD_FILE).write_text(finished.to_json(), encoding="utf-8")
    return finished


def measure_parity(folder: Path) -> float:
    """Largest absolute difference of logits between model.pt2 and model.onnx on random cubes.

    A batch of another size than the exported one is used, and of a semantic segmenter windows of
    another shape, so that what was frozen at export is found out.

    Raises
    ------
    ValueError
        If a logit is not finite.
    """
    card = ModelCard.from_folder(folder)
    generator = np.random.default_rng(0)
    shape = [card.box] * 3
    if card.task == "semantic":
        stride = network_info(card.network).stride
        shape = [card.box + number * stride for number in range(3)]
    cubes = generator.normal(size=(PARITY_CUBES, 1, *shape)).astype(np.float32)
    reference = load_runtime(folder, "torch")(cubes)
    parity = float(np.abs(reference - load_runtime(folder, "onnxruntime")(cubes)).max())
    if not math.isfinite(parity):
        msg = f"{folder}: {card.network} gives logits that are not finite: train it anew"
        raise ValueError(msg)
    return parity


def _export_onnx(
    network: nn.Module, example: torch.Tensor, shapes: Mapping[int, Any], path: Path
) -> None:
    """One self-contained ONNX file with dynamic axes; the exporter's chatter is kept down."""
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network,
                (example,),
                str(path),
                dynamo=True,
                dynamic_shapes=(shapes,),
                input_names=["subtomograms"],
                output_names=["logits"],
                external_data=False,
                verbose=False,
            )
    finally:
        exporter_log.setLevel(level)

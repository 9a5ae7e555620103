"""Export: a network to a model folder (model.pt2, model.onnx, card.json), and their parity."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cectflow.files import appearing, refuse_existing_folder
from cectflow.model_card import CARD_FILE, ModelCard
from cectflow.networks.ours import StridedClassifier
from cectflow.runtime import ONNX_FILE, PT2_FILE, has_openvino, load_runtime

__all__ = ["export_network", "measure_parity"]

PARITY_CUBES = 3


def export_network(
    network: nn.Module, card: ModelCard, folder: Path, *, stride: int | None = None
) -> ModelCard:
    """Write a model folder and return its card, with the parity measured.

    Parameters
    ----------
    network
        Cubes ``(n, 1, z, y, x)`` in the card's contrast → logits, normalisation included.
        It is exported in evaluation mode, with a dynamic batch; what is exported is a copy whose
        constants are folded: batch norms into their convolutions, distances into theirs.
    card
        Without parity.
    folder
        Absent or empty; it appears when complete.
    stride
        Of a segmenter whose box is a multiple of it: the exported network takes volumes of any
        shape ``(z, y, x)`` of at least two strides and multiples of it. None: the box only.

    Raises
    ------
    FileExistsError
        If the folder exists and is not empty.
    """
    refuse_existing_folder(folder)
    network = _fold_constants(network.cpu().eval())
    # A batch of two: torch.export takes a dimension of one for a constant.
    example = torch.zeros(2, 1, *_shape(card.box, stride))
    dimensions = _dynamic_dimensions(stride)
    with appearing(folder) as temporary:
        program = torch.export.export(
            network, (example,), dynamic_shapes=(dimensions,), strict=False
        )
        torch.export.save(program, temporary / PT2_FILE)
        _export_onnx(network, example, dimensions, temporary / ONNX_FILE)
        (temporary / CARD_FILE).write_text(card.to_json(), encoding="utf-8")
        parity = measure_parity(temporary, stride=stride)
        finished = card.model_copy(update={"parity": parity})
        (temporary / CARD_FILE).write_text(finished.to_json(), encoding="utf-8")
    return finished


def measure_parity(folder: Path, *, stride: int | None = None) -> float:
    """Largest absolute difference of logits between model.pt2 and model.onnx on random cubes.

    model.onnx is run by onnxruntime and, where it is installed, by openvino, which predicts there.

    A batch of another size than the exported one is used, so that a batch frozen at export
    is found out; with a stride also volumes of another shape, for the same reason.

    Parameters
    ----------
    folder
        A model folder.
    stride
        As in :func:`export_network`.

    Raises
    ------
    ValueError
        If a logit is not finite.
    """
    card = ModelCard.from_folder(folder)
    generator = np.random.default_rng(0)
    first, second = load_runtime(folder, "torch"), load_runtime(folder, "onnxruntime")
    # Volumes of other shapes, whole tomograms that is, are onnxruntime's.
    of_cubes = [second, *([load_runtime(folder, "openvino")] if has_openvino() else [])]
    shapes = [(card.box,) * 3, *([_shape(2 * card.box, stride)] if stride else [])]
    parity = 0.0
    for shape, others in zip(shapes, (of_cubes, [second]), strict=False):
        cubes = generator.normal(size=(PARITY_CUBES, 1, *shape)).astype(np.float32)
        expected = first(cubes)
        for infer in others:
            parity = float(np.maximum(parity, np.abs(expected - infer(cubes)).max()))
    if not math.isfinite(parity):
        msg = f"{folder}: {card.network} gives logits that are not finite: train it anew"
        raise ValueError(msg)
    return parity


def _fold_constants(network: nn.Module) -> nn.Module:
    """Copy of a network in evaluation mode that computes nothing which is the same for all cubes.

    Each batch norm is part of the convolution before it, and what our classifiers make of the
    distance from the centre is stored. onnxruntime and openvino fold norms when they load;
    torch.export does not, and torch runs the folded program 1.1 to 1.3 times as fast.
    """
    folded = copy.deepcopy(network)
    for layers in [layer for layer in folded.modules() if isinstance(layer, nn.Sequential)]:
        for (at, first), (after, second) in pairwise(list(layers.named_children())):
            if isinstance(first, nn.Conv3d) and isinstance(second, nn.BatchNorm3d):
                setattr(layers, at, fuse_conv_bn_eval(first, second))
                setattr(layers, after, nn.Identity())
    for layer in folded.modules():
        if isinstance(layer, StridedClassifier):
            layer.fold()
    return folded


def _shape(box: int, stride: int | None) -> tuple[int, int, int]:
    """A volume's; three edges with a stride, since torch.export takes equal ones for the same."""
    return (box, box + (stride or 0), box + 2 * (stride or 0))


def _dynamic_dimensions(stride: int | None) -> dict[int, Any]:
    """Axis → what it may be: any batch; with a stride any multiples of it as edges."""
    dimensions: dict[int, Any] = {0: torch.export.Dim("batch")}
    if stride is not None:
        for axis, name in enumerate("zyx", start=2):
            # From two strides on, since a convolution pads a single cell by another rule.
            cells = torch.export.Dim(name, min=2)
            dimensions[axis] = cells if stride == 1 else stride * cells
    return dimensions


def _export_onnx(
    network: nn.Module, example: torch.Tensor, dimensions: dict[int, Any], path: Path
) -> None:
    """One self-contained ONNX file; the exporter's chatter is kept down."""
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
                dynamic_shapes=(dimensions,),
                input_names=["subtomograms"],
                output_names=["logits"],
                external_data=False,
                verbose=False,
            )
    finally:
        exporter_log.setLevel(level)

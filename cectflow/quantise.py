"""Quantisation: model.int8.onnx beside the float32 network, calibrated on cubes as it will see."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from cectflow.files import replacing
from cectflow.runtime import INT8_FILE, ONNX_FILE

__all__ = ["quantise"]

CALIBRATION_BATCH = 16
LAYERS = ["Conv", "Gemm", "MatMul"]
"""ONNX operators that are computed in int8; the others, the normalisation among them, are not."""


def quantise(folder: Path, cubes: Float[NDArray[np.float32], "n 1 z y x"]) -> Path:
    """Write the int8 sibling of a model folder's ONNX network.

    Static quantisation after training: weights are int8 with a scale for each output channel
    (symmetric), what goes into a layer is uint8 between its lowest and highest value on the cubes;
    sums, biases and outputs stay float32. Quantised outputs, signed activations and percentiles in
    place of extremes each came out farther from the float32 logits (root mean square 0.06 to 0.18
    in place of 0.04, logits' deviation 5.7).

    Parameters
    ----------
    folder
        A model folder without int8.
    cubes
        For calibration, of the validation split; in the units of the network's input.

    Returns
    -------
    Path
        ``model.int8.onnx`` in the folder, which openvino and onnxruntime read.

    Raises
    ------
    FileExistsError
        If the folder has one already.
    """
    tools: Any = import_module("onnxruntime.quantization")  # its names are not typed
    shapes: Any = import_module("onnxruntime.quantization.shape_inference")
    path = folder / INT8_FILE
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the tools advise, on the root logger, what is done here
    try:
        with replacing(path) as temporary, tempfile.TemporaryDirectory() as scratch:
            prepared = Path(scratch) / ONNX_FILE
            shapes.quant_pre_process(folder / ONNX_FILE, prepared, skip_symbolic_shape=True)
            _gather_phases(prepared)
            tools.quantize_static(
                prepared,
                temporary,
                _Batches(cubes),
                quant_format=tools.QuantFormat.QDQ,
                op_types_to_quantize=LAYERS,
                per_channel=True,
                activation_type=tools.QuantType.QUInt8,
                weight_type=tools.QuantType.QInt8,
                calibrate_method=tools.CalibrationMethod.MinMax,
                extra_options={
                    "WeightSymmetric": True,
                    "OpTypesToExcludeOutputQuantization": LAYERS,
                },
            )
    finally:
        root.setLevel(level)
    return path


def _gather_phases(path: Path) -> None:
    """Make the phases of a stride channels, in a network's convolutions of one channel.

    Of stride 2, each 2 × 2 voxels of a section become four channels of one, over which the kernel
    goes with stride 1 there; zeros at its end make it whole. The sums are the same. Instructions
    for int8 multiply four channels at a time, three of which one channel leaves idle: openvino
    takes the first convolution of ``strided_nano`` 2.2 times as fast, onnxruntime the whole network
    0.8 times, which gains nothing by int8 anyhow.

    Parameters
    ----------
    path
        An ONNX file whose shapes are known, but for the batch; it is replaced.
    """
    onnx: Any = import_module("onnx")  # its names are not typed
    model = onnx.load(path)
    graph = model.graph
    weights = {each.name: each for each in graph.initializer}
    shapes = {
        each.name: [edge.dim_value for edge in each.type.tensor_type.shape.dim]
        for each in (*graph.input, *graph.value_info)
    }
    nodes: list[Any] = []
    for node in graph.node:
        if node.op_type == "Conv" and node.input[1] in weights:
            kernel = onnx.numpy_helper.to_array(weights[node.input[1]])
            told = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
            edges = shapes.get(node.input[0], ())[2:]
            stride = _stride_of(kernel, told, edges)
            if stride > 1:
                nodes += _phases(onnx, graph, node, edges, stride)
                gathered = _kernel_of_phases(kernel, stride)
                node.input[1] = f"{node.output[0]}_kernel"
                weight = onnx.numpy_helper.from_array(gathered, node.input[1])
                graph.initializer.append(weight)
                told |= {
                    "kernel_shape": gathered.shape[2:], "strides": [stride, 1, 1],
                    "pads": 2 * [stride, 1, 1],
                }  # fmt: skip
                del node.attribute[:]
                node.attribute.extend(onnx.helper.make_attribute(*each) for each in told.items())
        nodes.append(node)
    read = {name for node in nodes for name in node.input}
    kept = [each for each in graph.initializer if each.name in read]
    for values, new in ((graph.node, nodes), (graph.initializer, kept)):
        del values[:]
        values.extend(new)
    onnx.save(model, path)


def _stride_of(kernel: NDArray[Any], told: Mapping[str, Any], edges: Sequence[int]) -> int:
    """Stride of a convolution whose phases can be channels; otherwise 1."""
    stride = int(told.get("strides", [1])[0])
    fits = (
        kernel.shape[1:] == (1, *3 * [2 * stride + 1])
        and told.get("group", 1) == 1
        and list(told.get("strides", [])) == 3 * [stride]
        and list(told.get("pads", [])) == 6 * [stride]
        and list(told.get("dilations", 3 * [1])) == 3 * [1]
        and len(edges) == 3
        and all(edge > 0 and edge % stride == 0 for edge in edges)
    )
    return stride if fits else 1


def _phases(onnx: Any, graph: Any, node: Any, edges: Sequence[int], stride: int) -> list[Any]:
    """Nodes that give a convolution its input's phases, ``(n, y_phase * x_phase, z, y, x)``."""
    depth, height, width = edges[0], edges[1] // stride, edges[2] // stride
    given, made = node.input[0], f"{node.output[0]}_phases"
    for what, shape in (
        ("apart", (0, depth, height, stride, width, stride)),
        ("together", (0, stride**2, depth, height, width)),
    ):
        numbers = np.array(shape, np.int64)  # 0: as it is, the batch
        graph.initializer.append(onnx.numpy_helper.from_array(numbers, f"{made}_{what}"))
    make = onnx.helper.make_node
    node.input[0] = made
    return [
        make("Reshape", [given, f"{made}_apart"], [f"{made}_1"]),
        make("Transpose", [f"{made}_1"], [f"{made}_2"], perm=[0, 3, 5, 1, 2, 4]),
        make("Reshape", [f"{made}_2", f"{made}_together"], [made]),
    ]


def _kernel_of_phases(kernel: NDArray[Any], stride: int) -> NDArray[Any]:
    """Kernel ``(outputs, phases, z, 3, 3)`` of one over a single channel."""
    outputs, _, depth, _, _ = kernel.shape
    rest = (0, stride - 1)
    whole = np.pad(kernel[:, 0], ((0, 0), (0, 0), rest, rest))
    apart = whole.reshape(outputs, depth, 3, stride, 3, stride).transpose(0, 3, 5, 1, 2, 4)
    return np.ascontiguousarray(apart.reshape(outputs, stride**2, depth, 3, 3))


class _Batches:
    """What onnxruntime asks for calibration data, a batch at a time."""

    def __init__(self, cubes: NDArray[np.float32]) -> None:
        self.batches = iter(np.array_split(cubes, -(-len(cubes) // CALIBRATION_BATCH)))

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next batch; None after the last."""
        batch = next(self.batches, None)
        return None if batch is None else {"subtomograms": batch}

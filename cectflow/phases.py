"""Phases: a convolution of one channel and a stride as one of several channels and less stride."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["gather_phases"]


def gather_phases(path: Path) -> None:
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

"""An int8 sibling stays near its network, in any units, and replaces nothing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from builders import BOX, Exported, make_card, make_cubes
from numpy.typing import NDArray
from onnxruntime.quantization import shape_inference

from cectflow.export import export_network
from cectflow.networks.dsrf3d import DSRF3D
from cectflow.networks.normalisation import NormalisePerCube
from cectflow.networks.ours import StridedClassifier
from cectflow.phases import gather_phases
from cectflow.quantise import _range_of, quantise
from cectflow.runtime import RuntimeName, check_variant, load_runtime

pytest_plugins = ("exported",)


@pytest.fixture(scope="module")
def quantised(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised") / "model"
    shutil.copytree(exported.folder, folder)
    quantise(folder, make_cubes(20).subtomograms.numpy())
    return folder


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_int8_gives_nearly_the_logits_of_float32_in_any_units(
    quantised: Path, runtime: RuntimeName
) -> None:
    cubes = make_cubes(6, seed=1).subtomograms.numpy()
    exact = load_runtime(quantised, runtime)(cubes)
    rough = load_runtime(quantised, runtime, variant="int8")
    error = np.abs(rough(cubes) - exact).max()
    assert 0 < error < 0.1 * exact.std()
    np.testing.assert_allclose(rough(10 * cubes + 1003.3), rough(cubes), atol=0.05 * exact.std())


def test_both_runtimes_read_the_same_int8_network(quantised: Path) -> None:
    cubes = make_cubes(6, seed=2).subtomograms.numpy()
    first, second = (
        load_runtime(quantised, runtime, variant="int8")(cubes)
        for runtime in ("openvino", "onnxruntime")
    )
    np.testing.assert_allclose(first, second, atol=0.02)


def test_the_normalisation_is_not_quantised(quantised: Path) -> None:
    graph = onnx.load(str(quantised / "model.int8.onnx")).graph
    made_by = {output: node for node in graph.node for output in node.output}
    quantisers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    sources = {made_by[node.input[0]].op_type for node in quantisers if node.input[0] in made_by}
    assert "Div" in sources  # the normalised cubes
    assert not sources & {"Sub", "ReduceMean", "Mul", "Sqrt", "Pow"}
    readers = {node.op_type for node in graph.node if graph.input[0].name in node.input}
    assert "QuantizeLinear" not in readers


def test_the_layer_that_gives_the_logits_is_not_quantised(quantised: Path) -> None:
    graph = onnx.load(str(quantised / "model.int8.onnx")).graph
    made_by = {output: node.op_type for node in graph.node for output in node.output}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert [node.op_type for node in layers][-2:] == ["Conv", "Gemm"]
    assert made_by[layers[-2].input[0]] == made_by[layers[-2].input[1]] == "DequantizeLinear"
    assert "DequantizeLinear" not in {made_by.get(name) for name in layers[-1].input}


def test_no_channel_of_int8_lacks_anything_on_average(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = NormalisePerCube(DSRF3D(3, BOX, widths=(4, 6), pool=2, dense=(8,), dropout=0.0))
    for bias in (each for name, each in network.named_parameters() if name.endswith("bias")):
        torch.nn.init.normal_(bias, std=0.1)
    for layer in (network.network.features[0][0], network.network.hidden[0]):
        torch.nn.init.zeros_(layer.bias)  # ONNX leaves such a one out
    export_network(network, make_card(num_outputs=3), tmp_path / "model")
    cubes = make_cubes(20).subtomograms.numpy()
    quantise(tmp_path / "model", cubes)
    int8 = onnx.load(tmp_path / "model" / "model.int8.onnx")
    outputs = [node.output[0] for node in int8.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(outputs) == 6
    exact, rough = (
        _all_outputs(model, outputs, cubes)
        for model in (onnx.load(tmp_path / "model" / "model.onnx"), int8)
    )
    for first, second in zip(exact, rough, strict=True):
        rest = tuple(axis for axis in range(first.ndim) if axis != 1)
        error = (second - first).mean(rest)
        assert np.abs(second - first).max() > 1e-4
        np.testing.assert_allclose(error, 0, atol=3e-4 * first.std())


def _all_outputs(
    model: onnx.ModelProto, names: Sequence[str], cubes: NDArray[np.float32]
) -> list[NDArray[np.float32]]:
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    outputs: list[NDArray[np.float32]] = session.run(list(names), {"subtomograms": cubes})
    return outputs


def test_a_range_is_cut_where_that_makes_the_error_smaller() -> None:
    generator = np.random.default_rng(0)
    noise = generator.normal(size=200_000).astype(np.float32)
    low, high = _range_of(noise)
    assert 0.7 * noise.min() > low > noise.min()
    assert 0.7 * noise.max() < high < noise.max()
    for narrower in (0.9, 1.1):  # the error by the values themselves
        assert _error(noise, low, high) <= _error(noise, narrower * low, narrower * high)
    even = generator.uniform(2, 3, 10_000).astype(np.float32)
    assert _range_of(even) == (0.0, even.max())  # zero, the padding, must have its number


def _error(values: NDArray[np.float32], low: float, high: float) -> float:
    step = (high - low) / 255
    rounded = low + step * np.round((values.clip(low, high) - low) / step)
    return float(((rounded - values) ** 2).mean())


def test_float32_is_left_as_it_was_and_int8_is_not_replaced(
    exported: Exported, quantised: Path
) -> None:
    for name in ("model.onnx", "model.pt2", "card.json"):
        assert (quantised / name).read_bytes() == (exported.folder / name).read_bytes()
    with pytest.raises(FileExistsError, match=r"model\.int8\.onnx exists"):
        quantise(quantised, make_cubes(4).subtomograms.numpy())


def has_bfloat16() -> bool:
    try:
        check_variant("bfloat16")
    except ValueError:
        return False
    return True


@pytest.mark.skipif(not has_bfloat16(), reason="this CPU does not multiply in bfloat16")
@pytest.mark.parametrize("mean", [0.0, 1003.3, 100333.0])
def test_bfloat16_does_not_reach_the_normalisation(exported: Exported, mean: float) -> None:
    # In bfloat16 1003.3 is 1004, so normalising in it would shift a cube of deviation 1 by 0.7.
    cubes = make_cubes(6, seed=1).subtomograms.numpy()
    exact = load_runtime(exported.folder)(cubes)
    rough = load_runtime(exported.folder, "openvino", variant="bfloat16")(cubes + np.float32(mean))
    error = np.abs(rough - exact).max()
    assert 0 < error < 0.05 * exact.std()


# Phases of a stride


@pytest.mark.parametrize(("stem", "box", "is_gathered"), [(2, 12, True), (4, 16, True),
                                                          (2, 13, False)])  # fmt: skip
def test_phases_as_channels_give_the_same_logits(
    stem: int, box: int, is_gathered: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = StridedClassifier(3, box, widths=(4, 8), stem=stem)
    export_network(NormalisePerCube(network), make_card(box=box, num_outputs=3), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b" / "model.onnx"
    shape_inference.quant_pre_process(path, path, skip_symbolic_shape=True)
    gather_phases(path)
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(path).graph
    kernels = {each.name: each.dims for each in graph.initializer}
    first = next(node for node in graph.node if node.op_type == "Conv")
    assert kernels[first.input[1]][1] == (stem**2 if is_gathered else 1)
    cubes = np.random.default_rng(0).normal(size=(5, 1, box, box, box)).astype(np.float32)
    for runtime in ("onnxruntime", "openvino"):
        before, after = (load_runtime(tmp_path / name, runtime)(cubes) for name in "ab")
        np.testing.assert_allclose(after, before, atol=1e-5)


@pytest.mark.parametrize("change", ["group", "dilations", "unknown shape"])
def test_convolutions_that_are_of_another_kind_are_left_alone(change: str, tmp_path: Path) -> None:
    make, kinds = onnx.helper, onnx.TensorProto
    channels = 4 if change == "group" else 1
    edge = "e" if change == "unknown shape" else 8
    kernel = np.random.default_rng(0).normal(size=(4, 1, 5, 5, 5)).astype(np.float32)
    settings = {"strides": 3 * [2], "pads": 6 * [2], "group": channels}
    if change == "dilations":
        settings |= {"dilations": [1, 1, 2], "pads": [2, 2, 4, 2, 2, 4]}
    graph = make.make_graph(
        [make.make_node("Conv", ["x", "kernel"], ["y"], **settings)],
        "one",
        [make.make_tensor_value_info("x", kinds.FLOAT, ["n", channels, edge, edge, edge])],
        [make.make_tensor_value_info("y", kinds.FLOAT, ["n", 4, None, None, None])],
        [onnx.numpy_helper.from_array(kernel, "kernel")],
    )
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 20)]), tmp_path / "m")
    before = onnx.load(tmp_path / "m")
    gather_phases(tmp_path / "m")
    assert onnx.load(tmp_path / "m") == before


def test_convolutions_that_share_a_kernel_are_each_gathered(tmp_path: Path) -> None:
    make, kinds = onnx.helper, onnx.TensorProto
    kernel = np.random.default_rng(0).normal(size=(4, 1, 5, 5, 5)).astype(np.float32)
    settings = {"strides": 3 * [2], "pads": 6 * [2]}  # no dilations: ONNX allows it
    graph = make.make_graph(
        [make.make_node("Conv", [name, "kernel"], [f"of_{name}"], **settings) for name in "ab"],
        "two",
        [make.make_tensor_value_info(name, kinds.FLOAT, ["n", 1, 8, 8, 8]) for name in "ab"],
        [make.make_tensor_value_info(f"of_{name}", kinds.FLOAT, 5 * [None]) for name in "ab"],
        [onnx.numpy_helper.from_array(kernel, "kernel")],
    )  # fmt: skip
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "m")
    cubes = np.random.default_rng(1).normal(size=(2, 1, 8, 8, 8)).astype(np.float32)
    before = onnxruntime.InferenceSession(tmp_path / "m").run(None, {"a": cubes, "b": -cubes})
    gather_phases(tmp_path / "m")
    nodes = onnx.load(tmp_path / "m").graph.node
    assert [node.op_type for node in nodes] == 2 * ["Reshape", "Transpose", "Reshape", "Conv"]
    after = onnxruntime.InferenceSession(tmp_path / "m").run(None, {"a": cubes, "b": -cubes})
    np.testing.assert_allclose(after, before, atol=1e-4)

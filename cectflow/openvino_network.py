"""OpenVINO: a network compiled for the batches that it is given, and apart for bfloat16."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from cectflow.execution import count_cores
from cectflow.model_card import ModelCard, Variant

__all__ = ["Infer", "open_openvino"]

Infer = Callable[[Float[NDArray[np.float32], "n 1 z y x"]], Float[NDArray[np.float32], "n *logits"]]

SINGLES = 2
"""So many cubes are faster one by one than in a batch of a number that was not known."""


def open_openvino(
    path: Path,
    variant: Variant,
    threads: int | None,
    *,
    whole: bool,
    part_size: Callable[[int], int],
) -> list[Infer]:
    """Callables from cubes to logits, one for each thread that will call them.

    Parameters
    ----------
    path
        An ONNX network.
    variant
        ``int8`` is in the file; ``bfloat16`` holds for all but the normalisation.
    threads
        How many; None: as many as there are cores.
    whole
        One callable, for which all threads work.
    part_size
        Bytes of a cube → cubes that a callable is given at a time, but for the last.

    Raises
    ------
    ValueError
        If a network cannot be taken apart for bfloat16.
    """
    openvino: Any = import_module("openvino")
    core = openvino.Core()
    stages = [(core.read_model(path), "f32")]
    if variant == "bfloat16":
        stages = _normalised_apart(openvino, core, path)
    number = 1 if whole else threads or count_cores()
    options: dict[str, object] = {"PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        options |= {"INFERENCE_NUM_THREADS": threads}
    if not whole:
        # Unpinned: two processes would pin their threads to the same cores.
        options |= {
            "NUM_STREAMS": number, "INFERENCE_NUM_THREADS": number, "ENABLE_CPU_PINNING": False,
        }  # fmt: skip
    edges = list(stages[0][0].input(0).get_partial_shape())[1:]
    size = None
    if not whole and all(edge.is_static for edge in edges):
        size = part_size(4 * math.prod(edge.get_length() for edge in edges))
    compiled = _Compiled(core, stages, options)
    compiled.of(size)  # what is wrong with the file is said now
    return [_make_infer(compiled, size) for _ in range(number)]


class _Compiled:
    """The stages of a network, compiled for batches of a known number of cubes, or of any.

    Only where it knows the number does OpenVINO add the distance's response within the first
    convolution: one thread takes 1.3 times as many cubes of ``strided_nano`` per second.
    """

    def __init__(
        self, core: Any, stages: list[tuple[Any, str]], options: dict[str, object]
    ) -> None:
        self._core, self._stages, self._options = core, stages, options
        self._lock = threading.Lock()
        self._of: dict[int | None, list[Any]] = {}

    def of(self, number: int | None) -> list[Any]:
        """For batches of a number of cubes; None: of any."""
        with self._lock:
            if number not in self._of:
                self._of[number] = [
                    self._compile(stage.clone(), precision, number)
                    for stage, precision in self._stages
                ]
            return self._of[number]

    def _compile(self, model: Any, precision: str, number: int | None) -> Any:
        if number is not None:
            model.reshape([number, *list(model.input(0).get_partial_shape())[1:]])
        options = self._options | {"INFERENCE_PRECISION_HINT": precision}
        return self._core.compile_model(model, "CPU", options)


def _make_infer(compiled: _Compiled, size: int | None) -> Infer:
    """Callable of one thread, which mostly gets ``size`` cubes, and one or two at the end."""
    requests: dict[int | None, list[Any]] = {}

    def run(values: NDArray[np.float32], number: int | None) -> NDArray[np.float32]:
        if number not in requests:
            requests[number] = [stage.create_infer_request() for stage in compiled.of(number)]
        for request in requests[number]:
            values = request.infer({0: values}, share_inputs=True)[0]
        return values

    def infer(cubes: NDArray[np.float32]) -> NDArray[np.float32]:
        values = np.ascontiguousarray(cubes)
        if size is None or len(values) == size:
            return run(values, size)
        if 0 < len(values) <= SINGLES:
            return np.concatenate([run(values[row : row + 1], 1) for row in range(len(values))])
        return run(values, None)

    return infer


def _normalised_apart(openvino: Any, core: Any, path: Path) -> list[tuple[Any, str]]:
    """The normalisation of each cube in float32, and the network behind it in bfloat16.

    As one model OpenVINO takes the cubes' means in bfloat16, too, of which only every eighth
    number is left at 1000: a cube of mean 1003 and deviation 1 got logits as of another cube.
    """
    whole = core.read_model(path)
    normalised = _find_normalised(whole)
    if normalised is None:
        if ModelCard.from_folder(path.parent).normalisation == "cube":
            msg = (
                f"{path} does not show where its normalisation ends, which bfloat16 must leave in "
                "float32: use --variant float32 or int8"
            )
            raise ValueError(msg)
        return [(whole, "bf16")]  # whoever runs it normalises the whole tomogram
    head = openvino.Model([normalised], whole.get_parameters(), "normalisation")
    rest = core.read_model(path)  # a node belongs to one model only
    normalised = _find_normalised(rest)
    entry = openvino.opset13.parameter(normalised.get_partial_shape(), np.float32)
    for output in (normalised, rest.input(0)):  # the network may ask the input for its shape
        for target in output.get_target_inputs():
            target.replace_source_output(entry.output(0))
    network = openvino.Model(rest.get_results(), [entry], "network")
    return [(head, "f32"), (network, "bf16")]


def _find_normalised(model: Any) -> Any:
    """Output of :class:`~cectflow.networks.normalisation.NormalisePerCube`; None: not there."""
    for target in model.input(0).get_target_inputs():
        centred = target.get_node()
        if centred.get_type_name() != "Subtract":
            continue
        for divided in centred.output(0).get_target_inputs():
            if divided.get_node().get_type_name() == "Divide":
                return divided.get_node().output(0)
    return None

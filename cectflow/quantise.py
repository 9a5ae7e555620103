"""Quantisation: model.int8.onnx beside the float32 network, calibrated on cubes as it will see."""

from __future__ import annotations

import logging
import tempfile
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


class _Batches:
    """What onnxruntime asks for calibration data, a batch at a time."""

    def __init__(self, cubes: NDArray[np.float32]) -> None:
        self.batches = iter(np.array_split(cubes, -(-len(cubes) // CALIBRATION_BATCH)))

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next batch; None after the last."""
        batch = next(self.batches, None)
        return None if batch is None else {"subtomograms": batch}

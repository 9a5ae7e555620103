"""Runtime: a model folder as a function from cubes to logits, through torch or onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

if TYPE_CHECKING:  # torch takes 2 s to import; prediction with onnxruntime does without
    from torch import Tensor, nn

__all__ = [
    "RUNTIMES",
    "Infer",
    "Program",
    "RuntimeName",
    "choose_device",
    "load_program",
    "load_runtime",
]

RuntimeName = Literal["torch", "onnxruntime"]
RUNTIMES: tuple[RuntimeName, ...] = ("torch", "onnxruntime")
DEVICES = ("auto", "cpu", "cuda")
PT2_FILE = "model.pt2"
ONNX_FILE = "model.onnx"

Infer = Callable[[Float[NDArray[np.float32], "n 1 z y x"]], Float[NDArray[np.float32], "n *logits"]]


def choose_device(device: str) -> str:
    """``cpu`` or ``cuda`` for ``auto``, ``cpu`` or ``cuda``.

    Raises
    ------
    ValueError
        If it is none of them, or ``cuda`` is asked for and absent.
    """
    if device not in DEVICES:
        msg = f"unknown device {device!r}: expected one of {', '.join(DEVICES)}"
        raise ValueError(msg)
    if device == "cpu":
        return "cpu"
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        msg = "device is 'cuda', but torch sees no CUDA device: use --device cpu or auto"
        raise ValueError(msg)
    return "cuda" if available else "cpu"


def load_runtime(
    folder: Path,
    name: RuntimeName = "onnxruntime",
    *,
    device: str = "cpu",
    threads: int | None = None,
    gives_back: bool = False,
) -> Infer:
    """Callable from cubes to logits.

    Parameters
    ----------
    folder
        A model folder; its files' digests are the caller's care.
    name
        ``torch`` runs model.pt2, ``onnxruntime`` model.onnx.
    device
        ``cpu`` or ``cuda``.
    threads
        Of onnxruntime on the CPU; None leaves it the choice. torch's are set for the process.
    gives_back
        Let onnxruntime return its memory after every call, instead of keeping nearly twice as much
        for the next: for windows of tomograms, which are large and few.

    Raises
    ------
    FileNotFoundError
        If the folder lacks the file.
    """
    if name == "torch":
        return _load_torch(folder, device)
    return _load_onnx(_existing(folder / ONNX_FILE), device, threads, gives_back=gives_back)


def load_program(folder: Path, device: str = "cpu") -> nn.Module:
    """Exported torch program of a model folder: tensors on ``device`` → logits there."""
    import torch
    from torch.export.passes import move_to_device_pass

    program = torch.export.load(_existing(folder / PT2_FILE))
    if device != "cpu":
        program = move_to_device_pass(program, device)
    module: nn.Module = program.module()
    return module


class Program:
    """Exported torch program that is loaded when it is first called.

    It passes to another process as the name of its folder: the program itself cannot.

    Parameters
    ----------
    folder, device
        As of :func:`load_program`; on ``cuda`` the device that is current at the first call.

    Raises
    ------
    FileNotFoundError
        If the folder lacks the file.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        _existing(folder / PT2_FILE)
        self._folder = folder
        self._device = device

    def __call__(self, cubes: Tensor) -> Tensor:
        """Logits, on the device."""
        logits: Tensor = self.network(cubes)
        return logits

    @cached_property
    def network(self) -> nn.Module:
        """The program, loaded."""
        return load_program(self._folder, self._device)

    def __reduce__(self) -> tuple[type[Program], tuple[Path, str]]:
        return Program, (self._folder, self._device)


def _existing(path: Path) -> Path:
    if not path.is_file():
        msg = f"{path.parent} holds no {path.name}: expected a model folder (pt2, onnx, card.json)"
        raise FileNotFoundError(msg)
    return path


def _load_torch(folder: Path, device: str) -> Infer:
    import torch

    module = load_program(folder, device)

    def infer(cubes: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            # torch refuses negative strides and warns of read-only memory.
            owned = np.require(cubes, requirements=["C", "W"])
            logits: Tensor = module(torch.from_numpy(owned).to(device))
        return logits.float().cpu().numpy()

    return infer


def _load_onnx(path: Path, device: str, threads: int | None, *, gives_back: bool) -> Infer:
    onnxruntime: Any = import_module("onnxruntime")  # its names are not exported for mypy

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.enable_cpu_mem_arena = options.enable_mem_pattern = not gives_back
    providers = ["CPUExecutionProvider"]
    if device == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    name = session.get_inputs()[0].name

    def infer(cubes: NDArray[np.float32]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(None, {name: np.ascontiguousarray(cubes)})[0]
        return logits

    return infer

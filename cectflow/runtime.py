"""Runtime: a model folder as a function from cubes to logits: torch, onnxruntime or openvino."""

from __future__ import annotations

import ctypes
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cectflow.execution import count_cores
from cectflow.model_card import Variant
from cectflow.openvino_network import Infer, open_openvino
from cectflow.program_file import check_program

if TYPE_CHECKING:  # torch takes 2 s to import; prediction with onnxruntime does without
    from torch import Tensor, nn

__all__ = [
    "RUNTIMES",
    "Infer",
    "Program",
    "RuntimeName",
    "check_variant",
    "choose_device",
    "choose_runtime",
    "has_openvino",
    "load_program",
    "load_runtime",
    "load_torch",
]

RuntimeName = Literal["torch", "torch.compile", "onnxruntime", "openvino"]
RUNTIMES: tuple[RuntimeName, ...] = ("torch", "onnxruntime", "openvino")
"""Those that are ready at once; ``torch.compile`` calls a C++ compiler first, for a minute."""
DEVICES = ("auto", "cpu", "cuda")
PT2_FILE = "model.pt2"
ONNX_FILE = "model.onnx"
INT8_FILE = "model.int8.onnx"
PART_BYTES = 3 << 18
"""Of the cubes that one thread takes at a time: three of 40³, whose rate is level from two to four.
"""

VARIANTS: dict[RuntimeName, tuple[Variant, ...]] = {
    "torch": ("float32", "bfloat16"),
    "torch.compile": ("float32", "bfloat16"),
    "onnxruntime": ("float32", "int8"),
    "openvino": ("float32", "bfloat16", "int8"),
}
"""What each runtime can compute in: onnxruntime has no convolution in bfloat16 on a CPU."""


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
    if device == "cpu" or (device == "auto" and not _may_have_gpu()):
        return "cpu"
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        msg = "device is 'cuda', but torch sees no CUDA device: use --device cpu or auto"
        raise ValueError(msg)
    return "cuda" if available else "cpu"


def _may_have_gpu() -> bool:
    """Whether the machine has a driver that torch could compute with; torch is not imported."""
    if Path("/dev/kfd").exists():  # AMD's, whose devices torch calls cuda, too
        return True
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def choose_runtime(name: str, variant: Variant, device: str) -> RuntimeName:
    """Runtime for ``auto`` or a name.

    ``auto`` is torch on a GPU; on a CPU openvino where it is installed, else onnxruntime.

    Parameters
    ----------
    name
        ``auto`` or a runtime.
    variant
        That it is to compute in.
    device
        ``cpu`` or ``cuda``.

    Raises
    ------
    ValueError
        If there is no such runtime, it does not compute in the variant or on the device, or it is
        openvino and not installed.
    """
    known = get_args(RuntimeName)
    if name not in ("auto", *known):
        msg = f"unknown runtime {name!r}: expected one of auto, {', '.join(known)}"
        raise ValueError(msg)
    chosen: RuntimeName = next((known_name for known_name in known if known_name == name), "torch")
    if name == "auto" and device == "cpu":
        # onnxruntime is slower in int8 than in float32.
        chosen = "openvino" if has_openvino() or variant != "float32" else "onnxruntime"
    if variant not in VARIANTS[chosen]:
        others = [other for other in known if variant in VARIANTS[other]]
        msg = (
            f"{chosen} does not compute in {variant} on {device}: expected "
            f"{' or '.join(VARIANTS[chosen])}; {variant} is for {', '.join(others)}"
        )
        raise ValueError(msg)
    if chosen == "openvino" and device != "cpu":
        msg = f"openvino computes on a CPU, the device is {device!r}: give --device cpu"
        raise ValueError(msg)
    if chosen == "openvino":
        check_variant(variant)
    elif variant == "bfloat16" and device == "cpu":
        # Minutes per batch of student_1, whose first convolution has no fast kernel there.
        msg = f"{chosen} is slow in bfloat16 on a CPU: use openvino, or a GPU"
        raise ValueError(msg)
    return chosen


def has_openvino() -> bool:
    """Whether openvino is installed; it is not imported."""
    return find_spec("openvino") is not None


def check_variant(variant: Variant) -> None:
    """Refuse a variant that openvino cannot run on this machine.

    Raises
    ------
    ValueError
        If openvino is not installed, or the CPU does not multiply in bfloat16.
    """
    if not has_openvino():
        msg = "openvino is not installed: pip install 'cectflow[openvino]'"
        raise ValueError(msg)
    if variant != "bfloat16":
        return
    openvino: Any = import_module("openvino")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        msg = "this CPU does not multiply in bfloat16 (AVX512-BF16, AMX): use int8 or float32"
        raise ValueError(msg)


def load_runtime(
    folder: Path,
    name: RuntimeName = "onnxruntime",
    *,
    variant: Variant = "float32",
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
        ``torch`` and ``torch.compile`` run model.pt2, ``onnxruntime`` and ``openvino``
        model.onnx, or in int8 model.int8.onnx.
    variant
        What is computed in, but for the normalisation.
    device
        ``cpu`` or ``cuda``.
    threads
        Of onnxruntime and openvino on the CPU; None leaves it the choice. torch's are set for the
        process.
    gives_back
        For windows of tomograms, which are large and few: all threads work on one of them, and
        onnxruntime returns its memory after every call, instead of keeping nearly twice as much
        for the next. Otherwise each thread takes a few cubes of a batch.

    Raises
    ------
    FileNotFoundError
        If the folder lacks the file.
    ValueError
        If the runtime does not compute in the variant, or is not installed.
    """
    choose_runtime(name, variant, device)
    if name in ("torch", "torch.compile"):
        return _load_torch(folder, device, variant, compiled=name == "torch.compile")
    path = _existing(folder / (INT8_FILE if variant == "int8" else ONNX_FILE))
    if name == "openvino":
        infers = open_openvino(path, variant, threads, whole=gives_back, part_size=_part_size)
        return infers[0] if gives_back else _in_parts(infers)
    return _load_onnx(path, device, threads, gives_back=gives_back)


def load_program(folder: Path, device: str = "cpu") -> nn.Module:
    """Exported torch program of a model folder: tensors on ``device`` → logits there.

    Raises
    ------
    FileNotFoundError
        If the folder holds no program.
    ValueError
        If the program could run code when it is loaded.
    """
    import torch
    from torch.export.passes import move_to_device_pass

    check_program(_existing(folder / PT2_FILE))
    program = torch.export.load(folder / PT2_FILE)
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
    if path.is_file():
        return path
    if path.name == INT8_FILE:
        msg = f"{path.parent} has no int8: train it with `variants: [int8]`, or ask for float32"
    else:
        msg = f"{path.parent} holds no {path.name}: expected a model folder (pt2, onnx, card.json)"
    raise FileNotFoundError(msg)


def load_torch(
    folder: Path, device: str, variant: Variant = "float32", *, compiled: bool = False
) -> Callable[[Tensor], Tensor]:
    """Callable from cubes to float32 logits, both tensors on the device.

    Parameters
    ----------
    folder, variant
        As of :func:`load_runtime`.
    device
        As torch names it.
    compiled
        By ``torch.compile``.
    """
    import torch

    program = load_program(folder, device)
    forward: Callable[[Tensor], Tensor] = torch.compile(program) if compiled else program

    def infer(cubes: Tensor) -> Tensor:
        # Autocast takes convolutions and dense layers to bfloat16, and leaves means and roots.
        low = torch.autocast(cubes.device.type, torch.bfloat16, enabled=variant == "bfloat16")
        with torch.inference_mode(), low:
            return forward(cubes).float()

    return infer


def _load_torch(folder: Path, device: str, variant: Variant, *, compiled: bool) -> Infer:
    import torch

    forward = load_torch(folder, device, variant, compiled=compiled)

    def infer(cubes: NDArray[np.float32]) -> NDArray[np.float32]:
        # torch refuses negative strides and warns of read-only memory.
        owned = np.require(cubes, requirements=["C", "W"])
        return forward(torch.from_numpy(owned).to(device)).cpu().numpy()

    return infer


def _load_onnx(path: Path, device: str, threads: int | None, *, gives_back: bool) -> Infer:
    onnxruntime: Any = import_module("onnxruntime")  # its names are not exported for mypy

    whole = gives_back or device != "cpu"
    number = threads or count_cores()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = (threads or 0) if whole else 1
    options.enable_cpu_mem_arena = options.enable_mem_pattern = not gives_back
    providers = ["CPUExecutionProvider"]
    if device == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    name = session.get_inputs()[0].name

    def infer(cubes: NDArray[np.float32]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(None, {name: np.ascontiguousarray(cubes)})[0]
        return logits

    return infer if whole else _in_parts([infer] * number)


def _in_parts(infers: Sequence[Infer]) -> Infer:
    """Batches of any size, a few cubes at a time by each of several threads; any may call it.

    A few cubes and what a network's first layers make of them fit a core's cache, and threads that
    do not share a batch do not wait for one another: two of them take two to five times as many
    cubes per second as one call for a batch of 64 by two threads (``strided_nano``).

    Parameters
    ----------
    infers
        One for each thread, which calls it with no other.
    """
    free: queue.SimpleQueue[Infer] = queue.SimpleQueue()
    for each in infers:
        free.put(each)
    pool = ThreadPoolExecutor(len(infers), "infer") if len(infers) > 1 else None

    def infer_part(part: NDArray[np.float32]) -> NDArray[np.float32]:
        own = free.get()
        try:
            return own(part)
        finally:
            free.put(own)

    beginning, begun = threading.Lock(), False

    def infer(cubes: NDArray[np.float32]) -> NDArray[np.float32]:
        nonlocal begun
        size = _part_size(cubes[:1].nbytes)
        parts = [cubes[start : start + size] for start in range(0, len(cubes), size)] or [cubes]
        first: list[NDArray[np.float32]] = []
        if not begun:
            # Alone: openvino's first call sets up its bridge to numpy, one thread within that waits
            # for Python's lock and another that holds the lock waits for it, both for ever.
            with beginning:
                first.append(infer_part(parts.pop(0)))
                begun = True
        if not first and len(parts) == 1:
            return infer_part(parts[0])
        return np.concatenate([*first, *(pool.map if pool else map)(infer_part, parts)])

    return infer


def _part_size(cube_bytes: int) -> int:
    """Cubes that one thread takes at a time."""
    return max(1, PART_BYTES // max(1, cube_bytes))

"""A model folder becomes a function, or says what is missing."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import BOX, Exported

from cectflow import runtime
from cectflow.model_card import Variant
from cectflow.runtime import (
    RUNTIMES,
    Program,
    RuntimeName,
    _in_parts,
    choose_device,
    choose_runtime,
    load_program,
    load_runtime,
)

pytest_plugins = ("exported",)


@pytest.mark.parametrize(
    ("runtime", "file"),
    [("torch", r"model\.pt2"), ("onnxruntime", r"model\.onnx"), ("openvino", r"model\.onnx")],
)
def test_a_missing_file_is_named(runtime: RuntimeName, file: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"holds no {file}: expected a model folder"):
        load_runtime(tmp_path, runtime)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown device 'tpu': expected one of auto, cpu, cuda"):
        choose_device("tpu")


def test_a_gpu_that_is_not_there_is_refused_and_auto_does_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"sees no CUDA device: use --device cpu or auto"):
        choose_device("cuda")
    assert choose_device("auto") == "cpu"
    assert choose_device("cpu") == "cpu"


def test_auto_takes_a_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_may_have_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda"
    assert choose_device("cuda") == "cuda"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_cubes_may_be_read_only_or_strided_and_are_not_changed(
    exported: Exported, runtime: RuntimeName
) -> None:
    infer = load_runtime(exported.folder, runtime)
    cubes = np.random.default_rng(0).normal(size=(2, 1, BOX, BOX, BOX)).astype(np.float32)
    before = cubes.copy()
    expected = infer(cubes)
    np.testing.assert_array_equal(cubes, before)
    cubes.flags.writeable = False  # as of a memory map
    np.testing.assert_array_equal(infer(cubes), expected)
    flipped = np.flip(np.ascontiguousarray(np.flip(cubes, 2)), 2)
    np.testing.assert_array_equal(infer(flipped), expected)


def test_the_program_takes_tensors_here_and_in_another_process(exported: Exported) -> None:
    program = load_program(exported.folder)
    passed_on = pickle.loads(pickle.dumps(Program(exported.folder)))
    cubes = torch.randn(3, 1, BOX, BOX, BOX, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = exported.network.eval()(cubes)
        torch.testing.assert_close(program(cubes), expected)
        torch.testing.assert_close(passed_on(cubes), expected)


def test_onnxruntime_gives_the_same_logits_on_any_number_of_threads(exported: Exported) -> None:
    cubes = np.random.default_rng(1).normal(size=(2, 1, BOX, BOX, BOX)).astype(np.float32)
    one, two = (load_runtime(exported.folder, threads=n)(cubes) for n in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("part", [1, 3, 6])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_cube_has_the_same_logits_in_batches_of_any_size(
    exported: Exported, runtime: RuntimeName, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # openvino has the network compiled for a part, for a single cube and for any number.
    monkeypatch.setattr("cectflow.runtime.PART_BYTES", part * 4 * BOX**3)
    infer = load_runtime(exported.folder, runtime, threads=2)
    cubes = np.random.default_rng(1).normal(size=(8, 1, BOX, BOX, BOX)).astype(np.float32)
    expected = exported.network.eval()(torch.from_numpy(cubes)).detach().numpy()
    for number in (8, 7, 3, 1):
        np.testing.assert_allclose(infer(cubes[:number]), expected[:number], atol=1e-5)


def test_onnxruntime_on_the_cpu_does_without_torch(exported: Exported) -> None:
    program = (
        "import sys, pathlib, numpy\n"
        "from cectflow.runtime import choose_device, load_runtime\n"
        "infer = load_runtime(pathlib.Path(sys.argv[1]), device=choose_device('cpu'))\n"
        "infer(numpy.zeros((1, 1, int(sys.argv[2])) + 2 * (int(sys.argv[2]),), 'float32'))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(exported.folder), str(BOX)], check=True, timeout=600
    )


@pytest.mark.parametrize(
    ("name", "variant", "device", "message"),
    [
        ("tensorrt", "float32", "cpu", r"unknown runtime 'tensorrt': expected one of auto, torch"),
        ("onnxruntime", "bfloat16", "cpu", r"not compute in bfloat16 on cpu: .*for torch, .*openv"),
        ("torch", "int8", "cpu", r"torch does not compute in int8 on cpu: expected float32 or bfl"),
        ("torch", "bfloat16", "cpu", r"torch is slow in bfloat16 on a CPU: use openvino, or a GPU"),
        ("auto", "int8", "cuda", r"int8 is for onnxruntime, openvino"),
        ("openvino", "float32", "cuda", r"openvino computes on a CPU, .* give --device cpu"),
    ],
)
def test_what_a_runtime_cannot_do_is_refused(
    name: str, variant: Variant, device: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose_runtime(name, variant, device)


def test_auto_is_torch_on_a_gpu_and_openvino_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert choose_runtime("auto", "bfloat16", "cuda") == "torch"
    assert choose_runtime("auto", "float32", "cpu") == "openvino"
    monkeypatch.setattr("cectflow.runtime.find_spec", lambda name: None)
    assert choose_runtime("auto", "float32", "cpu") == "onnxruntime"
    for name, variant in (("openvino", "float32"), ("auto", "int8")):
        with pytest.raises(ValueError, match=r"pip install 'cectflow\[openvino\]'"):
            choose_runtime(name, variant, "cpu")


def test_a_cpu_without_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    class Old:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32", "INT8"]

    monkeypatch.setattr(openvino, "Core", Old)
    with pytest.raises(ValueError, match=r"does not multiply in bfloat16 \(AVX512-BF16, AMX\)"):
        choose_runtime("openvino", "bfloat16", "cpu")
    assert choose_runtime("openvino", "int8", "cpu") == "openvino"


def test_a_folder_without_int8_says_how_to_get_one(exported: Exported) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no int8: train it with `variants: \[int8\]`"):
        load_runtime(exported.folder, "openvino", variant="int8")


def test_the_first_part_is_computed_before_threads_begin() -> None:
    # Two first calls of openvino at once waited for each other for ever.
    at_work: list[str] = []
    seen: list[tuple[str, ...]] = []

    def infer(part: np.ndarray) -> np.ndarray:
        at_work.append(threading.current_thread().name)
        seen.append(tuple(at_work))
        time.sleep(0.01)
        at_work.remove(threading.current_thread().name)
        return part[:, 0, 0, 0]

    in_parts = runtime._in_parts([infer, infer])
    cubes = np.arange(40 * 3 * 40**3, dtype=np.float32).reshape(-1, 1, 40, 40, 40)
    for call in range(2):
        np.testing.assert_array_equal(in_parts(cubes), cubes[:, 0, 0, 0])
        if call == 0:
            assert seen[0] == (threading.current_thread().name,)
            assert all(name.startswith("infer") for names in seen[1:] for name in names)


def test_many_threads_may_call_at_once_and_the_first_part_is_computed_alone() -> None:
    at_work, most, done = 0, [0], 0
    lock = threading.Lock()

    def infer(cubes: np.ndarray) -> np.ndarray:
        nonlocal at_work, done
        with lock:
            at_work += 1
            most.append(at_work if done == 0 else 0)
        time.sleep(0.01)
        with lock:
            at_work -= 1
            done += 1
        return cubes[:, 0, 0, 0, :1]

    in_parts = _in_parts([infer] * 3)
    batches = np.random.default_rng(0).normal(size=(4, 20, 1, 32, 32, 32)).astype(np.float32)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(in_parts, batches))
    np.testing.assert_array_equal(found, batches[:, :, 0, 0, 0, :1])
    assert max(most) == 1

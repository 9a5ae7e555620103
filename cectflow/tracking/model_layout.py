"""MLflow's pytorch model layout around the very files of a model folder; nothing is re-exported.

The module is a *flavor* as ``mlflow.models.Model.log`` expects one, with :func:`save_model`.
``mlflow.pytorch.save_model`` would trace the network once more, so that the registered program
would not be the one whose parity and scores were measured.
"""

from __future__ import annotations

import json
import platform
import shutil
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
import yaml
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

from cectflow.files import sha256_of
from cectflow.model_card import CARD_FILE, ModelCard
from cectflow.program_file import check_program
from cectflow.runtime import INT8_FILE, ONNX_FILE, PT2_FILE

__all__ = ["FILE_PLACES", "LAYOUT_FILES", "SIBLING_PLACES", "program_signature", "save_model"]

FILE_PLACES = {
    PT2_FILE: f"data/{PT2_FILE}",
    ONNX_FILE: f"extra_files/{ONNX_FILE}",
    CARD_FILE: f"extra_files/{CARD_FILE}",
}
"""Where the layout keeps each file of a model folder."""
SIBLING_PLACES = {INT8_FILE: f"extra_files/{INT8_FILE}"}
"""The same of files that only some model folders have."""
LAYOUT_FILES = (
    "MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "input_example.json",
    "serving_input_example.json",
)  # fmt: skip
"""What MLflow wants beside them: ``MLmodel`` names the code that ``mlflow.pyfunc`` runs."""


def save_model(
    path: str,
    mlflow_model: Model,
    folder: Path,
    digests: dict[str, str],
    *,
    validate_serving_input: bool,
) -> None:
    """Write the layout with copies of a model folder's files; called by ``Model.log``.

    Parameters
    ----------
    path
        Folder of the layout, made here.
    mlflow_model
        Its description, completed here.
    folder
        The model folder.
    digests
        Receives the sha256 of every file of the layout, by its path there.
    validate_serving_input
        For ``Model.log``, which without it rewrites ``MLmodel`` after its digest is taken.

    Raises
    ------
    ValueError
        If the program's batch is not dynamic, or it could run code when it is loaded.
    """
    assert not validate_serving_input, "Model.log would change MLmodel once more"
    root = Path(path)
    siblings = {name: place for name, place in SIBLING_PLACES.items() if (folder / name).is_file()}
    for name, place in (FILE_PLACES | siblings).items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, root / place)
    mlflow_model.signature = program_signature(folder / PT2_FILE)
    _write_example(root, mlflow_model, ModelCard.from_folder(folder).box)
    _write_requirements(root)
    mlflow_model.add_flavor(
        "pytorch",
        model_data="data",
        pytorch_version=str(torch.__version__),
        code=None,
        extra_files=[
            *({"path": FILE_PLACES[name]} for name in (ONNX_FILE, CARD_FILE)),
            *({"path": place} for place in siblings.values()),
        ],
    )
    mlflow.pyfunc.add_to_model(
        mlflow_model,
        loader_module="mlflow.pytorch",
        data="data",
        conda_env="conda.yaml",
        python_env="python_env.yaml",
        # Exported on the CPU; by default MLflow would choose a GPU and then refuse the program.
        model_config={"device": "cpu"},
    )
    mlflow_model.model_size_bytes = sum(f.stat().st_size for f in root.rglob("*") if f.is_file())
    mlflow_model.save(str(root / "MLmodel"))
    for file in sorted(file for file in root.rglob("*") if file.is_file()):
        digests[file.relative_to(root).as_posix()] = sha256_of(file)


def program_signature(program_file: Path) -> ModelSignature:
    """Shapes that an exported program takes and gives; -1 where they are dynamic.

    Raises
    ------
    ValueError
        If the batch is not dynamic, or the program could run code when it is loaded.
    """
    check_program(program_file)
    program = torch.export.load(program_file)
    signature = program.graph_signature
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    inputs, outputs = (
        [_tensor_spec(values[str(name)]) for name in names]
        for names in (signature.user_inputs, signature.user_outputs)
    )
    batch = inputs[0].shape[0]
    if batch != -1:
        msg = (
            f"{program_file} takes batches of {batch} only: export it with a dynamic batch, from "
            f"an example batch of 2"
        )
        raise ValueError(msg)
    return ModelSignature(inputs=Schema([*inputs]), outputs=Schema([*outputs]))


def _tensor_spec(tensor: torch.Tensor) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else -1 for size in tensor.shape)
    return TensorSpec(np.dtype(str(tensor.dtype).removeprefix("torch.")), shape)


def _write_example(root: Path, mlflow_model: Model, box: int) -> None:
    shape = (1, 1, box, box, box)
    # Quarters are exact in float32 and short in JSON, which holds the example twice.
    noise = np.round(4 * np.random.default_rng(0).standard_normal(shape)) / 4
    for name in ("input_example.json", "serving_input_example.json"):
        content: Any = {"inputs": noise.tolist()} if name.startswith("serving") else noise.tolist()
        (root / name).write_text(json.dumps(content), encoding="utf-8")
    mlflow_model.saved_input_example_info = {
        "artifact_path": "input_example.json",
        "serving_input_path": "serving_input_example.json",
        "type": "ndarray",
    }


def _write_requirements(root: Path) -> None:
    # Without the local label (+cpu), which no package index knows.
    packages = [f"{name}=={installed(name).split('+')[0]}" for name in ("mlflow", "torch", "numpy")]
    python = platform.python_version()
    conda = {
        "name": "mlflow-env",
        "channels": ["conda-forge"],
        "dependencies": [f"python={python}", "pip", {"pip": packages}],
    }
    environment = {
        "python": python,
        "build_dependencies": ["pip", "setuptools", "wheel"],
        "dependencies": ["-r requirements.txt"],
    }
    (root / "requirements.txt").write_text("\n".join(packages) + "\n", encoding="utf-8")
    (root / "conda.yaml").write_text(yaml.safe_dump(conda), encoding="utf-8")
    (root / "python_env.yaml").write_text(yaml.safe_dump(environment), encoding="utf-8")

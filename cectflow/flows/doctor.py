"""What works here: versions, devices, the tracking store and write permission."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

import cectflow
from cectflow.tracking.runs import cectflow_commit, connect
from cectflow.tracking.versions import list_versions

__all__ = ["Finding", "examine"]

PACKAGES = ("mlflow", "torch", "onnxruntime", "numpy", "mrcfile", "gemmi", "starfile")


class Finding(NamedTuple):
    """One thing looked at."""

    what: str
    found: str
    sound: bool


def examine(tracking_uri: str | None) -> tuple[Finding, ...]:
    """Everything that must work before a long run is worth starting."""
    return (
        Finding("cectflow", f"{cectflow.__version__} ({cectflow_commit()})", True),
        Finding("python", f"{platform.python_version()} on {platform.system()}", True),
        *(Finding(name, importlib.metadata.version(name), True) for name in PACKAGES),
        Finding("processors", f"{os.cpu_count()}, torch uses {torch.get_num_threads()}", True),
        Finding("GPU", _describe_gpu(), True),
        _try_writing(Path.cwd()),
        _try_store(tracking_uri),
    )


def _describe_gpu() -> str:
    if not torch.cuda.is_available():
        return "none: everything runs on the CPU"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _try_writing(folder: Path) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Finding("working folder", f"{folder} can be written to", True)
    except OSError as error:
        return Finding("working folder", f"{folder}: {error}", False)


def _try_store(tracking_uri: str | None) -> Finding:
    try:
        uri = connect(tracking_uri)
        return Finding("tracking store", f"{uri}, {len(list_versions())} model versions", True)
    except (ValueError, OSError) as error:
        return Finding("tracking store", str(error), False)

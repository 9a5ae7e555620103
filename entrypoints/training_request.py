"""What all training entry points are asked for, and the story that two of them share."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from cectflow.flows.training import (
    Hardware,
    TrainingRequest,
    train_segmenter,
    train_teacher,
    train_tomogram_segmenter,
)
from cectflow.learning.fit import Device, Precision
from cectflow.tracking.runs import connect
from entrypoints.door import Parameters, chosen, integer, tell

__all__ = ["read_request", "train_role"]


def read_request(given: Parameters) -> TrainingRequest:
    """Request of an entry point's parameters.

    Raises
    ------
    ValueError
        If the seed or a number is no whole number, or the device or precision is unknown.
    """
    device = chosen(given, "device", ("auto", "cpu", "cuda"))
    precision = chosen(given, "precision", ("auto", "float32", "bfloat16", "float16"))
    workers = integer(given, "workers") if "workers" in given else None
    devices = integer(given, "devices")
    hardware = Hardware(
        cast("Device", device),
        cast("Precision", precision),
        workers=workers or 1,
        devices=1 if devices is None else devices,
    )
    dataset = given.get("dataset")
    return TrainingRequest(
        recipe=given["recipe"] or "demo",
        structures=given["structures"],
        dataset=Path(dataset) if dataset else None,
        out=Path(given["out"]) if given["out"] else None,
        seed=integer(given, "seed"),
        hardware=hardware,
    )


def train_role(
    role: Literal["segmenter", "tomogram-segmenter", "teacher"], given: Parameters
) -> None:
    """Train and register a segmenter or a teacher as an entry point's parameters say."""
    request = read_request(given)
    recipe, folder = request.prepare(role, tell)
    connect()
    train = {
        "segmenter": train_segmenter,
        "tomogram-segmenter": train_tomogram_segmenter,
        "teacher": train_teacher,
    }[role]
    registered = train(recipe, folder, request.hardware, dataset=request.dataset)
    print(f"{registered.version.label}: {registered.version.uri}")

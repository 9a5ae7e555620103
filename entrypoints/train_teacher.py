"""Entry point ``train_teacher``: train and register a teacher."""

from __future__ import annotations

from cectflow.flows.training import train_teacher
from cectflow.tracking.runs import connect
from entrypoints.door import Parameters, walk
from entrypoints.training_request import TRAINING_PARAMETERS, read_request


def story(given: Parameters) -> None:
    """Train and register a teacher classifier."""
    request = read_request(given)
    recipe, folder = request.prepare("teacher")
    connect()
    registered = train_teacher(recipe, folder, request.hardware, dataset=request.dataset)
    print(f"{registered.version.label}: {registered.version.uri}")


if __name__ == "__main__":
    walk("train_teacher", TRAINING_PARAMETERS, story)

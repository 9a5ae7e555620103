"""Entry point ``train_segmenter``: train and register a segmenter."""

from __future__ import annotations

from cectflow.flows.training import train_segmenter
from cectflow.tracking.runs import connect
from entrypoints.door import Parameters, walk
from entrypoints.training_request import TRAINING_PARAMETERS, read_request


def story(given: Parameters) -> None:
    """Train and register a segmenter of the task ``target``."""
    request = read_request(given)
    recipe, folder = request.prepare("segmenter")
    connect()
    registered = train_segmenter(recipe, folder, request.hardware, dataset=request.dataset)
    print(f"{registered.version.label}: {registered.version.uri}")


if __name__ == "__main__":
    walk("train_segmenter", TRAINING_PARAMETERS, story)

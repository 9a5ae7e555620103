"""Entry point ``train_segmenter``: train and register a segmenter."""

from __future__ import annotations

from entrypoints.door import TRAINING_PARAMETERS, Parameters, walk


def story(given: Parameters) -> None:
    """Train and register a segmenter of the task ``target``."""
    from cectflow.flows.training import train_segmenter
    from cectflow.tracking.runs import connect
    from entrypoints.training_request import read_request

    request = read_request(given)
    recipe, folder = request.prepare("segmenter")
    connect()
    registered = train_segmenter(recipe, folder, request.hardware, dataset=request.dataset)
    print(f"{registered.version.label}: {registered.version.uri}")


if __name__ == "__main__":
    walk("train_segmenter", TRAINING_PARAMETERS, story)

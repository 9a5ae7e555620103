"""Entry point ``train_teacher``: train and register a teacher."""

from __future__ import annotations

from entrypoints.door import TRAINING_PARAMETERS, Parameters, walk


def story(given: Parameters) -> None:
    """Train and register a teacher classifier."""
    from cectflow.flows.training import train_teacher
    from cectflow.tracking.runs import connect
    from entrypoints.training_request import read_request

    request = read_request(given)
    recipe, folder = request.prepare("teacher")
    connect()
    registered = train_teacher(recipe, folder, request.hardware, dataset=request.dataset)
    print(f"{registered.version.label}: {registered.version.uri}")


if __name__ == "__main__":
    walk("train_teacher", TRAINING_PARAMETERS, story)

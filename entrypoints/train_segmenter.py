"""Entry point ``train_segmenter``: train and register a segmenter of either task."""

from __future__ import annotations

from typing import Any, cast

from entrypoints.door import TRAINING_PARAMETERS, Parameters, chosen, walk


def story(given: Parameters) -> None:
    """Train and register a segmenter: of particles at a centre, or of whole tomograms."""
    from entrypoints.training_request import train_role

    train_role(cast("Any", chosen(given, "role", ("segmenter", "tomogram-segmenter"))), given)


if __name__ == "__main__":
    walk("train_segmenter", ("role", *TRAINING_PARAMETERS), story)

"""Entry point ``train_segmenter``: train and register a segmenter of the task ``target``."""

from __future__ import annotations

from entrypoints.door import TRAINING_PARAMETERS, Parameters, walk


def story(given: Parameters) -> None:
    """Train and register a segmenter of the task ``target``."""
    from entrypoints.training_request import train_role

    train_role("segmenter", given)


if __name__ == "__main__":
    walk("train_segmenter", TRAINING_PARAMETERS, story)

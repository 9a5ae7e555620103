"""Entry point ``train_teacher``: train and register a teacher classifier."""

from __future__ import annotations

from entrypoints.door import TRAINING_PARAMETERS, Parameters, walk


def story(given: Parameters) -> None:
    """Train and register a teacher classifier."""
    from entrypoints.training_request import train_role

    train_role("teacher", given)


if __name__ == "__main__":
    walk("train_teacher", TRAINING_PARAMETERS, story)

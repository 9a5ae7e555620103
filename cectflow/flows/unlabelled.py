"""Real cubes without labels, brought to what a student and its teacher expect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cectflow.model_card import ModelCard
from cectflow.prediction.contract import InputOptions
from cectflow.prediction.inputs import InputFiles
from cectflow.prediction.matching import require_spectrum, settle_spectrum

__all__ = ["Unlabelled", "find_unlabelled"]


@dataclass(frozen=True)
class Unlabelled:
    """Where cubes without labels lie, and what the user says of them.

    Attributes
    ----------
    files
        Stacks, or a tomogram with picks.
    options
        Voxel size, contrast, rescaling, spectrum.
    report
        Told what is done to them.
    """

    files: InputFiles
    options: InputOptions
    report: Callable[[str], None]

    @property
    def pattern(self) -> str:
        """Where they lie."""
        return str(self.files.subtomograms or self.files.tomogram)

    @property
    def arguments(self) -> list[str]:
        """Options of a command line that give the same cubes."""
        options = self.options
        given = ["--unlabelled", self.pattern, "--contrast", options.contrast]
        if options.voxel_size is not None:
            given += ["--voxel-size", f"{options.voxel_size:g}"]
        flags = {"--rescale": options.rescale, "--match-spectrum": options.match_spectrum}
        return [*given, *(flag for flag, is_given in flags.items() if is_given)]

    @property
    def tags(self) -> dict[str, str]:
        """What the user said of them."""
        options = self.options
        return {
            "unlabelled.contrast": options.contrast,
            "unlabelled.voxel_size": "header" if options.voxel_size is None else
            f"{options.voxel_size:g}",
            "unlabelled.rescale": str(options.rescale).lower(),
            "unlabelled.match_spectrum": str(options.match_spectrum).lower(),
        }  # fmt: skip

    def read(self, card: ModelCard) -> Float[Tensor, "n 1 z y x"]:
        """All cubes, as the networks of this card expect them.

        Raises
        ------
        ValueError
            If the card is not a classifier's or was trained on masked cubes, or the cubes cannot
            be brought to it.
        """
        if card.task != "classify":
            msg = (
                f"--unlabelled goes with a teacher that classifies: this one is a {card.role} for "
                f"the task {card.task!r}; leave --unlabelled out"
            )
            raise ValueError(msg)
        if card.masking is not None:
            msg = (
                f"the teacher knows cubes masked with {card.masking.segmenter}: expected one of "
                "cubes as they are; leave --unlabelled out, or train a teacher on unmasked cubes"
            )
            raise ValueError(msg)
        if self.options.match_spectrum:
            require_spectrum(card, "the teacher")
        source = self.files.open(card, self.options, self.report)
        source = settle_spectrum(source, "the teacher", self.report)
        cubes = np.concatenate(list(source.batches()))
        self.report(f"{len(cubes)} cubes without labels")
        return torch.from_numpy(cubes)


def find_unlabelled(
    pattern: str | None, options: InputOptions, report: Callable[[str], None]
) -> Unlabelled | None:
    """Stack, folder or glob that a user gave, or None if none was given."""
    return None if pattern is None else Unlabelled(InputFiles(pattern), options, report)

"""What entry points that read real cubes are told of them."""

from __future__ import annotations

from typing import cast

from cectflow.model_card import Contrast
from cectflow.prediction.contract import InputOptions
from entrypoints.door import Parameters, chosen, number

__all__ = ["INPUT_PARAMETERS", "read_input_options"]

INPUT_PARAMETERS = ("contrast", "voxel_size", "rescale", "match_spectrum")


def read_input_options(given: Parameters) -> InputOptions:
    """Options of an entry point's parameters.

    Raises
    ------
    ValueError
        If the voxel size is no number, or one of the others is unknown.
    """
    return InputOptions(
        voxel_size=number(given, "voxel_size"),
        contrast=cast("Contrast", chosen(given, "contrast", ("dark", "light"))),
        rescale=chosen(given, "rescale", ("false", "true")) == "true",
        match_spectrum=chosen(given, "match_spectrum", ("false", "true")) == "true",
        device=chosen(given, "device", ("auto", "cpu", "cuda")),
    )

"""What every entry point does first and last: read its parameters, and end with a clear line.

Entry points import the flows inside their stories: a worker process that simulates imports the
main module anew, and has no use for torch's training half.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import TypeVar

from cectflow.exit_codes import BAD_INPUT, INTERRUPTED, is_foreseen

__all__ = ["TRAINING_PARAMETERS", "Parameters", "chosen", "integer", "number", "tell", "walk"]

Parameters = Mapping[str, str | None]
Value = TypeVar("Value")

TRAINING_PARAMETERS = (
    "recipe",
    "structures",
    "dataset",
    "out",
    "device",
    "devices",
    "precision",
    "seed",
)


def walk(name: str, parameters: tuple[str, ...], story: Callable[[Parameters], int | None]) -> None:
    """Run an entry point.

    Parameters
    ----------
    name
        Of the entry point in MLproject.
    parameters
        Names; each is an option with a string value. MLproject knows no optional parameters: an
        empty value means that none was given, and reaches the story as None.
    story
        Receives the parameters; returns an exit code, None for success.
    """
    parser = argparse.ArgumentParser(prog=f"entrypoints.{name}")
    for parameter in parameters:
        parser.add_argument("--" + parameter.replace("_", "-"), dest=parameter, default="")
    given = {key: value or None for key, value in vars(parser.parse_args()).items()}
    try:
        sys.exit(story(given) or 0)
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not is_foreseen(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def tell(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def integer(parameters: Parameters, name: str) -> int | None:
    """Whole number of a parameter, None when it was not given.

    Raises
    ------
    ValueError
        If it is something else.
    """
    return _read(parameters, name, int, "a whole number")


def number(parameters: Parameters, name: str) -> float | None:
    """Number of a parameter, None when it was not given.

    Raises
    ------
    ValueError
        If it is something else.
    """
    return _read(parameters, name, float, "a number")


def _read(
    parameters: Parameters, name: str, read: Callable[[str], Value], what: str
) -> Value | None:
    text = parameters[name]
    if text is None:
        return None
    try:
        return read(text)
    except ValueError:
        msg = f"{name} is {text!r}: expected {what}"
        raise ValueError(msg) from None


def chosen(parameters: Parameters, name: str, choices: tuple[str, ...]) -> str:
    """Value of a parameter that must be one of a few; the first when it was not given.

    Raises
    ------
    ValueError
        If it is none of them.
    """
    value = parameters[name] or choices[0]
    if value not in choices:
        msg = f"{name} is {value!r}: expected one of {', '.join(choices)}"
        raise ValueError(msg)
    return value

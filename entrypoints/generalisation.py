"""Entry point ``generalisation``: what a segmenter makes of structures that it never saw."""

from __future__ import annotations

from entrypoints.door import TRAINING_PARAMETERS, Parameters, tell, walk

PARAMETERS = (*(p for p in TRAINING_PARAMETERS if p != "dataset"), "workers")


def story(given: Parameters) -> None:
    """Train with and without each group of structures, and print the table."""
    from rich.console import Console
    from rich.table import Table

    from cectflow.flows.generalisation import evaluate_generalisation, tabulate_generalisation
    from cectflow.tracking.runs import connect
    from entrypoints.training_request import read_request

    request = read_request(given)
    recipe, folder = request.prepare("generalisation", tell)
    connect()
    result = evaluate_generalisation(recipe, folder, request.hardware, report=tell)
    header, rows = tabulate_generalisation(result)
    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(width=200).print(table, markup=False)
    print(f"{folder}: generalisation.json, generalisation.png")


if __name__ == "__main__":
    walk("generalisation", PARAMETERS, story)

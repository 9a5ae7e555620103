"""Entry point ``main``: the whole road in one process, with nested runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.table import Table

from entrypoints.door import TRAINING_PARAMETERS, Parameters, tell, walk

if TYPE_CHECKING:
    from cectflow.flows.road import RoadReport

STAGES = ("staging", "production")
PARAMETERS = (*(p for p in TRAINING_PARAMETERS if p != "dataset"), "stages", "workers")


def story(given: Parameters) -> None:
    """Walk the road and print its table."""
    from cectflow.flows.road import walk_road
    from cectflow.tracking.runs import connect
    from entrypoints.training_request import read_request

    stages = tuple(part.strip() for part in (given["stages"] or ",".join(STAGES)).split(","))
    if not set(stages) <= set(STAGES):
        msg = f"stages is {given['stages']!r}: expected some of {', '.join(STAGES)}"
        raise ValueError(msg)
    request = read_request(given)
    recipe, folder = request.prepare(request.recipe, tell)
    uri = connect()
    report = walk_road(recipe, folder, request.hardware, stages=cast("Any", stages), report=tell)
    print_report(report, str(folder), uri)


def print_report(report: RoadReport, folder: str, uri: str) -> None:
    """Print the closing table, the paths and the command for the web page."""
    table = Table("what", "measured", box=None, pad_edge=False)
    for row in report.rows:
        table.add_row(*row)
    console = Console(width=120)
    console.print()
    console.print(table, markup=False)
    print(f"\npredictions: {folder}/predictions (classes.star, labels.mrc, field.png)")
    print(f"web page:    mlflow ui --backend-store-uri {uri}")


if __name__ == "__main__":
    walk("main", PARAMETERS, story)

"""``cectflow evaluate``: judge networks on a test split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cectflow.cli.options import (
    JsonOption,
    ModelOption,
    TrackingOption,
)
from cectflow.cli.output import print_json, print_table

__all__ = ["app"]

app = typer.Typer(help="Judge networks on a test split.", no_args_is_help=True)


@app.command("model")
def evaluate_model(
    model: ModelOption,
    dataset: Annotated[
        Path | None, typer.Option("--dataset", help="Folder; default: the one it was trained on.")
    ] = None,
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Print the scores of a model on a dataset's test split, with 95 % intervals over fields."""
    from cectflow.flows.promotion import evaluate_model as flow
    from cectflow.tracking.runs import connect

    connect(tracking_uri)
    scores = flow(model, dataset)
    if json:
        print_json({name: score.model_dump() for name, score in scores.items()})
        return
    rows = [(k, f"{s.value:.4f}", f"{s.low:.4f} to {s.high:.4f}") for k, s in scores.items()]
    print_table(("score", "value", "95 % interval"), rows)

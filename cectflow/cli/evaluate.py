"""``cectflow evaluate``: judge networks on a test split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cectflow.cli.options import (
    DeviceOption,
    JsonOption,
    ModelOption,
    OutFolderOption,
    PrecisionOption,
    RecipeOption,
    SeedOption,
    StructuresOption,
    TrackingOption,
    WorkersOption,
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


@app.command("generalisation")
def evaluate_generalisation(
    recipe: RecipeOption = "demo",
    structures: StructuresOption = None,
    out: OutFolderOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    seed: SeedOption = None,
    workers: WorkersOption = 1,
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Train the segmenter without each group of structures, and compare on what it never saw.

    The groups are in the recipe. The same command with the same --out goes on where it was broken
    off.
    """
    from cectflow.flows import generalisation
    from cectflow.flows.training import Hardware, TrainingRequest
    from cectflow.tracking.runs import connect

    hardware = Hardware(device, precision, workers)
    request = TrainingRequest(recipe, structures, None, out, seed, hardware)
    chosen, folder = request.prepare("generalisation")
    connect(tracking_uri)
    result = generalisation.evaluate_generalisation(
        chosen, folder, hardware, report=lambda line: typer.echo(line, err=True)
    )
    if json:
        print_json(result.model_dump())
        return
    print_table(*generalisation.tabulate_generalisation(result))
    typer.echo(f"{folder}: generalisation.json, generalisation.png")

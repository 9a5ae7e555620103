"""``cectflow``: the doors of the house, for hands. Heavy imports happen inside the commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from cectflow import __version__
from cectflow.cli import dataset, evaluate, models, predict, simulate, structures
from cectflow.cli.convert import convert
from cectflow.cli.options import JsonOption, TrackingOption
from cectflow.cli.output import print_json, print_table
from cectflow.cli.training import distill, sweep, train
from cectflow.exit_codes import BAD_INPUT, INTERRUPTED, REFUSED, is_foreseen

__all__ = ["app", "main"]

app = typer.Typer(
    name="cectflow",
    help="From atomic models to promoted networks and their predictions on cryo-ET data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(structures.app, name="structures")
app.add_typer(simulate.app, name="simulate")
app.add_typer(dataset.app, name="dataset")
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(models.app, name="models")
app.add_typer(predict.app, name="predict")
app.command("convert")(convert)
app.command("train")(train)
app.command("distill")(distill)
app.command("sweep")(sweep)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: bad input becomes one clear line and exit code 2, Ctrl-C 130."""
    import logging
    import warnings

    # One line on stderr for what cectflow itself warns of; the libraries' chatter stays out.
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", UserWarning)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        app(args=arguments, standalone_mode=True)
    except SystemExit as stop:  # typer itself turns Ctrl-C into exit code 130
        if stop.code == INTERRUPTED:
            typer.secho("interrupted: what was finished is kept", err=True)
        raise
    except Exception as error:
        if not is_foreseen(error):
            raise
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(BAD_INPUT)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"cectflow {__version__}")
        raise typer.Exit


@app.command("doctor")
def doctor(tracking_uri: TrackingOption = None, json: JsonOption = False) -> None:
    """Print versions, devices, the tracking store and write permission; exit 3 on a fault."""
    from cectflow.flows.doctor import examine

    findings = examine(tracking_uri)
    if json:
        print_json([finding._asdict() for finding in findings])
    else:
        rows = [(f.what, f.found, "ok" if f.sound else "FAULT") for f in findings]
        print_table(("what", "found", ""), rows)
    if not all(finding.sound for finding in findings):
        raise typer.Exit(REFUSED)

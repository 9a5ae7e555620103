"""``cectflow models``: registered models and their stages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cectflow.cli.options import (
    JsonOption,
    Stage,
    TrackingOption,
)
from cectflow.cli.output import print_json, print_table
from cectflow.exit_codes import REFUSED

__all__ = ["app"]

app = typer.Typer(help="Registered models and their stages.", no_args_is_help=True)


@app.command("list")
def models_list(
    name: Annotated[str | None, typer.Argument(help="Registered name; default: all.")] = None,
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Print registered versions with their stages."""
    from cectflow.tracking.runs import connect
    from cectflow.tracking.versions import list_versions

    connect(tracking_uri)
    versions = list_versions(name)
    if json:
        facts = [
            {"name": v.name, "version": v.version, "stages": v.stages, "created": v.created}
            for v in versions
        ]
        print_json(facts)
        return
    rows = [
        (v.name, v.version, ", ".join(v.stages), v.tags.get("network", ""), v.created)
        for v in versions
    ]
    print_table(("name", "version", "stages", "network", "created"), rows)


@app.command("show")
def models_show(
    model: Annotated[str, typer.Argument(help="NAME, NAME@stage or NAME/VERSION.")],
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Print a version's card, verdicts and history."""
    from cectflow.model_card import ModelCard
    from cectflow.tracking.promotion import history
    from cectflow.tracking.registry import resolve_model
    from cectflow.tracking.runs import connect

    connect(tracking_uri)
    folder, version = resolve_model(model)
    card = ModelCard.from_folder(folder).model_dump(mode="json")
    facts: dict[str, Any] = {"folder": str(folder), "card": card}
    if version is not None:
        verdicts = {k: v for k, v in version.tags.items() if k.startswith("verdict.")}
        facts |= {"version": version.label, "stages": version.stages, "verdicts": verdicts,
                  "history": history(version.name)}  # fmt: skip
    if json:
        print_json(facts)
        return
    rows = [(key, str(value)) for key, value in facts.items() if key not in {"card", "history"}]
    rows += [(key, str(value)) for key, value in card.items()]
    rows += [(f"{c['time']} {c['action']}", f"version {c['version']} {c['stage']} {c['reason']}")
             for c in facts.get("history", ())]  # fmt: skip
    print_table(("", ""), rows)


@app.command("promote")
def models_promote(
    model: Annotated[str, typer.Argument(help="NAME (newest version) or NAME/VERSION.")],
    version: Annotated[
        str | None, typer.Argument(help="Number, where NAME is given alone; default: the newest.")
    ] = None,
    to: Annotated[Stage, typer.Option("--to", help="Stage.")] = "staging",
    policy: Annotated[
        str | None, typer.Option("--policy", help="Name or YAML file; default: the role's.")
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option("--dataset", help="Folder; default: the one it was trained on.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure and judge; change nothing in the registry.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Set the stage against a refusal; needs --reason.")
    ] = False,
    reason: Annotated[str, typer.Option("--reason", help="Why; it stays in the history.")] = "",
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Promote a version if its role's policy says that it has earned it; exit 3 if refused."""
    from cectflow.flows.promotion import promote
    from cectflow.tracking.policy import VERDICT_HEADER
    from cectflow.tracking.runs import connect

    connect(tracking_uri)
    (promotion,) = promote(
        model if version is None else f"{model}/{version}",
        to,
        policy=policy,
        dataset=dataset,
        dry_run=dry_run,
        force=force,
        reason=reason,
    )
    if json:
        print_json(promotion.facts())
    else:
        print_table(VERDICT_HEADER, promotion.verdict.table())
        for figure, note in promotion.verdict.notes():
            typer.echo(f"{figure}: {note}")
        typer.echo(promotion.summary())
        typer.echo(f"report: {promotion.report}")
    if not promotion.granted or promotion.outcome == "superseded":
        raise typer.Exit(REFUSED)


@app.command("rollback")
def models_rollback(
    name: Annotated[str, typer.Argument(help="Registered name.")],
    stage: Annotated[Stage, typer.Option("--stage")] = "production",
    tracking_uri: TrackingOption = None,
) -> None:
    """Give a stage back to the version that held it before."""
    from cectflow.tracking.promotion import rollback
    from cectflow.tracking.runs import connect

    connect(tracking_uri)
    typer.echo(f"{rollback(name, stage).label} is in {stage} again")

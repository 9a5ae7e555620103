"""``cectflow models``: registered models and their stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cectflow.cli.options import (
    JsonOption,
    Stage,
    TrackingOption,
)
from cectflow.cli.output import print_json, print_table
from cectflow.exit_codes import REFUSED

if TYPE_CHECKING:
    from cectflow.tracking.record import Change

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


ReasonOption = Annotated[str, typer.Option("--reason", help="Kept on record.")]


@app.command("rollback")
def models_rollback(
    name: Annotated[str, typer.Argument(help="Registered name.")],
    stage: Annotated[Stage, typer.Option("--stage")] = "production",
    reason: ReasonOption = "",
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Give a stage back to the version that held it before."""
    from cectflow.tracking.promotion import rollback
    from cectflow.tracking.runs import connect

    connect(tracking_uri)
    _tell(name, rollback(name, stage, reason=reason), f"is in {stage} again", json)


@app.command("archive")
def models_archive(
    model: Annotated[str, typer.Argument(help="NAME/VERSION or NAME@stage.")],
    reason: Annotated[str, typer.Option("--reason", help="Kept on record.")],
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Withdraw a version: it loses every stage, and no rollback brings it back."""
    from cectflow.tracking.promotion import archive
    from cectflow.tracking.runs import connect
    from cectflow.tracking.versions import find_version

    if not reason.strip():
        msg = "an archive needs a reason: give it with --reason"
        raise ValueError(msg)
    connect(tracking_uri)
    version = find_version(model)
    _tell(version.name, archive(version, reason=reason), "is archived", json)


@app.command("history")
def models_history(
    name: Annotated[str, typer.Argument(help="Registered name.")],
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Print what became of each change of a model's stages, the oldest first."""
    from cectflow.tracking.promotion import history
    from cectflow.tracking.runs import connect

    connect(tracking_uri)
    changes = history(name)
    if json:
        print_json(changes)
        return
    columns = ("time", "action", "stage", "version", "previous", "outcome", "by", "reason")
    rows = [[str(change[each] or "") for each in columns] for change in changes]
    print_table(columns, rows)


@app.command("doctor")
def models_doctor(
    name: Annotated[str | None, typer.Argument(help="Registered name; default: all.")] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended.")] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Verify the files of every version, not of stages only.")
    ] = False,
    hours: Annotated[
        float, typer.Option("--hours", min=0.0, help="After which a RUNNING run counts as stuck.")
    ] = 24.0,
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Find, and with --fix mend, what is wrong in the registry; exit 3 if something is left."""
    from cectflow.tracking.doctor import examine_registry
    from cectflow.tracking.runs import connect

    connect(tracking_uri)
    faults = examine_registry(name, fix=fix, every=every, hours=hours)
    if json:
        print_json([fault._asdict() for fault in faults])
    elif faults:
        rows = [(f.kind, f.subject, f.found, "mended" if f.mended else f.remedy) for f in faults]
        print_table(("fault", "of", "found", "remedy"), rows)
    else:
        typer.echo("no fault found")
    if not all(fault.mended for fault in faults):
        raise typer.Exit(REFUSED)


def _tell(name: str, change: Change, became: str, json: bool) -> None:
    """Print what became of a change; exit 3 if another took the stage at the same time."""
    if json:
        from dataclasses import asdict

        print_json(asdict(change))
    elif change.outcome == "done":
        typer.echo(f"{name} v{change.version} {became}")
    else:
        typer.echo(f"{name} v{change.version}: {change.outcome}, see `cectflow models history`")
    if change.outcome != "done":
        raise typer.Exit(REFUSED)

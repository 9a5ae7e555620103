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
    from cectflow.model_card import ModelCard
    from cectflow.tracking.record import Change

__all__ = ["app"]

app = typer.Typer(help="Registered models and their stages.", no_args_is_help=True)

ModelArgument = Annotated[str, typer.Argument(help="NAME, NAME@stage, NAME/VERSION, or a folder.")]


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
            {"name": v.name, "version": v.version, "stages": v.stages, "created": v.created,
             "network": v.tags.get("network", ""), "digest": v.tags.get("digest", "")}
            for v in versions
        ]  # fmt: skip
        print_json(facts)
        return
    rows = [
        (v.name, v.version, ", ".join(v.stages), v.tags.get("network", ""), v.created)
        for v in versions
    ]
    print_table(("name", "version", "stages", "network", "created"), rows)


@app.command("show")
def models_show(
    model: ModelArgument,
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Print a version's card, verdicts and history."""
    facts, card = _describe_model(model, tracking_uri)
    if json:
        print_json(facts | {"card": card.model_dump(mode="json")})
        return
    from cectflow.cli.card import card_rows

    rows = [(key, value) for key, value in facts.items() if isinstance(value, str)]
    rows += [("stages", ", ".join(facts["stages"]))] if "stages" in facts else []
    tags = facts.get("origin", {}) | facts.get("verdicts", {})
    rows += [*tags.items(), *card_rows(card)]
    rows += [(f"{c['time']} {c['action']}", f"version {c['version']} {c['stage']} {c['reason']}")
             for c in facts.get("history", ())]  # fmt: skip
    print_table(("", ""), rows)


def _describe_model(model: str, tracking_uri: str | None) -> tuple[dict[str, Any], ModelCard]:
    from cectflow.model_card import CARD_FILE, ModelCard

    folder = Path(model)
    if (folder / CARD_FILE).is_file():
        from cectflow.tracking.bundle import open_model_folder

        label = open_model_folder(folder)
        card = ModelCard.from_folder(folder)
        return {"folder": str(folder), "model": label}, card
    from cectflow.tracking.promotion import history
    from cectflow.tracking.registry import read_card
    from cectflow.tracking.runs import connect
    from cectflow.tracking.versions import find_version

    connect(tracking_uri)
    version = find_version(model)
    facts = {
        "version": version.label,
        "uri": version.uri,
        "stages": version.stages,
        "created": version.created,
        "run": version.run_id,
        "digest": version.tags.get("digest", ""),
        "origin": {k: v for k, v in version.tags.items() if k.startswith("origin.")},
        "verdicts": {k: v for k, v in version.tags.items() if k.startswith("verdict.")},
        "history": history(version.name),
    }
    return facts, read_card(version)


@app.command("lineage")
def models_lineage(
    model: Annotated[str, typer.Argument(help="NAME, NAME@stage, NAME/VERSION or models:/ URI.")],
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Print where a version comes from: structures, data, recipe, commit, teachers, runs."""
    from cectflow.tracking.lineage import trace
    from cectflow.tracking.runs import connect
    from cectflow.tracking.versions import find_version

    connect(tracking_uri)
    lineage = trace(find_version(model))
    if json:
        print_json(lineage)
        return
    for line in _lineage_lines(lineage):
        typer.echo(line)


def _lineage_lines(facts: dict[str, Any], depth: int = 0) -> list[str]:
    """The lineage as an indented list; teachers below their student."""
    lines = [f"{facts['version']}  {facts['role']} {facts['network']}, {facts['created']}"]
    if facts["digest"]:
        lines.append(f"  files     sha256 {facts['digest']}")
    run = facts.get("run")
    if run is not None:
        lines.append(f"  run       {run['id']} {run['name']} ({run['status']}, {run['started']})")
    if "origin" in facts:
        origin = facts["origin"]
        lines.append(f"  origin    {origin.get('uri')} of {origin.get('store')}")
        brought = origin["lineage"]
        lines += [] if brought is None else _lineage_lines(brought, 1)
    else:
        data = facts["dataset"]
        lines += [
            f"  code      commit {facts['code']['commit']}",
            f"  recipe    sha256 {facts['recipe']['digest']} ({facts['recipe']['logged']})",
            f"  dataset   sha256 {data['digest']} ({data['path']})",
        ]
        lines += [
            f"    {s['name']}: {s['source'] or 'unknown source'}, "
            f"{s['licence'] or 'unknown licence'}, sha256 {s['sha256'][:12]}…"
            for s in data["structures"]
        ]
        for teacher in facts["teachers"]:
            lines += ["  teacher", *_lineage_lines(teacher, 1)]
    lines += [f"  verdict   {stage}: {what}" for stage, what in facts["verdicts"].items()]
    lines += [f"  missing   {what}" for what in facts["missing"]]
    return ["    " * depth + line for line in lines]


@app.command("diff")
def models_diff(
    first: ModelArgument,
    second: ModelArgument,
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Print what differs between two models: card, scores, costs, recipe, dataset."""
    from cectflow.tracking.comparison import compare
    from cectflow.tracking.runs import connect

    connect(tracking_uri)
    found = compare(first, second)
    if json:
        print_json(found)
        return
    header = ("", *found["models"], "")
    rows = [(name, _score_text(s["first"]), _score_text(s["second"]),
             f"{s['difference']:+.4f}" if "difference" in s else "")
            for name, s in found["scores"].items()]  # fmt: skip
    rows += [(name, str(c["first"]), str(c["second"]),
              f"× {c['ratio']:.3g}" if "ratio" in c else "")
             for name, c in found["cost"].items()]  # fmt: skip
    rows += [(f"{part}: {row['field']}", str(row["first"]), str(row["second"]), "")
             for part in ("card", "dataset") for row in found[part]]  # fmt: skip
    print_table(header, rows)
    if found["recipe"] is None:
        typer.echo("recipe: the text of at least one is unknown")
    for line in found["recipe"] or ():
        typer.echo(line)


def _score_text(score: dict[str, float] | None) -> str:
    if score is None:
        return ""
    return f"{score['value']:.4f} ({score['low']:.4f} to {score['high']:.4f})"


@app.command("pull")
def models_pull(
    model: Annotated[str, typer.Argument(help="NAME, NAME@stage, NAME/VERSION or models:/ URI.")],
    to: Annotated[Path, typer.Option("--to", help="New folder.")],
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Write a version as a folder that needs no server: weights, card, digests, lineage."""
    from cectflow.files import refuse_existing_folder
    from cectflow.tracking.runs import connect
    from cectflow.tracking.transfer import pull_model

    refuse_existing_folder(to)
    connect(tracking_uri)
    manifest = pull_model(model, to)
    if json:
        print_json(manifest.model_dump(mode="json"))
        return
    typer.echo(f"{manifest.label} is in {to}; predict with --model {to}")


@app.command("push")
def models_push(
    bundle: Annotated[Path, typer.Argument(help="Folder of `models pull`, or a .zip of it.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Registered name; default: the bundle's.")
    ] = None,
    tracking_uri: TrackingOption = None,
    json: JsonOption = False,
) -> None:
    """Register a bundle in this store; nothing happens if that very model is there."""
    from cectflow.tracking.runs import connect
    from cectflow.tracking.transfer import push_model

    connect(tracking_uri)
    version, is_new = push_model(bundle, name)
    if json:
        print_json({"version": version.uri, "new": is_new, "tags": version.tags})
        return
    typer.echo(f"{version.label} " + ("is registered" if is_new else "was there already"))


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

    if version is not None and (not version.isdecimal() or "/" in model or "@" in model):
        msg = f"give NAME VERSION, such as cectflow-student 2, or NAME/2; got {model} {version}"
        raise ValueError(msg)
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

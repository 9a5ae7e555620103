"""Entry point ``promote``: the newest version of a role, or any version, to a stage."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from cectflow.exit_codes import REFUSED
from cectflow.flows.promotion import Target, newest_of_role, promote
from cectflow.tracking.policy import VERDICT_HEADER
from cectflow.tracking.runs import connect
from entrypoints.door import Parameters, chosen, walk


def story(given: Parameters) -> int:
    """Promote, print the verdict, and exit with 3 when it is a refusal."""
    stage = chosen(given, "stage", ("staging", "production"))
    dry_run, force = (chosen(given, name, ("false", "true")) for name in ("dry_run", "force"))
    connect()
    (promotion,) = promote(
        given["model"] or newest_of_role(given["role"] or "student"),
        cast("Target", stage),
        policy=given["policy"],
        dataset=Path(given["dataset"]) if given["dataset"] else None,
        dry_run=dry_run == "true",
        force=force == "true",
        reason=given["reason"] or "",
    )
    for row in (VERDICT_HEADER, *promotion.verdict.table()):
        print("  ".join(row))
    for figure, note in promotion.verdict.notes():
        print(f"{figure}: {note}")
    print(promotion.summary())
    print(f"report: {promotion.report}")
    granted = promotion.granted and promotion.outcome != "superseded"
    return 0 if granted else REFUSED


if __name__ == "__main__":
    walk(
        "promote",
        ("role", "model", "stage", "policy", "dataset", "dry_run", "force", "reason"),
        story,
    )

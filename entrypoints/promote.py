"""Entry point ``promote``: the newest version of a role, or any version, to a stage."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from cectflow.exit_codes import REFUSED
from cectflow.flows.promotion import Target, newest_of_role, promote
from cectflow.tracking.runs import connect
from entrypoints.door import Parameters, chosen, walk


def story(given: Parameters) -> int:
    """Promote, print the verdict, and exit with 3 when it is a refusal."""
    stage = chosen(given, "stage", ("staging", "production"))
    connect()
    (promotion,) = promote(
        given["model"] or newest_of_role(given["role"] or "student"),
        cast("Target", stage),
        policy=given["policy"],
        dataset=Path(given["dataset"]) if given["dataset"] else None,
    )
    for row in promotion.verdict.table():
        print("  ".join(row))
    if promotion.note:
        print(promotion.note)
    label = promotion.version.label
    if promotion.verdict.passed:
        print(f"{label} is in {', '.join(promotion.version.stages)}")
        return 0
    print(f"{label} stays where it is: {promotion.verdict.refusal}")
    return REFUSED


if __name__ == "__main__":
    walk("promote", ("role", "model", "stage", "policy", "dataset"), story)

"""Entry point ``simulate``: a recipe's dataset folder."""

from __future__ import annotations

from pathlib import Path

from entrypoints.door import Parameters, integer, walk


def story(given: Parameters) -> None:
    """Simulate, and print where the dataset lies."""
    from cectflow.execution import Workplace
    from cectflow.flows.simulation import choose_recipe, new_folder, simulate
    from cectflow.tracking.runs import connect

    recipe = choose_recipe(
        given["recipe"] or "demo", structures=given["structures"], seed=integer(given, "seed")
    )
    folder = Path(given["out"]) if given["out"] else new_folder("dataset")
    connect()
    dataset = simulate(recipe, folder, where=Workplace(integer(given, "workers") or 1))
    print(f"{dataset.folder}: {dataset.manifest.content_digest()}")


if __name__ == "__main__":
    walk("simulate", ("recipe", "structures", "out", "seed", "workers"), story)

"""One dataset written in a process of its own: seconds and memory, for ``benchmarks.simulation``.

Its imports are those of the simulation alone, since every worker process repeats them.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from cectflow.execution import Workplace
from cectflow.simulation.delivery import simulate_dataset
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.structure import find_structures, load_structure
from cectflow.timing import own_peak


def main() -> None:
    """Print ``seconds`` of :func:`simulate_dataset`, and ``peak_gb``: resident memory.

    The start of worker processes and the preparation of the specimen are in the seconds; the
    memory is the largest of this process and of any worker.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path, help="YAML of a SimulationRecipe")
    parser.add_argument("--workers", type=int, required=True)
    options = parser.parse_args()
    recipe = SimulationRecipe.from_yaml(options.recipe)
    structures = [load_structure(source) for source in find_structures(",".join(recipe.structures))]
    with tempfile.TemporaryDirectory() as scratch:
        where = Workplace(options.workers)
        start = time.perf_counter()
        simulate_dataset(recipe, structures, Path(scratch) / "data", where=where)
        seconds = time.perf_counter() - start
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    print(json.dumps({"seconds": seconds, "peak_gb": max(own_peak(), workers)}))


if __name__ == "__main__":
    main()

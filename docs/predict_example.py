"""Files to walk docs/predict.md with: three simulated tomograms, and picks as matching gives them.

Written into the working folder are ``tomograms/TS_01.mrc`` …, RELION 5's ``tomograms.star``,
and ``picks.star`` in its centred coordinates. For every six particles there is a
pick at a random place. To be run as::

    python docs/predict_example.py demo
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from cectflow.flows.simulation import load_structures
from cectflow.particles import particles_from, read_particles
from cectflow.placement import coordinate_columns
from cectflow.recipe import load_recipe
from cectflow.simulation.tomogram_files import deliver_tomograms
from cectflow.tomogram_table import TomogramInfo
from cectflow.volume import read_volume

COUNT = 3
SHAPE = (48, 96, 96)
"""Voxels (z, y, x)."""
BINNING = 4
RANDOM_SHARE = 1 / 6
SCORES = (0.6, 0.2)


def write_example(recipe_name: str, folder: Path) -> None:
    """Write all of it."""
    recipe = load_recipe(recipe_name).simulation
    made = deliver_tomograms(
        recipe, load_structures(recipe), folder / "simulated", count=COUNT,
        shape=SHAPE,
    )  # fmt: skip
    (folder / "tomograms").mkdir(exist_ok=True)
    rng = np.random.default_rng(1)
    picks, rows = [], []
    for number, simulated in enumerate(made, 1):
        name = f"TS_{number:02d}"
        path = folder / "tomograms" / f"{name}.mrc"
        shutil.copy(simulated / "tomogram.mrc", path)
        volume = read_volume(path)
        pixel_size = volume.voxel_size / BINNING
        x, y, z = (BINNING * length for length in volume.shape[::-1])
        particles = read_particles(simulated / "particles.star").rows
        true = particles[[f"rlnCoordinate{axis}" for axis in "ZYX"]].to_numpy()
        true = true + rng.normal(scale=0.5, size=true.shape)
        random = rng.uniform(0, 1, (round(RANDOM_SHARE * len(true)), 3)) * volume.shape
        places = np.clip(np.concatenate([true, random]), 0, np.array(volume.shape) - 1)
        places = places[rng.permutation(len(places))]
        columns = coordinate_columns(
            places, "relion5", voxel_size=volume.voxel_size, shape=volume.shape,
            info=TomogramInfo((x, y, z), pixel_size, BINNING),
        )  # fmt: skip
        scores = np.linspace(*SCORES, len(places)).round(3)
        picks.append(
            pd.DataFrame(
                {"rlnTomoName": name, **columns, "rlnTomoTiltSeriesPixelSize": pixel_size,
                 "rlnLCCmax": scores}
            )
        )  # fmt: skip
        rows.append(f"{name} {x} {y} {z} {pixel_size:g} {BINNING} tomograms/{name}.mrc")
    particles_from(pd.concat(picks, ignore_index=True)).write(folder / "picks.star", overwrite=True)
    names = (
        "Name", "SizeX", "SizeY", "SizeZ", "TiltSeriesPixelSize", "TomogramBinning",
        "ReconstructedTomogram",
    )  # fmt: skip
    header = "".join(f"_rlnTomo{name}\n" for name in names)
    (folder / "tomograms.star").write_text(
        f"data_global\n\nloop_\n{header}" + "\n".join(rows) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="Of the simulation, such as demo.")
    write_example(parser.parse_args().recipe, Path())

"""Every command of the pages in docs/ runs as printed, but for the recipes of ``LONG``."""

from __future__ import annotations

import functools
import gzip
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import zarr
from road import ROOT, Road

from cectflow.flows.simulation import write_tomogram
from cectflow.particles import read_particles
from cectflow.placement import coordinates_zyx
from cectflow.recipe import load_recipe
from cectflow.volume import read_volume

PAGES = (
    "structures", "simulation", "datasets", "training", "registry", "predict", "prediction",
    "conventions",
)  # fmt: skip

# cectflow's commands and scripts in one process, others in a shell; each must end with its code.
RUNNER = """
import json, runpy, subprocess, sys
from cectflow.cli import main

if __name__ == "__main__":
    for line, arguments, expected in json.load(sys.stdin):
        code = 0
        if arguments[0] == "cectflow":
            try:
                main(arguments[1:])
            except SystemExit as stop:
                code = stop.code or 0
        elif arguments[0] == "python":
            sys.argv = arguments[1:]
            runpy.run_path(arguments[1], run_name="__main__")
        else:
            code = subprocess.run(line, shell=True, stdin=subprocess.DEVNULL).returncode
        if code != expected:
            sys.exit(f"{line} ended with {code}, expected {expected}")
"""
LONG = re.compile(
    r"cectflow (sweep|evaluate generalisation|train .* --devices 2|distill --teacher)"
)
"""Commands that train what no later one needs: with one epoch instead of the recipe's."""
TRAINED = re.compile(r"cectflow train (segmenter|tomogram-segmenter|teacher) [^#]* --dataset data$")
"""Commands that repeat a training of the road, on a dataset of the same bytes: with its checkpoint,
from the end of which they go on."""
CLONE = "~/cectflow"
"""What the pages call the folder of the clone."""
NAPARI = """
import sys

class Viewer:
    def add_image(self, data, **given):
        assert data.ndim == 3, data.shape

    def add_points(self, data, **given):
        assert data.shape[1] == 3, data.shape
        assert len(data) == len(given["features"]["class"])
        assert (data >= -0.5).all(), data.min()

def run():
    sys.exit(0)
"""
"""Stands in for napari, which is not among the requirements, and looks at what it is given."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A local stand-in for the PDB archive that serves any two entries."""
    folder = tmp_path_factory.mktemp("archive")
    for name in ("1KP8", "3J9I"):
        with gzip.open(folder / f"{name}.cif.gz", "wb") as file:
            file.write(f"data_{name}\n#\n".encode())

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def make_copick_project(road: Road) -> None:
    """The tomogram and its rods as a project."""
    run = road.folder / "copick/ExperimentRuns/tomogram"
    (run / "Picks").mkdir(parents=True)
    volume = read_volume(road.folder / "tomogram.mrc")
    array = zarr.create_array(run / "VoxelSpacing16.000/wbp.zarr/0", data=volume.data[...])
    assert array.shape == volume.shape
    group = zarr.open_group(run / "VoxelSpacing16.000/wbp.zarr", mode="a")
    scale = {"type": "scale", "scale": [volume.voxel_size] * 3}
    image = {"datasets": [{"path": "0", "coordinateTransformations": [scale]}]}
    group.attrs["ome"] = {"multiscales": [image]}
    table = read_particles(road.folder / "particles.star")
    positions = coordinates_zyx(table, voxel_size=volume.voxel_size, shape=volume.shape)
    points = [
        {"location": dict(zip("zyx", (voxels * volume.voxel_size).tolist(), strict=True))}
        for voxels in positions
    ]
    picks = {"pickable_object_name": "rod", "user_id": "alice", "session_id": "1", "points": points}
    (run / "Picks/alice_1_rod.json").write_text(json.dumps(picks))
    objects = [{"name": name, "is_particle": True} for name in ("rod", "barrel", "bowl")]
    config = {"pickable_objects": objects, "overlay_root": f"local://{road.folder}/copick"}
    (road.folder / "copick.json").write_text(json.dumps(config))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs(page: str, road: Road, archive: str) -> None:
    if not (road.folder / "tomogram.mrc").is_file():
        written = write_tomogram(load_recipe("tiny").simulation, road.folder / "example")
        shutil.copy(written.tomogram, road.folder)
        shutil.copy(written.particles, road.folder)
        # Of 48 x 48 x 32 voxels of 16 angstrom at binning 4, odd along x.
        columns = ("Name", "SizeX", "SizeY", "SizeZ", "TiltSeriesPixelSize", "TomogramBinning")
        header = "".join(f"_rlnTomo{name}\n" for name in columns)
        table = f"data_global\n\nloop_\n{header}tomogram 193 192 128 4.0 4.0\n"
        (road.folder / "tomograms.star").write_text(table)
        make_copick_project(road)
    text = (ROOT / "docs" / f"{page}.md").read_text()
    commands = [
        line
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
        if line.strip()
    ]
    assert commands
    folder = road.folder
    if CLONE in text:  # a page that is walked outside of the clone, and makes its own files
        folder = road.folder / page
        folder.mkdir()
    steps = []
    programs = {command.split()[0] for command in commands}
    assert programs <= {"cectflow", "mlflow", "python", "ls", "mkdir"}
    for command in commands:
        line = command.replace(CLONE, str(ROOT))
        if LONG.match(line):
            line = line.replace("--recipe tiny", f"--recipe {road.folder / 'short.yaml'}")
        if trained := TRAINED.match(line):
            there = f"{trained[1]}/checkpoints"
            shutil.copytree(road.folder / "tour" / there, folder / "trained" / there)
            line += " --out trained"
        arguments = shlex.split(line, comments=True)
        if arguments[1:3] == ["structures", "fetch"]:
            arguments += ["--base-url", archive]
        code = re.search(r"# exit code (\d+)$", line)
        steps.append((line, arguments, int(code[1]) if code else 0))
    # One process for a page: what its libraries do to signals must not reach the other tests.
    walked = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(steps),
        cwd=folder, env=road.environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert walked.returncode == 0, walked.stdout[-3000:] + walked.stderr[-3000:]
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        (folder / "napari.py").write_text(NAPARI)
        subprocess.run([sys.executable, "-c", snippet], cwd=folder, check=True, timeout=60)

"""Every command of the pages in docs/ runs as printed."""

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
from road import ROOT, Road

from cectflow.flows.simulation import write_tomogram
from cectflow.recipe import load_recipe

PAGES = (
    "structures", "simulation", "datasets", "training", "registry", "prediction", "conventions",
)  # fmt: skip

RUNNER = """
import json, sys
from cectflow.cli import main

if __name__ == "__main__":
    for command in json.load(sys.stdin):
        try:
            main(command)
        except SystemExit as stop:
            if stop.code:
                sys.exit(f"{command} ended with {stop.code}")
"""

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
    text = (ROOT / "docs" / f"{page}.md").read_text()
    commands = [
        line
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
        if line.strip()
    ]
    assert commands
    arguments = [shlex.split(command) for command in commands]
    assert {program for program, *_ in arguments} == {"cectflow"}
    for line in arguments:
        if line[1:3] == ["structures", "fetch"]:
            line += ["--base-url", archive]
    # One process for a page: what its libraries do to signals must not reach the other tests.
    walked = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps([line[1:] for line in arguments]),
        cwd=road.folder, env=road.environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert walked.returncode == 0, walked.stdout[-3000:] + walked.stderr[-3000:]

"""Every command of the pages in docs/ runs as printed."""

from __future__ import annotations

import functools
import gzip
import re
import shlex
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from road import ROOT, Road

from cectflow.cli import main
from cectflow.flows.simulation import write_tomogram
from cectflow.recipe import load_recipe

PAGES = ("structures", "simulation", "datasets", "training", "registry", "prediction")

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
@pytest.mark.usefixtures("by_hand")
def test_every_command_of_a_page_runs(page: str, road: Road, archive: str) -> None:
    if not (road.folder / "tomogram.mrc").is_file():
        written = write_tomogram(load_recipe("tiny").simulation, road.folder / "example")
        shutil.copy(written.tomogram, road.folder)
        shutil.copy(written.particles, road.folder)
    text = (ROOT / "docs" / f"{page}.md").read_text()
    commands = [
        line
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
        if line.strip()
    ]
    assert commands
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "cectflow"
        if arguments[:2] == ["structures", "fetch"]:
            arguments += ["--base-url", archive]
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code, command

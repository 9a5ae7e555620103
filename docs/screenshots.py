"""Screenshots of the registry on MLflow's web page, by a headless Chromium, into docs/images.

Checks that the pages show what they should: the aliases and tags of a version, the figures of its
run and, where the run has one, its report. To be run from the root of the clone, with a server up::

    python docs/screenshots.py http://127.0.0.1:5000 cectflow-student@production
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
IMAGES = Path(__file__).parent / "images"
WIDTH = 1112
"""Pixels that are kept: right of them MLflow shows its assistant."""
PATIENCE = 20_000
"""Milliseconds of the page's own clock: the page loads its parts one after the other."""


@dataclass(frozen=True)
class Page:
    """One view: name of its picture, its place on the server, texts that it must show."""

    name: str
    place: str
    expected: tuple[str, ...]


def ask(server: str, call: str, **query: str) -> dict[str, Any]:
    """What MLflow's REST interface answers."""
    address = f"{server}/api/2.0/mlflow/{call}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(address, timeout=30) as answer:
        content: dict[str, Any] = json.load(answer)
    return content


def find_pages(server: str, model: str, report: str) -> list[Page]:
    """Model, version, and the figures and the report of the run that promoted or made it."""
    name, _, alias = model.partition("@")
    registered = ask(server, "registered-models/get", name=name)["registered_model"]
    found = ask(server, "registered-models/alias", name=name, alias=alias or "production")
    version = found["model_version"]
    aliases = tuple(each["alias"] for each in registered["aliases"])
    verdicts = [tag["key"] for tag in version["tags"] if re.fullmatch(r"verdict\.\w+", tag["key"])]
    pages = [
        Page("registry_model", f"models/{name}", (name, *aliases)),
        Page(
            "registry_version", f"models/{name}/versions/{version['version']}",
            (name, "sha256.model.pt2", *verdicts, alias or "production"),
        ),
    ]  # fmt: skip
    named = [tag["value"] for tag in version["tags"] if "run" in tag["key"]]
    runs = [version["run_id"], *(each for each in named if re.fullmatch("[0-9a-f]{32}", each))]
    figure, report_page = None, None
    for run_id in runs:
        run = ask(server, "runs/get", run_id=run_id)["run"]["info"]
        place = f"experiments/{run['experiment_id']}/runs/{run_id}/artifacts"
        files = list_files(server, run_id)
        pictures = [file for file in files if file.endswith(".png")]
        reports = [file for file in files if Path(file).match(report)]
        if pictures:
            figure = Page("registry_figures", f"{place}/{pictures[0]}", (Path(pictures[0]).name,))
        if reports:
            report_page = Page("registry_report", f"{place}/{reports[0]}", (Path(reports[0]).name,))
    return pages + [page for page in (figure, report_page) if page is not None]


def list_files(server: str, run_id: str, folder: str = "") -> list[str]:
    """Paths of all artifacts of a run."""
    query = {"run_id": run_id} | ({"path": folder} if folder else {})
    files: list[str] = []
    for entry in ask(server, "artifacts/list", **query).get("files", ()):
        is_folder = entry.get("is_dir")
        files += list_files(server, run_id, entry["path"]) if is_folder else [entry["path"]]
    return files


def photograph(chromium: str, server: str, page: Page, folder: Path, scratch: Path) -> None:
    """Write the picture of a page whose text holds what it should; SystemExit if it does not."""
    address = f"{server}/#/{urllib.parse.quote(page.place)}"
    command = [
        chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--force-device-scale-factor=1", "--window-size=1500,1100", f"--user-data-dir={scratch}",
        f"--virtual-time-budget={PATIENCE}",
    ]  # fmt: skip
    shown = subprocess.run(
        [*command, "--dump-dom", address], capture_output=True, text=True, timeout=300, check=True
    )
    text = html.unescape(re.sub(r"<[^>]*>", " ", shown.stdout))
    missing = [each for each in page.expected if each not in text]
    if missing:
        sys.exit(f"{address} does not show {', '.join(missing)}")
    picture = folder / f"{page.name}.png"
    subprocess.run(
        [*command, f"--screenshot={picture}", address], capture_output=True, timeout=300, check=True
    )
    with Image.open(picture) as whole:
        whole.crop((0, 0, WIDTH, whole.height)).save(picture, optimize=True)
    print(f"{picture}: shows {', '.join(page.expected)}")


def main() -> None:
    """Photograph the pages of a version."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("server", help="such as http://127.0.0.1:5000")
    parser.add_argument("model", help="NAME@stage")
    parser.add_argument("--report", default="*.html", help="pattern of the report's file name")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder of the pictures")
    options = parser.parse_args()
    chromium = next((path for name in CHROMIUMS if (path := shutil.which(name))), None)
    if chromium is None:
        sys.exit(f"none of {', '.join(CHROMIUMS)} is installed: apt-get install chromium")
    server = options.server.rstrip("/")
    with tempfile.TemporaryDirectory(prefix="chromium-") as scratch:
        for page in find_pages(server, options.model, options.report):
            photograph(chromium, server, page, options.out, Path(scratch))


if __name__ == "__main__":
    main()

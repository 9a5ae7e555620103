"""Every command of docs/facility.md, in the order of the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from servers import POSTGRES

from benchmarks.server import free_port

PAGE = Path(__file__).resolve().parents[2] / "docs" / "facility.md"

FUNCTIONS = """
set -euo pipefail
stop() { [ -z "${SERVER:-}" ] || kill -9 -- "-$SERVER" 2>/dev/null || true; }
trap stop EXIT
healthy() {
    python - <<'END'
import time, urllib.request
for _ in range(480):
    try:
        urllib.request.urlopen("http://127.0.0.1:5000/health", timeout=1).close()
        break
    except OSError:
        time.sleep(0.25)
else:
    raise SystemExit("no server")
END
}
"""
REGISTER = """
import sys
from pathlib import Path
from cectflow.tracking.promotion import set_stage
from cectflow.tracking.registry import register_model
from cectflow.tracking.runs import connect, start_run
from cectflow.tracking.policy import Verdict
connect()
with start_run("register") as run:
    version = register_model(run, Path(sys.argv[1]), name="facility-student")
set_stage(version, "production", verdict=Verdict("student", True, ()))
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="the page is POSIX")]


def blocks(*sections: str) -> list[str]:
    """Commands of some sections of the page."""
    parts = re.split(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    texts = dict(zip(parts[1::2], parts[2::2], strict=True))
    return [
        block for each in sections for block in re.findall(r"```sh\n(.*?)```", texts[each], re.S)
    ]


def run_page(commands: list[str], folder: Path) -> str:
    """Run blocks one after the other in one shell, a server in the background; what they said."""
    script = FUNCTIONS
    for block in commands:
        if "mlflow server" in block:
            whole = block.replace("'", r"'\''")
            block = f"stop\nsetsid bash -c '{whole}' >> server.log 2>&1 &\nSERVER=$!\nhealthy\n"
        script += block
    script = script.replace(":5000", f":{(port := free_port())}").replace("5000", str(port))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, capture_output=True, text=True,
        # What the page installs is part of the development environment: nothing is fetched.
        env=clean | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                     "PIP_NO_INDEX": "1", "CECTFLOW_CACHE": str(folder / "cache")},
    )  # fmt: skip
    log = folder / "server.log"
    said = done.stdout + done.stderr
    assert done.returncode == 0, said + (log.read_text(encoding="utf-8") if log.exists() else "")
    return said


def register(model_folder: Path) -> str:
    return f"python - \"{model_folder}\" <<'END'{REGISTER}END\n"


def test_the_page_is_all_tested() -> None:
    titles = re.findall(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert titles == ["Server", "Clients", "Backup", "Restore", "Accounts", "PostgreSQL"]


def test_server_backup_restore_and_accounts(tmp_path: Path, model_folder: Path) -> None:
    said = run_page(
        [*blocks("Server", "Clients"), register(model_folder),
         *blocks("Backup"), *blocks("Restore", "Accounts")], tmp_path,
    )  # fmt: skip
    assert "no fault found" in said
    assert said.count("facility-student") >= 1  # rosalind's list
    assert (tmp_path / "registry" / "secret").stat().st_mode & 0o077 == 0
    assert (tmp_path / "lost" / "mlflow.db").is_file()


if POSTGRES:

    def test_postgresql(tmp_path: Path, model_folder: Path) -> None:
        own = f"export DATABASE={POSTGRES.rpartition('/')[0]}/facility"
        create = f"psql --quiet --dbname={POSTGRES} --command='CREATE DATABASE facility'\n"
        first, serve, client, *rest = blocks("PostgreSQL")
        first = re.sub(r"export DATABASE=.*", own, first)
        said = run_page(
            [create, "mkdir registry\n", first, serve, client, register(model_folder), *rest],
            tmp_path,
        )
        assert "no fault found" in said

"""MLflow servers that tests share: one of each kind for a session, started when first asked for."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

__all__ = ["KINDS", "Server", "Servers", "free_port", "serve"]

POSTGRES = os.environ.get("CECTFLOW_TEST_POSTGRES", "")
"""URI of a database that tests may fill; ``make test-servers`` sets it."""
KINDS = (
    "sqlite",
    "server",
    "server with basic auth",
    *(["server on postgresql"] if POSTGRES else []),
)
"""Stores that the same tests run against."""

AUTH = """[mlflow]
default_permission = READ
database_uri = sqlite:///{folder}/auth.db
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
grant_default_workspace_access = false
auth_cache_ttl_seconds = 60
"""
PASSWORD = "correct horse battery"


@dataclass(frozen=True)
class Server:
    """A running server, and what a client must set to be let in."""

    address: str
    process: subprocess.Popen[bytes]
    environment: dict[str, str]


@dataclass
class Servers:
    """One server of each kind."""

    root: Path
    empty_store: Path
    stack: ExitStack = field(default_factory=ExitStack)
    running: dict[str, Server] = field(default_factory=dict)

    def get(self, kind: str) -> Server:
        """The server of a kind, started if it does not run."""
        if kind not in self.running or self.running[kind].process.poll() is not None:
            folder = Path(self.root / f"{kind} {len(list(self.root.iterdir()))}")
            folder.mkdir()
            shutil.copy(self.empty_store, folder / "server.db")
            store = POSTGRES if kind == "server on postgresql" else "sqlite:///server.db"
            options, environment, login = [], {}, {}
            if kind == "server with basic auth":
                (folder / "auth.ini").write_text(AUTH.format(folder=folder), encoding="utf-8")
                options = ["--app-name", "basic-auth"]
                environment = {
                    "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
                    "MLFLOW_FLASK_SERVER_SECRET_KEY": "of this test",
                    "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
                }
                login = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": PASSWORD}
            options += ["--backend-store-uri", store, "--artifacts-destination", "./kept"]
            address, process = self.stack.enter_context(serve(folder, options, environment))
            self.running[kind] = Server(address, process, login)
        return self.running[kind]


@contextmanager
def serve(
    folder: Path, options: list[str], environment: dict[str, str]
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A lean server that works in a folder, killed at the end with all its processes."""
    port = str(free_port())
    address = ["--host", "127.0.0.1", "--port", port, "--workers", "1"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *address, *options], cwd=folder,
            stdout=log, stderr=log, env=clean | environment, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, folder / "server.log")
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(480):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(address, timeout=1).close()
        except OSError:
            time.sleep(0.25)
        else:
            return
    pytest.fail(f"no server at {address}:\n{log.read_text(encoding='utf-8')[-3000:]}")

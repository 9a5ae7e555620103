"""MLflow servers that tests share: one of each kind for a session, started when first asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.server import serve

__all__ = ["KINDS", "Server", "Servers"]

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

"""A lean MLflow server as docs/facility.md starts it, for benchmarks and tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["free_port", "serve"]

PATIENCE = 120.0
"""Seconds; a server starts in about ten."""


@contextmanager
def serve(
    folder: Path, options: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Address and process of a server that works in a folder, killed at the end with its children.

    Parameters
    ----------
    folder
        Where relative paths of the options lie; its log is ``server.log`` there.
    options
        Of ``mlflow server``, beyond host, port and number of workers.
    environment
        Beyond this process's, from which all of MLflow's own variables are left out.

    Raises
    ------
    RuntimeError
        If the server does not answer; with the end of its log.
    """
    port = str(free_port())
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port,
        "--workers", "1", *options,
    ]  # fmt: skip
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env={**clean, **(environment or {})},
            start_new_session=True,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        _await(f"{address}/health", process, folder / "server.log")
        yield address, process
    finally:
        if process.poll() is None:
            # Its workers are its children: they go with its process group.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _await(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(address, timeout=1).close()
        except OSError:
            time.sleep(0.25)
        else:
            return
    msg = f"no server at {address}: {log.read_text(encoding='utf-8')[-3000:]}"
    raise RuntimeError(msg)

"""Where runs and models are kept: one call that chooses, prepares and probes the MLflow store."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import ssl
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path

import mlflow
import mlflow.db
import sqlalchemy
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import ExclusiveFileLock

__all__ = ["connect", "current_store", "exclusive_lock", "explain"]

DEFAULT_STORE = "sqlite:///mlflow.db"
PROBE_TIMEOUT = 4.0  # seconds
ERROR_LENGTH = 300  # characters
SQLITE_MAGIC = b"SQLite format 3\0"

# MLflow's own defaults block a training for 246 s per call when its server is gone.
FAIL_FAST = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


def connect(tracking_uri: str | None = None, *, experiment: str = "cectflow") -> str:
    """URI of the store that every later run and model of this process goes to.

    A sqlite store is created or upgraded under a lock, so that several processes may start on it
    at once, and keeps its artifacts in ``mlruns`` beside the database file, whatever the working
    folder. Under ``mlflow run`` (``MLFLOW_RUN_ID`` is set) the experiment is left as it is. HTTP
    settings that the user has not chosen are made to fail within seconds, and MLflow is told
    never to read pickles.

    Parameters
    ----------
    tracking_uri
        ``sqlite:///path`` or ``http(s)://server``; by default ``MLFLOW_TRACKING_URI``, else
        ``sqlite:///mlflow.db`` in the working folder.
    experiment
        Name of the MLflow experiment; made when it is missing.

    Raises
    ------
    ValueError
        If the URI is a plain folder, or a sqlite URI that names no database file.
    ConnectionError
        If the server does not answer.
    """
    for name, value in FAIL_FAST.items():
        os.environ.setdefault(name, value)
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # a bar for each file
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_STORE
    scheme = uri.partition(":")[0] if ":" in uri else ""
    artifacts = None
    if scheme in {"http", "https"}:
        _probe(uri)
    elif scheme.startswith("sqlite"):
        uri, database = _locate(uri)
        _prepare(uri, database)
        artifacts = (database.parent / "mlruns" / _folder_name(experiment)).as_uri()
    elif scheme in {"", "file"}:
        msg = (
            f"{uri!r} is a folder, and MLflow no longer keeps runs in plain folders: "
            f"expected a database or a server; give {DEFAULT_STORE!r}, or move the old runs "
            f"with `mlflow migrate-filestore --source DIR --target {DEFAULT_STORE}`"
        )
        raise ValueError(msg)
    mlflow.set_tracking_uri(uri)
    if not os.environ.get("MLFLOW_RUN_ID"):
        _choose_experiment(experiment, artifacts)
    return uri


def current_store() -> str:
    """URI of the store in use, without user name and password."""
    return _without_password(mlflow.get_tracking_uri())


def explain(error: MlflowException) -> str:
    """Message of an error, on one line, cut short, and without the store's password."""
    text = " ".join(str(error).split()).replace(mlflow.get_tracking_uri(), current_store())
    return text if len(text) <= ERROR_LENGTH else text[:ERROR_LENGTH] + "..."


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Context that one process at a time may enter; the system frees the lock of a dead holder."""
    if os.name == "nt":  # MLflow's lock is POSIX only
        yield
        return
    with ExclusiveFileLock(str(path)):
        yield


def _locate(uri: str) -> tuple[str, Path]:
    url = sqlalchemy.make_url(uri)
    if not url.database or url.database == ":memory:":
        msg = f"{uri!r} names no database file: expected for instance {DEFAULT_STORE!r}"
        raise ValueError(msg)
    database = Path(url.database).absolute()
    if database.is_dir() or not _may_be_database(database):
        msg = f"{database} is no sqlite database: give another path, as in {DEFAULT_STORE!r}"
        raise ValueError(msg)
    url = url.set(database=str(database))
    return url.render_as_string(hide_password=False), database


def _may_be_database(path: Path) -> bool:
    if not path.exists():
        return True
    with path.open("rb") as file:
        return file.read(len(SQLITE_MAGIC)) in {b"", SQLITE_MAGIC}


def _prepare(uri: str, database: Path) -> None:
    database.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("mlflow.store.db.utils")
    level = logger.level
    # Without the lock three of four processes that start on a new store crash in its migrations.
    with exclusive_lock(database.with_name(database.name + ".lock")):
        logger.setLevel(logging.WARNING)
        try:
            with warnings.catch_warnings():  # of MLflow's migrations, meant for its authors
                warnings.simplefilter("ignore")
                mlflow.db.upgrade.main([uri], standalone_mode=False)
        finally:
            logger.setLevel(level)


def _probe(uri: str) -> None:
    shown = _without_password(uri)
    request = urllib.request.Request(shown.rstrip("/") + "/health")
    try:
        urllib.request.urlopen(request, timeout=PROBE_TIMEOUT).close()
    except urllib.error.HTTPError:
        return  # something answers; what it thinks of us is for MLflow to find out
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return  # it answers, and MLflow has its own settings for certificates
        msg = (
            f"no MLflow server answers at {shown} ({reason}): start it "
            f"(`mlflow server --backend-store-uri {DEFAULT_STORE}`), correct the address, or "
            f"unset MLFLOW_TRACKING_URI to keep runs in {DEFAULT_STORE}"
        )
        raise ConnectionError(msg) from None


def _choose_experiment(name: str, artifacts: str | None) -> None:
    client = mlflow.MlflowClient()
    if client.get_experiment_by_name(name) is None:
        try:
            client.create_experiment(name, artifact_location=artifacts)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was faster
                raise
    mlflow.set_experiment(name)


def _folder_name(experiment: str) -> str:
    return re.sub(r"[^\w.-]", "_", experiment)


def _without_password(uri: str) -> str:
    parts = urllib.parse.urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

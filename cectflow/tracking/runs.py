"""MLflow runs: :func:`connect` to a store, :func:`start_run`, and log through a :class:`Run`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
from matplotlib.figure import Figure
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelInput,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException

import cectflow
from cectflow.config import Config
from cectflow.tracking.spool import SPOOL_FOLDER, Spool, replay_spool
from cectflow.tracking.store import connect, current_store, explain
from cectflow.tracking.versions import RegisteredVersion

__all__ = ["Run", "cectflow_commit", "connect", "replay_spool", "start_run"]

# Limits of MLflow, in characters.
KEY_LENGTH = 250
VALUE_LENGTH = 6000
DIGEST_LENGTH = 36

SIGTERM_CODE = 128 + 15
BATCH = 100
"""Parameters or tags per call, MLflow's limit."""


class Run:
    """An open MLflow run.

    Metrics survive a server that is lost while the run goes on (see :mod:`.spool`); everything
    else needs the server and raises ``MlflowException`` without it.

    Parameters
    ----------
    run_id
        MLflow's id of the run.
    """

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self._spool = Spool(Path.cwd() / SPOOL_FOLDER, run_id)

    def log(self, metrics: Mapping[str, float | int], step: int | None = None) -> None:
        """Log metrics at a step; this is the callable that ``fit`` receives.

        Characters that MLflow refuses in names, such as the # of ``4v94#1``, become underscores.
        """
        self._spool.log({_key(name): value for name, value in metrics.items()}, step)

    def log_config(self, config: Config, name: str) -> None:
        """Log a configuration as the artifact ``{name}.yaml`` and as parameters ``cfg.*``.

        The prefix keeps them apart from the parameters that ``mlflow run`` itself has logged in
        another spelling. Logging the same values again is fine; MLflow refuses other values.
        """
        self.log_text(config.to_yaml(), f"{name}.yaml")
        params = [
            Param(_key(f"cfg.{key}"), value[:VALUE_LENGTH])
            for key, value in _flatten(config.model_dump(mode="json"))
        ]
        for start in range(0, len(params), BATCH):
            self._client.log_batch(self.run_id, params=params[start : start + BATCH])

    def log_figure(self, figure: Figure, path: str) -> None:
        """Log a figure as the artifact ``path``, whose suffix chooses the format."""
        self._client.log_figure(self.run_id, figure, path)

    def log_text(self, text: str, path: str) -> None:
        """Log a text as the artifact ``path``."""
        self._client.log_text(self.run_id, text, path)

    def log_json(self, content: object, path: str) -> None:
        """Log whatever JSON can write as the artifact ``path``."""
        self.log_text(json.dumps(content, indent=2) + "\n", path)

    def log_files(self, folder_or_file: Path, artifact_path: str | None = None) -> None:
        """Log a file, or everything in a folder, below ``artifact_path``.

        Raises
        ------
        FileNotFoundError
            If there is neither.
        """
        if folder_or_file.is_dir():
            self._client.log_artifacts(self.run_id, str(folder_or_file), artifact_path)
        elif folder_or_file.is_file():
            self._client.log_artifact(self.run_id, str(folder_or_file), artifact_path)
        else:
            msg = f"cannot log {folder_or_file}: there is no such file or folder"
            raise FileNotFoundError(msg)

    def log_dataset(self, name: str, digest: str, source: str, context: str) -> None:
        """Record that the run reads a dataset.

        Parameters
        ----------
        name
            Of the dataset.
        digest
            Hexadecimal sha256 of its manifest. MLflow shows the first 36 characters; the tag
            ``dataset.{context}`` holds all of it.
        source
            Path or URI.
        context
            What the run does with it: ``training``, ``test``.
        """
        dataset = Dataset(
            name=name,
            digest=digest[:DIGEST_LENGTH],
            source_type="local",
            source=json.dumps({"uri": source}),
            profile=json.dumps({"sha256": digest}),
        )
        tag = InputTag("mlflow.data.context", context)
        self._client.log_inputs(self.run_id, datasets=[DatasetInput(dataset, [tag])])
        self.set_tags({f"dataset.{context}": digest})

    def log_input_model(self, version: RegisteredVersion) -> None:
        """Record that the run starts from a registered version: the teacher of a student."""
        prefix = "models:/m-"
        if version.model_uri.startswith(prefix):
            model_id = version.model_uri.removeprefix("models:/")
            self._client.log_inputs(self.run_id, models=[LoggedModelInput(model_id)])
        self.set_tags({"input_model": version.uri})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        pairs = [RunTag(key, value) for key, value in tags.items()]
        for start in range(0, len(pairs), BATCH):
            self._client.log_batch(self.run_id, tags=pairs[start : start + BATCH])

    @property
    def _client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient()

    def _end(self, status: str) -> None:
        failure = None
        try:
            self._spool.flush()
        except MlflowException as error:
            failure = error
        try:
            mlflow.end_run(status)
        except MlflowException as error:
            failure = error
            self._spool.keep_status(status)
        if failure is not None:
            msg = (
                f"{current_store()} did not take the end of run {self.run_id} "
                f"({explain(failure)}): what is missing there stays in {self._spool.path} and is "
                f"sent when the next run starts in this folder against the same store"
            )
            warnings.warn(msg, stacklevel=3)


@contextlib.contextmanager
def start_run(
    name: str, *, tags: Mapping[str, str] | None = None, nested: bool = False
) -> Iterator[Run]:
    """Open run, ended as FINISHED, as FAILED on an exception, as KILLED on Ctrl-C or SIGTERM.

    Under ``mlflow run`` the outermost run is the one that MLflow has made (``MLFLOW_RUN_ID``),
    which keeps its name. Metrics that an earlier run left in the spool of the working folder are
    sent first. While a run is open, SIGTERM raises ``SystemExit(143)`` in the main thread.

    Parameters
    ----------
    name
        Shown by MLflow.
    tags
        Besides these, version and commit of cectflow are recorded.
    nested
        Whether the run is a child of the open one.

    Raises
    ------
    ValueError
        If a run is open and ``nested`` is not set.
    """
    if mlflow.active_run() is not None and not nested:
        msg = f"cannot start run {name!r}: a run is open; end it first or give nested=True"
        raise ValueError(msg)
    replay_spool(Path.cwd() / SPOOL_FOLDER)
    resumed = bool(os.environ.get("MLFLOW_RUN_ID"))
    all_tags = {
        "cectflow.version": cectflow.__version__,
        "cectflow.commit": cectflow_commit(),
        **(tags or {}),
    }
    with _sigterm_as_exit():
        active = mlflow.start_run(
            run_name=None if resumed else name, nested=nested, tags=dict(all_tags)
        )
        run = Run(active.info.run_id)
        status = "FAILED"
        try:
            yield run
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except SystemExit as end:
            if end.code in {None, 0, SIGTERM_CODE}:
                status = "KILLED" if end.code else "FINISHED"
            raise
        finally:
            run._end(status)


def cectflow_commit() -> str:
    """Git commit of the running code, ``-dirty`` when it was edited, ``unknown`` if untracked."""
    # An installed cectflow may lie in some other project's checkout: only tracked code counts.
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return "unknown"
    commit, edits = _git("rev-parse", "HEAD"), _git("status", "--porcelain", ".")
    if commit is None or edits is None:
        return "unknown"
    return f"{commit}-dirty" if edits else commit


def _git(*arguments: str) -> str | None:
    folder = Path(cectflow.__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def _exit_on_signal(number: int, frame: types.FrameType | None) -> None:
    raise SystemExit(SIGTERM_CODE)


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            yield f"{prefix}{key}", text


def _key(key: str) -> str:
    return re.sub(r"[^\w\-. /:]", "_", key)[:KEY_LENGTH]

"""Many machines: a Dask cluster for a command's jobs, an existing one or one that is started here.

A scheduler does whatever those say who can connect to it: clusters started here talk TLS with
credentials of their own, and their pages listen on this machine only.
"""

from __future__ import annotations

import logging
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from cectflow.cluster_workers import ClusterWorkers, given_orders
from cectflow.config import Config

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["ClusterConfig", "check_cluster", "job_script", "open_cluster"]

ADDRESS = re.compile(r"(tcp|tls)://([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}")
LOOPBACK = "127.0.0.1"
SECONDS_TO_CONNECT = 5.0
SECONDS_WITHOUT_WORKERS = 60.0
"""How long an existing scheduler may be without workers."""

# They end up in a batch script, where no shell shall find anything to expand. Rust's `$` of these
# patterns is the end of the text, and not also what is before a last line break.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:@,+-]*$")]
AbsolutePath = Annotated[str, StringConstraints(pattern=r"^/[A-Za-z0-9_./@+-]*$")]
Memory = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]*(\.[0-9]+)?[MGT]i?B$")]
Walltime = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,3}:[0-5][0-9]:[0-5][0-9]$")]
Directive = Annotated[
    str, StringConstraints(pattern=r"^--?[A-Za-z][A-Za-z-]*([ =][A-Za-z0-9_.,:=@/+%*\[\]-]+)?$")
]
SocketAddress = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+:[0-9]{1,5}$")]


class ClusterConfig(Config):
    """A Dask cluster that is started for a command and ended with it.

    Of Slurm and PBS it is so many jobs of the queue; of kind ``local``, processes of this machine.
    """

    kind: Literal["slurm", "pbs", "local"]
    jobs: Annotated[int, Field(ge=1, le=10000)] = 1
    """Of the queue; the work begins with the first that runs."""
    cores: Annotated[int, Field(ge=1, le=1024)] = 1
    """Of each job, and worker processes in it: each has one thread."""
    memory: Memory
    """Of each job, shared by its processes: ``16GB``."""
    walltime: Walltime | None = None
    """Of each job, ``HH:MM:SS``. Shortly before it a worker hands its work to others."""
    queue: Name | None = None
    """Slurm's partition, PBS's queue; none: the default one."""
    account: Name | None = None
    interface: Name | None = None
    """Network card of this machine that nodes reach, and of the nodes: ``ib0``."""
    scratch: AbsolutePath | None = None
    """Folder for Dask's files, on disks of the nodes."""
    logs: AbsolutePath | None = None
    """Folder for what the jobs say, shared; none: where the command is given."""
    python: AbsolutePath | None = None
    """Interpreter on the nodes; none: the path of this one."""
    directives: tuple[Directive, ...] = ()
    """Further lines of the job, as for ``sbatch`` or ``qsub``: ``--constraint=avx512``."""
    dashboard: SocketAddress = f"{LOOPBACK}:0"
    """Where the scheduler's pages listen; port 0: any that is free."""
    tls: bool = True
    """Encrypted, and closed to all but the processes of this command."""
    credentials: AbsolutePath | None = None
    """Shared folder for the files of these credentials; none: where the command is given."""
    wait: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3600.0
    """Seconds that the work waits while no worker is there."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> ClusterConfig:
        if self.kind == "local":
            of_queues = ("walltime", "queue", "account", "logs", "python", "credentials")
            given = [name for name in of_queues if getattr(self, name) is not None]
            given += ["directives"] if self.directives else []
            if given:
                msg = f"{', '.join(given)}: only for kind slurm or pbs"
                raise ValueError(msg)
            return self
        for name, what in (
            ("walltime", "the jobs' time limit, HH:MM:SS"),
            ("interface", "the network card over which nodes reach this machine, see `ip addr`"),
        ):
            if getattr(self, name) is None:
                msg = f"{name}: needed for kind {self.kind}, {what}"
                raise ValueError(msg)
        return self


def check_cluster(cluster: str) -> None:
    """Check what names a cluster, before any work is done.

    Parameters
    ----------
    cluster
        Address of a scheduler, or path of a YAML file with a :class:`ClusterConfig`.

    Raises
    ------
    ValueError
        If it is neither, or the file is no valid configuration.
    OSError
        If there is no such file, or what a cluster needs is not installed.
    """
    config = _read(cluster)
    needed = ["distributed"]
    if config is not None and config.kind != "local":
        needed.append("dask_jobqueue")
        program = {"slurm": "sbatch", "pbs": "qsub"}[config.kind]
        if shutil.which(program) is None:
            msg = f"{cluster}: kind {config.kind} needs the program {program}, which is not here"
            raise OSError(msg)
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        msg = (
            f"the cluster {cluster} needs {' and '.join(missing)}, not installed here: "
            f"pip install 'cectflow[cluster]'"
        )
        raise OSError(msg)


def _read(cluster: str) -> ClusterConfig | None:
    """Configuration of a cluster; None where it is the address of one."""
    if ADDRESS.fullmatch(cluster):
        return None
    if Path(cluster).suffix in {".yaml", ".yml"}:
        return ClusterConfig.from_yaml(Path(cluster))
    msg = (
        f"the cluster {cluster!r} is unknown: expected the address of a Dask scheduler, "
        f"tcp://HOST:PORT or tls://HOST:PORT, or the path of a .yaml file"
    )
    raise ValueError(msg)


@contextmanager
def open_cluster(
    cluster: str, function: Callable[..., Any], *, paths: Sequence[Path], title: str
) -> Iterator[ClusterWorkers]:
    """Context with the workers of a cluster, which have been found fit for the work.

    Parameters
    ----------
    cluster
        See :func:`check_cluster`.
    function
        Brought to each worker once.
    paths
        Files and folders that workers must see as this machine does. Into folders a hidden file is
        put for the time of the work.
    title
        What the work is, a few words.

    Raises
    ------
    OSError
        If no scheduler answers, jobs cannot be submitted, or workers are not fit for the work.
    """
    config = _read(cluster)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        if config is None:
            client, patience = _connect(cluster), SECONDS_WITHOUT_WORKERS
            stack.callback(client.close)
        else:
            client, patience = stack.enter_context(_started(config)), config.wait
        orders = stack.enter_context(given_orders(paths))
        yield stack.enter_context(ClusterWorkers(client, function, orders, title, patience))


@contextmanager
def _quiet() -> Iterator[None]:
    """Context in which Dask logs nothing here: what is lost or fails is raised."""
    # Importing Dask gives the latter a level of its own.
    import distributed

    loggers = [logging.getLogger(name) for name in (distributed.__name__, "distributed.client")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _connect(address: str) -> Client:
    from distributed import Client, Security

    certificates = Security().get_connection_args("client")["ssl_context"]
    if address.startswith("tls:") and certificates is None:
        msg = (
            f"{address} needs certificates: set DASK_DISTRIBUTED__COMM__TLS__CA_FILE, "
            f"…__TLS__CLIENT__CERT and …__TLS__CLIENT__KEY, or the same in Dask's configuration"
        )
        raise ConnectionError(msg)
    try:
        return Client(address, timeout=SECONDS_TO_CONNECT, set_as_default=False, name="cectflow")
    except OSError as error:
        msg = (
            f"no Dask scheduler answers at {address}: see that it runs and that this machine "
            f"reaches it ({error})"
        )
        raise ConnectionError(msg) from None


@contextmanager
def _started(config: ClusterConfig) -> Iterator[Client]:
    """Client of a cluster that is started here and ended afterwards."""
    from distributed import Client

    cluster = _start_local(config) if config.kind == "local" else _start_jobs(config)
    with ExitStack() as stack:
        stack.callback(_close, cluster)
        # The client goes first: it would complain of a scheduler that leaves.
        yield stack.enter_context(Client(cluster, set_as_default=False, name="cectflow"))


def _start_local(config: ClusterConfig) -> Any:
    from distributed import LocalCluster, Security

    place = {"interface": config.interface} if config.interface else {"host": LOOPBACK}
    return LocalCluster(
        n_workers=config.jobs * config.cores, threads_per_worker=1, processes=True,
        memory_limit=_memory_per_process(config), local_directory=config.scratch,
        dashboard_address=config.dashboard, worker_dashboard_address=f"{LOOPBACK}:0",
        security=Security.temporary() if config.tls else None,
        protocol="tls://" if config.tls else "tcp://",
        silence_logs=logging.CRITICAL, **place,
    )  # fmt: skip


def _start_jobs(config: ClusterConfig) -> Any:
    """Scheduler in this process, whose workers are jobs of the queue."""
    from dask_jobqueue.pbs import PBSCluster
    from dask_jobqueue.slurm import SLURMCluster
    from distributed import Security, Status

    kinds = {"slurm": SLURMCluster, "pbs": PBSCluster}
    cluster = kinds[config.kind](
        security=Security.temporary() if config.tls else None,
        protocol="tls://" if config.tls else "tcp://",
        shared_temp_directory=config.credentials or str(Path.cwd()),
        scheduler_options={"interface": config.interface, "dashboard_address": config.dashboard},
        silence_logs=logging.CRITICAL, **_job_options(config),
    )  # fmt: skip
    try:
        # As scale() does, which leaves the submission to the background: what the queue says of
        # one that it refuses would only be logged.
        while len(cluster.worker_spec) < config.jobs:
            cluster.worker_spec.update(cluster.new_worker_spec())
        cluster.sync(cluster._correct_state)
    except RuntimeError as error:
        for job in cluster.workers.values():
            if job.status == Status.created:  # at the end of close() none may be so
                job.status = Status.failed
        _close(cluster)
        msg = f"the queue refuses the cluster's jobs: {' '.join(str(error).split())}"
        raise OSError(msg) from None
    except BaseException:
        _close(cluster)
        raise
    return cluster


def _close(cluster: Any) -> None:
    cluster.close(timeout=20)
    # dask-jobqueue leaves its files with TLS's keys until it is collected as garbage.
    for name in ("ca_file", "cert", "key"):
        file = getattr(cluster, f"_job_{name}", None)
        if file is not None:
            file.close()


def job_script(config: ClusterConfig) -> str:
    """The batch script of a worker's job, as the queue gets it but for the scheduler's address."""
    from dask_jobqueue.pbs import PBSJob
    from dask_jobqueue.slurm import SLURMJob

    job = {"slurm": SLURMJob, "pbs": PBSJob}[config.kind]
    script: str = job(
        "tcp://SCHEDULER:PORT", name="WORKER", interface=config.interface, **_job_options(config)
    ).job_script()
    return script


def _job_options(config: ClusterConfig) -> dict[str, Any]:
    assert config.walltime is not None
    hours, minutes, seconds = (int(part) for part in config.walltime.split(":"))
    limit = 3600 * hours + 60 * minutes + seconds
    # A worker that retires hands on what it was to do; one that the queue kills counts as died.
    lifetime = limit - max(60, limit // 20)
    retire = ["--lifetime", f"{lifetime}s"] if lifetime > 60 else []
    return {
        "queue": config.queue,
        "account": config.account,
        "walltime": config.walltime,
        "cores": config.cores,
        "processes": config.cores,
        "memory": config.memory,
        "python": shlex.quote(config.python or sys.executable),
        "local_directory": config.scratch,
        "log_directory": config.logs,
        "job_extra_directives": list(config.directives),
        "worker_extra_args": ["--dashboard-address", f"{LOOPBACK}:0", *retire],
    }


def _memory_per_process(config: ClusterConfig) -> int:
    from dask.utils import parse_bytes

    return int(parse_bytes(config.memory)) // config.cores

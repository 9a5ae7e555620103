"""``mlflow run`` on a Slurm of one node, started here; by ``make test-slurm`` only.

Needs the programs of Slurm and munge (``apt-get install slurm-wlm``), root, and mlflow-slurm.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import mlflow
import pytest
from conftest import make_road
from road import ROOT, Road

from cectflow.cluster import ClusterConfig
from cectflow.manifest import read_manifest

CLUSTER = ROOT / "docs" / "cluster"
FINISHED = {"CD", "F", "CA", "TO", "NF"}

CONFIGURATION = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={megabytes} State=UNKNOWN
PartitionName=batch Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Road]:
    """A road whose environment submits to a cluster of its own."""
    if any(shutil.which(name) is None for name in ("munged", "slurmctld", "slurmd", "sbatch")):
        pytest.fail("Slurm is not installed: apt-get install slurm-wlm")
    folder = tmp_path_factory.mktemp("slurm")
    for parent in (folder, *folder.parents):  # munge wants to be reached by all
        if parent != Path("/") and parent.stat().st_mode & 0o555 != 0o555:
            parent.chmod(0o755)
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    (folder / "munge" / "key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge" / "key").chmod(0o400)
    configuration = CONFIGURATION.format(
        folder=folder, host=socket.gethostname().partition(".")[0], ports=free_ports(2),
        cpus=os.cpu_count(),
        megabytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 - 512,
    )  # fmt: skip
    (folder / "slurm.conf").write_text(configuration)
    road = make_road(folder)
    environment = road.environment | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "CECTFLOW_VENV": str(Path(sys.executable).parents[1]),
        "MLFLOW_CONDA_HOME": str(CLUSTER / "venv-as-conda"),
    }
    munge = ["munged", "--force"]
    munge += [f"--{what}={folder}/munge/{what.removesuffix('-file')}"
              for what in ("socket", "key-file", "pid-file", "log-file", "seed-file")]  # fmt: skip
    try:
        for command in (munge, ["slurmctld"], ["slurmd"]):
            subprocess.run(command, env=environment, check=True, timeout=60)
        yield Road(folder, "", environment)
    finally:
        for file in ("slurmd.pid", "slurmctld.pid", "munge/pid"):
            with suppress(OSError, ValueError):
                os.kill(int((folder / file).read_text()), signal.SIGTERM)


def submit(cluster: Road, *command: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def wait_for(cluster: Road, job: str) -> str:
    for _ in range(300):
        state = submit(cluster, "squeue", "--state=all", f"--job={job}", "--noheader", "-o%t")
        if state.strip() in FINISHED:
            return state.strip()
        time.sleep(1)
    pytest.fail(f"job {job} is in state {state} after five minutes")


def test_the_sbatch_script_runs_an_entry_point(cluster: Road) -> None:
    said = submit(
        cluster, "sbatch", f"--output={cluster.folder}/%j.out", str(CLUSTER / "train.sbatch"),
        "simulate", "-P", "recipe=tiny", "-P", f"out={cluster.folder / 'by script'}",
    )  # fmt: skip
    job = said.split()[-1]
    assert wait_for(cluster, job) == "CD", (cluster.folder / f"{job}.out").read_text()
    assert (cluster.folder / "by script" / "manifest.json").is_file()


def test_the_backend_plugin_runs_an_entry_point(cluster: Road) -> None:
    script = cluster.folder / "job.sh"
    config = json.loads((CLUSTER / "slurm.json").read_text()) | {"sbatch-script-file": str(script)}
    (cluster.folder / "slurm.json").write_text(json.dumps(config))
    submit(
        cluster, sys.executable, "-m", "mlflow", "run", ".", "-e", "simulate",
        "--backend", "slurm", "--backend-config", str(cluster.folder / "slurm.json"),
        "-P", "recipe=tiny", "-P", f"out={cluster.folder / 'by plugin'}",
    )  # fmt: skip
    mlflow.set_tracking_uri(cluster.environment["MLFLOW_TRACKING_URI"])
    found = mlflow.search_runs(search_all_experiments=True, output_format="list")
    (run,) = (run for run in found if "slurm_job_id" in run.data.tags)
    (job,) = json.loads(run.data.tags["slurm_job_id"].replace("'", '"'))
    output = ROOT / f"slurm-{job}.out"
    try:
        assert wait_for(cluster, job) == "CD", output.read_text()
    finally:
        output.unlink(missing_ok=True)
    assert mlflow.get_run(run.info.run_id).info.status == "FINISHED"
    assert (cluster.folder / "by plugin" / "manifest.json").is_file()


def test_one_command_works_through_jobs_of_the_queue(cluster: Road) -> None:
    sample = ClusterConfig.from_yaml(CLUSTER / "dask-slurm.yaml")
    own = {
        "jobs": 1, "cores": 2, "memory": "3GB", "walltime": "00:20:00", "interface": "lo",
        "queue": "batch", "logs": str(cluster.folder / "logs"),
        "credentials": str(cluster.folder), "wait": 120.0,
    }  # fmt: skip
    file = cluster.folder / "dask-slurm.yaml"
    file.write_text(sample.model_copy(update=own).to_yaml())
    simulate = ("cectflow", "simulate", "dataset", "--recipe", "tiny", "--out")
    submit(cluster, *simulate, str(cluster.folder / "by jobs"), "--cluster", str(file))
    submit(cluster, *simulate, str(cluster.folder / "here"))
    by_jobs, here = (read_manifest(cluster.folder / name) for name in ("by jobs", "here"))
    assert by_jobs.content_digest() == here.content_digest()
    # Its jobs have ended with it, and its credentials are gone.
    assert submit(cluster, "squeue", "--noheader", "--states=PENDING,RUNNING").strip() == ""
    assert not list(cluster.folder.glob(".dask-jobqueue*"))

    refused = sample.model_copy(update=own | {"queue": "nowhere"})
    file.write_text(refused.to_yaml())
    done = subprocess.run(
        [*simulate, str(cluster.folder / "refused"), "--cluster", str(file)],
        cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "the queue refuses the cluster's jobs" in done.stderr
    assert "invalid partition" in done.stderr

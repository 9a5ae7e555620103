"""Work on a real Dask cluster is that of this process, whoever dies; what cannot work is told."""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from builders import Exported
from cluster_jobs import (
    Heavy,
    die,
    fail,
    fail_beside_another,
    mark_and_stay,
    pid_of,
    wait_for_a_third,
    wait_until,
    work_with,
)
from distributed import Client

from cectflow import cluster, cluster_workers
from cectflow.cluster import ClusterConfig, job_script
from cectflow.execution import Workplace, run_all
from cectflow.flows.prediction import predict_classes
from cectflow.flows.segmentation import predict_segments
from cectflow.manifest import read_manifest
from cectflow.prediction.contract import InputOptions
from cectflow.prediction.inputs import InputFiles
from cectflow.prediction.many import ManySegmentation
from cectflow.prediction.whole import WholeOutputs
from cectflow.simulation.delivery import simulate_dataset
from cectflow.simulation.field import prepare_specimen
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.structure import Structure, StructureSource, load_structure
from cectflow.simulation.tomogram_files import _Job, _Setting, _simulate_one, deliver_tomograms
from cectflow.volume import Volume
from cectflow.volume_writer import write_stack, write_volume

pytest_plugins = ("exported",)

SAMPLE = Path(__file__).parents[1] / "docs" / "cluster" / "dask-slurm.yaml"

# In a process of its own, as a facility's scheduler is: a dying worker is no matter of the tests'.
CLUSTERS = """
import logging, sys
from distributed import LocalCluster

if __name__ == "__main__":
    settings = dict(threads_per_worker=1, dashboard_address="127.0.0.1:0", host="127.0.0.1",
                    worker_dashboard_address="127.0.0.1:0", silence_logs=logging.CRITICAL)
    with (LocalCluster(n_workers=2, **settings) as full,
          LocalCluster(n_workers=0, **settings) as empty):
        print(full.scheduler_address, empty.scheduler_address, flush=True)
        sys.stdin.read()
"""


class Addresses(NamedTuple):
    """Of a cluster of two worker processes, and of one without any."""

    full: str
    empty: str

    @property
    def workplace(self) -> Workplace:
        return Workplace(cluster=self.full)


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    script = tmp_path_factory.mktemp("cluster") / "clusters.py"
    script.write_text(CLUSTERS)
    with subprocess.Popen(
        [sys.executable, str(script)],
        cwd=script.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Addresses(*process.stdout.readline().split())
            process.stdin.close()
            process.wait(60)
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here hangs."""
    monkeypatch.setattr(cluster, "SECONDS_WITHOUT_WORKERS", 20.0)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Work


def test_results_do_not_depend_on_where_they_are_made(addresses: Addresses) -> None:
    jobs = [4.0, 1.0, 9.0, 0.0, 25.0]
    results = run_all(math.sqrt, jobs, where=addresses.workplace, title="roots")
    assert sorted(results) == [0.0, 1.0, 2.0, 3.0, 5.0]


def test_a_failure_on_a_worker_is_raised_here_with_its_traceback(addresses: Addresses) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such cube: 'cube\.mrc'") as failure:
        list(run_all(fail, ["portable"], where=addresses.workplace, title="cubes"))
    assert re.search(r"cluster_jobs.py.*, in fail", failure.value.__notes__[0])
    with pytest.raises(RuntimeError, match=r"^UnportableError: cube is torn"):
        list(run_all(fail, ["other"], where=addresses.workplace, title="cubes"))


def test_after_a_failure_jobs_in_hand_end_and_others_do_not_begin(
    addresses: Addresses, tmp_path: Path
) -> None:
    jobs = [(number, tmp_path) for number in range(20)]
    with pytest.raises(ValueError, match="this cube is missing"):
        list(run_all(fail_beside_another, jobs, where=addresses.workplace, title="cubes"))
    begun = {path.stem for path in tmp_path.glob("*.begun")}
    assert {path.stem for path in tmp_path.glob("*.done")} == begun - {"0"} >= {"1"}
    assert len(begun) <= 5  # four were in hand, and one took the place of that which failed


def test_what_the_function_holds_travels_once_to_each_worker(
    addresses: Addresses, tmp_path: Path
) -> None:
    function = partial(work_with, Heavy(tmp_path / "arrivals"))
    done = list(run_all(function, range(20), where=addresses.workplace, title="working"))
    assert sorted(result for _, result in done) == list(range(0, 200, 10))
    arrivals = (tmp_path / "arrivals").read_text().split()
    assert sorted(arrivals) == sorted({str(process) for process, _ in done})
    assert len(arrivals) == 2


def test_a_worker_that_comes_late_gets_what_the_function_holds(
    addresses: Addresses, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "distributed.cli.dask_worker", addresses.full, "--nthreads", "1",
        "--no-nanny", "--no-dashboard",
    ]  # fmt: skip
    late: list[subprocess.Popen[bytes]] = []

    def begin() -> None:
        wait_until((tmp_path / "arrivals").exists)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        late.append(
            subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
        )

    thread = threading.Thread(target=begin)
    thread.start()
    try:
        function = partial(wait_for_a_third, Heavy(tmp_path / "arrivals"))
        done = set(run_all(function, range(12), where=addresses.workplace, title="meeting"))
    finally:
        thread.join()
        late[0].kill()
        late[0].wait()
        with Client(addresses.full) as client:
            wait_until(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == 2)
    arrivals = (tmp_path / "arrivals").read_text().split()
    assert len(arrivals) == len(set(arrivals)) == 3
    assert str(late[0].pid) in arrivals
    assert {str(process) for process in done} <= set(arrivals)


@dataclass
class Drawn(Sequence[int]):
    """Many jobs, of which it is known how many have been asked for."""

    total: int
    drawn: int = 0

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, number: Any) -> Any:
        if number >= self.total:
            raise IndexError(number)
        self.drawn = max(self.drawn, number + 1)
        return number


@pytest.mark.parametrize("remote", [False, True])
def test_only_few_of_many_jobs_are_under_way(remote: bool, addresses: Addresses) -> None:
    jobs = Drawn(100_000)
    where = addresses.workplace if remote else Workplace(2)
    with closing(run_all(abs, jobs, where=where, title="counting")) as results:
        for done, _ in zip(range(1, 30), results, strict=False):
            # Two for each of the two workers, beside those that ended in the same moment.
            assert jobs.drawn <= done + 8


def test_what_a_dying_worker_had_in_hand_another_does(addresses: Addresses, tmp_path: Path) -> None:
    killed = []

    def kill_one() -> None:
        wait_until(lambda: len(list(tmp_path.glob("[01].*"))) == 2)
        killed.append(int(next(tmp_path.glob("0.*")).suffix[1:]))
        os.kill(killed[0], signal.SIGKILL)
        wait_until(lambda: len(list(tmp_path.glob("0.*"))) == 2)
        (tmp_path / "go").touch()

    killer = threading.Thread(target=kill_one)
    killer.start()
    jobs = [(number, tmp_path) for number in range(8)]
    results = run_all(mark_and_stay, jobs, where=addresses.workplace, title="marking")
    assert sorted(results) == list(range(8))
    killer.join()
    assert {int(path.suffix[1:]) for path in tmp_path.glob("0.*")} > set(killed)


def test_a_job_that_kills_every_worker_is_named_with_the_remedy(addresses: Addresses) -> None:
    with pytest.raises(
        ChildProcessError, match=r"masking: 4 workers have died over shard 17, .* smaller pieces"
    ):
        list(run_all(die, ["shard 17"], where=addresses.workplace, title="masking"))


def test_a_cluster_without_workers_is_not_waited_for_in_eternity(
    addresses: Addresses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "SECONDS_WITHOUT_WORKERS", 0.3)
    with pytest.raises(ChildProcessError, match=r"roots: the cluster has been without workers"):
        list(run_all(math.sqrt, [1.0], where=Workplace(cluster=addresses.empty), title="roots"))


# Simulation


STRUCTURES = [StructureSource(name, None, "builtin") for name in ("ring", "rod")]


@pytest.fixture(scope="module")
def structures() -> list[Structure]:
    return [load_structure(source) for source in STRUCTURES]


def recipe_of(fields: int) -> SimulationRecipe:
    return SimulationRecipe(
        box=16, voxel_size=16.0, field_shape=(24, 24, 24), fields={"train": fields, "test": 1},
        occupancy=0.06, blur=11.0, snr=(0.5, 2.0), jitter=16.0,
    )  # fmt: skip


def test_a_dataset_has_the_same_bytes_though_a_worker_is_killed_in_the_midst(
    addresses: Addresses,
    structures: list[Structure],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = recipe_of(12)
    simulate_dataset(recipe, structures, tmp_path / "here")
    workers = list(run_all(pid_of, [0, 1], where=addresses.workplace, title="asking"))
    finished = []

    def kill_one() -> None:
        wait_until(lambda: (tmp_path / "there" / "manifest.json").is_file())
        wait_until(lambda: any(read_manifest(tmp_path / "there").shards.values()))
        finished.append(sum(map(len, read_manifest(tmp_path / "there").shards.values())))
        os.kill(workers[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    monkeypatch.chdir(tmp_path)  # the workers have another working folder
    simulate_dataset(recipe, structures, Path("there"), where=addresses.workplace)
    killer.join()
    assert 0 < finished[0] < 13, "killed when it was over"
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_tomograms_have_the_same_bytes(
    addresses: Addresses, structures: list[Structure], tmp_path: Path
) -> None:
    recipe, shape = recipe_of(1), (16, 24, 24)
    here, there = tmp_path / "here", tmp_path / "there"
    deliver_tomograms(recipe, structures, here, count=3, shape=shape)
    deliver_tomograms(recipe, structures, there, count=3, shape=shape, where=addresses.workplace)
    assert contents(there) == contents(here)
    # One whose worker is taken for dead is made twice, and stays as it is.
    setting = _Setting(shape, prepare_specimen(recipe, structures), tilt_series=False)
    _simulate_one(setting, _Job(there / "tomo_000", 0))
    assert contents(there) == contents(here)


def test_particles_have_the_same_classes(
    addresses: Addresses, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = exported.card
    cubes = np.random.default_rng(0).normal(size=(90, card.box, card.box, card.box))
    monkeypatch.chdir(tmp_path)  # the workers have another working folder
    write_stack(Path("cubes.mrcs"), cubes.astype(np.float32), card.voxel_size)
    files, options = InputFiles("cubes.mrcs"), InputOptions(contrast=card.contrast)
    for where, name in ((Workplace(), "here"), (addresses.workplace, "there")):
        predict_classes(
            str(exported.folder), files, Path(f"{name}.star"), options, str, where=where,
            block_size=20,
        )  # fmt: skip
    assert Path("there.star").read_text() == Path("here.star").read_text()


def test_tomograms_have_the_same_labels_and_picks_and_one_that_is_torn_costs_itself(
    addresses: Addresses, semantic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the workers have another working folder
    names = ("TS_1", "TS_2", "TS_10")
    for seed, name in enumerate(names):
        cells = np.random.default_rng(seed).normal(size=(16, 32, 24)).astype(np.float32)
        write_volume(Path(f"{name}.mrc"), Volume(cells, 10.0))
    Path("TS_3.mrc").write_text("half a copy")
    for where, folder in ((Workplace(), Path("here")), (addresses.workplace, Path("there"))):
        folder.mkdir()
        outcome = predict_segments(
            str(semantic), InputFiles(tomogram="{name}.mrc"),
            WholeOutputs(folder / "{name}_labels.mrc", picks=folder / "picks.star"),
            InputOptions(), str, where=where,
        )  # fmt: skip
        assert isinstance(outcome, ManySegmentation)
        assert sorted(outcome.shares) == sorted(names)
        assert set(outcome.faults) == {"TS_3"}
    written = {path.name: path.read_bytes() for path in Path("here").glob("[!.]*")}
    assert set(written) == {f"{name}_labels.mrc" for name in names} | {
        "labels_failures.csv", "picks.star",
    }  # fmt: skip
    assert {path.name: path.read_bytes() for path in Path("there").glob("[!.]*")} == written


# A cluster of one's own


def test_a_file_describes_a_cluster_that_lives_as_long_as_its_work(tmp_path: Path) -> None:
    file = tmp_path / "local.yaml"
    file.write_text("kind: local\njobs: 2\nmemory: 2GB\nwait: 60\n")
    where = Workplace(cluster=str(file))
    pids = set(run_all(pid_of, range(8), where=where, title="asking", paths=[file]))
    assert len(pids) == 2
    assert os.getpid() not in pids
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    file.unlink()  # where there is nothing to be done no cluster is started
    assert list(run_all(pid_of, [], where=where, title="asking")) == []


INTERRUPTED = """
import signal, time
from multiprocessing import active_children
from pathlib import Path
from cectflow.execution import Workplace, run_all
from cectflow.flows.prediction import predict_classes
from cectflow.prediction.contract import InputOptions
from cectflow.prediction.inputs import InputFiles

def wait(_):
    Path("begun").touch()
    time.sleep(600)

if __name__ == "__main__":
    # It is ignored in what a shell starts in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        list(run_all(wait, [1, 2, 3], where=Workplace(cluster="local.yaml"), title="endless"))
    except KeyboardInterrupt:
        assert not active_children()
        print("ended")
"""


def test_ctrl_c_ends_a_cluster_that_was_started_for_the_work(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(INTERRUPTED)
    (tmp_path / "local.yaml").write_text("kind: local\nmemory: 1GB\ntls: false\n")
    with subprocess.Popen(
        [sys.executable, "script.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE, start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as parent:  # fmt: skip
        try:
            wait_until((tmp_path / "begun").exists)
            os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
            out, complaints = parent.communicate(timeout=60)
        finally:
            parent.kill()
    assert (out, complaints) == ("ended\n", "")


# What cannot work


def test_a_wrong_address_is_told_soon() -> None:
    with pytest.raises(ConnectionError, match=r"no Dask scheduler answers at tcp://127.0.0.1:1"):
        list(run_all(abs, [1], where=Workplace(cluster="tcp://127.0.0.1:1"), title="nothing"))
    with pytest.raises(ConnectionError, match=r"needs certificates: set DASK_DISTRIBUTED__COMM"):
        list(run_all(abs, [1], where=Workplace(cluster="tls://127.0.0.1:1"), title="nothing"))


@pytest.mark.parametrize("text", ["host:8786", "tcp://host", "http://host:8786", "tcp://a b:1"])
def test_what_is_neither_address_nor_file_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected the address of a Dask scheduler, tcp://HOST"):
        Workplace(cluster=text)


def test_a_missing_extra_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"needs distributed.* pip install 'cectflow\[cluster\]'"):
        Workplace(cluster="tcp://host:8786")


def test_a_queue_without_its_programs_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="kind slurm needs the program sbatch, which is not here"):
        Workplace(cluster=str(SAMPLE))


def test_what_the_queue_says_of_a_refused_job_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "sbatch"
    program.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified' >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    own = {"interface": "lo", "credentials": str(tmp_path)}
    file = tmp_path / "slurm.yaml"
    file.write_text(ClusterConfig.from_yaml(SAMPLE).model_copy(update=own).to_yaml())
    with pytest.raises(OSError, match=r"the queue refuses the cluster's jobs: .*invalid partition"):
        list(run_all(abs, [1], where=Workplace(cluster=str(file)), title="nothing"))
    assert not list(tmp_path.glob(".dask-jobqueue*")), "credentials stay"


def test_workers_of_other_code_are_refused(
    addresses: Addresses, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = (("Python", "2.7"), *cluster_workers._versions()[1:])
    monkeypatch.setattr(cluster_workers, "_versions", lambda: other)
    refused = (
        r"worker tcp://127.0.0.1:\d+ is not fit .* Python 3.*, the command 2.7: .* virtual env"
    )
    with pytest.raises(OSError, match=refused):
        list(run_all(abs, [1], where=addresses.workplace, title="nothing"))


@pytest.mark.parametrize(
    ("name", "change"), [(".", {"token": "put on another disk"}), ("cube.mrc", {"size": 11})]
)
def test_workers_that_see_another_disk_are_refused(
    name: str,
    change: dict[str, Any],
    addresses: Addresses,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "cube.mrc").write_bytes(bytes(10))
    paths = [tmp_path / name]
    assert list(run_all(abs, [-1], where=addresses.workplace, title="one", paths=paths)) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["cube.mrc"]
    plain = cluster_workers.given_orders

    @contextmanager
    def another(given: Sequence[Path]) -> Iterator[object]:
        with plain(given) as orders:
            yield replace(orders, sights=tuple(replace(s, **change) for s in orders.sights))

    monkeypatch.setattr(cluster, "given_orders", another)
    with pytest.raises(OSError, match=r"does not see the .* a file system that all machines"):
        list(run_all(abs, [1], where=addresses.workplace, title="one", paths=paths))


# Files


SLURM: dict[str, Any] = {
    "kind": "slurm", "jobs": 3, "cores": 4, "memory": "16GB", "walltime": "02:00:00",
    "interface": "ib0",
}  # fmt: skip


def test_a_batch_script_asks_for_what_the_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/my venv/bin/python")
    config = ClusterConfig(
        **SLURM | {"queue": "batch", "account": "em-1", "directives": ("--constraint=avx512",)}
    )
    lines = job_script(config).splitlines()
    assert {
        "#SBATCH -p batch", "#SBATCH -A em-1", "#SBATCH --cpus-per-task=4", "#SBATCH --mem=15G",
        "#SBATCH -t 02:00:00", "#SBATCH --constraint=avx512",
    } <= set(lines)  # fmt: skip
    command = shlex.split(lines[-1])
    assert command[:3] == ["/my venv/bin/python", "-m", "distributed.cli.dask_worker"]
    options = dict(zip(command[4::2], command[5::2], strict=False))
    assert options["--nthreads"] == "1"
    assert options["--nworkers"] == "4"
    # It retires six minutes before Slurm would end it, and shows its page to nobody.
    assert " --lifetime 6840s" in lines[-1]
    assert " --dashboard-address 127.0.0.1:0" in lines[-1]
    assert " --interface ib0" in lines[-1]
    pbs = job_script(ClusterConfig(**SLURM | {"kind": "pbs", "queue": "batch"}))
    assert "#PBS -q batch\n" in pbs
    assert "#PBS -l select=1:ncpus=4:mem=14GB\n" in pbs or "ncpus=4:mem=15GB\n" in pbs
    assert "#PBS -l walltime=02:00:00\n" in pbs


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("queue", "batch; rm -rf ~"), ("queue", "batch\n"), ("account", "$(id)"), ("account", ""),
        ("queue", "-p"), ("interface", "ib0`id`"), ("python", "/usr/bin/python -c"),
        ("python", "python"), ("scratch", "/tmp/$USER"), ("logs", "/a'b"), ("memory", "lots"),
        ("walltime", "2 hours"), ("directives", ("--wrap=$(id)",)), ("directives", ("rm -rf",)),
        ("directives", ("--a=b\n#SBATCH",)), ("dashboard", ":8787"), ("jobs", 0), ("wait", -1.0),
        ("jobs", "3"), ("partition", "batch"),
    ],
)  # fmt: skip
def test_nothing_of_a_file_reaches_a_shell_that_is_not_what_it_should_be(
    key: str, value: object
) -> None:
    with pytest.raises(ValueError, match=key):
        ClusterConfig(**SLURM | {key: value})


def test_a_file_tells_what_is_wrong_in_it(tmp_path: Path) -> None:
    def refused(text: str) -> pytest.RaisesExc[ValueError]:
        (tmp_path / "c.yaml").write_text(text)
        return pytest.raises(ValueError, match=told)

    told = r"c.yaml is no valid ClusterConfig: partition: no such key .*expected one of kind, jobs"
    with refused("kind: local\nmemory: 1GB\npartition: batch\n"):
        Workplace(cluster=str(tmp_path / "c.yaml"))
    told = r"queue: only for kind slurm or pbs"
    with refused("kind: local\nmemory: 1GB\nqueue: batch\n"):
        Workplace(cluster=str(tmp_path / "c.yaml"))
    told = r"interface: needed for kind pbs, the network card"
    with refused("kind: pbs\nmemory: 1GB\nwalltime: '01:00:00'\n"):
        Workplace(cluster=str(tmp_path / "c.yaml"))


def test_the_sample_of_the_page_is_valid_and_the_page_tells_each_key() -> None:
    config = ClusterConfig.from_yaml(SAMPLE)
    assert f"--cpus-per-task={config.cores}" in job_script(config)
    page = (SAMPLE.parents[1] / "cluster.md").read_text()
    for key in ClusterConfig.model_fields:
        assert f"`{key}`" in page, key

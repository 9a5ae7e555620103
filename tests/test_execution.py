"""Work gives the same results in this process and in others, and failures surface."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster_jobs import Heavy, work_with

from cectflow import execution, progress
from cectflow.execution import WorkerProcesses, Workplace, count_cores, run_all, single_thread
from cectflow.progress import track
from cectflow.together import Parent, run_together


def test_results_do_not_depend_on_the_number_of_workers() -> None:
    jobs = [4.0, 1.0, 9.0]
    alone = list(run_all(math.sqrt, jobs, where=Workplace(1), title="roots"))
    shared = list(run_all(math.sqrt, jobs, where=Workplace(2), title="roots"))
    assert alone == [2.0, 1.0, 3.0]
    assert sorted(shared) == sorted(alone)


def test_no_more_processes_begin_than_there_are_jobs() -> None:
    started: list[int] = []

    class Counting(WorkerProcesses):
        def __init__(self, workers: int, function: Callable[..., Any] | None = None) -> None:
            started.append(workers)
            super().__init__(workers, function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "WorkerProcesses", Counting)
        assert list(run_all(math.sqrt, [], where=Workplace(4), title="roots")) == []
        assert sorted(run_all(math.sqrt, [1.0, 4.0], where=Workplace(4), title="roots")) == [1, 2]
    assert started == [2]


def test_a_failure_in_a_worker_process_is_raised_here() -> None:
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        list(run_all(math.sqrt, [-1.0, 4.0], where=Workplace(2), title="roots"))


def test_one_worker_runs_lazily_so_that_earlier_results_are_kept() -> None:
    started: list[int] = []

    def job(number: int) -> int:
        started.append(number)
        if number == 2:
            msg = "two is refused"
            raise ValueError(msg)
        return number

    results = run_all(job, [0, 1, 2, 3], where=Workplace(1), title="counting")
    assert started == []
    assert next(results) == 0
    assert started == [0]
    assert next(results) == 1
    with pytest.raises(ValueError, match="two is refused"):
        next(results)
    assert started == [0, 1, 2]


def say_and_wait(signs: Path) -> str:
    """Show that the work has begun, and go on when told to."""
    (signs / "begun").touch()
    wait_for(signs / "go")
    return "done"


def wait_for(path: Path, seconds: float = 60.0) -> None:
    """Until a file is there."""
    wait_until(path.exists, seconds)


def wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Until something holds; fails if it never does."""
    stop = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < stop, "waited in vain"
        time.sleep(0.01)


def test_processes_beside_this_one_leave_ctrl_c_to_it(tmp_path: Path) -> None:
    with WorkerProcesses(1) as executor:
        worker = executor.submit(os.getpid).result()
        assert worker != os.getpid()
        busy = executor.submit(say_and_wait, tmp_path)
        wait_for(tmp_path / "begun")
        os.kill(worker, signal.SIGINT)
        (tmp_path / "go").touch()
        assert busy.result() == "done"
        assert executor.submit(os.getpid).result() == worker


@pytest.mark.parametrize(
    ("workers", "cores", "told", "share"),
    [(2, 6, "", "3"), (2, 3, "8", "1"), (3, 2, "0", "1"), (2, 6, "2", "2")],
)
def test_processes_share_the_cores_among_their_threads_or_take_what_they_are_told(
    workers: int, cores: int, told: str, share: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "count_cores", lambda: cores)
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    with WorkerProcesses(workers) as executor:
        # Libraries read it when they are imported, which no process has done yet.
        assert executor.submit(os.getenv, "OMP_NUM_THREADS").result() == share


def test_torch_in_processes_of_a_pool_has_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with WorkerProcesses(2) as executor:
        threads = executor.submit(torch.get_num_threads).result()
    assert threads == max(1, count_cores() // 2)


def test_processes_that_leave_at_once_have_said_all(capfd: pytest.CaptureFixture[str]) -> None:
    with WorkerProcesses(1) as executor:
        executor.submit(print, "the last word").result()
    assert capfd.readouterr().out == "the last word\n"


def return_or_wait(signs: Path, number: int) -> int:
    if number:
        say_and_wait(signs)
        (signs / "done").touch()
    return number


def test_a_consumer_that_stops_does_not_wait_for_jobs_in_hand(tmp_path: Path) -> None:
    function = partial(return_or_wait, tmp_path)
    with closing(run_all(function, range(2), where=Workplace(2), title="working")) as results:
        assert next(results) == 0
        wait_for(tmp_path / "begun")
    (tmp_path / "go").touch()
    assert not active_children()
    assert not (tmp_path / "done").exists()


def test_what_the_function_holds_travels_once_to_each_process(tmp_path: Path) -> None:
    function = partial(work_with, Heavy(tmp_path / "arrivals"))
    done = list(run_all(function, range(20), where=Workplace(2), title="working"))
    assert sorted(result for _, result in done) == list(range(0, 200, 10))
    arrivals = (tmp_path / "arrivals").read_text().split()
    assert sorted(arrivals) == sorted({str(process) for process, _ in done})
    assert str(os.getpid()) not in arrivals


INTERRUPTED = """
import signal, time
from multiprocessing import active_children
from pathlib import Path
from cectflow.execution import Workplace, run_all
from cectflow.together import run_together

def wait(_, parent=None):
    Path("begun").touch()
    time.sleep(600)

if __name__ == "__main__":
    # It is ignored in what a shell starts in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        list({work})
    except KeyboardInterrupt:
        assert not active_children()
        print("ended")
"""


@pytest.mark.parametrize(
    "work",
    [
        "run_all(wait, [1, 2, 3], where=Workplace(2), title='endless')",
        "run_together(wait, [1, 2], answer=divmod, title='endless')",
    ],
)
def test_ctrl_c_waits_for_no_job_and_leaves_no_process(work: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(INTERRUPTED.format(work=work))
    with subprocess.Popen(
        [sys.executable, "script.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as parent:
        wait_for(tmp_path / "begun")
        parent.send_signal(signal.SIGINT)
        out, _ = parent.communicate(timeout=60)
    assert out == "ended\n"


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_is_told_with_the_remedy() -> None:
    with pytest.raises(ChildProcessError, match=r"counting: one of 2 .* died.* fewer --workers"):
        list(run_all(die, [1, 2], where=Workplace(2), title="counting"))


SCRIPT = """
import os, time
from cectflow.execution import Workplace, run_all
from cectflow.together import run_together

def say(_, parent=None):
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    list({work})
"""


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    "work",
    [
        "run_all(say, [1, 2], where=Workplace(2), title='endless')",
        "run_together(say, [1, 2], answer=divmod, title='endless')",
    ],
)
def test_processes_end_with_a_parent_that_is_killed(work: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(work=work))
    with subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        workers = [int(process.stdout.readline()) for _ in range(2)]
        assert all(is_alive(worker) for worker in workers)
        process.kill()
    wait_until(lambda: not any(is_alive(worker) for worker in workers))


# Processes that need one another


def ask_and_tell(job: int, parent: Parent) -> None:
    parent.tell(("asks", job))
    parent.tell((job, parent.ask("half")))


def test_processes_together_tell_and_are_answered() -> None:
    def answer(number: int, question: str) -> float:
        assert question == "half"
        return jobs[number] / 2

    jobs = [8, 6]
    told = list(run_together(ask_and_tell, jobs, answer=answer, title="halves"))
    assert sorted(told, key=str) == sorted([("asks", 8), ("asks", 6), (8, 4.0), (6, 3.0)], key=str)
    assert not active_children()


def fail_or_wait(job: str, parent: Parent) -> None:
    if job == "fail":
        msg = "this cube is missing"
        raise ValueError(msg)
    if job == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()  # as for the others, in vain


@pytest.mark.parametrize(
    ("job", "error", "message"),
    [
        ("fail", ValueError, "^this cube is missing"),
        ("die", ChildProcessError, "cubes: one of 2 processes that work together has died"),
    ],
)
def test_the_failure_of_one_process_ends_all(
    job: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        list(run_together(fail_or_wait, ["stay", job], answer=divmod, title="cubes"))
    assert not active_children()


def test_less_than_one_worker_is_refused() -> None:
    with pytest.raises(ValueError, match="workers is 0: expected 1 or more"):
        WorkerProcesses(0)
    with pytest.raises(ValueError, match="workers is -2"):
        Workplace(-2)
    with pytest.raises(ValueError, match="workers is 2 beside the cluster tcp://host:8786"):
        Workplace(2, "tcp://host:8786")


def test_one_thread_holds_inside_and_the_former_number_comes_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with single_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError), single_thread():
            divmod(1, 0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_tracked_items_pass_unchanged_and_quietly() -> None:
    assert list(track(iter("abc"), total=3, title="letters")) == ["a", "b", "c"]


def test_progress_goes_to_stderr_in_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    for _ in track(range(3), total=3, title="letters", status=lambda: "well"):
        pass
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "letters: 1 of 3, 0 s left well",
        "letters: 2 of 3, 0 s left well",
    ]

"""Work gives the same results in this process and in others, and failures surface."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cectflow import execution
from cectflow.execution import (
    InProcessExecutor,
    open_executor,
    open_processes,
    run_all,
    single_thread,
    track,
)


def test_results_do_not_depend_on_the_number_of_workers() -> None:
    jobs = [4.0, 1.0, 9.0]
    alone = list(run_all(math.sqrt, jobs, workers=1, title="roots"))
    shared = list(run_all(math.sqrt, jobs, workers=2, title="roots"))
    assert alone == [2.0, 1.0, 3.0]
    assert sorted(shared) == sorted(alone)


def test_a_failure_in_a_worker_process_is_raised_here() -> None:
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        list(run_all(math.sqrt, [-1.0, 4.0], workers=2, title="roots"))


def test_one_worker_runs_lazily_so_that_earlier_results_are_kept() -> None:
    started: list[int] = []

    def job(number: int) -> int:
        started.append(number)
        if number == 2:
            msg = "two is refused"
            raise ValueError(msg)
        return number

    results = run_all(job, [0, 1, 2, 3], workers=1, title="counting")
    assert started == []
    assert next(results) == 0
    assert started == [0]
    assert next(results) == 1
    with pytest.raises(ValueError, match="two is refused"):
        next(results)
    assert started == [0, 1, 2]


def test_the_executor_of_one_worker_calls_at_once_and_keeps_the_failure() -> None:
    with open_executor(1) as executor:
        assert isinstance(executor, InProcessExecutor)
        assert executor.submit(divmod, 7, 2).result() == (3, 1)
        assert list(executor.map(abs, [-1, 2])) == [1, 2]
        failed = executor.submit(math.sqrt, -1.0)
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        failed.result()


def test_processes_beside_this_one_leave_ctrl_c_to_it() -> None:
    with open_processes(1) as executor:
        worker = executor.submit(os.getpid).result()
        assert worker != os.getpid()
        busy = executor.submit(time.sleep, 1.5)
        time.sleep(0.5)
        os.kill(worker, signal.SIGINT)
        assert busy.result() is None
        assert executor.submit(os.getpid).result() == worker


SCRIPT = """
import os, time
from cectflow.execution import open_processes

if __name__ == "__main__":
    with open_processes(2) as executor:
        print(executor.submit(os.getpid).result(), flush=True)
        time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        assert is_alive(worker)
        process.kill()
    for _ in range(400):
        if not is_alive(worker):
            break
        time.sleep(0.05)
    assert not is_alive(worker)


def test_less_than_one_worker_is_refused() -> None:
    with pytest.raises(ValueError, match="workers is 0: expected 1 or more"):
        open_processes(0)
    with pytest.raises(ValueError, match="workers is 0: expected 1"):
        open_executor(0)
    with pytest.raises(ValueError, match="workers is -2"):
        list(run_all(abs, [1], workers=-2, title="nothing"))


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
    monkeypatch.setattr(execution, "SECONDS_BETWEEN_LINES", -1.0)
    for _ in track(range(3), total=3, title="letters", status=lambda: "well"):
        pass
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "letters: 1 of 3, 0 s left well",
        "letters: 2 of 3, 0 s left well",
    ]

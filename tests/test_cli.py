"""The command line: help without weight, bad input answered with one clear line and exit code 2."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cectflow.cli import main
from cectflow.volume import Volume
from cectflow.volume_writer import write_stack, write_volume

COMMANDS = (
    (), ("structures", "list"), ("structures", "fetch"), ("simulate", "dataset"),
    ("simulate", "calibrate"),
    ("simulate", "tomograms"),
    ("dataset", "info"), ("dataset", "check"), ("dataset", "import"), ("dataset", "export"),
    ("train",), ("distill",), ("sweep",), ("evaluate", "model"), ("evaluate", "picks"),
    ("evaluate", "generalisation"), ("evaluate", "cost"), ("evaluate", "unknown"),
    ("models", "list"), ("models", "show"), ("models", "promote"), ("models", "rollback"),
    ("models", "lineage"), ("models", "diff"), ("models", "pull"), ("models", "push"),
    ("predict", "classify"), ("predict", "segment"), ("convert",), ("doctor",),
)  # fmt: skip

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    empty_store: Path,
) -> Run:  # fmt: skip
    """Run a command in a folder and a store of its own; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "store.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store.db")
    monkeypatch.setenv("CECTFLOW_CACHE", str(tmp_path / "cache"))

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command: tuple[str, ...], run: Run) -> None:
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "Usage" in out


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "from cectflow.cli import main\n"
        "try: main(['predict', 'classify', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'mlflow', 'torch', 'numpy', 'pandas', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_structures_are_listed_as_a_table_and_as_json(run: Run) -> None:
    code, out, _ = run("structures", "list", "builtin")
    assert code == 0
    assert "mass (kDa)" in out
    assert "horseshoe" in out
    code, out, _ = run("structures", "list", "builtin", "--json")
    assert {row["name"] for row in json.loads(out)} >= {"ring", "barrel"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("structures", "list", "nowhere.pdb"), "nowhere.pdb"),
        (("structures", "list", "builtin,notes.docx"), "notes.docx"),
        (("structures", "fetch", "12", "--out", "s"), "12"),
        (("simulate", "dataset", "--recipe", "nosuch", "--out", "d"), "one of demo, real, tiny"),
        (("simulate", "dataset", "--recipe", "bad.yaml", "--out", "d"), "snr is"),
        (("simulate", "dataset", "--recipe", "typo.yaml", "--out", "d"), "occupency"),
        (("simulate", "dataset", "--recipe", "small.yaml", "--out", "d"), "use a box of"),
        (("simulate", "tomograms", "--recipe", "nosuch", "--out", "d"), "one of demo, real, tiny"),
        (
            ("simulate", "tomograms", "--recipe", "tiny", "--shape", "8", "48", "48", "--out", "d"),
            "expected at least",
        ),
        (("train", "teacher", "--recipe", "network.yaml"), "known"),
        (("train", "teacher", "--recipe", "box.yaml"), "27"),
        (("train", "teacher", "--dataset", "nowhere", "--recipe", "tiny"), "no dataset folder"),
        (("train", "teacher", "--recipe", "tiny", "--device", "cuda"), "no CUDA device"),
        (("dataset", "info", "nowhere"), "no dataset folder"),
        (("dataset", "check", "nowhere"), "no dataset folder"),
        (("models", "show", "cectflow-student@production"), "cectflow-student"),
        (("models", "promote", "cectflow-student"), "cectflow-student"),
        (("models", "rollback", "cectflow-student"), "cectflow-student"),
        (("models", "lineage", "cectflow-student"), "cectflow-student"),
        (("models", "diff", "a/1", "b/1"), "no registered model 'a'"),
        (("models", "pull", "a/1", "--to", "d"), "no registered model 'a'"),
        (("models", "push", "nowhere"), "expected the folder of a bundle, or a .zip of it"),
        (("evaluate", "model", "--model", "nosuch/1"), "nosuch"),
        (
            ("predict", "classify", "--model", "cectflow-student@production", "--subtomograms",
             "s.mrcs", "--out", "o.star"), "cectflow-student",
        ),
        (
            ("predict", "classify", "--model", "cectflow-student@production", "--subtomograms",
             "s.mrcs", "--out", "o.star", "--tracking-uri", "http://127.0.0.1:1"),
            "http://127.0.0.1:1",
        ),
        (("models", "list", "--tracking-uri", "./mlruns"), "sqlite:///"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str, run: Run, tmp_path: Path
) -> None:
    tiny = (Path(__file__).parents[1] / "cectflow/recipes/tiny.yaml").read_text()
    for name, old, new in (
        ("bad", "snr: [10.0, 10.0]", "snr: [0.0, 5.0]"),
        ("typo", "occupancy:", "occupency:"),
        ("small", "box: 16", "box: 12"),
        ("network", "network: dsrf3d_v2_bn", "network: resnet50"),
        ("box", "network: strided_micro", "network: student_3"),
    ):
        assert old in tiny
        (tmp_path / f"{name}.yaml").write_text(tiny.replace(old, new))
    write_stack(tmp_path / "s.mrcs", np.zeros((1, 8, 8, 8), np.float32), 12.0)
    (tmp_path / "notes.docx").write_text("")
    before = {path.name for path in tmp_path.iterdir()}
    code, out, err = run(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    left = {path.name for path in tmp_path.iterdir()} - before
    assert left <= {"store.db", "store.db.lock", "mlruns", "cache"}, "something half-written stays"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("box: 16", "bocks: 16", r"simulation.bocks: no such key .*, expected one of seed, st"),
        ("{lowest: -60", "{low: -60", r"tilts.low: no such key .*, expected one of lowest, h"),
        ("snr: [10.0, 10.0]", "snr: [9.0, 1.0]", r"snr is \(9.0, 1.0\): expected 0 < lowest <="),
        ("seed: 0", "microscope: {defocus_um: [6.0, 3.0]}",
         r"microscope: defocus_um is \(6, 3\): expected the lower value first"),
        ("seed: 0", "distractors: {gold: 1.0, gold_diameter: [90.0, 80.0]}",
         r"gold_diameter is \(90, 80\): expected 0 < lowest <= highest"),
        ("lowest: -60.0, highest: 60.0", "lowest: 60.0, highest: -60.0",
         r"tilts run from 60° to -60° in steps of 6°: expected at least two angles"),
        ("lowest: -60.0, highest: 60.0", "explicit: [0.0]",
         r"explicit holds 1 angle\(s\), \(0.0,\): expected at least two angles"),
        ("occupancy: 0.06", "occupancy: 0.4",
         r"occupancy 0.4 was requested, 0.\d+ could be packed into .* lower the occupancy or"),
        ("field_shape: [32", "field_shape: [12",
         r"box 16 is larger than the field \(12, 48, 48\): enlarge the field"),
        ("box: 16", "box: 8",
         r"barrel is 156 Å across; a box of 8 .* has room for 108 Å: use a box of 11, "),
        ("include: [barrel", "include: [barrels", r"include names barrels: not among .* barrel, "),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_is_refused_with_given_expected_and_remedy(
    old: str, new: str, message: str, run: Run, tmp_path: Path
) -> None:
    tiny = (Path(__file__).parents[1] / "cectflow/recipes/tiny.yaml").read_text()
    tiny = tiny.replace("  structures: [builtin]", "  structures: [builtin]\n  seed: 0")
    assert old in tiny
    (tmp_path / "my.yaml").write_text(tiny.replace(old, new))
    code, out, err = run("simulate", "dataset", "--recipe", "my.yaml", "--out", "d")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("arguments", "exists"),
    [
        (("predict", "classify", "--subtomograms", "s.mrcs", "--out", "exists.star"), True),
        (("predict", "segment", "--subtomograms", "s.mrcs", "--out", "exists.star"), True),
    ],
)
def test_existing_output_is_refused_before_the_registry_is_asked(
    arguments: tuple[str, ...], exists: bool, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "exists.star").write_text("mine")
    write_stack(tmp_path / "s.mrcs", np.zeros((1, 8, 8, 8), np.float32), 12.0)
    code, _, err = run(*arguments, "--model", "cectflow-student@production")
    assert code == 2
    assert "--overwrite" in err
    assert (tmp_path / "exists.star").read_text() == "mine"


def test_an_empty_structure_file_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.pdb").write_text("")
    code, _, err = run("structures", "list", "empty.pdb")
    assert code == 2
    assert "empty.pdb" in err


def test_a_map_without_voxel_size_names_the_remedy(run: Run, tmp_path: Path) -> None:
    write_volume(tmp_path / "map.mrc", Volume(np.ones((8, 8, 8), np.float32), 12.0))
    content = bytearray((tmp_path / "map.mrc").read_bytes())
    content[40:52] = bytes(12)  # the cell's edges in Å
    with gzip.open(tmp_path / "map.mrc.gz", "wb") as file:
        file.write(content)
    code, _, err = run("structures", "list", "map.mrc.gz")
    assert code == 2
    assert "voxel size" in err


def test_warnings_are_one_line_on_stderr(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "real" / "rec3D.rec"
    command = [sys.executable, "-m", "cectflow", "structures", "list", str(path)]
    shutil.copy(path, tmp_path / "rec3D.mrc")
    command[-1] = str(tmp_path / "rec3D.mrc")
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = done.stderr.strip().splitlines()
    assert sum(line.startswith("warning: ") for line in lines) >= 1
    assert "Traceback" not in done.stderr


def test_an_interruption_is_told_and_exits_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cectflow.flows.doctor.examine", interrupt)
    with pytest.raises(SystemExit) as stop:
        main(("doctor",))
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip() == "interrupted: what was finished is kept"


def test_doctor_says_what_works(run: Run) -> None:
    code, out, _ = run("doctor")
    assert code == 0
    assert "tracking store" in out
    assert os.getcwd() in out.replace("\n", "")


def test_doctor_exits_3_when_the_store_cannot_be_reached(run: Run) -> None:
    code, out, _ = run("doctor", "--tracking-uri", "http://127.0.0.1:1")
    assert code == 3
    assert "FAULT" in out

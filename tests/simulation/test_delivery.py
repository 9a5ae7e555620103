"""Dataset folders: the same bytes however many processes write them, killed or out of disk."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cectflow.execution import Workplace
from cectflow.manifest import read_manifest
from cectflow.shards import check_dataset
from cectflow.simulation.delivery import simulate_dataset
from cectflow.simulation.distractors import Distractors, Junk
from cectflow.simulation.microscope import Microscope, TiltScheme
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.structure import Structure

resource = pytest.importorskip("resource", reason="limits are those of POSIX")

STRUCTURES = ("ring", "rod")
DRAWN = {
    "occupancy": 0.06,
    "snr": (0.5, 2.0),
    "jitter": 16.0,
    "distractors": Distractors(vesicles=0.5, vesicle_radius=(60.0, 80.0), sheets=0.3, gold=1.5),
    "junk": Junk(membrane=0.3, gold=0.2, empty=0.3),
    "microscope": Microscope(
        defocus_um=(3.0, 6.0), defocus_spread_um=(0.0, 0.4), astigmatism_um=(0.0, 0.2)
    ),
    "tilts": TiltScheme(step=6.0, thickness=(800.0, 2000.0), alignment_jitter=(0.0, 3.0)),
}
"""Everything that chance decides: what is in a field, how it is imaged, which cubes are cut."""


@pytest.fixture(scope="module")
def structures(phantom: Callable[[str], Structure]) -> list[Structure]:
    return [phantom(name) for name in STRUCTURES]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Stands still in the midst of a shard, when its files are written and have not their names yet.
SCRIPT = """
import sys, time
from pathlib import Path

from cectflow import shards
from cectflow.execution import Workplace
from cectflow.simulation.delivery import simulate_dataset
from cectflow.simulation.recipe import SimulationRecipe
from cectflow.simulation.structure import StructureSource, load_structure

plain = shards.sha256_of

def standing_still(path):
    if path.name == "00003.star":
        print("in the midst", flush=True)
        time.sleep(600)
    return plain(path)

shards.sha256_of = standing_still  # in worker processes too: they import this script

if __name__ == "__main__":
    recipe = SimulationRecipe.from_json(Path("recipe.json").read_text())
    structures = [load_structure(StructureSource(name, None, "builtin")) for name in sys.argv[1:]]
    simulate_dataset(recipe, structures, Path("data"), where=Workplace(2))
"""


def kill_in_the_midst(recipe: SimulationRecipe, place: Path) -> None:
    """SIGKILL of the main process with one shard half written and at least one finished."""
    (place / "script.py").write_text(SCRIPT)
    (place / "recipe.json").write_text(recipe.to_json())
    with subprocess.Popen(
        [sys.executable, "script.py", *STRUCTURES],
        cwd=place, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "in the midst\n"
        wait_until(lambda: any(read_manifest(place / "data").shards.values()))
        process.kill()
        process.wait()
        # Nobody goes on writing: the session that began with the process ends with it.
        wait_until(lambda: not has_processes(process.pid))


def has_processes(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(holds: Callable[[], bool]) -> None:
    stop = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < stop, "waited in vain"
        time.sleep(0.02)


def test_one_two_and_five_processes_and_a_killed_run_give_the_same_bytes(
    structures: list[Structure], make_recipe: Callable[..., SimulationRecipe], tmp_path: Path
) -> None:
    recipe = make_recipe(field_shape=(24, 24, 24), fields={"train": 6, "test": 1}, **DRAWN)
    simulate_dataset(recipe, structures, tmp_path / "one", where=Workplace(1))
    assert not check_dataset(tmp_path / "one")
    kill_in_the_midst(recipe, tmp_path)
    half = read_manifest(tmp_path / "data")
    assert not half.is_complete
    assert list((tmp_path / "data" / "train").glob(".00003.*")), "killed before it was written"
    finished = [tmp_path / f"data/{shard.name}.mrcs" for shard in half.shards["train"]]
    before = [path.stat().st_mtime_ns for path in finished]
    simulate_dataset(recipe, structures, tmp_path / "data", where=Workplace(5))
    assert [path.stat().st_mtime_ns for path in finished] == before
    assert contents(tmp_path / "data") == contents(tmp_path / "one")


def test_independent_fields_have_the_same_bytes_from_two_processes(
    structures: list[Structure], make_recipe: Callable[..., SimulationRecipe], tmp_path: Path
) -> None:
    recipe = make_recipe(
        independent=True, field_shape=(26, 26, 26), fields={"train": 7, "test": 2},
        fields_per_shard=2, **DRAWN,
    )  # fmt: skip
    for workers in (1, 2):
        simulate_dataset(recipe, structures, tmp_path / str(workers), where=Workplace(workers))
    assert read_manifest(tmp_path / "1").count("train") == 7
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_in_mid_shard_is_told_and_what_is_finished_is_kept(
    workers: int,
    structures: list[Structure],
    make_recipe: Callable[..., SimulationRecipe],
    tmp_path: Path,
) -> None:
    # The second shard is the first that does not fit: it holds three times as many fields.
    recipe = make_recipe(
        field_shape=(24, 24, 24), fields={"train": 1, "validation": 3}, fields_per_shard=3,
        targets_per_field=6,
    )  # fmt: skip
    room = 6 * 16**3 * 2 + 2048
    message = (
        r"validation.* could not be written, File too large: it needs at least 0\.\d+ MB, "
        r"[\d.]+ MB are free; make room, then give the same command again"
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # other processes inherit it
    try:
        with pytest.raises(OSError, match=message):
            simulate_dataset(recipe, structures, tmp_path / "a", where=Workplace(workers))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    half = read_manifest(tmp_path / "a")
    if workers == 1:  # of two processes the other may not have answered yet
        assert [shard.name for shard in half.shards["train"]] == ["train/00000"]
    assert not half.shards["validation"]
    assert not list((tmp_path / "a" / "validation").iterdir()), "something half-written stays"
    simulate_dataset(recipe, structures, tmp_path / "a")
    simulate_dataset(recipe, structures, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")

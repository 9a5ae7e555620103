"""Lineage from a version back to its structures, and what differs between two versions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from builders import make_manifest
from stores import pristine_mlflow, working_folder

from cectflow.cli import main
from cectflow.model_card import ModelCard, Score
from cectflow.recipe import Recipe, load_recipe
from cectflow.simulation.phantoms import build_phantom
from cectflow.tracking.comparison import compare
from cectflow.tracking.lineage import teacher_uri, trace
from cectflow.tracking.policy import Finding, Verdict
from cectflow.tracking.promotion import set_stage
from cectflow.tracking.registry import find_version, register_model
from cectflow.tracking.runs import connect, start_run
from cectflow.tracking.transfer import pull_model, push_model

STUDENT, TEACHER = "cectflow-student", "cectflow-teacher"
PASSED = Verdict("student", True, (Finding("speedup at least 3", "speedup", 4.0, 3.0, True),))
MANIFEST = make_manifest(
    sources={
        "barrel": build_phantom("barrel").digest,
        "1oel": "1" * 64,
        "mine": "2" * 64,
        "rod": "3" * 64,
    },
    commit="c0ffee",
)


def register(folder: Path, name: str, recipe: Recipe, where: Path, **changes: Any) -> None:
    """Version as a training leaves it: its run has recipe and facts of the dataset."""
    facts = {
        "dataset_digest": MANIFEST.content_digest(), "recipe_digest": recipe.digest(),
        "commit": "abc123",
    }  # fmt: skip
    card = ModelCard.from_folder(folder).model_copy(update=facts | changes)
    made = where / f"{name}-{recipe.digest()[:6]}"
    shutil.copytree(folder, made)
    (made / "card.json").write_text(card.to_json(), encoding="utf-8")
    with start_run("train") as run:
        run.log_config(recipe, "recipe")
        run.log_json(MANIFEST.facts(), "dataset.json")
        register_model(run, made, name=name, tags={"dataset.path": str(where / "data")})


@pytest.fixture(scope="module")
def traced_store(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Path, model_folder: Path
) -> Path:
    """A teacher and two students of it, of two recipes."""
    root = tmp_path_factory.mktemp("traced")
    shutil.copy(empty_store, root / "mlflow.db")
    recipe = load_recipe("tiny")
    longer = recipe.student.fit.model_copy(update={"epochs": 99})
    other = recipe.model_copy(update={"student": recipe.student.model_copy(update={"fit": longer})})
    with pristine_mlflow(), working_folder(root):
        connect(f"sqlite:///{root}/mlflow.db")
        register(model_folder, TEACHER, recipe, root, role="teacher", teacher=None)
        register(model_folder, STUDENT, recipe, root)
        better = {"accuracy": Score(value=0.97, low=0.95, high=0.99)}
        register(model_folder, STUDENT, other, root, scores=better)
        set_stage(find_version(f"{STUDENT}/1"), "production", verdict=PASSED)
    return root / "mlflow.db"


@pytest.fixture
def traced(lab: Path, traced_store: Path) -> str:
    shutil.copy(traced_store, lab / "mlflow.db")
    return connect()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert not stop.value.code
        return capsys.readouterr().out

    return call


def test_a_student_leads_back_to_structures_recipe_commit_and_teacher(traced: str) -> None:
    facts = trace(find_version(f"{STUDENT}@production"))
    recipe = load_recipe("tiny")
    assert facts["version"] == f"models:/{STUDENT}/1"
    assert facts["digest"] == find_version(f"{STUDENT}/1").tags["digest"]
    assert facts["code"]["commit"] == "abc123"
    assert facts["run"]["status"] == "FINISHED"
    assert facts["recipe"] == {
        "digest": recipe.digest(), "verified": True,
        "logged": f"runs:/{facts['run']['id']}/recipe.yaml",
    }  # fmt: skip
    assert facts["dataset"]["digest"] == MANIFEST.content_digest()
    structures = {each["name"]: each for each in facts["dataset"]["structures"]}
    assert structures["barrel"]["source"] == "cectflow's built-in phantoms"
    assert structures["1oel"]["citation"] == "https://doi.org/10.2210/pdb1oel/pdb"
    assert structures["1oel"]["licence"] == "CC0-1.0 (all entries of the PDB)"
    assert facts["verdicts"] == {"production": "passed"}
    assert [change["action"] for change in facts["history"]] == ["promote"]
    assert teacher_uri(find_version(f"{STUDENT}/1")) == f"models:/{TEACHER}/1"
    assert teacher_uri(find_version(f"{TEACHER}/1")) is None
    (teacher,) = facts["teachers"]
    assert (teacher["version"], teacher["teachers"]) == (f"models:/{TEACHER}/1", [])
    # Neither is known: a file of one's own, and a phantom's name with another digest.
    missing = ["source of structure mine", "source of structure rod"]
    assert facts["missing"] == teacher["missing"] == missing


def test_missing_links_are_named(traced: str) -> None:
    client = mlflow.MlflowClient()
    version = find_version(f"{STUDENT}/2")
    artifacts = Path(client.get_run(version.run_id).info.artifact_uri.removeprefix("file://"))
    names = ("recipe.yaml", "dataset.json")
    files = {artifacts / name: (artifacts / name).read_text() for name in names}
    client.delete_model_version(TEACHER, "1")
    client.delete_run(version.run_id)
    try:
        (artifacts / "dataset.json").unlink()
        (artifacts / "recipe.yaml").write_text("seed: 3\n")
        first = "\n".join(trace(version)["missing"])
        (artifacts / "recipe.yaml").unlink()
        second = "\n".join(trace(version)["missing"])
    finally:  # the artifacts are those of all tests here
        for path, text in files.items():
            path.write_text(text)
    assert f"run {version.run_id}: deleted" in first
    assert "the text that the run logged has another digest" in first
    assert "…: neither logged with the run nor found at" in first
    assert f"teacher models:/{TEACHER}/1: {TEACHER} has no version 1" in first
    assert "…: its text is in no run" in second


def test_a_pushed_bundle_keeps_its_lineage_and_takes_no_teacher_of_another_store(
    traced: str, lab: Path, empty_store: Path
) -> None:
    pull_model(f"{STUDENT}@production", lab / "bundle")
    assert Recipe.from_yaml(lab / "bundle" / "recipe.yaml") == load_recipe("tiny")
    brought = json.loads((lab / "bundle" / "lineage.json").read_text())
    pull_model(f"{TEACHER}/1", lab / "teacher")
    shutil.copy(empty_store, lab / "second.db")
    connect(f"sqlite:///{lab / 'second.db'}")
    version, _ = push_model(lab / "bundle", "lab-student")
    facts = trace(version)
    assert facts["origin"]["uri"] == f"models:/{STUDENT}/1"
    assert facts["origin"]["lineage"] == brought
    assert brought["teachers"][0]["version"] == f"models:/{TEACHER}/1"
    assert "teachers" not in facts
    assert facts["missing"] == []
    # Another network of its teacher's name will not do; the very files will, under any name.
    push_model(lab / "bundle", TEACHER)
    with pytest.raises(
        ValueError, match=rf"teacher models:/{TEACHER}/1 of .* is not in .*: pull it"
    ):
        teacher_uri(version)
    push_model(lab / "teacher", "lab-teacher")
    assert teacher_uri(version) == "models:/lab-teacher/1"


def test_two_versions_differ_in_what_was_changed(traced: str, lab: Path) -> None:
    found = compare(f"{STUDENT}/1", f"{STUDENT}/2")
    assert found["models"] == [f"{STUDENT} v1", f"{STUDENT} v2"]
    assert [row["field"] for row in found["card"]] == ["recipe_digest"]
    accuracy = found["scores"]["accuracy"]
    assert accuracy["first"] == {"value": 0.9, "low": 0.85, "high": 0.94}
    assert accuracy["difference"] == pytest.approx(0.07)
    assert accuracy["apart"]
    assert found["cost"]["parameters"] == {"first": 127, "second": 127, "ratio": 1.0}
    changed = [line for line in found["recipe"] if line[:1] in "+-"]
    assert changed[:2] == [f"--- {STUDENT} v1", f"+++ {STUDENT} v2"]
    assert [line.strip() for line in changed[2:]][-1] == "+    epochs: 99"
    assert len(changed) == 4
    assert found["dataset"] == []
    pull_model(f"{STUDENT}/1", lab / "bundle")
    same = compare(f"{STUDENT}/1", str(lab / "bundle"))
    assert (same["card"], same["recipe"]) == ([], [])


def test_the_commands_print_tables_and_json(traced: str, run: Callable[..., str]) -> None:
    listed = json.loads(run("models", "list", "--json"))
    assert [row["version"] for row in listed] == ["1", "2", "1"]
    assert all(len(row["digest"]) == 64 for row in listed)
    shown = json.loads(run("models", "show", f"{STUDENT}@production", "--json"))
    assert shown["card"]["network"] == "tiny"
    assert "ribosome" in run("models", "show", f"{STUDENT}@production")
    assert json.loads(run("models", "lineage", STUDENT, "--json"))["teachers"]
    lines = run("models", "lineage", STUDENT).splitlines()
    assert lines[0].startswith(f"models:/{STUDENT}/1  student tiny")
    assert any(line.startswith(f"    models:/{TEACHER}/1  teacher tiny") for line in lines)
    assert "  missing   source of structure mine" in lines
    different = run("models", "diff", f"{STUDENT}/1", f"{STUDENT}/2")
    assert "0.9000 (0.8500 to 0.9400)" in different
    assert "+    epochs: 99" in different.replace("     ", "    ")
    assert json.loads(run("models", "diff", f"{STUDENT}/1", f"{STUDENT}/2", "--json"))["scores"]


def test_pull_and_push_are_commands(
    traced: str, run: Callable[..., str], lab: Path, empty_store: Path
) -> None:
    shutil.copy(empty_store, lab / "second.db")
    said = run("models", "pull", f"{STUDENT}@production", "--to", "bundle")
    assert said.startswith(f"{STUDENT}/1@sha256:")
    assert "predict with --model bundle" in said
    card = json.loads(run("models", "show", "bundle", "--json"))
    assert card["model"].startswith(f"{STUDENT}/1@sha256:")
    second = ("--tracking-uri", f"sqlite:///{lab / 'second.db'}")
    assert run("models", "push", "bundle", *second) == f"{STUDENT} v1 is registered\n"
    again = json.loads(run("models", "push", "bundle", "--json", *second))
    assert (again["version"], again["new"]) == (f"models:/{STUDENT}/1", False)
    (lab / "bundle" / "card.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        main(("models", "push", "bundle", *second))
    assert stop.value.code == 2


def test_names_and_versions_take_two_requests_however_many_there_are(
    traced: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cectflow.tracking.versions import list_versions

    client = mlflow.MlflowClient
    for number in range(20):
        client().create_registered_model(f"other-{number}")
        client().create_model_version(f"other-{number}", "s3://nowhere/model")
    asked: list[str] = []
    for name in ("search_registered_models", "search_model_versions", "get_registered_model"):
        method = getattr(client, name)

        def count(*args: Any, _name: str = name, _method: Any = method, **kwargs: Any) -> Any:
            asked.append(_name)
            return _method(*args, **kwargs)

        monkeypatch.setattr(client, name, count)
    assert len(list_versions()) == 23
    assert asked == ["search_registered_models", "search_model_versions"]

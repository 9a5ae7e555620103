from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch

from cectflow.model_card import ModelCard
from cectflow.tracking.promotion import set_stage
from cectflow.tracking.registry import (
    ROLE_NAMES,
    RegisteredVersion,
    find_registered,
    find_version,
    list_versions,
    newest_version,
    read_card,
    register_model,
    registered_name,
    resolve_model,
)
from cectflow.tracking.runs import start_run

NAME = "cectflow-student"

PREDICT = """
import sys, numpy as np, mlflow
network = mlflow.pyfunc.load_model(sys.argv[1])
cubes = np.load("cubes.npy")
for n in (1, 2, len(cubes)):
    np.save(f"logits{n}.npy", network.predict(cubes[:n]))
assert not [name for name in sys.modules if name.startswith("cectflow")]
"""


def test_every_role_has_its_name() -> None:
    assert registered_name("segmenter", "target") == "cectflow-segmenter"
    assert registered_name("segmenter", "semantic") == "cectflow-tomogram-segmenter"
    assert registered_name("teacher", "classify") == "cectflow-teacher"
    assert registered_name("student", "classify") == NAME
    assert registered_name("student", "classify", prefix="lab_7") == "lab_7-student"
    assert registered_name("student", "target") == "cectflow-student-segmenter"
    assert registered_name("student", "semantic") == "cectflow-student-tomogram-segmenter"
    assert len(set(ROLE_NAMES.values())) == len(ROLE_NAMES) == 6


def test_a_role_without_a_name_and_a_bad_prefix_are_refused() -> None:
    with pytest.raises(ValueError, match="no registered name for a segmenter of task 'classify'"):
        registered_name("segmenter", "classify")
    with pytest.raises(ValueError, match="may hold letters, digits"):
        registered_name("teacher", "classify", prefix="my lab/x")


def test_registering_keeps_the_very_files_and_tells_their_digests(
    registry: str, model_folder: Path, lab: Path
) -> None:
    with start_run("distil") as run:
        version = register_model(run, model_folder, name="other", tags={"gate": "none"})
    assert (version.label, version.uri) == ("other v1", "models:/other/1")
    assert version.run_id == run.run_id
    assert version.stages == ()
    assert version.created.endswith("+00:00")
    assert version.tags["gate"] == "none"
    root = Path(mlflow.artifacts.download_artifacts(version.model_uri, dst_path=str(lab)))
    for place in ("data/model.pt2", "extra_files/model.onnx", "extra_files/card.json"):
        name = Path(place).name
        assert (root / place).read_bytes() == (model_folder / name).read_bytes()
        assert version.tags[f"sha256.{name}"] == sha256((root / place).read_bytes()).hexdigest()


def test_an_int8_sibling_is_of_the_same_version_and_verified_with_it(
    store: str, model_folder: Path, lab: Path
) -> None:
    folder = lab / "with-int8"
    shutil.copytree(model_folder, folder)
    (folder / "model.int8.onnx").write_bytes(b"stands for int8")
    with start_run("distil") as run:
        version = register_model(run, folder, name="siblings")
    resolved, _ = resolve_model("siblings/1")
    assert (resolved / "model.int8.onnx").read_bytes() == b"stands for int8"
    assert find_registered(folder, "siblings") == version
    (resolved / "model.int8.onnx").write_bytes(b"tampered")
    with pytest.raises(ValueError, match=r"model\.int8\.onnx of siblings v1 is not what was regis"):
        resolve_model("siblings/1")


def test_a_folder_finds_the_newest_version_made_of_its_files(
    registry: str, model_folder: Path, lab: Path
) -> None:
    found = find_registered(model_folder, NAME)
    assert found is not None
    assert found.uri == f"models:/{NAME}/3"
    assert find_registered(model_folder, "other") is None
    changed = lab / "changed"
    shutil.copytree(model_folder, changed)
    (changed / "model.onnx").write_bytes(b"another network")
    assert find_registered(changed, NAME) is None


def test_the_facts_of_the_card_are_tags_and_a_page(registry: str, card: ModelCard) -> None:
    tags = find_version(f"{NAME}/1").tags
    expected = {"role": "student", "network": "tiny", "classes": "3", "box": "8"}
    expected |= {"voxel_size": "13.6", "dataset_digest": card.dataset_digest, "parity": "1e-06"}
    expected |= {"score.accuracy": "0.9", "score.accuracy.interval": "0.85 to 0.94"}
    assert expected.items() <= tags.items()
    page = mlflow.MlflowClient().get_model_version(NAME, "1").description
    assert "| accuracy | 0.9000 (0.8500 to 0.9400) |" in page
    assert "ribosome, proteasome, apoferritin" in page


def test_the_logged_model_is_linked_with_run_and_versions(registry: str) -> None:
    version = find_version(f"{NAME}/2")
    logged = mlflow.get_logged_model(version.model_uri.removeprefix("models:/"))
    assert logged.source_run_id == version.run_id
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": NAME, "version": "2"}]
    outputs = mlflow.get_run(version.run_id).outputs.model_outputs
    assert logged.model_id in {output.model_id for output in outputs}


def test_a_folder_that_lacks_a_file_is_not_registered(
    registry: str, model_folder: Path, lab: Path
) -> None:
    for name in ("card.json", "model.pt2"):
        (lab / name).write_bytes((model_folder / name).read_bytes())
    with start_run("x") as run, pytest.raises(FileNotFoundError, match=r"lacks model\.onnx"):
        register_model(run, lab, name="other")


def test_a_static_batch_is_not_registered(registry: str, model_folder: Path, lab: Path) -> None:
    for name in ("card.json", "model.onnx"):
        (lab / name).write_bytes((model_folder / name).read_bytes())
    program = torch.export.export(torch.nn.Flatten(), (torch.zeros(2, 1, 8, 8, 8),), strict=False)
    torch.export.save(program, lab / "model.pt2")
    with start_run("x") as run, pytest.raises(ValueError, match="takes batches of 2 only"):
        register_model(run, lab, name="other")
    assert {version.name for version in list_versions()} == {NAME}


def test_a_bad_name_is_not_registered(registry: str, model_folder: Path) -> None:
    with start_run("x") as run, pytest.raises(ValueError, match="'a b' may hold letters"):
        register_model(run, model_folder, name="a b")


def test_pyfunc_predicts_any_batch_where_cectflow_is_never_imported(
    registry: str, model_folder: Path, lab: Path
) -> None:
    set_stage(find_version(f"{NAME}/2"), "production", verdict=None)
    cubes = np.random.default_rng(0).normal(size=(5, 1, 8, 8, 8)).astype(np.float32)
    np.save("cubes.npy", cubes)
    environment = os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    command = [sys.executable, "-c", PREDICT, f"models:/{NAME}@production"]
    subprocess.run(command, check=True, env=environment, timeout=600)
    network = torch.export.load(model_folder / "model.pt2").module()
    for n in (1, 2, 5):
        expected = network(torch.from_numpy(cubes[:n])).detach().numpy()
        np.testing.assert_array_equal(np.load(f"logits{n}.npy"), expected)


@pytest.mark.parametrize(
    "argument",
    [
        NAME,
        f"{NAME}@production",
        f"{NAME}/2",
        f"{NAME}/production",
        f"models:/{NAME}@production",
        f"models:/{NAME}/2",
        f"models:/{NAME}/Production",
    ],
)
def test_all_forms_of_an_argument_mean_the_same_version(registry: str, argument: str) -> None:
    set_stage(find_version(f"{NAME}/2"), "production", verdict=None)
    assert find_version(argument).version == "2"


def test_an_unknown_name_lists_the_registered_ones(registry: str) -> None:
    with pytest.raises(ValueError, match=rf"no registered model 'pupil'.*registered: {NAME}"):
        find_version("pupil")


def test_an_empty_registry_says_so(store: str) -> None:
    assert list_versions() == ()
    with pytest.raises(ValueError, match="registered: none yet"):
        find_version("pupil")


def test_a_bare_name_without_production_lists_what_there_is(registry: str) -> None:
    set_stage(find_version(f"{NAME}/3"), "staging", verdict=None)
    message = rf"no version in stage 'production': expected {NAME}@staging, {NAME}/1, {NAME}/2"
    with pytest.raises(ValueError, match=message):
        find_version(NAME)


@pytest.mark.parametrize("argument", [f"{NAME}/9", f"{NAME}@champion", f"models:/{NAME}/latest"])
def test_a_missing_version_or_stage_lists_what_there_is(registry: str, argument: str) -> None:
    with pytest.raises(ValueError, match=rf"{NAME} has no version .*expected {NAME}/1"):
        find_version(argument)


@pytest.mark.parametrize(
    "argument",
    ["", "a b", "a/b/c", "runs:/abc/model", "x'; drop", "ä", "..", "../x", "-rf", "a\n", "a$(id)"],
)
def test_another_form_is_refused_with_the_accepted_ones(registry: str, argument: str) -> None:
    with pytest.raises(ValueError, match="expected NAME, NAME@stage, NAME/VERSION"):
        find_version(argument)


def test_versions_are_listed_by_number(registry: str) -> None:
    assert [version.version for version in list_versions(NAME)] == ["1", "2", "3"]
    assert [version.version for version in list_versions()] == ["1", "2", "3"]
    assert newest_version(NAME).version == "3"


def test_a_model_folder_is_taken_as_it_is(lab: Path, model_folder: Path) -> None:
    assert resolve_model(str(model_folder)) == (model_folder, None)


def test_another_folder_is_refused(registry: str, lab: Path) -> None:
    (lab / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is no model folder, it holds no card\.json"):
        resolve_model("empty")


def test_a_version_is_downloaded_once_as_a_model_folder(
    registry: str, model_folder: Path, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, version = resolve_model(f"{NAME}/1", cache=lab / "cache")
    assert version == find_version(f"{NAME}/1")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["card.json", "model.onnx", "model.pt2"]
    assert all((folder / name).read_bytes() == (model_folder / name).read_bytes() for name in names)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    before = (folder / "model.pt2").stat().st_mtime_ns
    assert resolve_model(f"{NAME}/1", cache=lab / "cache")[0] == folder
    assert (folder / "model.pt2").stat().st_mtime_ns == before
    os.environ["CECTFLOW_CACHE"] = str(lab / "another")
    assert resolve_model(f"{NAME}/1")[0].is_relative_to(lab / "another")


def test_a_changed_file_in_the_cache_is_refused(registry: str, lab: Path) -> None:
    folder, _ = resolve_model(f"{NAME}/1", cache=lab / "cache")
    expected = sha256((folder / "card.json").read_bytes()).hexdigest()
    (folder / "card.json").write_text("{}", encoding="utf-8")
    message = rf"card\.json of {NAME} v1 .*expected sha256 {expected}, got [0-9a-f]{{64}}.*remove"
    with pytest.raises(ValueError, match=message):
        resolve_model(f"{NAME}/1", cache=lab / "cache")


def test_a_changed_file_in_the_registry_is_refused_and_not_kept(
    registry: str, model_folder: Path, lab: Path
) -> None:
    with start_run("x") as run:
        version = register_model(run, model_folder, name="other")
    model_id = version.model_uri.removeprefix("models:/")
    location = mlflow.get_logged_model(model_id).artifact_location.removeprefix("file://")
    (Path(location) / "data" / "model.pt2").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"model\.pt2 of other v1 is not what was registered"):
        resolve_model("other/1", cache=lab / "cache")
    assert not list((lab / "cache" / "other").iterdir())


def test_files_that_are_gone_are_named(registry: str, model_folder: Path, lab: Path) -> None:
    with start_run("x") as run:
        version = register_model(run, model_folder, name="other")
    model_id = version.model_uri.removeprefix("models:/")
    location = mlflow.get_logged_model(model_id).artifact_location.removeprefix("file://")
    (Path(location) / "extra_files" / "model.onnx").unlink()
    with pytest.raises(FileNotFoundError, match=r"cannot fetch extra_files/model\.onnx of other"):
        resolve_model("other/1", cache=lab / "cache")


@pytest.mark.parametrize("file", ["MLmodel", "conda.yaml", "input_example.json"])
def test_what_mlflow_alone_reads_is_registered_and_verified_too(
    registry: str, model_folder: Path, lab: Path, file: str
) -> None:
    with start_run("x") as run:
        version = register_model(run, model_folder, name="other")
    root = stored_files(version)
    files = [path for path in root.rglob("*") if path.is_file()]
    tags = {key: value for key, value in version.tags.items() if key.startswith("sha256.")}
    assert {f"sha256.{p.name}": sha256(p.read_bytes()).hexdigest() for p in files} == tags
    (root / file).write_text((root / file).read_text() + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{file} of other v1 is not what was registered"):
        resolve_model("other/1")


def test_what_mlflow_leaves_beside_a_model_that_it_loads_is_no_fault(
    registry: str, model_folder: Path, lab: Path
) -> None:
    with start_run("x") as run:
        version = register_model(run, model_folder, name="other")
    mlflow.artifacts.download_artifacts(version.uri)
    assert (stored_files(version) / "registered_model_meta").is_file()
    folder, _ = resolve_model("other/1", cache=lab / "cache")
    assert not (folder / "registered_model_meta").exists()


def test_a_file_that_was_put_beside_them_is_refused(
    registry: str, model_folder: Path, lab: Path
) -> None:
    with start_run("x") as run:
        version = register_model(run, model_folder, name="other")
    (stored_files(version) / "code").mkdir()
    (stored_files(version) / "code" / "loader.py").write_text("")
    with pytest.raises(ValueError, match=r"other v1 holds code/, which was not registered"):
        resolve_model("other/1")


def test_a_pickle_under_our_name_with_our_tags_is_refused(
    registry: str, model_folder: Path, lab: Path
) -> None:
    with start_run("x") as run:
        version = register_model(run, model_folder, name="other")
    data = stored_files(version) / "data"
    (data / "model.pt2").rename(data / "model.pth")
    with pytest.raises(ValueError, match=r"other v1 holds model\.pth in data/, expected model.pt2"):
        resolve_model("other/1")


def test_a_version_whose_files_lie_anywhere_is_refused(
    registry: str, lab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    astray = replace(find_version(f"{NAME}/1"), model_uri=str(lab))
    monkeypatch.setattr("cectflow.tracking.registry.find_version", lambda _: astray)
    with pytest.raises(ValueError, match=r"v1 is /.*cannot be verified: expected a version that c"):
        resolve_model(f"{NAME}/1")


def test_a_card_is_read_and_verified_without_the_network(
    registry: str, card: ModelCard, model_folder: Path, lab: Path
) -> None:
    assert read_card(find_version(f"{NAME}/1")) == card
    assert not (lab / "models").exists()
    with start_run("x") as run:
        version = register_model(run, model_folder, name="other")
    place = stored_files(version) / "extra_files" / "card.json"
    place.write_text(place.read_text().replace("ribosome", "exosome"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"card\.json of other v1 is not what was registered"):
        read_card(version)


def stored_files(version: RegisteredVersion) -> Path:
    model = mlflow.get_logged_model(version.model_uri.removeprefix("models:/"))
    return Path(model.artifact_location.removeprefix("file://"))


def test_a_pickle_is_refused(store: str, lab: Path) -> None:
    with start_run("x"):
        mlflow.pytorch.log_model(
            torch.nn.Linear(1, 1),
            name="m",
            serialization_format="pickle",
            pip_requirements=["torch"],
            registered_model_name="pickled",
        )
    with pytest.raises(ValueError, match=r"pickled v1 holds model\.pth, .*cectflow reads no"):
        resolve_model("pickled/1", cache=lab / "cache")


def test_a_version_without_digests_is_refused(registry: str, lab: Path) -> None:
    mlflow.MlflowClient().delete_model_version_tag(NAME, "1", "sha256.model.onnx")
    with pytest.raises(ValueError, match=r"lacks the tags sha256\.model\.onnx"):
        resolve_model(f"{NAME}/1", cache=lab / "cache")

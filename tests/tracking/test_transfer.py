"""Bundles: out of one store, through predictions without any, into another."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import mlflow
import onnx
import pytest
from builders import write_onnx

from cectflow.tracking.bundle import BundleManifest, open_bundle, seal_bundle, unpacked
from cectflow.tracking.promotion import set_stage
from cectflow.tracking.registry import find_version, list_versions, register_model, resolve_model
from cectflow.tracking.runs import start_run
from cectflow.tracking.transfer import pull_model, push_model

NAME = "cectflow-student"
FACTS = {"name": NAME, "version": "7", "store": "sqlite:///far.db", "pulled": "", "cectflow": "0"}


@pytest.fixture
def bundle(model_folder: Path, tmp_path: Path) -> Path:
    """Bundle that was made in some other place."""
    folder = tmp_path / "bundle"
    shutil.copytree(model_folder, folder)
    (folder / "lineage.json").write_text('{"version": "models:/cectflow-student/7"}')
    seal_bundle(folder, FACTS)
    return folder


def edit_manifest(bundle: Path, edit: Callable[[dict[str, dict[str, str]]], object]) -> None:
    content = json.loads((bundle / "bundle.json").read_text())
    edit(content)
    (bundle / "bundle.json").write_text(json.dumps(content))


def test_a_version_goes_to_another_store_and_keeps_its_origin(
    store: str, bundle: Path, lab: Path
) -> None:
    with start_run("x") as run:
        register_model(run, _model_only(bundle), name=NAME)
    set_stage(find_version(f"{NAME}/1"), "production", verdict=None)
    manifest = pull_model(f"{NAME}@production", lab / "pulled")
    assert open_bundle(lab / "pulled") == manifest
    assert (manifest.name, manifest.version, manifest.stages) == (NAME, "1", ("production",))
    assert manifest.store == store
    with pytest.raises(FileExistsError, match="pulled exists and is not empty"):
        pull_model(f"{NAME}@production", lab / "pulled")
    # The very version is there already, under its own name; under another it is new.
    assert push_model(lab / "pulled") == (find_version(f"{NAME}/1"), False)
    pushed, is_new = push_model(lab / "pulled", "lab-student")
    assert (pushed.label, pushed.stages, is_new) == ("lab-student v1", (), True)
    assert push_model(lab / "pulled", "lab-student") == (pushed, False)
    assert pushed.tags["origin.uri"] == f"models:/{NAME}/1"
    assert pushed.tags["origin.store"] == store
    assert pushed.tags["origin.digest"] == manifest.model_digest == pushed.tags["digest"]
    folder, _ = resolve_model("lab-student/1")
    for name in ("model.pt2", "model.onnx", "card.json"):
        assert (folder / name).read_bytes() == (lab / "pulled" / name).read_bytes()
    logged = mlflow.artifacts.load_text(f"runs:/{pushed.run_id}/origin/lineage.json")
    assert json.loads(logged)["version"] == f"models:/{NAME}/1"


def test_a_tampered_version_is_not_pulled_and_nothing_stays(
    registry: str, model_folder: Path, lab: Path
) -> None:
    with start_run("x") as run:
        version = register_model(run, model_folder, name="other")
    model = mlflow.get_logged_model(version.model_uri.removeprefix("models:/"))
    stored = Path(model.artifact_location.removeprefix("file://"))
    (stored / "data" / "model.pt2").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"model\.pt2 of other v1 is not what was registered"):
        pull_model("other/1", lab / "pulled")
    assert not (lab / "pulled").exists()


def _model_only(bundle: Path) -> Path:
    folder = bundle.with_name("model")
    folder.mkdir()
    for name in ("model.pt2", "model.onnx", "card.json"):
        shutil.copy(bundle / name, folder)
    return folder


def test_a_bundle_is_a_model_folder_whose_name_tells_version_and_digest(bundle: Path) -> None:
    manifest = open_bundle(bundle)
    assert manifest.label == f"{NAME}/7@sha256:{manifest.model_digest[:12]}"
    assert resolve_model(str(bundle)) == (bundle, None)


def test_a_bundle_predicts_where_no_store_is_and_mlflow_is_not_imported(
    bundle: Path, lab: Path
) -> None:
    script = (
        "import sys\n"
        "from cectflow.flows.prediction import load_model\n"
        "network = load_model('bundle', ('classify',), 'cpu', runtime='onnxruntime')\n"
        "print(network.label)\n"
        "sys.exit('mlflow' in sys.modules)"
    )
    environment = os.environ | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == open_bundle(bundle).label
    (bundle / "model.onnx").write_bytes(b"something else")
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert "model.onnx is not what was pulled: expected sha256" in done.stderr


def link(bundle: Path) -> None:
    target = bundle.with_name("elsewhere.onnx")
    (bundle / "model.onnx").rename(target)
    (bundle / "model.onnx").symlink_to(target)


def hard_link(bundle: Path) -> None:
    os.link(bundle / "model.onnx", bundle.with_name("elsewhere.onnx"))


def pipe(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    os.mkfifo(bundle / "model.onnx")


def foreign_path(name: str) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        edit_manifest(bundle, lambda content: content["files"].update({name: "0" * 64}))

    return change


def newer_card(bundle: Path) -> None:
    card = json.loads((bundle / "card.json").read_text()) | {"schema_version": 9, "soul": True}
    (bundle / "card.json").write_text(json.dumps(card))
    seal_bundle(bundle, FACTS)


def pickled_network(bundle: Path) -> None:
    (bundle / "model.pt2").write_bytes(b"\x80\x02}q\x00.")
    seal_bundle(bundle, FACTS)


def weights_elsewhere(bundle: Path) -> None:
    write_onnx(bundle / "model.onnx", outside=True)
    seal_bundle(bundle, FACTS)


def no_onnx(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"stands for an ONNX file")
    seal_bundle(bundle, FACTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: (b / "card.json").write_text("{}"), r"card\.json is not what was pulled: exp"),
        (lambda b: (b / "model.pt2").write_bytes(b""), r"model\.pt2 is not what was pulled"),
        (lambda b: (b / "evil.py").write_text(""), r"holds evil\.py, which its bundle\.json does"),
        (lambda b: (b / "model.onnx").unlink(), r"lacks model\.onnx"),
        (lambda b: (b / "lineage.json").unlink(), r"lacks lineage\.json"),
        (lambda b: (b / "extra").mkdir(), "is a link, a folder or a special file"),
        (link, r"model\.onnx is a link, a folder or a special file"),
        (hard_link, r"model\.onnx is a link, a folder or a special file"),
        (pipe, r"model\.onnx is a link, a folder or a special file"),
        (foreign_path("../outside.onnx"), r"names '\.\./outside\.onnx', which lies outside"),
        (foreign_path("/etc/passwd"), r"names '/etc/passwd', which lies outside"),
        (foreign_path("MODEL.ONNX"), r"names 'MODEL\.ONNX', which lies outside of the bundle"),
        (lambda b: edit_manifest(b, lambda c: c.update(name="../x")), "name: String should match"),
        (lambda b: edit_manifest(b, lambda c: c.update(version="1;ls")), "version: String sh"),
        (lambda b: edit_manifest(b, lambda c: c.update(model_digest="0" * 64)), "digest that is"),
        (lambda b: edit_manifest(b, lambda c: c.update(schema_version=2)), "bundle of schema 2"),
        (lambda b: (b / "bundle.json").write_text("{"), "is no valid BundleManifest"),
        (newer_card, "is a card of schema 9, cectflow .* knows schemas up to 1: install"),
        (pickled_network, r"model\.pt2 is no exported torch program"),
        (weights_elsewhere, r"'weight' in another file, \.\./\.\./etc/passwd: expected one file"),
        (no_onnx, r"model\.onnx is no ONNX file"),
    ],
)  # fmt: skip
def test_what_does_not_verify_is_refused_and_not_registered(
    registry: str, bundle: Path, change: Callable[[Path], object], message: str
) -> None:
    change(bundle)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        push_model(bundle, "pushed")
    assert {version.name for version in list_versions()} == {NAME}


def test_a_folder_that_is_no_bundle_is_not_pushed(store: str, model_folder: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"is no bundle, it has no bundle\.json: make one w"
    ):
        push_model(model_folder)
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: expected the folder of"):
        push_model(Path("nowhere"))


def test_a_bad_name_is_not_pushed(store: str, bundle: Path) -> None:
    with pytest.raises(ValueError, match="may hold letters, digits"):
        push_model(bundle, "../x")


def packed(bundle: Path, *, prefix: str = "", extra: dict[str, bytes] | None = None) -> Path:
    path = bundle.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in bundle.iterdir():
            archive.write(file, f"{prefix}{file.name}")
        for name, content in (extra or {}).items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("prefix", ["", "bundle/"])
def test_an_archive_of_a_bundle_is_as_good(bundle: Path, prefix: str) -> None:
    with unpacked(packed(bundle, prefix=prefix)) as folder:
        assert isinstance(open_bundle(folder), BundleManifest)
        assert not folder.is_relative_to(bundle)
    assert not folder.exists()


@pytest.mark.parametrize(
    "name", ["../model.onnx", "/model.onnx", "a/../model.onnx", "evil.py", "a/model.onnx",
             "MODEL.PT2", "C:/model.onnx", "..\\model.onnx"],
)  # fmt: skip
def test_an_archive_that_holds_more_is_refused(bundle: Path, name: str) -> None:
    path = packed(bundle, extra={name: b""})
    before = set(bundle.parent.iterdir())
    with (
        pytest.raises(ValueError, match="which is no file of a bundle, lies outside"),
        unpacked(path),
    ):
        pass
    assert set(bundle.parent.iterdir()) == before


def test_a_link_in_an_archive_is_refused(bundle: Path) -> None:
    link = zipfile.ZipInfo("recipe.yaml")
    link.external_attr = 0o120777 << 16
    path = packed(bundle)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ValueError, match="or is a link: expected plain files"), unpacked(path):
        pass


def test_an_archive_that_unpacks_to_too_much_is_refused_while_it_unpacks(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cectflow.tracking.bundle.MAX_BYTES", 3 << 20)
    (bundle / "recipe.yaml").write_bytes(bytes(8 << 20))
    path = packed(bundle)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match="unpacks to more than 3145728 bytes"), unpacked(path):
        pass
    with pytest.raises(ValueError, match="a bundle has at most 3145728"):
        open_bundle(bundle)


def test_another_archive_is_refused(bundle: Path) -> None:
    path = bundle.with_suffix(".tar")
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"is no \.zip of a bundle"), unpacked(path):
        pass


def test_the_onnx_of_these_tests_is_one(bundle: Path) -> None:
    onnx.checker.check_model(onnx.load(str(bundle / "model.onnx")))


def test_a_bundle_is_pushed_into_an_empty_store(store: str, bundle: Path) -> None:
    version, is_new = push_model(packed(bundle))
    assert (version.uri, is_new) == (f"models:/{NAME}/1", True)
    assert version.tags["origin.uri"] == f"models:/{NAME}/7"
    assert version.tags["origin.store"] == "sqlite:///far.db"

"""Pull and push: registered versions out of a store as bundles, and into another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cectflow
from cectflow.files import appearing, refuse_existing_folder
from cectflow.model_card import ModelCard
from cectflow.program_file import check_program
from cectflow.runtime import INT8_FILE, ONNX_FILE, PT2_FILE
from cectflow.tracking.bundle import (
    BUNDLE_FILE,
    LINEAGE_FILE,
    MODEL_FILES,
    RECIPE_FILE,
    BundleManifest,
    files_digest,
    open_bundle,
    seal_bundle,
    unpacked,
)
from cectflow.tracking.lineage import ORIGIN_LINEAGE, logged_text, trace
from cectflow.tracking.registry import (
    find_registered,
    model_digests,
    recorded_digests,
    register_model,
    resolve_model,
)
from cectflow.tracking.runs import start_run
from cectflow.tracking.store import current_store
from cectflow.tracking.versions import RegisteredVersion, check_name, find_version

__all__ = ["pull_model", "push_model"]

TAG_LENGTH = 500
"""Characters of a bundle's text that become a tag."""


def pull_model(argument: str, folder: Path) -> BundleManifest:
    """Bundle of a registered version: its files, digests, lineage and recipe in one new folder.

    Parameters
    ----------
    argument
        Whatever :func:`~cectflow.tracking.versions.find_version` takes.
    folder
        Absent or empty; it appears when complete.

    Raises
    ------
    FileExistsError
        If the folder exists and is not empty.
    ValueError
        If there is no such version, or one of its files is not what was registered.
    """
    refuse_existing_folder(folder)
    version = find_version(argument)
    model, _ = resolve_model(version.uri)
    lineage = trace(version)
    recipe = logged_text(version.run_id, "recipe.yaml") if version.run_id else None
    with appearing(folder) as temporary:
        for name in (name for name in MODEL_FILES if (model / name).is_file()):
            shutil.copyfile(model / name, temporary / name)
        (temporary / LINEAGE_FILE).write_text(_json(lineage), encoding="utf-8")
        if recipe is not None:
            (temporary / RECIPE_FILE).write_text(recipe, encoding="utf-8")
        manifest = seal_bundle(
            temporary,
            {
                "name": version.name,
                "version": version.version,
                "store": current_store(),
                "stages": version.stages,
                "pulled": datetime.now(UTC).isoformat(timespec="seconds"),
                "cectflow": cectflow.__version__,
                "tags": version.tags,
            },
        )
        if manifest.model_digest != files_digest(recorded_digests(version)):
            msg = f"the copy of {version.label} changed while it was made: give the command again"
            raise ValueError(msg)
        open_bundle(temporary)
    return manifest


def push_model(bundle: Path, name: str | None = None) -> tuple[RegisteredVersion, bool]:
    """Version made of a bundle in the store in use, and whether it is new there.

    Its origin (name, version, store, stages and digest there) is kept in tags ``origin.*`` and the
    lineage that it brought in the run that registers it. It holds no stage: the verdicts of another
    store are not those of this one.

    Parameters
    ----------
    bundle
        Folder, or a .zip of it.
    name
        Registered name; by default that of the bundle.

    Raises
    ------
    FileNotFoundError
        If there is no such bundle.
    ValueError
        If it does not verify, the name or the card is not valid, or a file of it could run code
        or read others when it is loaded.
    """
    with unpacked(bundle) as folder:
        manifest = open_bundle(folder)
        registered = check_name(name or manifest.name)
        card = ModelCard.from_folder(folder)
        check_program(folder / PT2_FILE)
        for file in (ONNX_FILE, INT8_FILE):
            if (folder / file).is_file():
                _refuse_external_data(folder / file)
        found = find_registered(folder, registered)
        if found is not None:
            return found, False
        with start_run("push", tags={"role": card.role}) as run:
            for file in (BUNDLE_FILE, LINEAGE_FILE, RECIPE_FILE):
                if (folder / file).is_file():
                    run.log_files(folder / file, Path(ORIGIN_LINEAGE).parent.name)
            version = register_model(run, folder, name=registered, tags=_origin(manifest))
        assert files_digest(model_digests(folder)) == manifest.model_digest
    return version, True


def _origin(manifest: BundleManifest) -> Mapping[str, str]:
    facts = {
        "uri": f"models:/{manifest.name}/{manifest.version}",
        "store": manifest.store,
        "stages": ", ".join(manifest.stages),
        "pulled": manifest.pulled,
        "digest": manifest.model_digest,
        "cectflow": manifest.cectflow,
    }
    return {f"origin.{key}": value[:TAG_LENGTH] for key, value in facts.items() if value}


def _refuse_external_data(path: Path) -> None:
    """An ONNX file may name others, of whatever path, that hold its weights."""
    import onnx

    network = onnx.ModelProto()
    try:
        network.ParseFromString(path.read_bytes())
    except Exception:  # protobuf's DecodeError, which has no types
        msg = f"{path} is no ONNX file: pull the bundle again"
        raise ValueError(msg) from None
    for tensor in _tensors(network.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            places = [entry.value for entry in tensor.external_data if entry.key == "location"]
            msg = (
                f"{path} keeps {tensor.name!r} in another file, {', '.join(places)}: expected one "
                f"file with all its weights; export the network again"
            )
            raise ValueError(msg)


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _json(content: object) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

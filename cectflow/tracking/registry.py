"""The model registry: :func:`register_model` from a model folder, :func:`resolve_model` to one.

Which version an argument means is told by :mod:`.versions`, stages are kept by :mod:`.promotion`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.models_artifact_repo import REGISTERED_MODEL_META_FILE_NAME

from cectflow.files import sha256_of
from cectflow.model_card import CARD_FILE, ModelCard
from cectflow.runtime import PT2_FILE
from cectflow.tracking import model_layout
from cectflow.tracking.bundle import files_digest, open_model_folder
from cectflow.tracking.model_layout import FILE_PLACES, LAYOUT_FILES, SIBLING_PLACES
from cectflow.tracking.runs import Run
from cectflow.tracking.versions import (
    FORMS,
    ROLE_NAMES,
    RegisteredVersion,
    check_name,
    find_version,
    list_versions,
    newest_version,
    registered_name,
)

__all__ = [
    "ROLE_NAMES",
    "RegisteredVersion",
    "find_registered",
    "find_version",
    "list_versions",
    "model_digests",
    "newest_version",
    "read_card",
    "recorded_digests",
    "register_model",
    "registered_name",
    "resolve_model",
]

CACHE_VARIABLE = "CECTFLOW_CACHE"
DIGEST_TAG = "sha256."
"""And a file's name: tag with its digest. Every file of a version has one, whoever reads it."""
WHOLE_TAG = "digest"
"""Tag with the digest of the model folder: :func:`~cectflow.tracking.bundle.files_digest`."""
PLACES = FILE_PLACES | SIBLING_PLACES | {file: file for file in LAYOUT_FILES}


def register_model(
    run: Run, folder: Path, *, name: str, tags: Mapping[str, str] | None = None
) -> RegisteredVersion:
    """Next version of a registered model, made of a model folder's files as they are.

    The files become one MLflow model without pickle, which ``mlflow.pyfunc.load_model`` reads
    where cectflow is not installed. The sha256 of every file, those that MLflow wants beside them
    included, and the facts of the card become tags.

    Parameters
    ----------
    run
        The run that made the network.
    folder
        Holds ``model.pt2``, ``model.onnx`` and ``card.json``.
    name
        Registered name; made when it is new.
    tags
        Further tags of the version.

    Raises
    ------
    FileNotFoundError
        If the folder lacks a file.
    ValueError
        If the name or the card is not valid, the program's batch is not dynamic, or loading it
        could run code.
    """
    check_name(name)
    card = ModelCard.from_folder(folder)
    given = model_digests(folder)
    facts, written = _facts(card), dict[str, str]()
    logged = Model.log(
        artifact_path=None,
        flavor=model_layout,
        name=f"{card.role}-{card.network}",
        model_type=card.role,
        run_id=run.run_id,
        tags=facts,
        metadata={"role": card.role, "task": card.task, "network": card.network},
        folder=folder,
        digests=written,
        validate_serving_input=False,
    )
    digests = {Path(place).name: digest for place, digest in written.items()}
    if not given.items() <= digests.items():
        msg = f"{folder} was changed while it was registered: give the command again"
        raise ValueError(msg)
    client = mlflow.MlflowClient()
    _ensure_registered(client, name, card)
    row = client.create_model_version(
        name,
        source=logged.model_uri,
        model_id=logged.model_id,  # a server refuses the source without it
        run_id=run.run_id,
        tags={
            **facts,
            **{DIGEST_TAG + file: digest for file, digest in digests.items()},
            WHOLE_TAG: files_digest(given),
            **(tags or {}),
        },
        description=_description(card),
    )
    version = str(row.version)
    # The link that MLflow's own `register_model` leaves for the page of the logged model.
    link = json.dumps([{"name": name, "version": version}])
    client.set_logged_model_tags(logged.model_id, {"mlflow.modelVersions": link})
    return find_version(f"{name}/{version}")


def find_registered(folder: Path, name: str) -> RegisteredVersion | None:
    """Newest version of a registered model that was made of just these files; None: there is none.

    Parameters
    ----------
    folder
        Model folder.
    name
        Registered name; it need not exist.
    """
    digests = {DIGEST_TAG + file: digest for file, digest in model_digests(folder).items()}
    if not mlflow.MlflowClient().search_registered_models(f"name = '{check_name(name)}'"):
        return None
    same = [version for version in list_versions(name) if digests.items() <= version.tags.items()]
    return same[-1] if same else None


def resolve_model(
    argument: str, *, cache: Path | None = None
) -> tuple[Path, RegisteredVersion | None]:
    """Model folder that an argument means, and the version it came from.

    A folder that holds a card is taken as it is (no version), a bundle after its files are
    verified; anything else is looked up in the registry, downloaded once, and checked against the
    digests of its registration every time.

    Parameters
    ----------
    argument
        Path of a model folder, or whatever :func:`find_version` takes.
    cache
        Where downloads are kept; by default ``$CECTFLOW_CACHE``, else ``~/.cache/cectflow/models``.

    Raises
    ------
    ValueError
        If there is no such model, if it holds a pickle in place of ``model.pt2``, if it was not
        registered by cectflow, if it holds a file that was not registered, or one that is not what
        was registered.
    FileNotFoundError
        If the registry knows the version but its files are gone.
    """
    path = Path(argument).expanduser()
    if (path / CARD_FILE).is_file():
        open_model_folder(path)
        return path, None
    if path.is_dir():
        msg = f"{path} is no model folder, it holds no {CARD_FILE}: expected one, or {FORMS}"
        raise ValueError(msg)
    version = find_version(argument)
    digests = recorded_digests(version)
    kept = {file: digests[file] for file in digests if file not in LAYOUT_FILES}
    root = cache or Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/cectflow/models").expanduser()
    key = hashlib.sha256("".join(sorted(kept.values())).encode()).hexdigest()[:16]
    folder = root / version.name / f"{version.version}-{key}"
    if not folder.exists():
        _download(version, digests, folder)
    else:
        _verify(folder, kept, version, f"remove {folder} to download it again")
    return folder, version


def read_card(version: RegisteredVersion) -> ModelCard:
    """Card of a version, verified, without fetching its network.

    Raises
    ------
    ValueError
        If the card is not the one that was registered, or of a newer schema.
    FileNotFoundError
        If it is gone.
    """
    digest = recorded_digests(version)[CARD_FILE]
    with tempfile.TemporaryDirectory(prefix="cectflow-card-") as scratch:
        _fetch(_repository(version), CARD_FILE, Path(scratch), version)
        remedy = "its stored file was changed; register the network again"
        _verify(Path(scratch), {CARD_FILE: digest}, version, remedy)
        return ModelCard.from_folder(Path(scratch))


def recorded_digests(version: RegisteredVersion) -> dict[str, str]:
    """Name → sha256 of every file of a version, as its tags say.

    Raises
    ------
    ValueError
        If it is not one that cectflow registered, or holds a pickle.
    FileNotFoundError
        If it is neither, and its files are gone.
    """
    digests = {file: version.tags.get(DIGEST_TAG + file, "") for file in PLACES}
    missing = [DIGEST_TAG + file for file in FILE_PLACES if not digests[file]]
    is_ours = version.model_uri.startswith("models:/")
    if missing or not is_ours:
        found = f"is {version.model_uri}"
        if is_ours:
            _list_stored(_repository(version), version)  # if it is a pickle, that is what to say
            found = f"lacks the tags {', '.join(missing)}"
        msg = (
            f"{version.label} {found}, so its files cannot be verified: expected a version that "
            f"cectflow registered"
        )
        raise ValueError(msg)
    return {file: digest for file, digest in digests.items() if digest}


def model_digests(folder: Path) -> dict[str, str]:
    """Name → sha256 of the files of a model folder.

    Raises
    ------
    FileNotFoundError
        If one is missing.
    """
    siblings = [file for file in SIBLING_PLACES if (folder / file).is_file()]
    return {file: _digest(folder / file) for file in (*FILE_PLACES, *siblings)}


def _repository(version: RegisteredVersion) -> ArtifactRepository:
    try:
        return get_artifact_repository(version.model_uri)
    except (MlflowException, OSError) as error:
        raise FileNotFoundError(_gone(version, "MLmodel", error)) from None


def _list_stored(repository: ArtifactRepository, version: RegisteredVersion) -> set[str]:
    """Places of all files of a version, if its network is no pickle."""
    try:
        entries = [
            entry for place in ("", "data", "extra_files") for entry in _entries(repository, place)
        ]
    except (MlflowException, OSError) as error:
        raise FileNotFoundError(_gone(version, "MLmodel", error)) from None
    found = {place for place, is_folder in entries if not is_folder}
    found |= {f"{place}/" for place, is_folder in entries if is_folder}
    # MLflow itself leaves name and version beside a model that it loads where it is stored.
    found -= {"data/", "extra_files/", REGISTERED_MODEL_META_FILE_NAME}
    payload = sorted(place.removeprefix("data/") for place in found if place.startswith("data/"))
    if found and payload != [Path(FILE_PLACES[PT2_FILE]).name]:
        msg = (
            f"{version.label} holds {', '.join(payload) or 'nothing'} in data/, expected "
            f"{PT2_FILE} alone: cectflow reads no pickles; register the network again with "
            f"cectflow, or log it with serialization_format='pt2'"
        )
        raise ValueError(msg)
    return found


def _entries(repository: ArtifactRepository, place: str) -> list[tuple[str, bool]]:
    return [(entry.path, bool(entry.is_dir)) for entry in repository.list_artifacts(place or None)]


def _download(version: RegisteredVersion, digests: Mapping[str, str], folder: Path) -> None:
    """Fetch and verify every file, also those that MLflow alone reads; keep the model folder."""
    repository = _repository(version)
    stored, expected = _list_stored(repository, version), {PLACES[file] for file in digests}
    if stored - expected:
        msg = (
            f"{version.label} holds {', '.join(sorted(stored - expected))}, which was not "
            f"registered: remove it from {version.model_uri}, or register the network again"
        )
        raise ValueError(msg)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as scratch:
        flat = Path(scratch) / "model"
        flat.mkdir()
        for file in digests:
            _fetch(repository, file, flat, version)
        _verify(flat, digests, version, "its stored file was changed; register the network again")
        for file in LAYOUT_FILES:
            (flat / file).unlink(missing_ok=True)
        kept = {file: digests[file] for file in digests if file not in LAYOUT_FILES}
        try:
            flat.replace(folder)
        except OSError:  # another process was faster
            _verify(folder, kept, version, f"remove {folder} to download it again")


def _fetch(
    repository: ArtifactRepository, file: str, folder: Path, version: RegisteredVersion
) -> None:
    """Download one file of a version, whatever its folder there, into a folder."""
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch:
        try:
            fetched: str = repository.download_artifacts(PLACES[file], dst_path=scratch)  # type: ignore[no-untyped-call]
        except (MlflowException, OSError) as error:
            raise FileNotFoundError(_gone(version, PLACES[file], error)) from None
        shutil.move(fetched, folder / file)


def _verify(
    folder: Path, digests: Mapping[str, str], version: RegisteredVersion, remedy: str
) -> None:
    for file, expected in digests.items():
        got = _digest(folder / file)
        if got != expected:
            msg = (
                f"{file} of {version.label} is not what was registered: expected sha256 "
                f"{expected}, got {got} in {folder}: {remedy}"
            )
            raise ValueError(msg)


def _gone(version: RegisteredVersion, place: str, error: Exception) -> str:
    return (
        f"cannot fetch {place} of {version.label} from {version.model_uri} ({error}): were the "
        f"artifacts removed, or the folder of a sqlite store moved?"
    )


def _ensure_registered(client: mlflow.MlflowClient, name: str, card: ModelCard) -> None:
    try:
        client.create_registered_model(
            name, description=f"cectflow networks, role {card.role}, task {card.task}"
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _facts(card: ModelCard) -> dict[str, str]:
    facts = {
        "role": card.role,
        "task": card.task,
        "network": card.network,
        "classes": str(len(card.classes)),
        "box": str(card.box),
        "voxel_size": f"{card.voxel_size:g}",
        "dataset_digest": card.dataset_digest,
        "recipe_digest": card.recipe_digest,
        "commit": card.commit,
    }
    if card.parity is not None:
        facts["parity"] = f"{card.parity:.3g}"
    if card.teacher is not None:
        facts["teacher"] = card.teacher
    for name, score in card.scores.items():
        facts[f"score.{name}"] = f"{score.value:.6g}"
        facts[f"score.{name}.interval"] = f"{score.low:.6g} to {score.high:.6g}"
    return facts


def _description(card: ModelCard) -> str:
    scores = [
        f"| {name} | {score.value:.4f} ({score.low:.4f} to {score.high:.4f}) |"
        for name, score in card.scores.items()
    ]
    classes = ", ".join(card.classes)
    rows = [
        f"**{card.network}**, {card.role} for the task *{card.task}*",
        "",
        "| | |",
        "|---|---|",
        f"| input | {card.box}³ voxels of {card.voxel_size:g} Å, {card.contrast} protein |",
        f"| {len(card.classes)} classes | {classes if len(classes) < 1000 else 'see card.json'} |",
        *scores,
    ]
    rows += [
        f"| {variant} | {figures.difference.value:+.4f}, {figures.speedup:.2f} × as fast |"
        for variant, figures in card.variants.items()
    ]
    if card.cost is not None:
        rows += [
            f"| parameters | {card.cost.parameters:,} |",
            f"| GMAC | {card.cost.macs / 1e9:.3g} |",
            f"| subtomograms/s | {card.cost.subtomograms_per_s:.3g} on {card.cost.device} |",
        ]
    if card.teacher is not None:
        rows.append(f"| teacher | {card.teacher} |")
    return "\n".join(rows)


def _digest(path: Path) -> str:
    if not path.is_file():
        files = ", ".join(FILE_PLACES)
        msg = f"{path.parent} lacks {path.name}: expected a model folder with {files}"
        raise FileNotFoundError(msg)
    return sha256_of(path)

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

from cectflow.files import sha256_of
from cectflow.model_card import CARD_FILE, ModelCard
from cectflow.runtime import PT2_FILE
from cectflow.tracking import model_layout
from cectflow.tracking.model_layout import FILE_PLACES, SIBLING_PLACES
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
    "newest_version",
    "register_model",
    "registered_name",
    "resolve_model",
]

CACHE_VARIABLE = "CECTFLOW_CACHE"
DIGEST_TAG = "sha256."


def register_model(
    run: Run, folder: Path, *, name: str, tags: Mapping[str, str] | None = None
) -> RegisteredVersion:
    """Next version of a registered model, made of a model folder's files as they are.

    The files become one MLflow model without pickle, which ``mlflow.pyfunc.load_model`` reads
    where cectflow is not installed. Their sha256 and the facts of the card become tags.

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
        If the name is not valid, or the program's batch is not dynamic.
    """
    check_name(name)
    card = ModelCard.from_folder(folder)
    digests = _digests(folder)
    facts = _facts(card)
    logged = Model.log(
        artifact_path=None,
        flavor=model_layout,
        name=f"{card.role}-{card.network}",
        model_type=card.role,
        run_id=run.run_id,
        tags=facts,
        metadata={"role": card.role, "task": card.task, "network": card.network},
        folder=folder,
    )
    client = mlflow.MlflowClient()
    _ensure_registered(client, name, card)
    row = client.create_model_version(
        name,
        source=logged.model_uri,
        model_id=logged.model_id,  # a server refuses the source without it
        run_id=run.run_id,
        tags={**facts, **digests, **(tags or {})},
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
    digests = _digests(folder)
    if not mlflow.MlflowClient().search_registered_models(f"name = '{check_name(name)}'"):
        return None
    same = [version for version in list_versions(name) if digests.items() <= version.tags.items()]
    return same[-1] if same else None


def resolve_model(
    argument: str, *, cache: Path | None = None
) -> tuple[Path, RegisteredVersion | None]:
    """Model folder that an argument means, and the version it came from.

    A folder that holds a card is taken as it is (no version); anything else is looked up in the
    registry, downloaded once, and checked against the digests of its registration every time.

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
        registered by cectflow, or if a file is not the one that was registered.
    FileNotFoundError
        If the registry knows the version but its files are gone.
    """
    path = Path(argument).expanduser()
    if (path / CARD_FILE).is_file():
        return path, None
    if path.is_dir():
        msg = f"{path} is no model folder, it holds no {CARD_FILE}: expected one, or {FORMS}"
        raise ValueError(msg)
    version = find_version(argument)
    digests = _registered_digests(version)
    root = cache or Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/cectflow/models").expanduser()
    key = hashlib.sha256("".join(sorted(digests.values())).encode()).hexdigest()[:16]
    folder = root / version.name / f"{version.version}-{key}"
    if not folder.exists():
        _download(version, digests, folder)
    else:
        _verify(folder, digests, version, f"remove {folder} to download it again")
    return folder, version


def _registered_digests(version: RegisteredVersion) -> dict[str, str]:
    try:
        flavors = Model.load(version.uri).flavors
        listed = mlflow.artifacts.list_artifacts(artifact_uri=f"{version.uri}/data")
    except (MlflowException, OSError) as error:
        raise FileNotFoundError(_gone(version, "MLmodel", error)) from None
    payload = sorted(Path(entry.path).name for entry in listed)
    if "pytorch" not in flavors or payload != [PT2_FILE]:
        found = ", ".join(payload) or "nothing"
        msg = (
            f"{version.label} holds {found} in data/, expected {PT2_FILE} alone: cectflow reads "
            f"no pickles; register the network again with cectflow, or log it with "
            f"serialization_format='pt2'"
        )
        raise ValueError(msg)
    digests = {file: version.tags.get(DIGEST_TAG + file, "") for file in FILE_PLACES}
    missing = [DIGEST_TAG + file for file, digest in digests.items() if not digest]
    if missing:
        msg = (
            f"{version.label} lacks the tags {', '.join(missing)}, so its files cannot be "
            f"verified: expected a version that cectflow registered"
        )
        raise ValueError(msg)
    siblings = {file: version.tags.get(DIGEST_TAG + file, "") for file in SIBLING_PLACES}
    return digests | {file: digest for file, digest in siblings.items() if digest}


def _download(version: RegisteredVersion, digests: Mapping[str, str], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as scratch:
        flat = Path(scratch) / "model"
        flat.mkdir()
        places = FILE_PLACES | SIBLING_PLACES
        for file, place in ((file, places[file]) for file in digests):
            try:
                fetched = mlflow.artifacts.download_artifacts(
                    artifact_uri=f"{version.uri}/{place}", dst_path=scratch
                )
            except (MlflowException, OSError) as error:
                raise FileNotFoundError(_gone(version, place, error)) from None
            shutil.move(fetched, flat / file)
        _verify(flat, digests, version, "its stored file was changed; register the network again")
        try:
            flat.replace(folder)
        except OSError:  # another process was faster
            _verify(folder, digests, version, f"remove {folder} to download it again")


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


def _digests(folder: Path) -> dict[str, str]:
    """Tags of a version that name its files."""
    siblings = [file for file in SIBLING_PLACES if (folder / file).is_file()]
    return {DIGEST_TAG + file: _digest(folder / file) for file in (*FILE_PLACES, *siblings)}


def _digest(path: Path) -> str:
    if not path.is_file():
        files = ", ".join(FILE_PLACES)
        msg = f"{path.parent} lacks {path.name}: expected a model folder with {files}"
        raise FileNotFoundError(msg)
    return sha256_of(path)

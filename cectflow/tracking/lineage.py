"""Lineage: a version back to structures, recipe, dataset, commit, teachers and runs.

What cannot be found is named under ``missing``, never left out in silence.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException

from cectflow.manifest import MANIFEST_FILE, Manifest, read_manifest
from cectflow.model_card import ModelCard
from cectflow.recipe import Recipe
from cectflow.simulation.phantoms import build_phantom, list_phantoms
from cectflow.tracking.promotion import history
from cectflow.tracking.registry import read_card
from cectflow.tracking.store import current_store
from cectflow.tracking.versions import RegisteredVersion, find_version, list_versions

__all__ = ["DATASET_TAG", "ORIGIN_LINEAGE", "logged_text", "teacher_uri", "trace"]

ORIGIN_LINEAGE = "origin/lineage.json"
"""Artifact of the run that pushed a bundle: the lineage that the bundle brought along."""
DATASET_TAG = "dataset.path"
"""Of a version: where the dataset lies on which it was judged."""
VERDICT = re.compile(r"verdict\.(\w+)")
PDB_ID = re.compile(r"(?:pdb_0000)?([0-9][0-9a-z]{3})", re.IGNORECASE)


def trace(version: RegisteredVersion) -> dict[str, Any]:
    """Where a version comes from, as JSON can hold it.

    Keys are ``version``, ``name``, ``number``, ``stages``, ``created``, ``digest`` (of its files),
    ``role``, ``task``, ``network``, ``code``, ``run``, ``recipe``, ``dataset``, ``masking``,
    ``teachers`` (each a lineage again), ``verdicts``, ``history`` (of this version), ``origin``
    (of a pushed bundle, with the lineage that it brought) and ``missing``.

    Raises
    ------
    ValueError, FileNotFoundError
        If the version itself cannot be read.
    """
    return _trace(version, ())


def teacher_uri(version: RegisteredVersion) -> str | None:
    """URI of a student's teacher in the store in use, of an ensemble all, joined by commas.

    The card of a pushed version names its teacher as another store calls it, where this store may
    have a different network: here the very files are found by their digest.

    Returns
    -------
    str or None
        None of a version that has no teacher.

    Raises
    ------
    ValueError
        If the teacher of a pushed version is not in this store.
    """
    origin = _origin(version, [])
    if origin is None:
        return read_card(version).teacher
    lineage = origin["lineage"] or {}
    while "origin" in lineage:  # pushed, pulled and pushed again
        lineage = lineage["origin"]["lineage"] or {}
    found = [_local_uri(teacher, origin) for teacher in lineage.get("teachers", ())]
    return ",".join(found) or None


def _local_uri(teacher: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    digest = str(teacher["digest"])
    same = [each for each in list_versions() if digest and each.tags.get("digest") == digest]
    if not same:
        msg = (
            f"teacher {teacher['version']} of {origin['store']} is not in {current_store()}: pull "
            f"it there with `cectflow models pull`, and push it here"
        )
        raise ValueError(msg)
    return same[-1].uri


def logged_text(run_id: str, path: str) -> str | None:
    """Text that a run logged as an artifact; None: it is not there."""
    try:
        text: str = mlflow.artifacts.load_text(f"runs:/{run_id}/{path}")
    except (MlflowException, OSError, UnicodeDecodeError):
        return None
    return text


def _trace(version: RegisteredVersion, students: tuple[str, ...]) -> dict[str, Any]:
    card = read_card(version)
    missing: list[str] = []
    facts: dict[str, Any] = {
        "version": version.uri,
        "name": version.name,
        "number": version.version,
        "stages": list(version.stages),
        "created": version.created,
        "digest": version.tags.get("digest", ""),
        "role": card.role,
        "task": card.task,
        "network": card.network,
    }
    origin = _origin(version, missing)
    if origin is not None:
        # What the card names (teachers, runs) is of the store that the bundle was pulled from.
        facts |= {"run": _run_facts(_find_run(version, missing)), "origin": origin}
        return facts | _standing(version) | {"missing": missing}
    run = _find_run(version, missing)
    if card.commit == "unknown":
        missing.append("git commit: cectflow ran outside of a checkout when this was trained")
    facts |= {
        "code": {
            "commit": card.commit,
            "cectflow": None if run is None else run.data.tags.get("cectflow.version"),
        },
        "run": _run_facts(run),
        "recipe": _recipe_facts(version, card, missing),
        "dataset": _dataset_facts(version, card, missing),
        "masking": None if card.masking is None else card.masking.model_dump(mode="json"),
        "teachers": _teachers(card, (*students, version.uri), missing),
    }
    return facts | _standing(version) | {"missing": missing}


def _standing(version: RegisteredVersion) -> dict[str, Any]:
    verdicts = {m[1]: value for key, value in version.tags.items() if (m := VERDICT.fullmatch(key))}
    changes = [each for each in history(version.name) if each["version"] == version.version]
    return {"verdicts": verdicts, "history": changes}


def _origin(version: RegisteredVersion, missing: list[str]) -> dict[str, Any] | None:
    prefix = "origin."
    tags = {k.removeprefix(prefix): v for k, v in version.tags.items() if k.startswith(prefix)}
    if not tags:
        return None
    text = logged_text(version.run_id, ORIGIN_LINEAGE) if version.run_id else None
    if text is None:
        missing.append(f"{ORIGIN_LINEAGE} of the run that pushed the bundle")
    return {**tags, "lineage": None if text is None else json.loads(text)}


def _find_run(version: RegisteredVersion, missing: list[str]) -> MlflowRun | None:
    if not version.run_id:
        missing.append("run: the registry names none")
        return None
    try:
        run = mlflow.MlflowClient().get_run(version.run_id)
    except MlflowException:
        run = None
    if run is None or run.info.lifecycle_stage == "deleted":
        missing.append(f"run {version.run_id}: deleted")
    return run


def _run_facts(run: MlflowRun | None) -> dict[str, Any] | None:
    if run is None:
        return None
    tags, parents = run.data.tags, "mlflow.parentRunId"
    return {
        "id": run.info.run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "started": _time(run.info.start_time),
        "ended": _time(run.info.end_time),
        "user": tags.get("mlflow.user"),
        "entry_point": tags.get("mlflow.project.entryPoint"),
        "parent": tags.get(parents),
    }


def _time(milliseconds: int | None) -> str | None:
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, tz=UTC).isoformat(timespec="seconds")


def _recipe_facts(
    version: RegisteredVersion, card: ModelCard, missing: list[str]
) -> dict[str, Any]:
    text = logged_text(version.run_id, "recipe.yaml") if version.run_id else None
    if text is None:
        missing.append(f"recipe {card.recipe_digest[:12]}…: its text is in no run")
        return {"digest": card.recipe_digest, "logged": None, "verified": False}
    verified = _digest_of_recipe(text) == card.recipe_digest
    if not verified:
        missing.append(
            f"recipe {card.recipe_digest[:12]}…: the text that the run logged has another digest"
        )
    logged = f"runs:/{version.run_id}/recipe.yaml"
    return {"digest": card.recipe_digest, "logged": logged, "verified": verified}


def _digest_of_recipe(text: str) -> str | None:
    with tempfile.TemporaryDirectory(prefix="cectflow-recipe-") as scratch:
        path = Path(scratch) / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            return Recipe.from_yaml(path).digest()
        except ValueError:  # of another version of cectflow
            return None


def _dataset_facts(
    version: RegisteredVersion, card: ModelCard, missing: list[str]
) -> dict[str, Any]:
    path = version.tags.get(DATASET_TAG)
    facts: dict[str, Any] = {
        "digest": card.dataset_digest,
        "path": path,
        "live_digest": card.live_digest,
        "unlabelled_digest": card.unlabelled_digest,
    }
    known, described_by = _describe_dataset(version, card, path)
    if known is None:
        missing.append(
            f"dataset {card.dataset_digest[:12]}…: neither logged with the run nor found at {path}"
        )
        return facts | {"described_by": None, "structures": []}
    structures = _structures(known)
    missing += [f"source of structure {s['name']}" for s in structures if s["source"] is None]
    if not structures:
        missing.append(f"sources of dataset {card.dataset_digest[:12]}…: its manifest names none")
    kept = {key: known.get(key) for key in ("kind", "recipe_digest", "commit", "masked_from")}
    return facts | kept | {"described_by": described_by, "structures": structures}


def _describe_dataset(
    version: RegisteredVersion, card: ModelCard, path: str | None
) -> tuple[Mapping[str, Any] | None, str]:
    """What is known of the very dataset of a card, and where it was read."""
    text = logged_text(version.run_id, "dataset.json") if version.run_id else None
    if text is not None:
        known: dict[str, Any] = json.loads(text)
        if known.get("content_digest") == card.dataset_digest:
            return known, f"runs:/{version.run_id}/dataset.json"
    if path is not None and (Path(path) / MANIFEST_FILE).is_file():
        manifest = _manifest(Path(path))
        if manifest is not None and manifest.content_digest() == card.dataset_digest:
            return manifest.facts(), str(Path(path) / MANIFEST_FILE)
    return None, ""


def _manifest(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except ValueError:  # of another version of cectflow
        return None


def _structures(dataset: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, digest, source, licence and citation of what the data were made of, where known."""
    recipe = dataset.get("recipe") or {}
    urls = _downloads(recipe.get("structures") or ())
    return [
        {"name": name, "sha256": digest, **_provenance(name, digest, urls)}
        for name, digest in (dataset.get("sources") or {}).items()
    ]


def _downloads(folders: object) -> dict[str, str]:
    """Digest → address of the files that `structures fetch` put into these folders."""
    found: dict[str, str] = {}
    for folder in folders if isinstance(folders, list | tuple) else ():
        path = Path(str(folder)) / "digests.json"
        if path.is_file():
            try:
                records = json.loads(path.read_text(encoding="utf-8"))
                found |= {r["sha256"]: r["url"] for r in records.values() if r.get("url")}
            except (ValueError, KeyError, AttributeError):
                continue
    return found


def _provenance(name: str, digest: str, urls: Mapping[str, str]) -> dict[str, str | None]:
    if name in list_phantoms() and build_phantom(name).digest == digest:
        return {
            "source": "cectflow's built-in phantoms",
            "licence": "Apache-2.0",
            "citation": "an invented shape, no structure",
        }
    url = urls.get(digest)
    entry = PDB_ID.fullmatch(Path(url).name.partition(".")[0] if url else name.partition("#")[0])
    if entry is None:
        return {"source": url, "licence": None, "citation": None}
    code = entry[1].lower()
    return {
        "source": url or f"PDB entry {code.upper()}, by its name",
        "licence": "CC0-1.0 (all entries of the PDB)",
        "citation": f"https://doi.org/10.2210/pdb{code}/pdb",
    }


def _teachers(
    card: ModelCard, students: tuple[str, ...], missing: list[str]
) -> list[dict[str, Any]]:
    traced = []
    for uri in (card.teacher or "").split(","):
        if not uri:
            continue
        try:
            teacher = find_version(uri)
            if teacher.uri in students:
                missing.append(f"teacher {uri}: is its own student's teacher")
                continue
            traced.append(_trace(teacher, students))
        except (ValueError, FileNotFoundError) as error:
            missing.append(f"teacher {uri}: {error}")
    return traced

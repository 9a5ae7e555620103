"""Bundles: a registered version as a folder of its own, which needs no server; without MLflow.

A bundle is a model folder with ``bundle.json``, the :class:`BundleManifest`, which names every
other file with its digest. It is verified whenever it is opened, which finds out what was changed
on the way by mistake; there is no signature, so who made it is told by nothing but its origin.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cectflow.config import Config
from cectflow.files import sha256_of
from cectflow.model_card import CARD_FILE, refuse_newer_schema
from cectflow.runtime import INT8_FILE, ONNX_FILE, PT2_FILE

__all__ = [
    "BUNDLE_FILE",
    "BundleManifest",
    "files_digest",
    "open_bundle",
    "open_model_folder",
    "seal_bundle",
    "unpacked",
]

BUNDLE_FILE = "bundle.json"
LINEAGE_FILE = "lineage.json"
RECIPE_FILE = "recipe.yaml"
MODEL_FILES = (PT2_FILE, ONNX_FILE, CARD_FILE, INT8_FILE)
KNOWN_FILES = (*MODEL_FILES, LINEAGE_FILE, RECIPE_FILE)
"""All that a bundle may hold, in no folder but its own."""
REQUIRED_FILES = (PT2_FILE, ONNX_FILE, CARD_FILE, LINEAGE_FILE)
BUNDLE_SCHEMA = 1
MAX_BYTES = 4 << 30
"""Of a bundle: dozens of times the largest network of the catalogue."""
MAX_MANIFEST_BYTES = 1 << 20


class BundleManifest(Config):
    """What a bundle holds, and which version it was when it was pulled."""

    schema_version: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$")
    """Registered name."""
    version: str = Field(pattern=r"^\d{1,9}$")
    store: str
    """URI of the store that it was pulled from, without user name and password."""
    stages: tuple[str, ...] = ()
    """Those it held when it was pulled."""
    pulled: str
    """ISO 8601, UTC."""
    cectflow: str
    """Version of cectflow that wrote the bundle."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Of the registered version: facts, scores, verdicts."""
    model_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the model's files: :func:`files_digest`."""
    files: dict[str, str]
    """Name → sha256 of every file but this one."""

    @property
    def label(self) -> str:
        """What outputs call the model: ``cectflow-student/3@sha256:0123456789ab``."""
        return f"{self.name}/{self.version}@sha256:{self.model_digest[:12]}"


def files_digest(digests: Mapping[str, str]) -> str:
    """Hexadecimal sha256 that names a model folder by its files, in whatever store it lies.

    Parameters
    ----------
    digests
        Name → sha256; other files than those of a model folder do not count.
    """
    lines = [f"{name} {digests[name]}" for name in sorted(MODEL_FILES) if name in digests]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def seal_bundle(folder: Path, facts: Mapping[str, Any]) -> BundleManifest:
    """Write the manifest of a folder whose files are complete.

    Parameters
    ----------
    folder
        Holds the model's files and the lineage.
    facts
        Fields of the manifest, but for the digests.
    """
    files = {name: sha256_of(folder / name) for name in KNOWN_FILES if (folder / name).is_file()}
    manifest = BundleManifest(**facts, model_digest=files_digest(files), files=files)
    (folder / BUNDLE_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def open_model_folder(folder: Path) -> str:
    """What outputs call the model of a folder; a bundle is verified, another taken as it is.

    Raises
    ------
    ValueError
        If it is a bundle that does not verify.
    """
    if not os.path.lexists(folder / BUNDLE_FILE):
        return folder.resolve().name
    return open_bundle(folder).label


def open_bundle(folder: Path) -> BundleManifest:
    """Manifest of a bundle whose every file is what the manifest says.

    Raises
    ------
    FileNotFoundError
        If the folder has no manifest, or lacks a file.
    ValueError
        If the manifest is not valid or of a newer schema, if it names a file outside of the
        folder or of another kind, if the folder holds a file that it does not name, a link or
        whatever is no plain file, if it is too large, or if a digest differs.
    """
    path = folder / BUNDLE_FILE
    if not folder.is_dir() or not os.path.lexists(path):
        msg = (
            f"{folder} is no bundle, it has no {BUNDLE_FILE}: make one with `cectflow models pull`"
        )
        raise FileNotFoundError(msg)
    with os.scandir(folder) as entries:
        sizes = {entry.name: _plain_size(entry) for entry in entries}
    if sizes[BUNDLE_FILE] > MAX_MANIFEST_BYTES or sum(sizes.values()) > MAX_BYTES:
        msg = (
            f"{folder} has {sum(sizes.values())} bytes, {sizes[BUNDLE_FILE]} of them in "
            f"{BUNDLE_FILE}: a bundle has at most {MAX_BYTES} and {MAX_MANIFEST_BYTES}"
        )
        raise ValueError(msg)
    text = path.read_text(encoding="utf-8")
    refuse_newer_schema(text, path, BUNDLE_SCHEMA, "bundle")
    manifest = BundleManifest.from_json(text, source=str(path))
    _check_names(manifest, set(sizes) - {BUNDLE_FILE}, folder)
    for name, expected in manifest.files.items():
        got = sha256_of(folder / name)
        if got != expected:
            msg = (
                f"{folder / name} is not what was pulled: expected sha256 {expected}, got {got}; "
                f"pull the bundle again"
            )
            raise ValueError(msg)
    if manifest.model_digest != files_digest(manifest.files):
        msg = f"{path} gives a digest that is not that of its files: pull the bundle again"
        raise ValueError(msg)
    return manifest


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Folder of a bundle: the folder itself, or a temporary one with what a .zip of it holds.

    Raises
    ------
    FileNotFoundError
        If there is neither.
    ValueError
        If the archive holds more than a bundle may: another path, a link, too many bytes.
    """
    if path.is_dir():
        yield path
        return
    if not path.is_file():
        msg = f"{path} does not exist: expected the folder of a bundle, or a .zip of it"
        raise FileNotFoundError(msg)
    with tempfile.TemporaryDirectory(prefix="cectflow-bundle-") as scratch:
        folder = Path(scratch) / "bundle"
        folder.mkdir()
        try:
            with zipfile.ZipFile(path) as archive:
                _extract(archive, path, folder)
        except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError) as bad:
            msg = f"{path} is no .zip of a bundle ({bad}): pack its folder with `zip -r`"
            raise ValueError(msg) from None
        yield folder


def _extract(archive: zipfile.ZipFile, path: Path, folder: Path) -> None:
    """Plain files of known names only, from the archive's root or its one folder."""
    budget = MAX_BYTES
    seen: set[str] = set()
    entries = [info for info in archive.infolist() if not info.is_dir()]
    for info in entries:
        parent, _, name = info.filename.rpartition("/")
        kind = stat.S_IFMT(info.external_attr >> 16)
        folders = {other.filename.rpartition("/")[0] for other in entries}
        if (
            name not in (*KNOWN_FILES, BUNDLE_FILE)
            or name in seen
            or len(folders) != 1
            or not re.fullmatch(r"(?!\.\.?$)[^/\\:]*", parent)
            or kind not in {0, stat.S_IFREG}
        ):
            msg = (
                f"{path} holds {info.filename!r}, which is no file of a bundle, lies outside of "
                f"it, is there twice, or is a link: expected plain files of "
                f"{', '.join((BUNDLE_FILE, *KNOWN_FILES))} in one folder"
            )
            raise ValueError(msg)
        seen.add(name)
        with archive.open(info) as source, (folder / name).open("wb") as target:
            # What is counted is what comes out: the sizes in an archive are only claims.
            while chunk := source.read(1 << 20):
                budget -= len(chunk)
                if budget < 0:
                    msg = f"{path} unpacks to more than {MAX_BYTES} bytes: no bundle is so large"
                    raise ValueError(msg)
                target.write(chunk)


def _plain_size(entry: os.DirEntry[str]) -> int:
    status = entry.stat(follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        msg = (
            f"{entry.path} is a link, a folder or a special file: a bundle holds plain files only; "
            f"copy it with `cp -rL`, or pull it again"
        )
        raise ValueError(msg)
    return status.st_size


def _check_names(manifest: BundleManifest, found: set[str], folder: Path) -> None:
    foreign = [name for name in manifest.files if name not in KNOWN_FILES]
    if foreign:
        msg = (
            f"{folder / BUNDLE_FILE} names {', '.join(map(repr, sorted(foreign)))}, which lies "
            f"outside of the bundle or is none of its files: expected {', '.join(KNOWN_FILES)}"
        )
        raise ValueError(msg)
    unnamed = found - set(manifest.files)
    if unnamed:
        msg = (
            f"{folder} holds {', '.join(sorted(unnamed))}, which its {BUNDLE_FILE} does not name: "
            f"remove it, or pull the bundle again"
        )
        raise ValueError(msg)
    missing = (set(manifest.files) | set(REQUIRED_FILES)) - found
    if missing:
        msg = f"{folder} lacks {', '.join(sorted(missing))}: pull the bundle again"
        raise FileNotFoundError(msg)

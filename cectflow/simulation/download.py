"""Download: structures of the PDB by their ids, checked, with a record of where they came from.

Offers :func:`fetch_structures`; its folder is one that ``find_structures`` takes.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import json
import re
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cectflow.files import replacing

__all__ = ["fetch_structures"]

DIGESTS_FILE = "digests.json"
TIMEOUT = 60.0  # seconds without an answer

# The ids of old (1oel) and the extended ones (pdb_00001oel).
_PDB_ID = re.compile(r"[0-9][0-9a-z]{3}|pdb_[0-9a-z]{8}")

_SCHEMES = ("http", "https")

_Record = dict[str, str | None]


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects to http and https only; urllib's own also go to ftp."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: Any,
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if urllib.parse.urlsplit(newurl).scheme not in _SCHEMES:
            return None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch_structures(
    pdb_ids: Sequence[str],
    folder: Path,
    *,
    base_url: str = "https://files.rcsb.org/download",
    overwrite: bool = False,
) -> tuple[Path, ...]:
    """Paths of mmCIF files, one per PDB id, downloaded where they are not there yet.

    A file is there if it has the digest in the folder's ``digests.json``; one that was put there by
    hand is checked and recorded. Those finished before a failure are kept.

    Parameters
    ----------
    pdb_ids
        Such as ``1oel`` or ``pdb_00001oel``, in either case.
    folder
        Made if it does not exist. Files are called ``1oel.cif.gz``; ``digests.json`` records the
        sha256, the URL (null: put there by hand) and the date of each.
    base_url
        What the file's name is appended to; http or https.
    overwrite
        Download again whatever is there.

    Raises
    ------
    ValueError
        If an id is not one of the PDB (before anything is downloaded) or unknown to the server, if
        what it sends is not gzipped mmCIF, or if a file is there that differs from its record.
    ConnectionError
        If the server cannot be reached, refuses, or breaks off.
    """
    if urllib.parse.urlsplit(base_url).scheme not in _SCHEMES:
        msg = f"cannot download from {base_url!r}: expected an address with http:// or https://"
        raise ValueError(msg)
    names = [_file_name(pdb_id) for pdb_id in pdb_ids]
    folder.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(names):
        if overwrite or not _is_there(folder, name):
            _fetch(f"{base_url.rstrip('/')}/{_remote_name(name)}", folder, name)
    return tuple(folder / name for name in names)


def _file_name(pdb_id: str) -> str:
    if not _PDB_ID.fullmatch(pdb_id.lower()):
        msg = (
            f"{pdb_id!r} is no PDB id: expected four letters or digits that begin with a digit, "
            "such as 1oel, or the extended form pdb_00001oel"
        )
        raise ValueError(msg)
    return f"{pdb_id.lower()}.cif.gz"


def _remote_name(name: str) -> str:
    return name if name.startswith("pdb_") else name[:4].upper() + name[4:]


def _is_there(folder: Path, name: str) -> bool:
    path = folder / name
    if not path.exists():
        return False
    content = path.read_bytes()
    record = _read_digests(folder).get(name)
    if record is None:  # put there by hand
        _check_mmcif(content, str(path))
        _record(folder, name, content, url=None)
    elif record["sha256"] != hashlib.sha256(content).hexdigest():
        msg = (
            f"{path} differs from its record in {DIGESTS_FILE}: delete it, or replace it with "
            "--overwrite"
        )
        raise ValueError(msg)
    return True


def _fetch(url: str, folder: Path, name: str) -> None:
    content = _download(url, folder, name)
    _check_mmcif(content, url)
    # The record first: if all ends between the two, the file is downloaded again.
    _record(folder, name, content, url=url)
    with replacing(folder / name, overwrite=True) as temporary:
        temporary.write_bytes(content)


def _download(url: str, folder: Path, name: str) -> bytes:
    opener = urllib.request.build_opener(_WebRedirects)
    request = urllib.request.Request(url, headers={"User-Agent": "cectflow"})
    try:
        with opener.open(request, timeout=TIMEOUT) as response:
            content: bytes = response.read()
            return content
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            msg = f"{url.rpartition('/')[0]} knows no structure {name.partition('.')[0]!r} (404)"
            raise ValueError(msg) from None
        reason = f"the server answers {error.code} {error.reason}"
    except urllib.error.URLError as error:
        reason = str(error.reason)
    except (OSError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
    msg = f"cannot download {url}: {reason}. Download it by hand and save it as {folder / name}"
    raise ConnectionError(msg)


def _check_mmcif(content: bytes, source: str) -> None:
    try:
        with gzip.open(io.BytesIO(content)) as stream:
            start = stream.read(4096).lstrip()
            while stream.read(1 << 20):  # to the checksum at the end
                pass
    except (EOFError, OSError, zlib.error) as error:
        msg = f"{source} is not a whole gzip file ({error}): expected gzipped mmCIF"
        raise ValueError(msg) from None
    if not start.startswith((b"data_", b"#")):
        msg = f"{source} begins with {start[:20]!r}: expected mmCIF, which begins with data_ or #"
        raise ValueError(msg)


def _read_digests(folder: Path) -> dict[str, _Record]:
    path = folder / DIGESTS_FILE
    if not path.exists():
        return {}
    try:
        digests: dict[str, _Record] = json.loads(path.read_text(encoding="utf-8"))
        for record in digests.values():
            record["sha256"]
    except (AttributeError, KeyError, TypeError, ValueError):
        msg = f"{path} is no record of downloads: delete it, and the files will be recorded anew"
        raise ValueError(msg) from None
    return digests


def _record(folder: Path, name: str, content: bytes, *, url: str | None) -> None:
    digests = _read_digests(folder)
    digests[name] = {
        "sha256": hashlib.sha256(content).hexdigest(),
        "url": url,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with replacing(folder / DIGESTS_FILE, overwrite=True) as temporary:
        temporary.write_text(json.dumps(digests, indent=2, sort_keys=True) + "\n", encoding="utf-8")

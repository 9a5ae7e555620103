"""Downloads: from a server on the loopback, which is all that these tests need."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cectflow.simulation.download import fetch_structures

MMCIF = gzip.compress(b"data_TEST\n_entry.id TEST\n", mtime=0)


@dataclass
class Server:
    """What a test server knows, and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/download/")
            state.asked.append(name)
            content = state.files.get(name)
            status = state.statuses.get(name, 404 if content is None else 200)
            if name in state.redirects:
                status = 302
            self.send_response(status)
            if name in state.redirects:
                self.send_header("Location", state.redirects[name])
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write((content or b"") if status == 200 else b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{httpd.server_address[1]}/download"
        yield state
        httpd.shutdown()
        thread.join()


def read_record(folder: Path) -> dict[str, dict[str, str | None]]:
    content: dict[str, dict[str, str | None]] = json.loads((folder / "digests.json").read_text())
    return content


def test_a_download_lands_with_its_digest_and_its_address(server: Server, tmp_path: Path) -> None:
    server.files = {"1ABC.cif.gz": MMCIF, "pdb_00001abc.cif.gz": MMCIF}
    folder = tmp_path / "new" / "folder"
    paths = fetch_structures(["1aBc", "PDB_00001abc"], folder, base_url=server.url)
    assert paths == (folder / "1abc.cif.gz", folder / "pdb_00001abc.cif.gz")
    assert all(path.read_bytes() == MMCIF for path in paths)
    record = read_record(folder)
    assert set(record) == {path.name for path in paths}
    assert record["1abc.cif.gz"]["sha256"] == hashlib.sha256(MMCIF).hexdigest()
    assert record["1abc.cif.gz"]["url"] == f"{server.url}/1ABC.cif.gz"
    assert str(record["1abc.cif.gz"]["date"]).endswith("+00:00")
    assert {path.name for path in folder.iterdir()} == {*record, "digests.json"}


def test_what_is_there_is_not_downloaded_again_unless_asked(server: Server, tmp_path: Path) -> None:
    server.files = {"1ABC.cif.gz": MMCIF}
    for _ in range(2):
        fetch_structures(["1abc", "1ABC"], tmp_path, base_url=server.url)
    assert server.asked == ["1ABC.cif.gz"]
    newer = gzip.compress(b"# a comment first\ndata_TEST\n", mtime=0)
    server.files = {"1ABC.cif.gz": newer}
    (path,) = fetch_structures(["1abc"], tmp_path, base_url=server.url, overwrite=True)
    assert path.read_bytes() == newer


def test_a_file_put_there_by_hand_is_checked_and_recorded(server: Server, tmp_path: Path) -> None:
    (tmp_path / "1abc.cif.gz").write_bytes(MMCIF)
    fetch_structures(["1abc"], tmp_path, base_url=server.url)
    assert server.asked == []
    assert read_record(tmp_path)["1abc.cif.gz"]["url"] is None
    (tmp_path / "2abc.cif.gz").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"2abc\.cif\.gz is not a whole gzip file"):
        fetch_structures(["2abc"], tmp_path, base_url=server.url)


def test_a_file_that_differs_from_its_record_is_refused(server: Server, tmp_path: Path) -> None:
    server.files = {"1ABC.cif.gz": MMCIF}
    (path,) = fetch_structures(["1abc"], tmp_path, base_url=server.url)
    path.write_bytes(gzip.compress(b"data_EDITED\n"))
    with pytest.raises(ValueError, match=r"differs from its record .* --overwrite"):
        fetch_structures(["1abc"], tmp_path, base_url=server.url)


@pytest.mark.parametrize(
    "pdb_id", ["", "abcd", "1abcd", "../1", "1ab/", "pdb_1abc", "pdb_000001abc"]
)
def test_an_invalid_id_is_refused_before_any_download(
    pdb_id: str, server: Server, tmp_path: Path
) -> None:
    server.files = {"1ABC.cif.gz": MMCIF}
    with pytest.raises(ValueError, match=r"is no PDB id: expected .* 1oel"):
        fetch_structures(["1abc", pdb_id], tmp_path / "new", base_url=server.url)
    assert server.asked == []
    assert not (tmp_path / "new").exists()


def test_an_unknown_id_is_named_and_those_finished_are_kept(server: Server, tmp_path: Path) -> None:
    server.files = {"1ABC.cif.gz": MMCIF}
    with pytest.raises(ValueError, match=r"knows no structure '9xyz' \(404\)"):
        fetch_structures(["1abc", "9xyz", "2abc"], tmp_path, base_url=server.url)
    assert server.asked == ["1ABC.cif.gz", "9XYZ.cif.gz"]
    assert set(read_record(tmp_path)) == {"1abc.cif.gz"}
    assert (tmp_path / "1abc.cif.gz").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>captive portal</html>", "is not a whole gzip file"),
        (MMCIF[:-6], "is not a whole gzip file"),
        (gzip.compress(b"<html>", mtime=0), r"begins with b'<html>': expected mmCIF"),
    ],
    ids=["a portal page", "a broken download", "a zipped page"],
)
def test_what_is_not_whole_gzipped_mmcif_leaves_nothing(
    content: bytes, message: str, server: Server, tmp_path: Path
) -> None:
    server.files = {"1ABC.cif.gz": content}
    with pytest.raises(ValueError, match=message):
        fetch_structures(["1abc"], tmp_path, base_url=server.url)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_fails_or_sends_elsewhere_is_a_connection_error(
    server: Server, tmp_path: Path
) -> None:
    server.statuses = {"1ABC.cif.gz": 503}
    with pytest.raises(ConnectionError, match=r"answers 503 .* save it as .*1abc\.cif\.gz"):
        fetch_structures(["1abc"], tmp_path, base_url=server.url)
    server.redirects = {"2ABC.cif.gz": "ftp://127.0.0.1:1/2ABC.cif.gz"}
    with pytest.raises(ConnectionError, match="answers 302"):
        fetch_structures(["2abc"], tmp_path, base_url=server.url)


def test_a_redirect_within_the_web_is_followed(server: Server, tmp_path: Path) -> None:
    server.files = {"elsewhere": MMCIF}
    server.redirects = {"1ABC.cif.gz": f"{server.url}/elsewhere"}
    (path,) = fetch_structures(["1abc"], tmp_path, base_url=server.url)
    assert path.read_bytes() == MMCIF


def test_an_unreachable_server_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(ConnectionError, match=r"cannot download http.* Download it by hand"):
        fetch_structures(["1abc"], tmp_path, base_url="http://127.0.0.1:1")


def test_other_schemes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected an address with http:// or https://"):
        fetch_structures(["1abc"], tmp_path, base_url="file:///etc")


def test_a_broken_record_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "1abc.cif.gz").write_bytes(MMCIF)
    (tmp_path / "digests.json").write_text("[]")
    with pytest.raises(ValueError, match=r"is no record of downloads: delete it"):
        fetch_structures(["1abc"], tmp_path)

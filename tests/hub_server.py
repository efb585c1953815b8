"""A server on this machine that speaks the Hugging Face hub's protocol of downloads, as far as the client asks it."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

GATED = "team/gated"


class Hub(ThreadingHTTPServer):
    """Serves folder/ORG/NAME/REVISION/FILE; every file of a revision belongs to one commit.

    Attributes:
        url: for HF_ENDPOINT.
        downloads: files whose content was asked for.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.folder, self.downloads = folder, list[str]()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Request(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        words = unquote(urlsplit(self.path).path).strip("/").split("/")
        listing = words[:2] == ["api", "models"]
        if listing:
            words = [*words[2:4], "", words[5] if words[4:] else "main"]
        repository, action, revision, file = "/".join(words[:2]), words[2], words[3], "/".join(words[4:])
        folder = self.server.folder / repository
        if repository == GATED:
            return self._refuse(403, "GatedRepo")
        if not folder.is_dir():
            return self._refuse(401, "RepoNotFound")
        if not (folder / revision).is_dir():
            return self._refuse(404, "RevisionNotFound")
        if listing:
            files = [path for path in sorted((folder / revision).rglob("*")) if path.is_file()]
            siblings = [{"rfilename": path.relative_to(folder / revision).as_posix()} for path in files]
            about = {"id": repository, "siblings": siblings}
            return self._answer(json.dumps(about).encode(), "application/json", "listing", revision)
        assert action == "resolve", self.path
        if not (folder / revision / file).is_file():
            return self._refuse(404, "EntryNotFound", revision)
        if self.command == "GET":
            self.server.downloads.append(f"{repository}/{file}@{revision}")
        content = (folder / revision / file).read_bytes()
        self._answer(content, "application/octet-stream", hashlib.sha256(content).hexdigest(), revision)

    def _answer(self, content: bytes, kind: str, etag: str, revision: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", hashlib.sha1(revision.encode()).hexdigest())
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _refuse(self, status: int, code: str, revision: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        if revision:
            self.send_header("X-Repo-Commit", hashlib.sha1(revision.encode()).hexdigest())
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def served(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub of a folder, until the end of the block; this process uses it as a new one does with HF_ENDPOINT."""
    hub = Hub(folder)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in (
        ("ENDPOINT", hub.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", template),
        ("HF_HUB_CACHE", str(cache)),
    ):
        monkeypatch.setattr(constants, name, value)
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()

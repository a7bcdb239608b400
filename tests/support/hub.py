"""A server on this machine that speaks as much of the Hugging Face Hub's API as reading data sets needs."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_a_member"
_PAGE = 3  # entries of a listing that are sent at once; the Hub sends 1000


@dataclass
class Hub:
    """What is served, and what has been asked for.

    Attributes:
        repositories: data sets, "owner/name" or "owner/name@revision", each with its folder.
        private: those that only the token may see.
        gated: those that anyone may list, but only the token may read.
        reads: file, first byte and the one after the last of each answer with the content of a file.
        requests: every address that was asked for.
        failing: how many of the next reads fail as on an overloaded server.
        endpoint: its address.
    """

    repositories: dict[str, Path] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    reads: list[tuple[str, int, int]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    failing: int = 0
    endpoint: str = ""

    def env(self, **more: str) -> dict[str, str]:
        """Return the variables of a process that reads from this server."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", **more}


@contextmanager
def serving_hub(repositories: dict[str, Path], **rest) -> Iterator[Hub]:
    """Serve data sets on a free port; the arguments are the attributes of `Hub`."""
    hub = Hub(repositories, **rest)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True  # else each answer waits for an acknowledgement
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def do_POST(self):
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self._answer(parse_qs(sent) if "=" in sent else json.loads(sent or "{}"))

    def _answer(self, sent=None):
        address = urlsplit(self.path)
        self.hub.requests.append(self.path)
        if match := re.fullmatch(r"/cdn/(.+)/-/(.+)", address.path):
            return self._content(unquote(match[1]), unquote(match[2]))
        match = re.fullmatch(
            r"/(?:api/)?datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info|resolve)/([^/]+)/?(.*))?", address.path
        )
        if not match:
            return self._error(401, "RepoNotFound")
        name, action, revision, path = match[1], match[2], unquote(match[3] or "main"), unquote(match[4] or "")
        known = self.headers.get("Authorization") == "Bearer " + TOKEN
        if not any(key.split("@")[0] == name for key in self.hub.repositories) or (
            name in self.hub.private and not known
        ):
            return self._error(404 if known else 401, "RepoNotFound")  # the Hub does not tell private ones from absent
        key = name if revision == "main" else f"{name}@{revision}"
        folder = self.hub.repositories.get(key)
        if folder is None:
            return self._error(404, "RevisionNotFound")
        if action in (None, "revision"):
            return self._json({"id": name, "sha": "0" * 40, "private": name in self.hub.private, "tags": []})
        if action == "paths-info":
            found = [folder / one for one in sent["paths"]]
            return self._json([_entry(folder, one) for one in found if one.exists()])
        if action == "tree":
            return self._tree(folder, path, parse_qs(address.query))
        if name in self.hub.gated and not known:
            return self._error(403, "GatedRepo")
        if not (folder / path).is_file():
            return self._error(404, "EntryNotFound")
        return self._send(302, b"", Location=f"/cdn/{key}/-/{path}")  # large files lie on another server

    def _tree(self, folder, path, query):
        if not (folder / path).is_dir():
            return self._error(404, "EntryNotFound")
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        found = sorted((folder / path).rglob("*") if recursive else (folder / path).iterdir())
        first = int(query.get("cursor", ["0"])[0])
        more = {}
        if first + _PAGE < len(found):
            flag = f"recursive={recursive}&cursor={first + _PAGE}"
            more["Link"] = f'<{self.hub.endpoint}{urlsplit(self.path).path}?{flag}>; rel="next"'
        return self._json([_entry(folder, one) for one in found[first : first + _PAGE]], **more)

    def _content(self, key, path):
        if self.hub.failing > 0:
            self.hub.failing -= 1
            return self._error(503, "")
        content = self.hub.repositories[key] / path
        size = content.stat().st_size
        start, stop = 0, size
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(part[1]), min(size, int(part[2] or size) + 1)
        if start >= size:
            return self._error(416, "")
        self.hub.reads.append((path, start, stop))
        with content.open("rb") as file:
            file.seek(start)
            return self._send(206, file.read(stop - start), **{"Content-Range": f"bytes {start}-{stop - 1}/{size}"})

    def _json(self, content, **headers):
        return self._send(200, json.dumps(content).encode(), **{"Content-Type": "application/json"}, **headers)

    def _error(self, status, code):
        return self._send(status, b"{}", **{"X-Error-Code": code, "Content-Type": "application/json"})

    def _send(self, status, body, **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(folder, path):
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    return {"type": "file", "path": name, "oid": "0" * 40, "size": path.stat().st_size}

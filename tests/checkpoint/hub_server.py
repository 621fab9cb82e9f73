"""A hub on loopback: the part of the Hugging Face API that a snapshot download uses."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories by id, each the files of a directory, and a log of what was asked for.

    They are models' or data sets', as they are asked for.

    Attributes:
      endpoint: what HF_ENDPOINT is to be.
      served: (method, repository, file) of each request for a file, in order.
    """

    def __init__(self, repositories: dict[str, Path]):
        self.repositories = repositories
        self.served: list[tuple[str, str, str]] = []
        self.endpoint = ""

    def files_served(self, repository: str) -> set[str]:
        """The files of `repository` whose content or headers were asked for."""
        return {file for _, name, file in self.served if name == repository}


@contextlib.contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[Hub]:
    """Runs a hub of `repositories` until the block ends."""
    hub = Hub(repositories)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)(/revision/main)?", path):
            return self._if_known(match[1], self._info)
        if match := re.fullmatch(rf"/api/(?:models|datasets)/([^/]+/[^/]+)/tree/{COMMIT}", path):
            return self._if_known(match[1], self._tree)
        return self._file(path)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass

    def _if_known(self, repository, answer):
        if repository not in self.hub.repositories:
            return self._send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        return self._send(json.dumps(answer(repository)).encode())

    def _info(self, repository):
        return {"_id": "0", "id": repository, "modelId": repository, "sha": COMMIT, "siblings": []}

    def _tree(self, repository):
        directory = self.hub.repositories[repository]
        return [
            {
                "type": "file",
                "path": path.relative_to(directory).as_posix(),
                "size": path.stat().st_size,
                "oid": _etag(path),
            }
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        ]

    def _file(self, path):
        match = re.fullmatch(rf"/(?:datasets/)?([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path)
        if match is None or match[1] not in self.hub.repositories:
            return self._send(b"", 404, {"X-Error-Code": "RepoNotFound"})
        self.hub.served.append((self.command, match[1], match[2]))
        file = self.hub.repositories[match[1]] / match[2]
        if not file.is_file():
            return self._send(b"", 404, {"X-Error-Code": "EntryNotFound"})
        return self._send(file.read_bytes(), 200, {"ETag": f'"{_etag(file)}"'})

    def _send(self, body, status=200, headers=None):
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()

"""As much of the Hub's interface as `datasets` asks for, on a port of this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_COMMIT = "b" * 40


@contextlib.contextmanager
def hub(sets: Mapping[str, Mapping[str, bytes]]) -> Iterator[str]:
    """The address of a Hub that has these data sets: files by their names."""

    def entry(path: str, content: bytes) -> dict[str, object]:
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            name = next((name for name in sets if f"/datasets/{name}" in path), "")
            files = sets.get(name, {})
            about, resolve = f"/api/datasets/{name}", f"/datasets/{name}/resolve/"
            if path.startswith(f"{about}/tree/"):
                self.answer(json.dumps([entry(*file) for file in files.items()]).encode())
            elif name and path.startswith(about):
                siblings = [{"rfilename": file} for file in files]
                found = {"id": name, "_id": "1", "sha": _COMMIT, "private": False, "gated": False, "disabled": False}
                self.answer(json.dumps({**found, "tags": [], "siblings": siblings}).encode())
            elif path.startswith(resolve) and (file := path.removeprefix(resolve).partition("/")[2]) in files:
                self.answer(files[file], ETag=f'"{entry(file, files[file])["oid"]}"', X_Repo_Commit=_COMMIT)
            else:
                code = "EntryNotFound" if path.startswith(resolve) else "RepoNotFound"
                self.answer(b'{"error": "not found"}', 404, X_Error_Code=code, X_Error_Message="not found")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

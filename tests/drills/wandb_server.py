"""A wandb server of our own: it takes a run's rows as the real one does, until it is told to fail."""

import contextlib
import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WandbServer:
    """`mode`: work, or one of the FAULTS, at any time. `num_runs`: how often it let one begin."""

    FAULTS = ("refuse", "hang", "500")

    def __init__(self, mode: str = "work") -> None:
        self.mode, self.num_runs, self._over = mode, 0, threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: _Handler(self, *a))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.become(mode)

    def become(self, mode: str) -> None:
        self.mode = mode
        if mode == "refuse":
            self._http.shutdown()
            self._http.server_close()  # nobody listens on the port any more

    def wait(self) -> None:
        self._over.wait(300)

    def close(self) -> None:
        self._over.set()
        if self.mode != "refuse":
            self.become("refuse")

    def answer(self, path: str, asked: dict) -> dict:
        if path.endswith("/file_stream"):
            return {}
        self.num_runs += asked.get("operationName") == "UpsertBucket"
        variables = asked.get("variables", {})
        project = {"id": "1", "name": variables.get("project"), "entity": {"id": "1", "name": "us"}}
        bucket = {
            "id": "1",
            "name": variables.get("name"),
            "displayName": variables.get("name"),
            "project": project,
        }
        files = [
            {"name": name, "uploadUrl": f"{self.url}/upload/{name}"}
            for name in variables.get("files") or []
        ]
        return {
            "data": {
                "upsertBucket": {"bucket": bucket, "inserted": True},
                "createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files},
            }
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, owner: WandbServer, *arguments: object) -> None:
        self._owner = owner
        with contextlib.suppress(OSError):  # the client has gone
            super().__init__(*arguments)

    def log_message(self, *arguments: object) -> None:
        return

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self._owner.mode == "hang":
            self._owner.wait()
        if self._owner.mode in ("hang", "refuse"):
            self.close_connection = True
            return
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        asked = json.loads(body) if self.command == "POST" and body else {}
        answer = json.dumps(self._owner.answer(self.path, asked)).encode()
        self.send_response(500 if self._owner.mode == "500" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = _any

"""Uploads to a server on this machine that answers as the Hugging Face Hub, by the real huggingface_hub."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from alexnet_ddp.config import ConfigError
from alexnet_ddp.config.compose import compose
from alexnet_ddp.export.hub import require_hub, upload
from alexnet_ddp.runtime.errors import MachineError

TOKEN = "hf_abcdefghijklmnop"
FILES = {"README.md": b"---\ntags: [x]\n---\n", "model.safetensors": bytes(range(256)) * 40}


class Hub(ThreadingHTTPServer):
    """Records the requests. `files`: what was committed. `refusal`: the status of every answer, or None."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.objects, self.files, self.refusal = [], {}, {}, None
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer({"id": "org/photos", "sha": "0" * 40})

    def do_PUT(self):
        self.server.objects[self.path] = self.body()
        self.answer({})

    def do_POST(self):
        body, hub = self.body(), self.server
        hub.requests.append((self.path, self.headers.get("Authorization"), body))
        if hub.refusal:
            self.answer({"error": f"no write access for {TOKEN}"}, hub.refusal)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"{hub.address}/org/photos", "id": "org/photos"})
        elif self.path.endswith("/preupload/main"):
            mode = {"README.md": "regular"}
            names = [one["path"] for one in json.loads(body)["files"]]
            found = [
                {"path": n, "uploadMode": mode.get(n, "lfs"), "shouldIgnore": False} for n in names
            ]
            self.answer({"files": found})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{hub.address}/put/{one['oid']}"}}
            self.answer({"transfer": "basic", "objects": objects})
        elif self.path.endswith("/commit/main"):
            for kind, value in map(commit_line, body.splitlines()):
                if kind == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                if kind == "lfsFile":
                    hub.files[value["path"]] = hub.objects[f"/put/{value['oid']}"]
            self.answer(
                {
                    "success": True,
                    "commitOid": "1" * 40,
                    "commitUrl": f"{hub.address}/org/photos/commit/1",
                }
            )
        else:  # validate-yaml
            self.answer({"warnings": [], "errors": []})

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def commit_line(line: bytes):
    entry = json.loads(line)
    return entry["key"], entry["value"]


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out").mkdir()
    for name, data in FILES.items():
        (tmp_path / "out" / name).write_bytes(data)
    return tmp_path / "out"


def test_the_files_arrive_in_one_commit_of_a_private_repository(hub, folder, capfd):
    assert upload(folder, "org/photos", "onnx of photos") == f"{hub.address}/org/photos"
    assert hub.files == FILES
    assert {token for _, token, _ in hub.requests if token} == {f"Bearer {TOKEN}"}
    created = json.loads(next(body for path, _, body in hub.requests if path.endswith("create")))
    assert (created["organization"], created["name"]) == ("org", "photos")
    assert created.get("visibility") == "private" or created.get("private") is True
    (commit,) = [body for path, _, body in hub.requests if path.endswith("/commit/main")]
    assert b"onnx of photos" in commit
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_one_line_without_the_token_and_the_folder_stays(hub, folder, status, capfd):
    hub.refusal = status
    with pytest.raises(ConfigError, match=rf"push=org/photos failed \(HTTP {status} ") as end:
        upload(folder, "org/photos", "x")
    text = str(end.value)
    assert text.endswith(f"may write there, then run: hf upload org/photos {folder}")
    assert TOKEN not in text + "".join(capfd.readouterr())
    assert "\n" not in text
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES


def test_no_network_is_one_line_and_the_folder_stays(hub, folder, monkeypatch, capfd):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(
        MachineError,
        match=r"push=org/photos failed \(ConnectError: .*complete in .*; run: hf upload",
    ):
        upload(folder, "org/photos", "x")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert capfd.readouterr() == ("", "")


def test_what_a_push_needs_is_checked_before_the_export(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    require_hub("org/photos")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"needs the network, and HF_HUB_OFFLINE is set"):
        require_hub("org/photos")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(
        ConfigError, match=r"needs a token .*; run `hf auth login`, or set HF_TOKEN"
    ):
        require_hub("org/photos")
    monkeypatch.setattr("alexnet_ddp.export.hub.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"push=org/photos needs huggingface_hub; pip install"):
        require_hub("org/photos")


@pytest.mark.parametrize("name", ["photos", "org/", "a/b/c", "org/my photos", "https://hf.co/a/b"])
def test_a_repository_is_org_and_name(name):
    with pytest.raises(ConfigError, match=rf"push \({re.escape(name)}\) must be ORG/NAME"):
        compose("export", ["format=onnx", "output=out", f"push={name}"])

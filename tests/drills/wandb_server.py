"""A wandb server of our own: it takes a run's rows as the real one does, until it is told to fail.

It records what arrives: GraphQL operations, the file stream of each run, uploaded files. It can ask a run to stop, and
give a sweep agent its commands.
"""

import contextlib
import gzip
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

ENTITY = {"id": "1", "name": "us"}


@dataclass
class ReceivedRun:
    """What arrived of one run. `started`: the variables of each UpsertBucket, merged, per start."""

    started: list[dict] = field(default_factory=list)
    history: dict[int, dict] = field(default_factory=dict)  # _step -> row
    summary: dict = field(default_factory=dict)
    system: list[dict] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)
    preempting: bool = False
    alerts: list[dict] = field(default_factory=list)
    artifacts: list[dict] = field(default_factory=list)  # the input of CreateArtifact

    @property
    def config(self) -> dict:
        """The configuration: the last one that was sent."""
        sent = [one["config"] for one in self.started if one.get("config")]
        return {key: item["value"] for key, item in json.loads(sent[-1]).items()}


class WandbServer:
    """`mode`: work, or one of the FAULTS, at any time. `num_runs`: how often it let one begin.

    `runs`: by id. `stopped`: ids of runs whose "Stop run" button was pressed. `commands`: for the sweep agent, a list per
    heartbeat. `latency_s`: how long each answer takes, at any time.
    """

    FAULTS = ("refuse", "hang", "500")

    def __init__(self, mode: str = "work", latency_s: float = 0.0) -> None:
        self.latency_s = latency_s
        self.mode, self.num_runs, self._over = mode, 0, threading.Event()
        self.runs: dict[str, ReceivedRun] = {}
        self.uploads: dict[str, bytes] = {}
        self.stopped: set[str] = set()
        self.commands: list[list[dict]] = []
        self.operations: list[str] = []
        self.sweep_config = "{}"
        self._lock = threading.Lock()
        self._artifacts: dict[str, dict] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: _Handler(self, *a))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.become(mode)

    @property
    def env(self) -> dict[str, str]:
        """The variables with which wandb uses this server."""
        return {"WANDB_MODE": "online", "WANDB_API_KEY": "c" * 40, "WANDB_BASE_URL": self.url}

    def become(self, mode: str) -> None:
        self.mode = mode
        if mode == "refuse":
            self._http.shutdown()
            self._http.server_close()  # nobody listens on the port any more

    def pause(self, seconds: float) -> None:
        """Wait, but not longer than until close()."""
        self._over.wait(seconds)

    def close(self) -> None:
        self._over.set()
        if self.mode != "refuse":
            self.become("refuse")

    def answer(self, path: str, body: bytes) -> dict:
        with self._lock:
            if "/upload/" in path:
                self.uploads[unquote(path.partition("/upload/")[2])] = body
                return {}
            if not path.endswith(("/graphql", "/file_stream")):
                return {}  # such as telemetry
            asked = json.loads(body)
            if path.endswith("/file_stream"):
                return self._stream(path.split("/")[-2], asked)
            query = asked.get("query", "")
            name = asked.get("operationName") or _operation(query)
            self.operations.append(name)
            answers = getattr(self, f"_{name}", None)
            return {"data": answers(asked.get("variables") or {}) if answers else {}}

    # --- the run -----------------------------------------------------------------------------------------------------

    def _run(self, run_id: str) -> ReceivedRun:
        return self.runs.setdefault(run_id, ReceivedRun())

    def _stream(self, run_id: str, sent: dict) -> dict:
        run = self._run(run_id)
        for name, part in (sent.get("files") or {}).items():
            rows = [
                json.loads(line) for line in part["content"] if name.endswith((".jsonl", ".json"))
            ]
            if name == "wandb-history.jsonl":
                for row in rows:
                    run.history.setdefault(row["_step"], {}).update(row)
            elif name == "wandb-summary.json":
                run.summary = rows[-1]
            elif name == "wandb-events.jsonl":
                run.system += rows
        run.preempting |= bool(sent.get("preempting"))
        if sent.get("complete"):
            run.exit_codes.append(sent["exitcode"])
        return {"stopped": True} if run_id in self.stopped else {}

    def _UpsertBucket(self, sent: dict) -> dict:
        run, run_id = self._run(sent["name"]), sent["name"]
        self.num_runs += 1
        run.started.append(sent)
        project = {"id": "1", "name": sent.get("project") or "none", "entity": ENTITY}
        bucket = {"id": "1", "name": run_id, "displayName": sent.get("displayName") or run_id}
        bucket |= {"project": project, "sweepName": sent.get("sweep"), "historyLineCount": 0}
        return {"upsertBucket": {"bucket": bucket, "inserted": len(run.started) == 1}}

    def _RunResumeStatus(self, sent: dict) -> dict:
        run = self.runs.get(sent["name"])
        if run is None or not run.history:
            return {}
        rows = [json.dumps(row) for _, row in sorted(run.history.items())]
        bucket = {"id": "1", "name": sent["name"], "displayName": sent["name"], "tags": []}
        bucket |= {"historyLineCount": len(rows), "historyTail": json.dumps(rows[-1:])}
        bucket |= {"eventsLineCount": len(run.system), "eventsTail": "[]", "logLineCount": 0}
        bucket |= {"summaryMetrics": json.dumps(run.summary), "wandbConfig": '{"t": 1}'}
        bucket |= {"config": json.dumps({key: {"value": v} for key, v in run.config.items()})}
        return {"model": {"id": "1", "name": sent["project"], "entity": ENTITY, "bucket": bucket}}

    def _RunStoppedStatus(self, sent: dict) -> dict:
        return {"project": {"run": {"stopped": sent["runId"] in self.stopped}}}

    def _NotifyScriptableRunAlert(self, sent: dict) -> dict:
        self._run(sent["runName"]).alerts.append(sent)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _CreateRunFiles(self, sent: dict) -> dict:
        files = [
            {"name": name, "uploadUrl": f"{self.url}/upload/{sent['run']}/{name}"}
            for name in sent["files"]
        ]
        return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}

    def _Viewer(self, sent: dict) -> dict:
        user = {"id": "1", "entity": "us", "username": "us", "email": None, "flags": "{}"}
        return {"viewer": user | {"teams": {"edges": []}}}

    # --- artifacts -----------------------------------------------------------------------------------------------------

    def _ArtifactType(self, sent: dict) -> dict:
        return {"project": None}  # there is no such artifact yet

    def _CreateArtifact(self, sent: dict) -> dict:
        given = sent["input"]
        self._run(given["runName"]).artifacts.append(given)
        artifact_id = f"a{len(self._artifacts)}"
        self._artifacts[artifact_id] = given
        created = {
            "id": artifact_id,
            "state": "PENDING",
            "artifactSequence": {"latestArtifact": None},
        }
        return {"createArtifact": {"artifact": created}}

    def _CreateArtifactManifest(self, sent: dict) -> dict:
        file = {"id": "f", "uploadUrl": f"{self.url}/upload/{sent['artifactID']}/manifest.json"}
        file |= {"uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def _UpdateArtifactManifest(self, sent: dict) -> dict:
        file = {"id": "f", "uploadUrl": f"{self.url}/upload/manifest.json", "uploadHeaders": []}
        return {"updateArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}

    def _CreateArtifactFiles(self, sent: dict) -> dict:
        nodes = [
            {
                "storagePath": file["name"],
                "uploadUrl": f"{self.url}/upload/{file['artifactID']}/{file['name']}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": file["artifactID"]},
            }
            for file in sent["input"]["artifactFiles"]
        ]
        edges = [{"node": node} for node in nodes]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, sent: dict) -> dict:
        digest = self._artifacts[sent["artifactID"]]["digest"]
        return {"commitArtifact": {"artifact": {"id": sent["artifactID"], "digest": digest}}}

    def _ArtifactByID(self, sent: dict) -> dict:
        given = self._artifacts[sent["id"]]
        project = {"id": "1", "internalId": "1", "name": "p", "entity": {"name": "us"}}
        sequence = {
            "__typename": "ArtifactSequence",
            "name": given["artifactCollectionName"],
            "project": project,
        }
        artifact = {
            "__typename": "Artifact",
            "id": sent["id"],
            "artifactSequence": sequence,
            "versionIndex": int(sent["id"][1:]),
            "artifactType": {"name": given["artifactTypeName"]},
            "description": None,
            "metadata": "{}",
            "ttlDurationSeconds": 0,
            "ttlIsInherited": False,
            "tags": [],
            "historyStep": None,
            "state": "COMMITTED",
            "size": 1,
            "digest": given["digest"],
            "commitHash": None,
            "fileCount": 1,
            "createdAt": "2026-01-01T00:00:00Z",
            "updatedAt": None,
            "aliases": [],
        }
        return {"artifact": artifact}

    # --- sweeps ----------------------------------------------------------------------------------------------------------

    def _SweepWithRuns(self, sent: dict) -> dict:
        sweep = {
            "id": "1",
            "name": sent["sweep"],
            "config": self.sweep_config,
            "runs": {"edges": []},
        }
        return {"project": {"sweep": sweep}}

    def _CreateAgent(self, sent: dict) -> dict:
        return {"createAgent": {"agent": {"id": "agent"}}}

    def _Heartbeat(self, sent: dict) -> dict:
        commands = self.commands.pop(0) if self.commands else []
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}


def _operation(query: str) -> str:
    found = re.search(r"(?:query|mutation)\s+(\w+)", query)
    return found[1] if found else ""


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
        self._owner.pause(self._owner.latency_s)
        if self._owner.mode == "hang":
            self._owner.pause(300)
        if self._owner.mode in ("hang", "refuse"):
            self.close_connection = True
            return
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        is_read = self.command in ("POST", "PUT")
        answer = json.dumps(self._owner.answer(self.path, body if is_read else b"")).encode()
        self.send_response(500 if self._owner.mode == "500" else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = _any

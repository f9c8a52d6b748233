"""push_to_hub against an HTTP server on this machine that answers as the Hub does: what is sent, and when."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.helpers import ROOT

SCRIPT = """
from pathlib import Path
import sys
from tests.support.trainers import trainer

ours = trainer(Path(sys.argv[1]), max_steps=2, push_to_hub=True, hub_model_id="me/tiny", hub_token="hf_secret",
               save_strategy="steps", save_steps=1, save_total_limit=1, hub_strategy="checkpoint")
ours.dataset_names = ["me/ranked", "TRAIN.jsonl"]
ours.train()
ours.evaluate()
ours.save_model()
"""


class Hub(BaseHTTPRequestHandler):
    """Every file is taken inline ("regular"), so that a commit holds all that was sent."""

    seen: list[tuple[str, str, str]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode("utf-8")
        self.seen.append((self.path, self.headers.get("Authorization", ""), body))
        here = f"http://127.0.0.1:{self.server.server_port}/me/tiny"  # type: ignore[attr-defined]
        answer: dict[str, Any] = {"url": here, "commitUrl": f"{here}/commit/1", "commitOid": "1"}
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        data = json.dumps(answer).encode("utf-8")
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    Hub.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def commits(seen: list[tuple[str, str, str]]) -> list[tuple[str, dict[str, bytes]]]:
    """(summary, files) of each commit, in order."""
    found = []
    for path, _, body in seen:
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            found.append((next(line["value"]["summary"] for line in lines if line["key"] == "header"), files))
    return found


@pytest.mark.slow
def test_push_to_hub(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "home")}
    folder = tmp_path / "run"
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Hub.seen[0][0] == "/api/repos/create"
    assert {token for _, token, _ in Hub.seen} == {"Bearer hf_secret"}

    pushed = commits(Hub.seen)
    steps = [summary for summary, _ in pushed]
    assert steps.count("Training in progress, step 1") == steps.count("Training in progress, step 2") == 1
    assert steps.count("Training in progress, step 2, checkpoint") == 1
    assert steps[-1] == "Model save"
    everything = [name for _, files in pushed for name in files]
    assert not [name for name in everything if ".writing" in name or "partial" in name]
    checkpoint = dict(pushed)["Training in progress, step 2, checkpoint"]
    assert {"last-checkpoint/model.safetensors", "last-checkpoint/optimizer.pt"} <= checkpoint.keys()
    for name, content in checkpoint.items():
        assert content == (folder / "checkpoint-2" / Path(name).name).read_bytes(), name

    last = {name: content for _, files in pushed for name, content in files.items()}
    assert last["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    card = last["README.md"].decode("utf-8")
    data = yaml.safe_load(card.split("---\n")[1])
    assert data["datasets"] == ["me/ranked"]
    assert "Held out, after step 2" in card

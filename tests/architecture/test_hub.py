"""Models by their names on a hub: a small hub of this machine's own stands for the real one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mptfoundry.architecture.hub import locate
from mptfoundry.errors import CheckpointError

COMMITS = {"main": "a" * 40, "v2": "b" * 40}
FILES = {
    "config.json": b'{"model_type": "mpt"}',
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"the same weights",
    "modeling_mpt.py": b"raise SystemExit",
    "onnx/config.json": b"{}",
}
LOCATE = "import sys; from mptfoundry.architecture.hub import locate; print(locate(sys.argv[1], sys.argv[2]))"


class Hub(BaseHTTPRequestHandler):
    """The few answers that the hub's client needs."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        if parts[:5] == ["api", "models", "team", "mpt", "revision"] and parts[5] in self.revisions():
            commit = self.revisions()[parts[5]]
            about = {"id": "team/mpt", "sha": commit, "siblings": [{"rfilename": name} for name in FILES]}
            return self.send(json.dumps(about).encode(), with_body, {"X-Repo-Commit": commit})
        if parts[:5] == ["api", "models", "team", "mpt", "tree"] and parts[5] in self.revisions():
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": "0"}
                for name, content in FILES.items()
            ]
            return self.send(json.dumps(tree).encode(), with_body, {})
        name = "/".join(parts[4:])
        if parts[:3] == ["team", "mpt", "resolve"] and parts[3] in self.revisions() and name in FILES:
            etag = hashlib.sha256(FILES[name]).hexdigest()
            headers = {"X-Repo-Commit": self.revisions()[parts[3]], "ETag": f'"{etag}"'}
            return self.send(FILES[name], with_body, headers)
        return self.send(b"", with_body, {"X-Error-Code": "RevisionNotFound"}, code=404)

    def revisions(self) -> dict[str, str]:
        return {**COMMITS, **{commit: commit for commit in COMMITS.values()}}

    def send(self, body: bytes, with_body: bool, headers: dict[str, str], code: int = 200) -> None:
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """In which the client finds this hub and an empty cache, whatever this process's own variables say."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_")
    others = {key: value for key, value in os.environ.items() if not key.startswith(settings)}
    yield {
        **{key: value for key, value in others.items() if not key.lower().endswith("_proxy")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
    }
    server.shutdown()


def located(environment: dict[str, str], name: str, revision: str) -> str:
    words = [sys.executable, "-c", LOCATE, name, revision]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=100)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_weights_and_texts_of_a_revision_are_fetched_once_and_no_code(environment: dict[str, str]) -> None:
    folder = Path(located(environment, "team/mpt", "v2"))
    assert folder.name == COMMITS["v2"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: FILES[name] for name in ("config.json", "model.safetensors")
    }
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    assert located(offline, "team/mpt", "v2") == str(folder)
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        said = located({**environment, variable: "1"}, "team/mpt", "main")
        assert "team/mpt at revision main: is neither a folder nor in the Hugging Face cache" in said
        assert f"{variable} is set" in said
    assert "team/mpt at revision v3: is neither" in located(environment, "team/mpt", "v3")


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere/model", "../up", "~/nowhere", "a/b/c", "team/mpt?x=1"]
)
def test_what_can_be_no_name_of_a_hub_is_not_looked_for_there(name: str) -> None:
    with pytest.raises(CheckpointError, match=r": no such file or folder\.$"):
        locate(name)

"""Downloads from a hub of our own on the loopback interface, whole and interrupted."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_jax.convert.converter import open_checkpoint
from qwen_jax.convert.synthetic import TINY, write_random_checkpoint
from qwen_jax.errors import CheckpointError
from qwen_jax.hub import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CUT = "model-00002"


class Hub(http.server.ThreadingHTTPServer):
    """One repository, owner/tiny, from a folder. `broken`: a shard's transfer breaks off half way, as often as it is tried."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.broken = False
        self.served: list[tuple[str, int]] = []  # (file, bytes) of every transfer


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/owner/tiny"):
            names = sorted(p.name for p in self.server.folder.iterdir())
            if "/tree/" in path:
                answer = [
                    {"type": "file", "path": n, "size": (self.server.folder / n).stat().st_size, "oid": n}
                    for n in names
                ]
            else:
                answer = {"id": "owner/tiny", "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)
            return
        match = re.fullmatch(rf"/owner/tiny/resolve/(?:main|{COMMIT})/([\w.-]+)", path)
        if match is None or not (self.server.folder / match[1]).is_file():
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
            return
        content = (self.server.folder / match[1]).read_bytes()
        headers = {"ETag": f'"{match[1]}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        start, status = 0, 200
        if wanted := re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", "")):
            start, status = int(wanted[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(status, content[start:], headers, body, match[1])

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool, file: str = "") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not body:
            return
        if self.server.broken and file.startswith(CUT):
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)
        if file:
            self.server.served.append((file, len(content)))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    write_random_checkpoint(folder, TINY, max_shard_bytes=20_000)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    (folder / "README.md").write_text("neither is this")
    with Hub(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


PROGRAM = """
import sys
from qwen_jax.errors import CheckpointError
from qwen_jax.hub import resolve
try:
    print(resolve(sys.argv[1]))
except CheckpointError as error:
    print("refused:", error)
"""


def resolve_in_a_process(hub: Hub, home: Path, hub_id: str) -> str:
    """What `resolve` says, in a process that takes that hub for the Hugging Face hub."""
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, hub_id], capture_output=True, text=True, env=environment, check=True, timeout=120
    )  # fmt: skip
    assert done.stdout.count("\n") == 1
    return done.stdout.strip()


def test_download_interrupted_and_resumed(hub, tmp_path):
    home = tmp_path / "home"
    hub.broken = True
    first = resolve_in_a_process(hub, home, "owner/tiny")
    assert re.fullmatch(
        r"refused: owner/tiny: download incomplete \(.+\); run the same command again to resume", first
    )
    for snapshot in home.glob("**/snapshots/*"):
        with pytest.raises(CheckpointError):
            open_checkpoint(snapshot)

    complete = {name for name, size in hub.served if size == (hub.folder / name).stat().st_size}
    hub.broken = False
    hub.served.clear()
    folder = Path(resolve_in_a_process(hub, home, "owner/tiny"))
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        p.name for p in hub.folder.iterdir() if p.name not in ("pytorch_model.bin", "README.md")
    )
    for file in folder.iterdir():
        assert file.read_bytes() == (hub.folder / file.name).read_bytes()
    open_checkpoint(folder)
    assert complete.isdisjoint(name for name, _ in hub.served)  # only what the first run had not got

    hub.served.clear()
    assert resolve_in_a_process(hub, home, "owner/tiny") == str(folder)
    assert hub.served == []  # nothing twice


def test_repository_that_is_not_there(hub, tmp_path):
    said = resolve_in_a_process(hub, tmp_path / "home", "owner/absent")
    assert said == "refused: owner/absent: no such folder here, and no such repository on the hub"


def test_local_paths(tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert resolve("models") == Path("models")
    for text in ("absent", "./absent", "../a/b", str(tmp_path / "absent"), "a/b/c", "~/absent-folder"):
        with pytest.raises(CheckpointError, match=f"{re.escape(text)}: no such folder$"):
            resolve(text)
    with pytest.raises(CheckpointError, match=r"models/absent: no such folder \(models exists"):
        resolve("models/absent")

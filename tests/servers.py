"""Real storage servers on this machine's loopback, and a small S3 client that shares nothing with obstore."""

import atexit
import functools
import hashlib
import hmac
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import pytest

KEY, SECRET = "key-of-the-tests", "secret-of-the-tests"
BUCKET = "caches"
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class S3:
    """A server and its bucket."""

    endpoint: str

    def into(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make this the server that the environment names."""
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def ask(self, method: str, path: str, query: str = "", data: bytes = b"") -> bytes:
        """A request with a signature of version 4; `query` sorted and quoted."""
        host = self.endpoint.removeprefix("http://")
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        digest = hashlib.sha256(data).hexdigest()
        headers = {"host": host, "x-amz-content-sha256": digest, "x-amz-date": now}
        names = ";".join(headers)
        lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
        request = f"{method}\n{quote(path)}\n{query}\n{lines}\n{names}\n{digest}"
        scope = f"{now[:8]}/us-east-1/s3/aws4_request"
        text = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
        key = f"AWS4{SECRET}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        signature = hmac.digest(key, text.encode(), "sha256").hex()
        headers["authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={KEY}/{scope}, SignedHeaders={names}, Signature={signature}"
        )
        url = f"{self.endpoint}{quote(path)}" + (f"?{query}" if query else "")
        with urllib.request.urlopen(
            urllib.request.Request(url, data=data or None, headers=headers, method=method), timeout=30
        ) as answer:
            return bytes(answer.read())

    def names(self, prefix: str) -> list[str]:
        """Names of all objects below a prefix, the prefix left out."""
        listed = self.ask("GET", f"/{BUCKET}", f"list-type=2&max-keys=1000&prefix={quote(prefix + '/', safe='')}")
        assert b"<IsTruncated>false" in listed
        return [name.removeprefix(f"{prefix}/") for name in re.findall(r"<Key>([^<]*)</Key>", listed.decode())]

    def get(self, prefix: str, name: str) -> bytes:
        return self.ask("GET", f"/{BUCKET}/{prefix}/{name}")

    def put(self, prefix: str, name: str, data: bytes) -> None:
        self.ask("PUT", f"/{BUCKET}/{prefix}/{name}", data=data)

    def contents(self, prefix: str) -> dict[str, bytes]:
        return {name: self.get(prefix, name) for name in self.names(prefix)}

    def unfinished_uploads(self) -> list[str]:
        """Multipart uploads that were begun and neither finished nor aborted."""
        return re.findall(r"<UploadId>([^<]*)</UploadId>", self.ask("GET", f"/{BUCKET}", "uploads=").decode())


def _free_port() -> int:
    """A port that is free together with the one 10,000 above it, which SeaweedFS takes too."""
    while True:
        port = random.randint(20_000, 50_000)
        try:
            with socket.socket() as one, socket.socket() as two:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 10_000))
        except OSError:
            continue
        return port


def _started(command: list[str], endpoint: str, folder: Path, environment: dict[str, str]) -> S3:
    log = folder / "log"
    with open(log, "wb") as sink:
        server = subprocess.Popen(command, stdout=sink, stderr=sink, env=os.environ | environment, cwd=folder)

    def end() -> None:
        server.kill()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    s3 = S3(endpoint)
    until = time.monotonic() + 60
    while time.monotonic() < until and server.poll() is None:
        try:
            s3.ask("PUT", f"/{BUCKET}")
            # The first file may take seconds.
            s3.put("first", "file", b"data")
            return s3
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{command[0]} did not start: {log.read_text()[-2000:]}")


@functools.cache
def seaweed() -> S3:
    """A SeaweedFS server, started once."""
    folder = Path(tempfile.mkdtemp(prefix="weed-"))
    s3, master, volume, filer = (_free_port() for _ in range(4))
    command = [
        str(BIN / "weed"), "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3",
        f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
        "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.localSocket={folder}/s3", f"-filer.localSocket={folder}/filer",
        "-volume.max=0", "-master.volumeSizeLimitMB=64", "-master.telemetry=false",
    ]  # fmt: skip
    return _started(
        command, f"http://127.0.0.1:{s3}", folder, {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    )


@functools.cache
def rclone() -> S3:
    """A server that takes conditional writes and ignores their condition."""
    folder = Path(tempfile.mkdtemp(prefix="rclone-"))
    (folder / "data").mkdir()
    port = _free_port()
    command = [
        str(BIN / "rclone"), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}",
        "--config", str(folder / "none"), str(folder / "data"),
    ]  # fmt: skip
    return _started(command, f"http://127.0.0.1:{port}", folder, {})

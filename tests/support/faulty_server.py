"""An HTTP server on loopback that knows ranges and fails on demand, by itself or in front of another server."""

import hashlib
import http.client
import logging
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from data.storage import azure, google
from data.storage.clients import s3_client
from data.storage.locations import write_whole


class FaultyServer(ThreadingHTTPServer):
    """files: what it serves, unless there is an upstream (host, port) whose answers it hands on.

    faults: what befalls the next GETs of a tar, one each, '' nothing; with for_good the last one stays.
    read_only: what befalls a PUT of a path in which this is found: it may not be written.
    handed_on: headers that an upstream is given.
    asked: path and Range of each such GET.  sent: bytes of all bodies.  where: a folder of it, in which put stores.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], upstream: tuple[str, int] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.upstream = files, upstream
        self.faults: list[str] = []
        self.for_good = False
        self.read_only = ""
        self.handed_on: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        self.sent = 0
        self.end = threading.Event()
        self.where = f"{self.url}/some"

    def put(self, name: str, data: bytes) -> str:
        """Store a file and say where; an upstream is written through our own client."""
        where = f"{self.where}/{name}"
        if self.upstream:
            write_whole(where, data)
        else:
            self.files[f"some/{name}"] = data
        return where

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass  # clients that hang up are what is tested


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultyServer

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, fault = self.server, ""
        asked = self.headers.get("Range", "")
        if ".tar" in self.path:
            server.asked.append((self.path, asked))
            if server.faults:
                fault = server.faults[0] if server.for_good and len(server.faults) == 1 else server.faults.pop(0)
        if fault.isdigit():
            self.answer(int(fault), {}, b"")
        elif fault in ("refuse", "mute"):
            server.end.wait(20 if fault == "mute" else 0)
            self.close_connection = True
        else:
            self.answer(*(self.hand_on() if server.upstream else self.look_up(asked, fault)), fault)

    def do_PUT(self):
        if self.server.read_only and self.server.read_only in self.path:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.answer(403, {}, b"")
        else:
            self.answer(*self.hand_on())

    do_POST = do_HEAD = do_DELETE = lambda self: self.answer(*self.hand_on())

    def look_up(self, asked: str, fault: str) -> tuple[int, dict[str, str], bytes]:
        data = self.server.files.get(self.path.partition("?")[0].lstrip("/"))
        if data is None:
            return 404, {}, b""
        mark = {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        if not span or fault == "whole":
            return 200, mark, data
        start, end = int(span[1]), min(int(span[2]) + 1, len(data))
        if start >= len(data):
            return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
        return 206, mark | {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}, data[start:end]

    def hand_on(self) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection(*self.server.upstream)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        upstream.request(self.command, self.path, body, dict(self.headers) | self.server.handed_on)
        answer = upstream.getresponse()
        kept = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in ("content-length", "transfer-encoding", "date", "server", "connection")
        }
        if self.command == "HEAD":  # it has a length, and no body
            kept["Content-Length"] = answer.getheader("Content-Length", "0")
        return answer.status, kept, answer.read()

    def answer(self, status: int, headers: dict[str, str], body: bytes, fault: str = "") -> None:
        part = body[: len(body) // 2] if fault in ("stall", "cut", "reset", "short") else body
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(part) if fault == "short" else len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.server.sent += len(part)
            self.wfile.write(part)
        if fault == "stall":
            self.server.end.wait(20)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = self.close_connection or fault in ("stall", "cut", "reset")


@contextmanager
def serving(files: dict[str, bytes], upstream: tuple[str, int] | None = None) -> Iterator[FaultyServer]:
    """A server that runs in a thread."""
    server = FaultyServer(files, upstream)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.end.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def http_server() -> Iterator[FaultyServer]:
    """An HTTP server that fails on demand."""
    with serving({}) as server:
        yield server


@pytest.fixture(scope="session")
def moto() -> Iterator[tuple[str, int]]:
    """moto's S3 server."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture
def s3_server(moto, monkeypatch) -> Iterator[FaultyServer]:
    """An S3 server with an empty bucket, which fails on demand."""
    import boto3

    keys = {"aws_access_key_id": "nobody", "aws_secret_access_key": "nothing", "region_name": "us-east-1"}
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    boto3.client("s3", endpoint_url=f"http://{moto[0]}:{moto[1]}", **keys).create_bucket(Bucket=bucket)
    for name, value in keys.items():
        monkeypatch.setenv(name.upper().replace("REGION_NAME", "AWS_DEFAULT_REGION"), value)
    with serving({}, moto) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        s3_client.cache_clear()
        server.where = f"s3://{bucket}/some"
        yield server
    s3_client.cache_clear()


@pytest.fixture
def gs_server(s3_server, monkeypatch) -> FaultyServer:
    """The same server as Google's, whose XML API has the requests of S3 that we make."""
    monkeypatch.setenv(google.EMULATOR, s3_server.url)
    google._session.cache_clear()
    scope = "Credential=nobody/20260101/us-east-1/s3/aws4_request"
    s3_server.handed_on = {"Authorization": f"AWS4-HMAC-SHA256 {scope}, SignedHeaders=host, Signature=0"}
    s3_server.where = s3_server.where.replace("s3://", "gs://")
    return s3_server


@pytest.fixture(scope="session")
def azurite(tmp_path_factory) -> Iterator[int]:
    """The port of Azurite, Microsoft's own server of blobs for tests."""
    pytest.importorskip("azure.storage.blob", reason="needs azure-storage-blob")
    command = os.environ.get("AZURITE") or shutil.which("azurite-blob")
    if not command:
        pytest.skip("needs Azurite (npm install azurite): name its azurite-blob in AZURITE")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = str(tmp_path_factory.mktemp("azurite"))
    options = ["--location", where, "--blobPort", str(port), "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    server = subprocess.Popen([command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def az_server(azurite, monkeypatch) -> Iterator[FaultyServer]:
    """Azurite with an empty container, behind a server that fails on demand."""
    from azure.storage.blob import ContainerClient

    container = f"container-{uuid.uuid4().hex[:8]}"
    with serving({}, ("127.0.0.1", azurite)) as server:
        # The account and the key that Azurite documents.
        key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
        account = f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={key};"
        text = f"{account}BlobEndpoint={server.url}/devstoreaccount1;"
        ContainerClient.from_connection_string(text, container).create_container()
        monkeypatch.setenv(azure.CONNECTION, text)
        azure._service.cache_clear()
        server.where = f"az://{container}/some"
        yield server
    azure._service.cache_clear()

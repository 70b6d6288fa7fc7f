"""S3 server on loopback, whose requests can be made to fail in the ways of a sick one.

moto answers the requests. A layer before it counts them and, from a `Fault`, spoils one of them, or all from
one on. Objects can be looked at and put back behind the server's back, which is quick.
"""

import contextlib
import io
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qs
from xml.sax.saxutils import escape

import fsspec
import pytest
from aiobotocore.session import AioSession
from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.s3.models import s3_backends
from s3fs import S3FileSystem
from werkzeug.serving import make_server

BUCKET, REGION = "runs", "us-east-1"
REFUSALS = {
    "500": ("500 Internal Server Error", "InternalError"),
    "503": ("503 Slow Down", "SlowDown"),
    "403": ("403 Forbidden", "AccessDenied"),
}
"""Requests that are answered by an error, and not done."""
CLOSED = ("unread", "half read", "answer lost", "answer cut")
"""Connections that are closed: before the request is read, in the middle of it, when it was done."""
HELD = ("never answered", "done too late")
"""Requests that are answered to nobody: the client waits until its patience ends."""
OTHERS = ("stale listings", "deletion in parts", "slow")
KILLS = ("killed before", "killed in", "killed after")
"""Requests at which their sender is killed: before it is done, in the middle of its body, when it is done."""
PATIENCE = 0.5
"""Seconds that a client waits for an answer that is held."""
MOST_SECONDS = 2
"""Longest time that a request is held: a client may not notice that its patience has ended."""


@dataclass(frozen=True)
class Fault:
    """A fault of the k-th request, or of all from then on."""

    kind: str
    k: int = 1
    forever: bool = False
    lag: int = 1
    """Number of changes that listings don't show yet, if they are stale."""
    seconds: float = 0.0
    """Delay of each request, if they are slow."""
    victim: list[int] | None = None
    """Process to be killed, once it is known."""


class GoneError(ConnectionError):
    """The end of a connection, by the server."""


class Handler(MotoRequestHandler):
    """A request's handler that says nothing."""

    def log(self, *_: Any) -> None:
        pass


class ObjectStore:
    """The server and its bucket."""

    url = f"s3://{BUCKET}"

    def __init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._bucket = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket(BUCKET, REGION)
        self._lock = threading.Lock()
        self._fault: Fault | None = None
        self._late: list[Callable[[], object]] = []
        self._history: list[dict[str, int]] = []
        self.requests: list[str] = []
        """Method and path of each request since the fault was set."""
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.put_back({})

    def options(self, **config: Any) -> dict[str, Any]:
        """Return the options by which fsspec finds the server; `config` is botocore's."""
        return {
            "key": "key",
            "secret": "secret",
            "endpoint_url": f"http://127.0.0.1:{self._server.server_port}",
            "client_kwargs": {"region_name": REGION},
            "config_kwargs": {"retries": {"max_attempts": 0}, **config},
        }

    @contextlib.contextmanager
    def patience(self, seconds: float = PATIENCE) -> Iterator[None]:
        """Let clients wait so long for an answer."""
        options = {**fsspec.config.conf["s3"], **self.options(read_timeout=seconds)}
        with mock.patch.dict(fsspec.config.conf, s3=options):
            yield

    # --- objects, behind the server's back -------------------------------------------------------------

    def objects(self) -> dict[str, bytes]:
        """Return the content of each object by its name."""
        with self._lock:
            return {name: self._bucket.keys[name].value for name in list(self._bucket.keys)}

    def put_back(self, objects: Mapping[str, bytes]) -> None:
        """Make the bucket hold these objects alone, and no upload that has begun."""
        with self._lock:
            for name in list(self._bucket.keys):
                self._bucket.keys.pop(name)
            for upload in self.uploads():
                self._bucket.multiparts.pop(upload).dispose()
            for name, content in objects.items():
                s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(BUCKET, name, content)
            self._history = [self._sizes()]

    def uploads(self) -> list[str]:
        """Return the uploads in parts that have begun and not ended."""
        return list(self._bucket.multiparts)

    def _sizes(self) -> dict[str, int]:
        return {name: self._bucket.keys[name].size for name in list(self._bucket.keys)}

    # --- faults ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def sick(self, fault: Fault | None) -> Iterator[list[str]]:
        """Let requests fail; yield the list of them. What is to be done too late is done at the end."""
        with self._lock:
            self.requests, self._fault, self._history = [], fault, [self._sizes()]
        requests = self.requests
        try:
            yield requests
        finally:
            with self._lock:
                self.requests, self._fault, late, self._late = [], None, self._late, []
            for work in late:
                work()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            self.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
            n, fault = len(self.requests), self._fault
        if fault is None or not (n == fault.k or (fault.forever and n > fault.k)):
            return self._done(environ, start, self._body(environ))
        if fault.kind in REFUSALS:
            self._body(environ)
            return _refused(environ, start, *REFUSALS[fault.kind])
        if fault.kind in CLOSED:
            return self._closed(fault.kind, environ, start)
        if fault.kind in HELD:
            return self._held(fault.kind, environ)
        if fault.kind in KILLS:
            return self._killed(fault, environ)
        if fault.kind == "slow":
            time.sleep(fault.seconds)
        elif fault.kind == "stale listings" and "list-type" in parse_qs(environ["QUERY_STRING"]):
            return self._listed_late(fault.lag, environ, start)
        elif fault.kind == "deletion in parts" and "delete" in environ["QUERY_STRING"].split("="):
            return self._deleted_in_parts(environ, start)
        return self._done(environ, start, self._body(environ))

    def _body(self, environ: dict[str, Any], part: float = 1) -> bytes:
        size = int(environ.get("CONTENT_LENGTH") or 0)
        return environ["wsgi.input"].read(int(size * part)) if size else b""

    def _done(self, environ: dict[str, Any], start: Callable[..., Any], body: bytes) -> list[bytes]:
        """Let moto do a request whose body was read; return the parts of the answer."""
        answer = [*self._moto({**environ, "wsgi.input": io.BytesIO(body)}, start)]
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            with self._lock:
                self._history.append(self._sizes())
        return answer

    def _closed(self, kind: str, environ: dict[str, Any], start: Callable[..., Any]) -> Iterator[bytes]:
        if kind in ("unread", "half read"):
            self._body(environ, 0 if kind == "unread" else 0.5)
            raise _close(environ)
        said: list[Any] = []
        answer = b"".join(self._done(environ, lambda *args: said.extend(args), self._body(environ)))
        if kind == "answer lost" or len(answer) < 2:
            raise _close(environ)
        start(*said)  # the headers tell the whole length
        return _cut(environ, answer)

    def _held(self, kind: str, environ: dict[str, Any]) -> list[bytes]:
        """Wait until the client has gone."""
        body = self._body(environ)
        connection: socket.socket = environ["werkzeug.socket"]
        connection.settimeout(MOST_SECONDS)
        with contextlib.suppress(OSError):
            connection.recv(1, socket.MSG_PEEK)
        if kind == "done too late":
            kept = {name: value for name, value in environ.items() if not name.startswith("werkzeug.")}
            with self._lock:
                self._late.append(lambda: self._done(kept, lambda *_: None, body))
        raise _close(environ)

    def _killed(self, fault: Fault, environ: dict[str, Any]) -> list[bytes]:
        body = self._body(environ, 0.5 if fault.kind == "killed in" else 1)
        if fault.kind == "killed after":
            self._done(environ, lambda *_: None, body)
        assert fault.victim is not None, "nobody is to be killed"
        while not fault.victim:
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.kill(fault.victim[0], signal.SIGKILL)
        raise _close(environ)

    def _listed_late(self, lag: int, environ: dict[str, Any], start: Callable[..., Any]) -> list[bytes]:
        with self._lock:
            names = self._history[max(0, len(self._history) - 1 - lag)]
        asked = {key: values[0] for key, values in parse_qs(environ["QUERY_STRING"]).items()}
        return _answered(
            start, "200 OK", _listing(names, asked.get("prefix", ""), asked.get("delimiter", ""))
        )

    def _deleted_in_parts(self, environ: dict[str, Any], start: Callable[..., Any]) -> list[bytes]:
        """Delete the first half of the keys, and tell of the others that they can't be: with 200, as S3."""
        head, *keys = self._body(environ).decode().split("<Object>")
        last, *tail = keys[-1].split("</Object>")
        keys = [key.removesuffix("</Object>") for key in (*keys[:-1], last)]
        done, kept = keys[: len(keys) // 2], keys[len(keys) // 2 :]
        if done:
            body = head + "".join(f"<Object>{key}</Object>" for key in done) + "".join(tail)
            environ = {**environ, "CONTENT_LENGTH": str(len(body))}
            self._done(environ, lambda *_: None, body.encode())
        errors = "".join(f"<Error>{key}<Code>InternalError</Code></Error>" for key in kept)
        return _answered(start, "200 OK", f"<DeleteResult>{errors}</DeleteResult>")


def _close(environ: dict[str, Any]) -> GoneError:
    """Close the connection of a request; return what ends its handler."""
    with contextlib.suppress(OSError):
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return GoneError()


def _cut(environ: dict[str, Any], answer: bytes) -> Iterator[bytes]:
    yield answer[: len(answer) // 2]
    raise _close(environ)


def _answered(start: Callable[..., Any], status: str, document: str) -> list[bytes]:
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n{document}'.encode()
    start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
    return [body]


def _refused(environ: dict[str, Any], start: Callable[..., Any], status: str, code: str) -> list[bytes]:
    answer = _answered(
        start, status, f"<Error><Code>{code}</Code><Message>{code}, injected</Message></Error>"
    )
    return [] if environ["REQUEST_METHOD"] == "HEAD" else answer


def _listing(names: Mapping[str, int], prefix: str, delimiter: str) -> str:
    """Return the answer to a listing of these names with their sizes."""
    found, folders = [], set[str]()
    for name in sorted(names):
        rest = name.removeprefix(prefix)
        if not name.startswith(prefix):
            continue
        if delimiter and delimiter in rest:
            folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
        else:
            found.append(
                f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                f"<Size>{names[name]}</Size></Contents>"
            )
    inside = "".join(
        f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in sorted(folders)
    )
    return (
        f"<ListBucketResult><Name>{BUCKET}</Name><KeyCount>{len(found) + len(folders)}</KeyCount>"
        f"<IsTruncated>false</IsTruncated>{''.join(found)}{inside}</ListBucketResult>"
    )


@contextlib.contextmanager
def served() -> Iterator[ObjectStore]:
    """Start the server, and let fsspec find it by `s3://`; nothing else of the machine is looked at."""
    store = ObjectStore()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, os.devnull)
        for name, value in {"AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1"}.items():
            patch.setenv(name, value)
        patch.setattr(S3FileSystem, "retries", 1)
        patch.setitem(fsspec.config.conf, "s3", {**store.options(), "session": AioSession()})
        try:
            yield store
        finally:
            S3FileSystem.clear_instance_cache()
            store.stop()


def copied(objects: Mapping[str, bytes], folder: Path) -> Path:
    """Write objects into a folder, by their names."""
    for name, content in objects.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder

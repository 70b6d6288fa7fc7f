"""Stores that let nobody in: what may not be seen isn't called absent, and the error says what to do."""

import errno
import os
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import pytest
from marks import slow
from object_store import Fault, ObjectStore
from s3fs import S3FileSystem

from ckpt import (
    CheckpointError,
    Retention,
    clean,
    committed_tags,
    open_checkpoint,
    open_store,
    prune,
    read_latest,
)
from ckpt.stores.remote_errors import naming

READERS: dict[str, Callable[[str], Any]] = {
    "open": open_checkpoint,
    "a tag": lambda run: open_checkpoint(run, "t1"),
    "tags": committed_tags,
    "latest": read_latest,
    "clean": clean,
    "prune": lambda run: prune(run, Retention(keep_last=1)),
    "exists": lambda run: open_store(run).exists("latest"),
    "the folder": lambda run: open_store(run).exists(""),
    "names": lambda run: open_store(run).names(),
}
each_reader = pytest.mark.parametrize("reader", READERS)


@pytest.fixture
def without_credentials(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    for name in os.environ:
        if name.startswith("AWS_") and name != "AWS_EC2_METADATA_DISABLED":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    options = {k: v for k, v in fsspec.config.conf["s3"].items() if k not in ("key", "secret", "session")}
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("without_credentials")
@each_reader
def test_no_credentials(reader: str) -> None:
    with pytest.raises((CheckpointError, PermissionError)) as caught:
        READERS[reader]("s3://runs/run")
    assert "there are no credentials (Unable to locate credentials): give them in" in str(caught.value)


@each_reader
def test_access_denied(object_store: ObjectStore, reader: str) -> None:
    run = f"{object_store.url}/run"
    with (
        object_store.sick(Fault("403", forever=True)),
        pytest.raises((CheckpointError, PermissionError)) as caught,
    ):
        READERS[reader](run)
    assert run in str(caught.value)
    assert "access is denied (" in str(caught.value)
    assert "check which credentials" in str(caught.value)


def test_a_bucket_without_the_run_is_no_denial(object_store: ObjectStore) -> None:
    object_store.put_back({})
    assert read_latest(f"{object_store.url}/run") is None
    with pytest.raises(CheckpointError, match="is not a folder"):
        open_checkpoint(f"{object_store.url}/run")


class Refusing(BaseHTTPRequestHandler):
    """A server of files that answers each request by the status in its path, 0 by none."""

    def do_GET(self) -> None:
        if status := int(self.path.split("/")[1]):
            self.send_error(status)
        else:
            self.connection.close()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "words"),
    [(403, "access is denied"), slow(401, "access is denied"), (500, "500"), (0, "ServerDisconnectedError")],
)
def test_fsspec_calls_an_object_missing_that_it_may_not_look_at(web: str, status: int, words: str) -> None:
    store = open_store(f"{web}/{status}/run")
    for call in (lambda: store.exists("latest"), lambda: store.exists(""), store.names):
        with pytest.raises(OSError, match=words) as caught:
            call()
        assert not isinstance(caught.value, FileNotFoundError)
    with pytest.raises(CheckpointError, match=rf"run can't be read: .*{words}"):
        open_checkpoint(f"{web}/{status}/run")


def test_what_is_missing_stays_missing(web: str) -> None:
    store = open_store(f"{web}/404/run")
    assert not store.exists("latest")
    assert store.names() == []


def test_a_server_that_cannot_be_reached_is_no_empty_one(web: str) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        port = server.server_port
    store = open_store(f"http://127.0.0.1:{port}/run")
    with pytest.raises(OSError, match="onnect") as caught:
        store.exists("latest")
    assert caught.value.errno == errno.EIO


class OtherError(Exception):
    """An error of a library, which keeps the status of the store's answer."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status_code = status


@pytest.mark.parametrize(
    ("status", "kind"), [(403, PermissionError), (410, FileNotFoundError), (503, OSError)]
)
def test_the_answer_behind_a_missing_file(status: int, kind: type[OSError]) -> None:
    with pytest.raises(OSError, match="latest") as caught, naming("store://run/latest"):
        raise FileNotFoundError("latest") from OtherError(status)
    assert type(caught.value) is kind
    assert caught.value.filename == "store://run/latest"

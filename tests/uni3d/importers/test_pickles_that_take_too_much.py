"""Small pickles that ask for all memory, all time or all of the stack: refused before they are built."""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
from marks import slow

from ckpt import CheckpointError
from uni3d.importers import trial
from uni3d.importers.pickles import read_pickle
from uni3d.importers.source import Options
from uni3d.importers.torch_files import load


def doubled(empty: bytes, times: int) -> bytes:
    """Return opcodes that leave nothing on the stack, and pairs of pairs in the memo."""
    code = empty + b"q\x000"
    for i in range(1, times):
        code += b"h%ch%c\x86q%c0" % (i - 1, i - 1, i)
    return code


def with_one_hash(count: int) -> bytes:
    """Return opcodes of a dict whose keys have the same hash: to build it takes the square of the time."""
    keys = (pickle.dumps(k * (2**61 - 1), 2).removeprefix(b"\x80\x02")[:-1] for k in range(count))
    return b"}(" + b"".join(key + b"N" for key in keys) + b"u."


LISTS = b"".join(b"]q%c" % i + (b"h%ca" % (i - 1) if i else b"K\x01a") * 10 for i in range(30))
TAKES_TOO_MUCH = {
    "a number in the memo": (b"]r" + struct.pack("<I", 1 << 27) + b".", "takes more than 512 MiB"),
    "a bytearray": (b"\x96" + struct.pack("<Q", 1 << 36) + b".", "takes more than 512 MiB"),
    "lists of the same list": (LISTS + b".", r"unfolds to more than \d+ elements"),
    "a list in itself": (b"]q\x00h\x00a.", "has more than 200 containers within each other"),
    "pairs of the same pair as a key": (doubled(b"K\x01K\x02\x86", 40) + b"}h\x27K\x01s.", "more than 2 s"),
    "a nested key": (b"}" + b")" + b"\x85" * 200_000 + b"Ns.", r"crashes what reads it \(SIGSEGV\)"),
    "nested lists": (b"]" * 1000 + b"a" * 999 + b".", "has more than 200 containers within each other"),
    "keys with one hash": (with_one_hash(60_000), r"more than \d s"),
    "a range as a set": (b"cbuiltins\nset\n(cbuiltins\nrange\n(K\x00I10000000000\ntRtR.", "a set of a range"),
    "a range as a shape": (
        b"ctorch\nSize\n(cbuiltins\nrange\n(K\x00I10000000000\ntRtR.",
        "a tuple of a range",
    ),
}


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SECONDS", 2)
    monkeypatch.setattr(trial, "ELEMENTS", 1000)


@pytest.mark.parametrize("name", [name if name == "nested lists" else slow(name) for name in TAKES_TOO_MUCH])
def test_it_is_refused(name: str) -> None:
    code, words = TAKES_TOO_MUCH[name]
    with pytest.raises(CheckpointError, match=words) as caught:
        read_pickle(b"\x80\x04" + code, "some.file")
    assert str(caught.value).startswith("some.file "), caught.value


def test_in_a_file_of_torch(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"Ns.")
    with pytest.raises(CheckpointError, match=r"weights.pt has a pickle of 200007 bytes that crashes"):
        load(file, Options())


def test_one_that_is_trusted_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    value: Any = []
    for _ in range(300):
        value = [value]
    with pytest.raises(CheckpointError, match="if you trust whoever wrote it, add --trust"):
        read_pickle(pickle.dumps(value), "a.file")
    monkeypatch.setattr(trial, "check", None)
    assert read_pickle(pickle.dumps(value), "a.file", trust=True) == value


def test_after_a_refusal_the_next_is_read() -> None:
    plain = {"a": [1, {2, 3}, frozenset({4}), (5.5, 1j)], "b": {"c": b"bytes"}, "d": "x" * 100_000}
    for code in (b"\x80\x04}" + b")" + b"\x85" * 200_000 + b"Ns.", b"\x80\x04]r\xff\xff\xff\x0f."):
        with pytest.raises(CheckpointError):
            read_pickle(code, "bad")
        assert read_pickle(pickle.dumps(plain), "good") == plain

"""Other frameworks' files with one value changed: JSON, headers of safetensors, pickles."""

import io
import json
import pickle
import pickletools
import zipfile
from itertools import pairwise
from pathlib import Path
from random import Random

from forged import changed

_CONSTANTS = [None, True, False, 0, 1, -1, 7, 2**31 - 1, 2**62, -(2**70), 0.5, float("nan"), "", "word", ".."]
_CONSTANTS += ["/etc/passwd", "\x1b[2J", "x" * 300, b"bytes", (), (1, 2), (-1,), [], [1], {}, {"a": 1}]
_PUSHES = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_PUSHES |= {"SHORT_BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE"}
_PUSHES |= {"BINGET", "LONG_BINGET"}
"""Opcodes that put one value on the stack."""


def forge_file(folder: Path, random: Random) -> str:
    """Change one value in one of the files below `folder`; return what was changed."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and _forgery(p) is not None)
    path = random.choice(files)
    forgery = _forgery(path)
    assert forgery is not None
    return f"{path.relative_to(folder)}: {forgery(path, random)}"


def _forgery(path: Path):  # type: ignore[no-untyped-def]
    """Return the function that changes a file of this kind; None if there is none."""
    if path.suffix == ".json":
        return _json
    if path.suffix == ".safetensors":
        return _safetensors
    if path.suffix in (".pt", ".bin", ".pth") and zipfile.is_zipfile(path):
        return _archive
    if path.name == ".metadata" or path.suffix == ".pkl":
        return _pickle
    return None


def _json(path: Path, random: Random) -> str:
    what, text = changed(json.loads(path.read_text()), random)
    path.write_text(text, errors="surrogatepass")
    return what


def _safetensors(path: Path, random: Random) -> str:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    what, text = changed(json.loads(data[8:end]), random)
    head = text.encode(errors="surrogatepass")
    path.write_bytes(len(head).to_bytes(8, "little") + head + data[end:])
    return what


def _archive(path: Path, random: Random) -> str:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in entries if name.endswith("data.pkl"))
    what, entries[name] = _with_one_changed(entries[name], random)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    return what


def _pickle(path: Path, random: Random) -> str:
    what, data = _with_one_changed(path.read_bytes(), random)
    path.write_bytes(data)
    return what


def _with_one_changed(data: bytes, random: Random) -> tuple[str, bytes]:
    """Return a pickle in which one opcode puts another value on the stack, and what was changed."""
    steps = [(op.name, value, at) for op, value, at in pickletools.genops(io.BytesIO(data))]
    ends = [at for _, _, at in steps[1:]] + [len(data)]
    places = [i for i, (name, _, _) in enumerate(steps) if name in _PUSHES]
    i = random.choice(places)
    name, value, at = steps[i]
    new = random.choice(_CONSTANTS)
    what = f"byte {at}: {name} {value!r:.60} -> {new!r:.40}"
    return what, data[:at] + _pushing(new) + data[ends[i] :]


def _pushing(value: object) -> bytes:
    """Return opcodes that put a value on the stack, and leave the memo as it is."""
    code = pickle.dumps(value, 2)[2:-1]
    steps = [(at - 2, op.name) for op, _, at in pickletools.genops(io.BytesIO(b"\x80\x02" + code + b"."))][1:]
    return b"".join(code[a:b] for (a, name), (b, _) in pairwise(steps) if name != "BINPUT")

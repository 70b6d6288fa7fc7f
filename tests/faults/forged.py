"""Documents with one change and right checksums: only their form shows what is wrong."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from ckpt.checksums import crc32c
from ckpt.format import MANIFEST, object_record

DEEP = "<deep>"
"""Stands for JSON that is nested a hundred thousand deep, which no encoder writes."""
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 7.5, -0.0, 2**31, 2**40, 2**63, 10**400, 1e308,
    "", "word", "0", "float32", "..", "../../x", "a/b", "/etc/passwd", "\x1b[2J\x07", "\ud800", "x" * 5000,
    [], [0], [1], [-1], [2**40, 2**40], [None], [[1]], ["word"], [1.5], [True],
    {}, {"word": 7}, {"": {}}, {"..": {}}, DEEP,
]  # fmt: skip


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of each value in a document, itself first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def forge(folder: Path, random: Random) -> str:
    """Change one document of the checkpoint in `folder`, set all checksums right; return what was changed."""
    documents = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.json"))
    name = random.choice([MANIFEST, *(d for d in documents if "/" not in d), random.choice(documents)])
    what, text = changed(json.loads((folder / name).read_text()), random)
    if name == MANIFEST:
        _write_manifest(folder, text)
        return f"{name} {what}"
    (folder / name).write_bytes(data := text.encode(errors="surrogatepass"))
    manifest = json.loads((folder / MANIFEST).read_text())
    for records in (manifest["parts"], manifest["files"]):
        if name in records:
            records[name] |= object_record(data)
    if name in manifest["parts"]:
        _follow(manifest["parts"][name], data)
    _write_manifest(folder, json.dumps(manifest))
    return f"{name} {what}"


def _follow(record: dict[str, Any], data: bytes) -> None:
    """Let the manifest list the arrays that a part describes, if it is of that form."""
    try:
        part = json.loads(data)
        record["arrays"] = {atom: [*states] for atom, states in part.items()}
    except (ValueError, RecursionError, AttributeError, TypeError):
        return


def _write_manifest(folder: Path, text: str) -> None:
    """Write a manifest with the checksum of its own content."""
    text = text.removeprefix("{").lstrip()
    if text.startswith('"crc32c"'):
        text = text.partition(",")[2]
    rest = text.encode(errors="surrogatepass")
    (folder / MANIFEST).write_bytes(b'{"crc32c": "%08x",\n' % crc32c(rest) + rest)


def changed(document: Any, random: Random) -> tuple[str, str]:
    """Return what was changed in a document, and its text."""
    path = random.choice([*places(document)][1:] or [()])
    what, text = _changed(document, path, random)
    return f"{list(path)}: {what}", text


def _changed(document: Any, path: tuple[str | int, ...], random: Random) -> tuple[str, str]:
    """Return what was changed at `path`, and the document's text."""
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    if not path:
        return "the whole", _text(random.choice(VALUES))
    key, how = path[-1], random.choice(["replace"] * 5 + ["delete", "rename", "copy", "swap", "twice"])
    if how == "delete":
        del holder[key]
        return how, _text(document)
    if how == "rename" and isinstance(holder, dict):
        new = random.choice(["", "..", "x/y", "\x1b[31m", "word", "zarr.json", f"{key}2", "__x", "x" * 300])
        holder[new] = holder.pop(key)
        return f"renamed {new!r}", _text(document)
    if how in ("copy", "swap"):
        all_places = [p for p in places(document) if p and p[: len(path)] != path and path[: len(p)] != p]
        if all_places:
            other = random.choice(all_places)
            there = document
            for step in other[:-1]:
                there = there[step]
            mine, theirs = copy.deepcopy(holder[key]), copy.deepcopy(there[other[-1]])
            holder[key] = theirs
            if how == "swap":
                there[other[-1]] = mine
            return f"{how} with {list(other)}", _text(document)
    if how == "twice" and isinstance(holder, dict):
        holder["<twice>"] = random.choice(VALUES)
        return "twice", _text(document).replace('"<twice>"', json.dumps(key))
    value = random.choice(VALUES)
    old = holder[key]
    if isinstance(old, int) and random.random() < 0.5:
        value = old + random.choice([-1, 1, 2**32, -old])
    holder[key] = value
    return f"{old!r:.40} -> {value!r:.40}", _text(document)


def _text(document: Any) -> str:
    """Return the JSON of a document; numbers too long for Python's own decoder stay."""
    return json.dumps(document).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)

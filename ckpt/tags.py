"""Which checkpoints a run has, which one is the newest, and which ones are kept."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ckpt.errors import CheckpointError
from ckpt.format import LATEST, MANIFEST, check_tag, decode_manifest, is_tag
from ckpt.stores import Store, open_store

_HEAD_BYTES = 4 << 10
"""Of a manifest: its first lines say what it is of."""


def committed_tags(run: str | Path | Store) -> list[str]:
    """Tags that can be read, oldest first by what their manifests say."""
    store = open_store(run) if isinstance(run, str | Path) else run
    return [head.tag for head in sorted(_heads(store), key=lambda head: head.age)]


def read_latest(run: str | Path | Store) -> str | None:
    """The tag that `latest` names; None where nothing was ever committed.

    Raises:
        CheckpointError: there are checkpoints but no `latest`, or it names one that isn't there.
    """
    store = open_store(run) if isinstance(run, str | Path) else run
    tag = _named_by_latest(store)
    if tag is None or store.exists(f"{tag}/{MANIFEST}"):
        return tag
    newer = _named_by_latest(store)  # a save beside us may have replaced it, and retention deleted that one
    if newer != tag:
        return newer
    problem = f"{store.where(LATEST)} names {tag!r}, which isn't a committed checkpoint"
    raise CheckpointError(f"{problem}; {_there(store)}")


def _named_by_latest(store: Store) -> str | None:
    where = store.where(LATEST)
    try:
        return check_tag(store.read(LATEST).decode().strip())
    except FileNotFoundError:
        if not committed_tags(store):
            return None
        problem = f"{store.where('')} has no file {LATEST!r}; name a tag"
    except NotADirectoryError:
        return None
    except OSError as error:
        problem = f"{where} can't be read: {error.strerror or error}"
    except ValueError as error:
        problem = f"{where} is damaged: {error}"
    raise CheckpointError(f"{problem} ({_there(store)})")


def _there(store: Store) -> str:
    tags = committed_tags(store)
    return f"the tags there are: {', '.join(tags)}" if tags else "there are none"


class _Head(NamedTuple):
    """What the first lines of a manifest say; whether they are true is seen when it is opened."""

    tag: str
    """The folder's name."""
    own: bool
    """Whether it was saved under this name, and isn't somebody's copy."""
    step: int
    created: str
    committed_at: float

    @property
    def age(self) -> tuple[str, int, float, str]:
        """Orders checkpoints: steps can go back, and copying a run changes its files' times."""
        return self.created, self.step if self.created else 0, self.committed_at, self.tag


def _heads(store: Store) -> Iterator[_Head]:
    for name in store.names():
        if not is_tag(name) or not store.exists(f"{name}/{MANIFEST}"):
            continue
        values: dict[str, Any] = {}
        buffer = bytearray(_HEAD_BYTES)
        with contextlib.suppress(OSError, ValueError):
            read = store.read_into(f"{name}/{MANIFEST}", memoryview(buffer), 0)
            for line in bytes(buffer[:read]).decode(errors="replace").split("\n"):
                found = re.fullmatch(r'\s*"(tag|step|created)": ("[^"]*"|\d+),?', line)
                if found:
                    values.setdefault(found[1], json.loads(found[2]))
        step, created = values.get("step"), str(values.get("created", ""))
        with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
            when = store.committed_at(name)
            yield _Head(name, values.get("tag") == name, step if isinstance(step, int) else 0, created, when)


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints are kept when a new one has been committed; by default all."""

    keep_last: int | None = None
    """This many of the newest."""
    keep_every: int | None = None
    """And those whose step is a multiple of this."""

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more, or None to keep all")
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError("keep_every says what is kept beside the last ones; give keep_last too")

    def dropped(self, tags: Sequence[str], steps: Sequence[int]) -> list[str]:
        """The tags to delete, of all `tags`, oldest first, that have these `steps`."""
        if self.keep_last is None:
            return []
        old = list(zip(tags, steps, strict=True))[: -self.keep_last]
        return [tag for tag, step in old if self.keep_every is None or step % self.keep_every]


KEEP_ALL = Retention()


def prune(run: str | Path | Store, retention: Retention, *, dry_run: bool = False) -> list[str]:
    """Delete the checkpoints that `retention` doesn't keep; returns their tags.

    What `latest` names is kept in any case, and so is what doesn't look like a checkpoint that was saved
    here under its name. One with a damaged manifest is neither deleted nor counted among those that are
    kept. A crash leaves each checkpoint whole or gone.

    Raises:
        CheckpointError: `latest` is damaged (then nothing is deleted), or a deletion failed.
    """
    store = open_store(run) if isinstance(run, str | Path) else run
    latest = read_latest(store)
    heads = [head for head in sorted(_heads(store), key=lambda head: head.age) if head.own]
    kept = 0
    readable: list[_Head] = []
    for head in reversed(heads):  # those that count must be good for something
        if retention.keep_last is not None and kept < retention.keep_last and not _is_whole(store, head.tag):
            continue
        kept += 1
        readable.insert(0, head)
    dropped = retention.dropped([head.tag for head in readable], [head.step for head in readable])
    dropped = [tag for tag in dropped if tag != latest]
    for tag in () if dry_run else dropped:
        try:
            store.delete(tag)
        except OSError as error:
            raise CheckpointError(f"{store.where(tag)} can't be deleted: {error}") from error
    return dropped


def _is_whole(store: Store, tag: str) -> bool:
    """Whether the manifest is; the chunks are not read."""
    try:
        decode_manifest(store.read(f"{tag}/{MANIFEST}"), tag)
    except (OSError, CheckpointError, ValueError):
        return False
    return True

"""Tags of a run: listing checkpoints, finding the newest, deleting old ones."""

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
"""Bytes to read of a manifest: its first lines hold the tag, the step and the time."""


def committed_tags(run: str | Path | Store) -> list[str]:
    """Return the tags of all committed checkpoints, oldest first by their manifests."""
    store = open_store(run) if isinstance(run, str | Path) else run
    return [head.tag for head in sorted(_heads(store), key=lambda head: head.age)]


def read_latest(run: str | Path | Store) -> str | None:
    """Return the tag that `latest` names; None if nothing was ever committed.

    Raises:
        CheckpointError: there are checkpoints but no `latest`, or it names one that doesn't exist.
    """
    store = open_store(run) if isinstance(run, str | Path) else run
    tag = _named_by_latest(store)
    if tag is None or store.exists(f"{tag}/{MANIFEST}"):
        return tag
    newer = _named_by_latest(store)  # a concurrent save may have moved `latest` and deleted the old tag
    if newer != tag:
        return newer
    problem = f"{store.where(LATEST)} names {tag!r}, which isn't a committed checkpoint"
    raise CheckpointError(f"{problem}; {there_are(store)}")


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
    raise CheckpointError(f"{problem} ({there_are(store)})")


def there_are(store: Store) -> str:
    """List the tags of a run, for messages."""
    tags = committed_tags(store)
    return f"the tags there are: {', '.join(tags)}" if tags else "there are none"


class _Head(NamedTuple):
    """First lines of a manifest, unverified: they are checked when the checkpoint is opened."""

    tag: str
    """Name of the folder."""
    own: bool
    """True if it was saved under this name, and isn't a user's copy."""
    step: int
    created: str
    committed_at: float

    @property
    def age(self) -> tuple[str, int, float, str]:
        """Sort key. Time first, as steps can go back; file times last, as copying a run changes them."""
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
    """Rule for which checkpoints to keep after a commit; by default all."""

    keep_last: int | None = None
    """Number of newest checkpoints to keep; None for all."""
    keep_every: int | None = None
    """Also keep checkpoints whose step is a multiple of this."""

    def __post_init__(self) -> None:
        for name in ("keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more, or None to keep all")
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError("keep_every keeps checkpoints in addition to the last ones; give keep_last too")

    def dropped(self, tags: Sequence[str], steps: Sequence[int]) -> list[str]:
        """Return the tags to delete, given all `tags`, oldest first, and their `steps`."""
        if self.keep_last is None:
            return []
        old = list(zip(tags, steps, strict=True))[: -self.keep_last]
        return [tag for tag, step in old if self.keep_every is None or step % self.keep_every]


KEEP_ALL = Retention()


def prune(run: str | Path | Store, retention: Retention, *, dry_run: bool = False) -> list[str]:
    """Delete the checkpoints that `retention` doesn't keep; return their tags.

    The checkpoint that `latest` names is always kept, and so are copies under other names. A checkpoint with
    a damaged manifest is neither deleted nor counted as kept. A crash leaves each checkpoint whole or gone.

    Raises:
        CheckpointError: `latest` is damaged (then nothing is deleted), or a deletion failed.
    """
    store = open_store(run) if isinstance(run, str | Path) else run
    latest = read_latest(store)
    heads = [head for head in sorted(_heads(store), key=lambda head: head.age) if head.own]
    kept = 0
    readable: list[_Head] = []
    for head in reversed(heads):  # a damaged checkpoint must not push out a good one
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
    """Return whether the manifest is whole; chunks are not read."""
    try:
        decode_manifest(store.read(f"{tag}/{MANIFEST}"), tag)
    except (OSError, CheckpointError, ValueError):
        return False
    return True

"""Order of a run's checkpoints: that of their commits, which each manifest's first lines number.

No clock decides it, as clocks are set back, nor do steps, as a run may go back. Only manifests of other
writers, without a number, are put where their times say.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from ckpt.background import identity
from ckpt.format import MANIFEST, is_tag
from ckpt.stores import Store
from ckpt.threads import cores, for_each

_HEAD_BYTES = 4 << 10
"""Bytes to read of a manifest: its first lines hold the tag, the number, the step and the time."""
_LINE = re.compile(r'\s*"(tag|commit|durable|step|created|run_id)": ("[^"]*"|\d+|true|false),?').fullmatch


class Head(NamedTuple):
    """First lines of a manifest, unverified: they are checked when the checkpoint is opened."""

    tag: str
    """Name of the folder."""
    own: bool
    """True if it was saved under this name, and isn't a user's copy."""
    commit: int
    """Number among the commits of the run; 0 if the manifest doesn't say."""
    durable: bool
    """False if the manifest says that a power cut may damage it."""
    step: int
    created: str
    run_id: str | None
    """Run that saved it; None if the manifest doesn't say."""
    committed_at: float

    @property
    def age(self) -> tuple[int, str, int, float, str]:
        """Sort key. Time before the step, as steps can go back; file times last, as copying changes them."""
        step = self.step if self.created else 0
        return self.commit, self.created, step, self.committed_at, self.tag


def heads_of(store: Store, *, unseen: Callable[[str, OSError], None] | None = None) -> list[Head]:
    """Return the heads of all committed checkpoints, oldest first.

    Folders that may be checkpoints, of which the place doesn't tell enough, are handed to `unseen`.

    Raises:
        OSError: there is such a folder, and no `unseen`; or nothing can be listed.
    """
    found = []
    for name in filter(is_tag, store.names()):
        try:
            head = head_of(store, name)
        except OSError as error:
            if unseen is None:
                raise
            unseen(name, error)
        else:
            found += [] if head is None else [head]
    return list(_merged(sorted(found, key=lambda head: head.age)))


def _merged(heads: list[Head]) -> Iterator[Head]:
    """Put heads without a number before the first with one that is no older by its time."""
    waiting = [head for head in heads if not head.commit]
    for head in heads:
        if head.commit:
            while waiting and waiting[0].created <= head.created:
                yield waiting.pop(0)
            yield head
    yield from waiting


def head_of(store: Store, name: str) -> Head | None:
    """Return the head of a committed checkpoint; None if there is none under this name.

    Raises:
        OSError: it can't be read, so its place in the order, its run and its name aren't known.
    """
    if not store.exists(f"{name}/{MANIFEST}"):
        return None
    try:
        values = _first_values(store, name)
        when = store.committed_at(name)
    except FileNotFoundError:  # deleted since it was listed
        return None
    step, run_id, commit = values.get("step"), values.get("run_id"), values.get("commit")
    return Head(
        tag=name,
        own=values.get("tag") == name,
        commit=commit if type(commit) is int else 0,
        durable=values.get("durable") is not False,
        step=step if type(step) is int else 0,
        created=str(values.get("created", "")),
        run_id=run_id if isinstance(run_id, str) else None,
        committed_at=when,
    )


def _first_values(store: Store, name: str) -> dict[str, Any]:
    buffer, values = bytearray(_HEAD_BYTES), dict[str, Any]()
    read = store.read_into(f"{name}/{MANIFEST}", memoryview(buffer), 0)
    for line in bytes(buffer[:read]).decode(errors="replace").split("\n"):
        found = _LINE(line)
        if found:
            with contextlib.suppress(ValueError):
                values.setdefault(found[1], json.loads(found[2]))
    return values


_known: dict[str, dict[str, int]] = {}
"""Run -> tag -> number, so that not every save reads all manifests. A wrong one costs no more than a tie."""


def next_commit(store: Store, names: Iterable[str]) -> int:
    """Return the number of the run's next commit, given the names in its folder."""
    tags = {name for name in names if is_tag(name)}
    known = _known.setdefault(identity(store.url), {})
    for gone in known.keys() - tags:
        del known[gone]

    def number(tag: str) -> int:
        try:
            found = _first_values(store, tag).get("commit")
        except OSError:  # no checkpoint, or one that nobody can read
            return 0
        return found if type(found) is int else 0

    new = sorted(tags - known.keys())
    found = zip(new, for_each(number, new, store.threads or cores()), strict=True)
    known.update({tag: commit for tag, commit in found if commit})
    return max(known.values(), default=0) + 1


def note_commit(store: Store, tag: str, number: int) -> None:
    """Remember the number of a commit of this process."""
    _known.setdefault(identity(store.url), {})[tag] = number

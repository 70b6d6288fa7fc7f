"""Tags of a run: listing checkpoints, finding the newest, deleting old ones."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckpt.background import check_last_save
from ckpt.errors import CheckpointError, as_checkpoint_error
from ckpt.format import LATEST, MANIFEST, NAMED_LATEST, WRITER, check_tag, decode_manifest, is_tag
from ckpt.order import Head, head_of, heads_of
from ckpt.stores import Store, as_store
from ckpt.stores.writer_lock import CLEANING, DELETING, say_once


def committed_tags(run: str | Path | Store) -> list[str]:
    """Return the tags of all committed checkpoints, in the order of their commits.

    Raises:
        CheckpointError: the folder can't be read.
    """
    store = as_store(run)
    with as_checkpoint_error(f"{store.where('')} can't be read"):
        return [head.tag for head in heads_of(store)]


def read_latest(run: str | Path | Store) -> str | None:
    """Return the tag that `latest` names; None if nothing was ever committed.

    Raises:
        CheckpointError: there are checkpoints but no `latest`, and none of them says that it was about to be
            named when its save ended; or `latest` names one that doesn't exist; or the folder can't be read;
            or this process's last save into the run failed, and nobody was told yet.
    """
    store = as_store(run)
    if store is not run:
        check_last_save(store.url)
    with as_checkpoint_error(f"{store.where('')} can't be read"):
        tag = _named_by_latest(store)
        if tag is None or store.exists(f"{tag}/{MANIFEST}"):
            return tag
        newer = _named_by_latest(store)  # a concurrent save may have moved `latest` and deleted the old tag
    if newer != tag:
        return newer
    problem = f"{store.where(LATEST)} names {tag!r}, which isn't a committed checkpoint"
    raise CheckpointError(f"{problem}; {there_are(store)}")


def _named_by_latest(store: Store) -> str | None:
    try:
        return _in_latest(store)
    except FileNotFoundError:
        heads = [head for head in heads_of(store) if head.own]
        if heads and store.exists(f"{heads[-1].tag}/{NAMED_LATEST}"):
            return heads[-1].tag  # the save of the first one to be named ended before it wrote `latest`
    except NotADirectoryError:
        return None
    try:
        return _in_latest(store)  # the first save may have written it meanwhile
    except FileNotFoundError:
        if not committed_tags(store):
            return None
    raise CheckpointError(f"{store.where('')} has no file {LATEST!r}; name a tag ({there_are(store)})")


def _in_latest(store: Store) -> str:
    where = store.where(LATEST)
    try:
        return check_tag(store.read(LATEST).decode().strip())
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        problem = f"{where} can't be read: {error.strerror or error}"
    except ValueError as error:
        problem = f"{where} is damaged: {error}"
    raise CheckpointError(f"{problem} ({there_are(store)})")


def there_are(store: Store) -> str:
    """List the tags of a run, for messages."""
    tags = committed_tags(store)
    return f"the tags there are: {', '.join(tags)}" if tags else "there are none"


def check_owner(run: str | Path | Store, tag: str, run_id: str | None) -> None:
    """Check that a save of the run `run_id` wouldn't replace another run's checkpoint.

    A checkpoint that doesn't name its run may be replaced, and so may any by a save that doesn't.

    Raises:
        CheckpointError: `tag` is another run's.
    """
    store = as_store(run)
    with as_checkpoint_error(f"{store.where(tag)} can't be read"):
        head = head_of(store, tag) if run_id is not None and is_tag(tag) else None
    if head is not None and head.run_id not in (None, run_id):
        raise CheckpointError(
            f"{store.where(tag)} was saved by another run ({head.run_id}; this one is {run_id}): resume from "
            "it to go on with that run, or save to another folder or tag, or delete it"
        )


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


def prune(
    run: str | Path | Store, retention: Retention, *, run_id: str | None = None, dry_run: bool = False
) -> list[str]:
    """Delete the checkpoints that `retention` doesn't keep; return their tags.

    The checkpoint that `latest` names is always kept, and so are copies under other names. A checkpoint with
    a damaged manifest is neither deleted nor counted as kept. A crash leaves each checkpoint whole or gone.
    With `run_id`, the same holds for those of other runs.

    Raises:
        CheckpointError: `latest` is damaged, or another process is writing (then nothing is deleted); or a
            deletion failed, after the others were made.
    """
    store = as_store(run)
    dropped, failures = _dropped(store, retention, run_id), list[str]()
    if dropped and not dry_run:
        with holding(store, DELETING):
            dropped, failures = delete_old(store, retention, run_id=run_id)
    if failures:
        raise CheckpointError("; ".join(failures))
    return dropped


def delete_old(
    store: Store, retention: Retention, *, run_id: str | None = None
) -> tuple[list[str], list[str]]:
    """Delete what `prune` does, as the holder of the lock; return the tags, and what couldn't be deleted.

    Raises:
        CheckpointError: `latest` is damaged; nothing is deleted.
    """
    deleted, failures = [], []
    for tag in _dropped(store, retention, run_id):
        try:
            store.delete(tag)
        except OSError as error:
            failures.append(f"{store.where(tag)} can't be deleted: {error}")
        else:
            deleted.append(tag)
    return deleted, failures


def _dropped(store: Store, retention: Retention, run_id: str | None) -> list[str]:
    """Return the tags to delete."""
    latest = read_latest(store)

    def unseen(tag: str, error: OSError) -> None:  # another user's, for example: neither counted nor deleted
        say_once(f"{store.where(tag)} can't be read, and isn't counted as kept: {error}")

    with as_checkpoint_error(f"{store.where('')} can't be read"):
        heads = [head for head in heads_of(store, unseen=unseen) if head.own]
    heads = [head for head in heads if run_id is None or head.run_id in (None, run_id)]
    kept = 0
    readable: list[Head] = []
    for head in reversed(heads):  # a damaged checkpoint must not push out a good one
        if retention.keep_last is not None and kept < retention.keep_last and not _is_whole(store, head.tag):
            continue
        kept += 1
        readable.insert(0, head)
    dropped = retention.dropped([head.tag for head in readable], [head.step for head in readable])
    return [tag for tag in dropped if tag != latest]


def clean(run: str | Path | Store) -> list[str]:
    """Remove the leftovers of interrupted saves and deletions; return their names.

    Raises:
        CheckpointError: another process is writing, or something can't be removed.
    """
    store = as_store(run)
    with as_checkpoint_error(f"{store.where('')} can't be cleaned"):
        if not store.leftovers() and WRITER not in store.names():
            return []
        with holding(store, CLEANING):
            names = store.clean()
        if left := store.leftovers():
            raise CheckpointError(f"{', '.join(map(store.where, left))} can't be removed; remove it by hand")
    return names


@contextlib.contextmanager
def holding(store: Store, what: str) -> Iterator[None]:
    """Hold the lock of the run for a while.

    Raises:
        CheckpointError: another process has it, or the folder can't be written.
    """
    try:
        with as_checkpoint_error(f"{store.where('')} can't be written"):
            store.hold(uuid.uuid4().hex, what)
        yield
    finally:
        store.release()


def _is_whole(store: Store, tag: str) -> bool:
    """Return whether the manifest is whole; chunks are not read."""
    try:
        decode_manifest(store.read(f"{tag}/{MANIFEST}"), tag)
    except (OSError, CheckpointError, ValueError):
        return False
    return True

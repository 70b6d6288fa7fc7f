"""When a checkpoint exists, and when it doesn't.

A save is written into the hidden folder `.saving.<tag>`. The commit is one rename to `<tag>`, after every
file, folder and the manifest (last) are on the disk. A crash before it leaves a hidden folder that no
reader looks at and that the next save removes. A tag that is saved again is exchanged for its replacement
in one step, so it can be read all the time. `latest` follows, replaced atomically.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ckpt import files
from ckpt.errors import CheckpointError
from ckpt.format import LATEST, MANIFEST, check_tag

_STAGING = ".saving."


def local_folder(url: str | Path) -> Path:
    """The folder that `url` names. Remote stores are refused for now."""
    if "://" in str(url):
        raise CheckpointError(f"{url}: only local folders can be read and written in this release")
    return Path(url)


def begin(run: Path, tag: str) -> Path:
    """Make the staging folder of a save, and remove what crashed saves left in the run's folder."""
    _make_durably(run)
    if (run / tag).exists() and not (run / tag / MANIFEST).exists():
        raise CheckpointError(
            f"{run / tag} exists and is not a checkpoint; save under another tag, or move it away"
        )
    for leftover in run.glob(f"{_STAGING}*"):
        shutil.rmtree(leftover)
    staging = staging_folder(run, tag)
    staging.mkdir()
    return staging


def _make_durably(folder: Path) -> None:
    """Make a folder and its parents, so that the names of those made survive a crash."""
    if not folder.is_dir():
        _make_durably(folder.parent)
        folder.mkdir(exist_ok=True)
        files.sync_folder(folder.parent)


def staging_folder(run: Path, tag: str) -> Path:
    return run / f"{_STAGING}{tag}"


def commit(run: Path, tag: str, *, durable: bool, update_latest: bool) -> None:
    """Give the staged checkpoint its name, then point `latest` at it."""
    staging, final = staging_folder(run, tag), run / tag
    if final.exists() and not (final / MANIFEST).exists():
        raise CheckpointError(
            f"{final} exists and is not a checkpoint; save under another tag, or move it away"
        )
    if final.exists():
        try:
            files.exchange_folders(staging, final)
        except OSError as error:
            raise CheckpointError(
                f"{final} exists and can't be replaced in one step on this file system ({error}); "
                "save under another tag, or delete it first"
            ) from error
    else:
        staging.rename(final)
    try:
        if durable:
            files.sync_folder(run)
        if update_latest:
            files.replace_file(run / LATEST, f"{tag}\n".encode(), durable=durable)
    except OSError as error:
        raise CheckpointError(f"{final} is committed, but {LATEST!r} may not name it: {error}") from error
    # The checkpoint that was replaced, if any. What can't be removed now, the next save removes.
    shutil.rmtree(staging, ignore_errors=True)


def abandon(run: Path, tag: str) -> None:
    """Remove the staging folder of a save that failed."""
    shutil.rmtree(staging_folder(run, tag), ignore_errors=True)


def committed_tags(run: str | Path) -> list[str]:
    """Tags that can be read, oldest commit first."""
    folder = local_folder(run)
    found = [p.parent for p in folder.glob(f"*/{MANIFEST}") if not p.parent.name.startswith(".")]
    return [p.name for p in sorted(found, key=lambda p: ((p / MANIFEST).stat().st_mtime_ns, p.name))]


def read_latest(run: str | Path) -> str | None:
    """The tag that `latest` names; None where nothing was ever committed.

    Raises:
        CheckpointError: there are checkpoints but no `latest`, or it names one that isn't there.
    """
    folder = local_folder(run)
    tags = committed_tags(folder)
    there = f"the tags there are: {', '.join(tags)}" if tags else "there are none"
    try:
        tag = check_tag((folder / LATEST).read_text().strip())
    except FileNotFoundError:
        if not tags:
            return None
        raise CheckpointError(f"{folder} has no file {LATEST!r}; name a tag ({there})") from None
    except NotADirectoryError:
        return None
    except OSError as error:
        raise CheckpointError(f"{folder / LATEST} can't be read: {error.strerror} ({there})") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / LATEST} is damaged: {error} ({there})") from None
    if tag not in tags:
        raise CheckpointError(f"{folder / LATEST} names {tag!r}, which isn't a committed checkpoint; {there}")
    return tag

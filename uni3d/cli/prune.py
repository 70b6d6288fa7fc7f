"""The commands that look after a run's checkpoints: verify, clean, prune."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uni3d.cli.terminal import AsJson, DryRun, Run, RunOnly, Tag, in_bytes, progress_bar, say, say_json

if TYPE_CHECKING:
    import ckpt
    from ckpt.stores import Store


@dataclass
class _Answer:
    """What the verification of one checkpoint gave."""

    tag: str
    url: str
    objects: int = 0
    bytes: int = 0
    """That were read."""
    seconds: float = 0.0
    problems: list[ckpt.Problem] = field(default_factory=list)

    def print(self) -> None:
        for problem in self.problems:
            say(problem)
        n = len(self.problems)
        found = f"{n} problem{'s' * (n != 1)}" if n else "whole"
        speed = self.bytes / self.seconds / 1e6 if self.seconds else 0.0
        size = f"{self.objects} objects, {in_bytes(self.bytes)}"
        say(f"{self.tag}: {found}; {size} in {self.seconds:.2f} s ({speed:.0f} MB/s)")

    def row(self) -> dict[str, Any]:
        problems = [asdict(problem) for problem in self.problems]
        return {**vars(self), "seconds": round(self.seconds, 6), "whole": not problems, "problems": problems}


def verify(
    run: Run,
    tag: Tag = None,
    every: Annotated[bool, typer.Option("--all", help="Verify every committed checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read and check every object of a checkpoint, and name what is wrong. Exit code 1 if anything is."""
    if every and tag is not None:
        raise ValueError(f"--all and --tag {tag} were both given; give one")
    answers = []
    for each in _tags(run) if every else [tag]:
        answers.append(_verify(run, each))
        if not as_json:
            answers[-1].print()
    if every and (problem := _latest(run)) is not None:
        answers.append(_Answer("latest", problem.path, problems=[problem]))
        if not as_json:
            say(problem)
    if as_json:
        say_json([answer.row() for answer in answers])
    if any(answer.problems for answer in answers):
        raise typer.Exit(1)


def _tags(run: str) -> Sequence[str | None]:
    """All of a run, oldest first; None, for the one to be found, where it is a checkpoint's own folder."""
    import ckpt

    return ckpt.committed_tags(run) or [None]


def _latest(run: str) -> ckpt.Problem | None:
    """What is wrong with the run's own file, without which the checkpoints are there but not found."""
    import ckpt

    try:
        ckpt.read_latest(run)
    except ckpt.CheckpointError as error:
        return ckpt.Problem(path=ckpt.open_store(run).where("latest"), what=f"can't be followed: {error}")
    return None


def _verify(run: str, tag: str | None) -> _Answer:
    import ckpt

    try:
        checkpoint = ckpt.open_checkpoint(run, tag)
    except ckpt.CheckpointError as error:
        folder = _committed(run, tag)
        if folder is None:
            raise
        what = f"can't be opened: {error}"
        return _Answer(folder.rpartition("/")[2], folder, problems=[ckpt.Problem(path=folder, what=what)])
    answer = _Answer(checkpoint.tag, checkpoint.url)
    answer.objects, size = ckpt.extent(checkpoint)
    begin = time.perf_counter()
    with progress_bar(f"verifying {checkpoint.tag}", size) as advance:

        def progress(n: int) -> None:
            answer.bytes += n
            advance(n)

        answer.problems = ckpt.verify(checkpoint, progress=progress)
    answer.seconds = time.perf_counter() - begin
    return answer


def _committed(run: str, tag: str | None) -> str | None:
    """Where the checkpoint lies that was asked for and can't be opened; None where there is no such one."""
    import ckpt
    from ckpt.format import MANIFEST

    store = ckpt.open_store(run)
    if tag is None and store.exists(MANIFEST):
        return store.where("").rstrip("/")
    tag = ckpt.read_latest(store) if tag is None else tag
    return store.where(tag) if tag in ckpt.committed_tags(store) else None


def clean(run: RunOnly, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Remove what saves and deletions that crashed left behind.

    No save may be going on in the run meanwhile: it looks the same, and would lose what it has written.
    """
    store = run_store(run)
    names = store.leftovers() if dry_run else store.clean()
    if as_json:
        say_json({"removed": names, "dry_run": dry_run})
        return
    for name in names:
        say(f"{'would remove' if dry_run else 'removed'} {name}")
    if not names:
        say(f"{store.where('')}: nothing to remove")


def prune(
    run: RunOnly,
    keep_last: Annotated[int, typer.Option(min=1, help="Keep this many of the newest.")],
    keep_every: Annotated[
        int | None, typer.Option(min=1, help="And those whose step is a multiple of this.")
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Delete old checkpoints. Each stops existing in one step; what `latest` names is always kept."""
    import ckpt

    retention = ckpt.Retention(keep_last=keep_last, keep_every=keep_every)
    store = run_store(run)
    tags = ckpt.committed_tags(store)
    if not tags:
        raise ckpt.CheckpointError(
            f"{store.where('')} holds no committed checkpoint; give the folder that a run was saved to"
        )
    deleted = ckpt.prune(store, retention, dry_run=dry_run)
    kept = [tag for tag in tags if tag not in deleted]
    if as_json:
        say_json({"deleted": deleted, "kept": kept, "dry_run": dry_run})
        return
    for tag in deleted:
        say(f"{'would delete' if dry_run else 'deleted'} {tag}")
    say(f"{'would keep' if dry_run else 'kept'} {', '.join(kept)}")


def run_store(run: str) -> Store:
    """The place of a run that must be there: a mistyped name must not look like one with nothing to do."""
    import ckpt
    from ckpt.format import MANIFEST

    store = ckpt.open_store(run)
    if store.exists(MANIFEST):
        what = "is one checkpoint's own folder"
    elif not store.exists(""):
        what = "is not a folder"
    else:
        return store
    raise ckpt.CheckpointError(f"{store.where('')} {what}; give the folder that a run was saved to")

"""`uni3d verify`: check the data of checkpoints against their checksums."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from typer import Exit, Option

from uni3d.cli.terminal import AsJson, Run, Tag, plural, progress_bar, say, say_json
from uni3d.units import format_bytes

if TYPE_CHECKING:
    import ckpt


@dataclass
class _Result:
    """Result of verifying one checkpoint."""

    tag: str
    url: str
    objects: int = 0
    bytes: int = 0
    """Bytes that were read."""
    seconds: float = 0.0
    problems: list[ckpt.Problem] = field(default_factory=list)

    def print(self) -> None:
        for problem in self.problems:
            say(problem)
        found = plural(len(self.problems), "problem") if self.problems else "ok"
        speed = self.bytes / self.seconds / 1e6 if self.seconds else 0.0
        size = f"{self.objects} objects, {format_bytes(self.bytes)}"
        say(f"{self.tag}: {found}; {size} in {self.seconds:.2f} s ({speed:.0f} MB/s)")

    def row(self) -> dict[str, Any]:
        problems = [asdict(problem) for problem in self.problems]
        return {**vars(self), "seconds": round(self.seconds, 6), "whole": not problems, "problems": problems}


def verify(
    run: Run,
    tag: Tag = None,
    every: Annotated[bool, Option("--all", help="Verify every committed checkpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read a checkpoint and check all of its data.

    Exits with 1 if anything is damaged or missing.
    """
    import ckpt

    if every and tag is not None:
        raise ValueError(f"--all and --tag {tag} are mutually exclusive")
    results = []
    tags: Sequence[str | None] = ckpt.committed_tags(run) if every else [tag]
    for each in tags or [None]:  # a single checkpoint's folder has no tags
        results.append(_verify(run, each))
        if not as_json:
            results[-1].print()
    if every and (problem := _latest(run)) is not None:
        results.append(_Result("latest", problem.path, problems=[problem]))
        if not as_json:
            say(problem)
    if as_json:
        say_json([result.row() for result in results])
    if any(result.problems for result in results):
        raise Exit(1)


def _latest(run: str) -> ckpt.Problem | None:
    """Return the problem with the run's file `latest`, without which no checkpoint is found by default."""
    import ckpt

    try:
        ckpt.read_latest(run)
    except ckpt.CheckpointError as error:
        return ckpt.Problem(path=ckpt.open_store(run).where("latest"), what=f"can't be followed: {error}")
    return None


def _verify(run: str, tag: str | None) -> _Result:
    import ckpt

    try:
        checkpoint = ckpt.open_checkpoint(run, tag)
    except ckpt.CheckpointError as error:
        try:
            folder = _committed(run, tag)
        except OSError:  # nothing there can be read
            raise error from None
        if folder is None:
            raise
        what = f"can't be opened: {error}"
        return _Result(folder.rpartition("/")[2], folder, problems=[ckpt.Problem(path=folder, what=what)])
    result = _Result(checkpoint.tag, checkpoint.url)
    result.objects, size = ckpt.extent(checkpoint)
    begin = time.perf_counter()
    with progress_bar(f"verifying {checkpoint.tag}", size) as advance:

        def progress(n: int) -> None:
            result.bytes += n
            advance(n)

        result.problems = ckpt.verify(checkpoint, progress=progress)
    result.seconds = time.perf_counter() - begin
    return result


def _committed(run: str, tag: str | None) -> str | None:
    """Return the folder of a committed checkpoint that can't be opened, or None if there is no such tag."""
    import ckpt
    from ckpt.format import MANIFEST

    store = ckpt.open_store(run)
    if tag is None and store.exists(MANIFEST):
        return store.where("").rstrip("/")
    tag = ckpt.read_latest(store) if tag is None else tag
    return store.where(tag) if tag in ckpt.committed_tags(store) else None

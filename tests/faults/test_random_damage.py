"""Random damage to a checkpoint: a read tells of it or has the right numbers, and `verify` names it all.

`tests/ckpt/test_corruption.py` and `test_verify.py` go through the places of each kind; this one mixes.
"""

from pathlib import Path
from random import Random
from urllib.parse import unquote

import pytest
from budget import seeds
from ckpt_helpers import files_below, same
from ckpt_saved import BETWEEN, Places, Saved
from damage import OTHER, TAG, Files, damaged, is_data, put
from figures import Campaign
from situations import Case, Problems, arrays_of, saving

import ckpt
from ckpt import CheckpointError, open_checkpoint

MANIFEST, PART = f"{TAG}/manifest.json", f"{TAG}/arrays.0.json"


class Subject:
    """A run with two checkpoints, of which one is damaged."""

    def __init__(self, run: Path, files: str) -> None:
        self.run = run
        case = Case("fresh", 2, files, True)
        for tag, numbers in ((TAG, "new"), (OTHER, "other")):
            for result in saving(case, run, new=numbers, tag=tag)():
                assert not isinstance(result, BaseException)
        self.files: Files = files_below(run)
        saved = Saved(str(run))
        self.places = {f"{TAG}/{path}": saved.places(path) for path in saved.files}
        self.arrays = arrays_of("new", True)

    def chunks(self, path: str, after: bytes) -> tuple[list[int], bool]:
        """Return the positions of the chunks of a file that changed, and whether anything else did."""
        before, at = self.files[path], self.places[path]
        if before == after:
            return [], False
        chunks, outside = [], before[at.index :] != after[at.index :]
        for i in range(len(at.chunks)):
            begin, end = i * at.stride, i * at.stride + at.payload + 4
            if before[begin:end] != after[begin:end]:
                chunks.append(i)
            gap = slice(end, min((i + 1) * at.stride, at.index))
            outside |= before[gap] != after[gap]
        return chunks, outside

    def reads(self, path: str, after: bytes) -> list[int]:
        """Return the positions of the chunks that a read of the array finds changed."""
        before, at = self.files[path], self.places[path]
        begins = [i * at.stride for i in range(len(at.chunks))]
        return [i for i, b in enumerate(begins) if before[b : b + at.payload] != after[b : b + at.payload]]


def check(subject: Subject, after: Files) -> Problems:
    """Read everything and verify; return what is wrong with what they say."""
    before, run = subject.files, subject.run
    changed = [path for path in before if path.startswith(TAG) and after.get(path) != before[path]]
    try:
        checkpoint = open_checkpoint(run, TAG)
    except CheckpointError as error:
        told = str(run / MANIFEST if MANIFEST in after else run)
        return [] if MANIFEST in changed and told in str(error) else [("other", f"opening it: {error}")]
    if MANIFEST in changed:
        return [("wrong", "a damaged manifest is opened")]
    problems = check_reads(subject, checkpoint, after, changed)
    told = {problem.path: problem for problem in ckpt.verify(checkpoint, threads=1)}
    for path in changed:
        problem = told.pop(str(run / path), None)
        if problem is None:
            if not (PART in changed and "/atoms/" in path) and as_json_same(before[path], after.get(path)):
                problems.append(("wrong", f"verify doesn't notice {path}"))
            continue
        names = [*map(unquote, path.split("/")[2:-1]), "", ""][:2] if "/atoms/" in path else ["", ""]
        if [problem.atom, problem.state] != names:
            problems.append(("other", f"verify names {problem.atom}/{problem.state} for {path}"))
        if is_data(path) and len(after.get(path, b"")) == len(before[path]):
            chunks, outside = subject.chunks(path, after[path])
            expected = [subject.places[path].damaged(*chunks)] if chunks else []
            expected += [BETWEEN] if outside else []
            if problem.what != ", and ".join(expected):
                problems.append(("other", f"verify says {problem.what!r} of {path}, not {expected}"))
    if PART not in changed:
        problems += [("other", f"verify tells of {path}") for path in told]
    return problems


def as_json_same(before: bytes, after: bytes | None) -> bool:
    """Return whether the content must be noticed: white space of a zarr.json has no meaning."""
    return after is None or b"".join(before.split()) != b"".join(after.split())


def check_reads(subject: Subject, checkpoint: ckpt.Checkpoint, after: Files, changed: list[str]) -> Problems:
    problems: Problems = []
    for key, expected in subject.arrays.items():
        folder = f"{TAG}/atoms/{'/'.join(key)}"
        own = [path for path in changed if path.startswith(f"{folder}/c")]
        touched = {path: subject.reads(path, after.get(path, b"")) for path in own}
        touched = {path: found for path, found in touched.items() if found}
        try:
            found = checkpoint.read(*key)
        except CheckpointError as error:
            if PART in changed:
                named = str(subject.run / PART) in str(error)
            else:
                named = any(
                    f"{'/'.join(key)} chunk {subject.places[path].chunks[i]}" in str(error)
                    and str(subject.run / path) in str(error)
                    for path, numbers in touched.items()
                    for i in numbers
                )
            if not named:
                problems.append(("other", f"reading {key}: {error}"))
            continue
        if not same(found, expected):
            problems.append(("wrong", f"{key} has other numbers"))
        elif touched or PART in changed:
            problems.append(("wrong", f"reading {key} doesn't notice {[*touched] or PART}"))
    return problems


@pytest.fixture(scope="module")
def subjects(memory_path: Path) -> list[Subject]:
    return [Subject(memory_path / f"damage-{files}", files) for files in ("array", "writer")]


def test_random_damage(subjects: list[Subject]) -> None:
    assert all(isinstance(at, Places) for subject in subjects for at in subject.places.values())
    assert any(len(at.chunks) > 1 for subject in subjects for at in subject.places.values())
    chosen = seeds(sample=150, everything=16_000)
    campaign = Campaign("damage to a checkpoint", len(chosen))
    for seed in chosen:
        rng = Random(seed)
        subject = rng.choice(subjects)
        what, after = damaged(subject.files, rng)
        if after == subject.files:
            continue  # zeros where zeros were, or twins exchanged
        put(subject.run, after, subject.files)
        campaign.point(seed, what, check(subject, after))
        put(subject.run, subject.files, after)
    campaign.end()
    for subject in subjects:
        assert check(subject, subject.files) == []

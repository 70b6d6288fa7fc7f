"""The trial of one peer, in a process that is started with `calls.c` preloaded; `peers.py` does that.

Everything happens in children that are forked from it: the save that dies, and each load.
"""

import argparse
import contextlib
import gc
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

FAULTS = Path(__file__).parent
sys.path[:0] = [str(FAULTS), str(FAULTS.parents[1])]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from damage import Files, put  # noqa: E402
from peer_damage import damaged  # noqa: E402
from peer_kinds import PEERS, WAYS, Arrays, Peer  # noqa: E402
from power import Disk  # noqa: E402
from preload import Call, preloaded, read_log, watch  # noqa: E402

SECONDS, MEMORY = 120, 32 << 30
"""Longest life of a child process, and most of its address space, rather than a hang or a full machine."""
PARTS = (0.0, 0.5)
"""Parts of a write that are done before the process dies in it."""
OLD, NEW = 1, 2


def child(work: Callable[[], Any]) -> Any:
    """Do `work` in a forked process; return what it returns, an exception of its own, or how it ended."""
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(SECONDS)
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1), os.dup2(silence, 2)
            try:
                answer = work()
            except BaseException as error:  # DCP's is no Exception
                answer = RuntimeError(f"{type(error).__name__}: {error}")
            with open(sending, "wb") as file:
                pickle.dump(answer, file)
        finally:
            os._exit(0)
    os.close(sending)
    with open(receiving, "rb") as file:
        answer = file.read()
    end = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert end != -signal.SIGALRM, "a child took too long, of which nothing follows"
    return pickle.loads(answer) if answer else EndedError(end)


class EndedError(Exception):
    """A child ended without an answer, by an exit code or minus a signal."""


def done(answer: Any) -> Any:
    """Return a child's answer, which may be no error."""
    if isinstance(answer, BaseException):
        raise answer
    return answer


def equal(a: Arrays, b: Arrays) -> bool:
    """Return whether all arrays are the same, bit for bit."""
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def files_below(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Subject:
    """A peer's run, saved one way, to which faults happen."""

    def __init__(self, peer: Peer, way: str, folder: Path) -> None:
        self.peer, self.way, self.crashes = peer, way, 0
        self.tags = {OLD: "step-1" if way == "next" else "only", NEW: "step-2" if way == "next" else "only"}
        self.before, self.run = folder / "before", folder / "run"
        self.arrays: dict[int, Arrays] = {
            s: done(child(lambda s=s: peer.trainer(s).arrays())) for s in self.tags
        }
        self.before.mkdir()
        done(child(lambda: self.save(self.before, OLD)))

    def save(self, run: Path, step: int, **fault: Any) -> None:
        trainer = self.peer.trainer(step)
        if step == NEW:
            self.peer.go_on(run, self.tags[OLD], trainer)
        if fault:
            watch(run, **fault)
        self.peer.save(run, self.tags[step], trainer)

    def fresh(self) -> Path:
        """Return the run's folder, with the older checkpoint alone."""
        shutil.rmtree(self.run, ignore_errors=True)
        return Path(shutil.copytree(self.before, self.run))

    def held(self, step: int) -> str:
        """Load a step's tag in a process of its own; return whose numbers it has, `wrong` or `error`."""

        def load() -> Arrays:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            trainer = self.peer.trainer(0)
            self.peer.load(self.run, self.tags[step], trainer)
            return trainer.arrays()  # type: ignore[no-any-return]

        found = child(load)
        self.crashes += isinstance(found, EndedError)
        if isinstance(found, BaseException):
            return "error"
        names = [name for name, step in (("old", OLD), ("new", NEW)) if equal(found, self.arrays[step])]
        return names[0] if names else "wrong"

    def left(self, *, returned: bool) -> set[str]:
        """Look at what a save left that was cut off, or that `returned` before; return the kinds of harm."""
        newest = child(lambda: self.peer.newest(self.run))
        if self.way == "over":
            allowed = ("new",) if returned else ("old", "new")
            found = self.held(NEW) if newest == self.tags[NEW] else "none"
            if found in allowed:
                return set()
            return {"lost"} | ({"torn"} if found == "error" else {"wrong"} if found == "wrong" else set())
        older = self.held(OLD)
        harm = set() if older == "old" else {"lost"} | ({"wrong"} if older in ("new", "wrong") else set())
        if newest == self.tags[NEW]:
            found = self.held(NEW)
            harm |= {"new": set(), "error": {"torn"}}.get(found, {"wrong"})
        elif newest != self.tags[OLD] or returned:
            harm.add("lost")
        return harm


def traced(subject: Subject) -> list[Call]:
    """Do the save of the second checkpoint; return its calls."""
    run, log = subject.fresh(), subject.run.with_name("log")

    def work() -> None:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        subject.save(run, NEW, log=fd)

    done(child(work))
    calls = read_log(log)
    assert calls, "the save made no call that was seen"
    assert subject.held(NEW) == "new", "the checkpoint isn't loaded as it was saved"
    return calls


def kills(subject: Subject, calls: list[Call], most: int, rng: Random) -> Counter[str]:
    """Kill saves at their calls; count the points and what was harmed."""
    points = [
        (k, p) for k, call in enumerate(calls, 1) for p in (PARTS if call.name == "write" else PARTS[:1])
    ]
    figures: Counter[str] = Counter(calls=len(calls), points=0)
    for k, part in rng.sample(points, min(most, len(points))):
        run = subject.fresh()
        end = child(lambda k=k, part=part, run=run: subject.save(run, NEW, kill_at=k, part=part))
        if not isinstance(end, EndedError):
            done(end)
            continue  # threads made fewer calls this time
        assert end.args == (-signal.SIGKILL,)
        figures["points"] += 1
        figures.update(subject.left(returned=False))
    return figures


def cuts(subject: Subject, calls: list[Call], most: int, rng: Random) -> Counter[str]:
    """Cut the power during saves or at their end; count the states and what was harmed."""

    def parts(path: str) -> tuple[str, ...]:
        return Path(path).relative_to(subject.run).parts

    figures: Counter[str] = Counter(points=0)
    seen: set[int] = set()
    for _ in range(most):
        disk, n = Disk(subject.before), rng.choice((rng.randint(0, len(calls)), len(calls)))
        for call in calls[:n]:
            if call.name == "write":
                disk.do(("write", parts(call.path), call.offset, call.data))
            elif call.name != "failed":
                disk.do((call.name, *(parts(path) for path in (call.path, call.other) if path)))
        state = disk.cut(rng)
        state.tree()
        identity = hash((state.identity(), n == len(calls)))
        if identity in seen:
            continue
        seen.add(identity)
        shutil.rmtree(subject.run, ignore_errors=True)
        state.make(subject.run)
        figures["points"] += 1
        figures.update(subject.left(returned=n == len(calls)))
    return figures


def damages(subject: Subject, most: int, rng: Random) -> Counter[str]:
    """Damage the finished second checkpoint; count what the loads said."""
    run, tags = subject.fresh(), subject.tags
    done(child(lambda: subject.save(run, NEW)))
    files = files_below(run)
    own = sorted(path for path in files if subject.peer.is_of(path, tags[NEW]))
    twins = {path: path.replace(tags[NEW], tags[OLD], 1) for path in own}
    older = {path: twin for path, twin in twins.items() if twin in files} if len(own) > 1 else {}
    figures: Counter[str] = Counter(tried=0)
    subject.crashes = 0
    for _ in range(most):
        what, after = damaged(files, own, older, rng)
        if after == files:
            continue
        put(run, after, files)
        found = {"error": "noticed", "new": "harmless"}.get(subject.held(NEW), "wrong")
        figures.update(("tried", found, f"{what.split()[0]}: {found}"))
        put(run, files, after)
    assert subject.held(NEW) == "new"
    return figures + Counter(crashes=subject.crashes)


def one(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Try one peer; return its figures by way."""
    assert preloaded()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    peer, found = PEERS[name], {}
    for way in arguments.ways:
        rng = Random(f"{arguments.seed} {way}")
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            with contextlib.redirect_stderr(None), tempfile.TemporaryDirectory() as other:
                peer.warm(Path(other))
            gc.freeze()  # or each child copies what the collector touches
            subject = Subject(peer, way, Path(folder))
            calls = traced(subject)
            found[way] = {"kill": kills(subject, calls, arguments.points // peer.slow, rng)}
            found[way]["cut"] = cuts(subject, calls, arguments.cuts // peer.slow, rng)
            if way == WAYS[0]:
                found[way]["damage"] = damages(subject, arguments.damages // peer.slow, rng)
    return {"title": peer.title(), "ways": found}


if __name__ == "__main__":
    name, settings = sys.argv[1], argparse.Namespace(**json.loads(sys.argv[2]))
    print(json.dumps(one(name, settings)))

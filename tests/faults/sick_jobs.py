"""A job in which a rank falls sick: starts the ranks, watches how they end, and checks what they leave."""

import json
import os
import re
import select
import shutil
import signal
import time
import traceback
from pathlib import Path
from typing import Any

from ckpt_helpers import Arrays, save_arrays
from sick_ranks import STORE_TIMEOUT, Rank, Schedule

from ckpt import CheckpointError, committed_tags, open_checkpoint, read_latest, verify

START = 60.0
HANG = 60.0
"""Seconds after which a rank that doesn't end hangs."""
ENDED = "at its end"
SLACK = 5.0
"""Seconds that a busy machine may take for what isn't waiting."""
LOOKS_FOR_A_REASON = 5.0
"""Seconds for which a rank asks the store why it lost a connection in a step."""
OF_THE_STORE = (
    "rendezvous store is lost",
    "so is that to the rendezvous store",
    "the rendezvous store has given",
)
"""Words of a rank that has lost the store."""
GATHERING = "load_checkpoint() failed"
"""Words of a load's error if a rank was lost after all was read."""


class Member:
    """A rank's process, as its watcher sees it."""

    def __init__(self, pid: int, told: int, hears: int) -> None:
        self.pid, self.told, self.hears = pid, told, hears
        self.said: dict[str, Any] = {}
        self.told_at: dict[str, float] = {}
        self.code: int | None = None
        self.stopped = False
        self.rest = b""

    def read(self) -> None:
        data = os.read(self.told, 1 << 16)
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            what = json.loads(line)
            self.said |= what
            self.told_at |= dict.fromkeys(what, time.monotonic())

    def look(self) -> None:
        """Note whether the process has ended or stopped."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if pid and os.WIFSTOPPED(status):
                self.stopped = True
            elif pid and not os.WIFCONTINUED(status):
                self.code = os.waitstatus_to_exitcode(status)

    def go(self) -> None:
        try:
            os.write(self.hears, b"g")
        except BrokenPipeError:
            return

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.code is None:
            os.kill(self.pid, number)


class Job:
    """One schedule. `rank` is set in the process of a rank alone."""

    def __init__(self, schedule: Schedule, folder: Path) -> None:
        self.schedule, self.folder = schedule, folder
        self.members: list[Member] = []
        self.rank: int | None = None
        self.problems: list[tuple[str, str]] = []
        self.agent = 0
        self.notes: dict[str, Any] = {}

    def run(self) -> int:
        """Do the job; return the exit code of this process, which is a rank's or the watcher's."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        try:
            code = self.start()
            if self.rank is not None:
                return code
            self.watch()
        except Exception:
            if self.rank is not None:
                raise
            self.problems.append(("other", traceback.format_exc()))
        finally:
            if self.rank is None:
                self.end()
        return 0

    def end(self) -> None:
        for member in self.members:
            member.look()
            member.kill()
        if self.agent:
            os.kill(self.agent, signal.SIGKILL)
        if not self.problems:
            shutil.rmtree(self.folder)
        seed = self.schedule.seed
        found = {"seed": seed, "label": str(self.schedule), "problems": self.problems, "notes": self.notes}
        self.folder.with_suffix(".json").write_text(json.dumps(found))

    # --- processes -------------------------------------------------------------------------------------

    def start(self) -> int:
        if self.schedule.store == "torchrun":
            self.start_store()
        for rank in range(self.schedule.world):
            (told, tells), (hears, hear) = os.pipe(), os.pipe()
            pid = os.fork()
            if pid == 0:
                self.rank = rank
                for end in (told, hear, *(end for m in self.members for end in (m.told, m.hears))):
                    os.close(end)
                return Rank(self.schedule, rank, self.folder, tells, hears).live()
            os.close(tells)
            os.close(hears)
            self.members.append(Member(pid, told, hear))
        return 0

    def start_store(self) -> None:
        """Start a process that has the rendezvous store, as torchrun's has."""
        self.agent = os.fork()
        if self.agent == 0:
            try:
                self.store = Rank(self.schedule, 0, self.folder, -1, -1).start_store()
                time.sleep(300)
            finally:
                os._exit(0)

    def until(self, done: Any, seconds: float) -> bool:
        """Read what the ranks tell until `done()`; return False if it took too long."""
        deadline = time.monotonic() + seconds
        while True:
            for member in self.members:
                member.look()
            readable = [m.told for m in self.members if m.told >= 0]
            ready, _, _ = select.select(readable, [], [], 0)
            for member in self.members:
                if member.told in ready:
                    before = len(member.said)
                    member.read()
                    if len(member.said) == before and member.code is not None:
                        os.close(member.told)
                        member.told = -1
            if done():
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)

    # --- the course of a job ---------------------------------------------------------------------------

    def watch(self) -> None:
        s, members = self.schedule, self.members
        sick = members[s.rank]
        others = [member for member in members if member is not sick]
        if not self.until(lambda: all("ready" in m.said or m.code is not None for m in members), START):
            self.tell_hang("while it starts", members)
            return
        if any("ready" not in m.said for m in members):
            self.wrong(f"it didn't start: {self.logs()}")
            return
        older = held(self.folder / "run", "t1")
        expected = held(self.folder / "expected", "t2") if s.saves else {}
        for member in members:
            member.go()
        if not self.until(lambda: "sick" in sick.said, START):
            self.tell_hang("before a rank was sick", members)
            return
        if s.how == "paused":
            self.until(lambda: sick.stopped, 5)
            time.sleep(0.3 * s.timeout)
            sick.kill(signal.SIGCONT)
        well = s.how in ("slow", "paused")
        waited_for = members if well else others
        if not self.until(lambda: all(ended(m) for m in waited_for), HANG):
            self.tell_hang("after a rank was sick", waited_for)
            return
        if s.how == "raises" and not s.lives_on:
            assert "ended" in sick.said or self.until(lambda: ended(sick), HANG)
        for member in others:
            member.go()
        if not self.until(lambda: all(m.code is not None for m in others), HANG):
            self.tell_hang(ENDED, others)
            return
        if s.how == "stopped" and s.lives_on:
            sick.kill(signal.SIGCONT)
        elif s.how == "stopped":
            sick.kill()
        sick.go()
        if not self.until(lambda: sick.code is not None, HANG):
            self.tell_hang(ENDED, [sick])
            return
        self.check_ends(sick, others)
        self.check_run(others, older, expected)

    def tell_hang(self, when: str, members: list[Member]) -> None:
        hanging = [
            self.members.index(m) for m in members if (m.code is None and when != ENDED) or not ended(m)
        ]
        for member in self.members:
            member.kill(signal.SIGUSR1)
            member.kill(signal.SIGCONT)
        time.sleep(1)
        self.problems.append(("other", f"HANG {when} of ranks {hanging}: {self.logs()}"))

    def logs(self) -> str:
        texts = [path.read_text()[-6000:] for path in sorted(self.folder.glob("rank*"))]
        return "\n".join(f"--- rank {rank}:\n{text}" for rank, text in enumerate(texts))

    # --- checks ----------------------------------------------------------------------------------------

    def wrong(self, text: str) -> None:
        self.problems.append(("other", text))

    def check_ends(self, sick: Member, others: list[Member]) -> None:
        s = self.schedule
        for member in [*others, sick]:
            own = {"killed": -signal.SIGKILL, "stopped": 3 if s.lives_on else -signal.SIGKILL}
            said = member.said.get("ended")
            expected = own.get(s.how) if member is sick else None
            if expected in (None, 3):
                expected = None if said is None else 3 if said else 0
            if member.code != expected:
                rank = self.members.index(member)
                self.wrong(f"rank {rank} ended with {member.code}, not {expected}: {self.logs()}")
        texts = {m.said["text"] for m in others if m.said["ended"]}
        self.notes = {
            "fell": sick.said["sick"],
            "points": sick.said.get("points"),
            "texts": sorted(texts),
            "seconds": max(m.told_at["ended"] for m in others) - sick.told_at["sick"],
        }
        if s.how in ("slow", "paused"):
            if texts or sick.said["ended"]:
                self.wrong(f"a rank that was only {s.how} wasn't waited for: {texts} {sick.said}")
            return
        if s.how == "raises" and not sick.said["ended"]:
            return  # something has coped with it
        # A load ends with gathering parameters, for which a step's rules hold.
        gathers = s.work in ("step", "initialize") or any(GATHERING in text for text in texts)
        late = (s.group_timeout + LOOKS_FOR_A_REASON if gathers else s.timeout) + SLACK
        late += STORE_TIMEOUT if s.stops_the_store else 0.0
        if self.notes["seconds"] > late:
            self.wrong(f"the others ended after {self.notes['seconds']:.1f} s: {texts}")
        if not texts:
            return
        if len(texts) > 1 and not gathers and not s.takes_the_store:
            self.wrong(f"the ranks say different things: {texts}")
        for member in others:
            if member.said["ended"]:
                self.check_error(member.said["ended"].split(), member.said["text"])

    def check_error(self, kinds: list[str], text: str) -> None:
        s = self.schedule
        if s.work in ("step", "initialize") and not (s.work == "initialize" and "CheckpointError" in kinds):
            work = "initialize()" if s.work == "initialize" else "step 2: train_batch()"
            if "RankFailedError" not in kinds:
                self.wrong(f"{kinds[0]}: {text}")
            elif not text.startswith(f"{work} failed"):
                self.wrong(f"the work isn't named: {text}")
            elif not re.search(rf"\branks? ([0-9]+, )*{s.rank}\b", text) and not self.store_is_gone(text):
                self.wrong(f"rank {s.rank} isn't named: {text}")
            return
        if s.work == "load" and "RankFailedError" in kinds and GATHERING in text:
            return
        if "CheckpointError" not in kinds:
            self.wrong(f"{kinds[0]}: {text}")
        work = r"the save (of t2|at step 2, before it is written): "
        if s.work in ("load", "initialize"):
            work = r"the (load from|look for the newest checkpoint of) .*run: "
        agreed = s.how == "raises" and text.endswith(f"(rank {s.rank})")  # it was asked, and has told
        if not re.match(work, text) and not agreed:
            self.wrong(f"the work isn't named: {text}")
        if not re.search(rf"\brank {s.rank}\b", text):
            self.wrong(f"rank {s.rank} isn't named: {text}")

    def store_is_gone(self, text: str) -> bool:
        """Return whether a rank may not know the reason, as rank 0 had the store and ended before it."""
        s = self.schedule
        if s.takes_the_store and "its own last output says why" in text:
            return True  # of another rank, which had no way to tell why it closed its connections
        return s.store == "rank 0" and any(words in text for words in OF_THE_STORE)

    def check_run(self, others: list[Member], older: Arrays, expected: Arrays) -> None:
        run, s = self.folder / "run", self.schedule
        there, latest = committed_tags(run), read_latest(run)
        if "t1" not in there:
            self.problems.append(("lost", "t1"))
        elif differ(older, held(run, "t1")):
            self.problems.append(("wrong", "t1 has other numbers"))
        saved = "t2" in there
        if saved and (not s.saves or differ(expected, held(run, "t2"))):
            self.problems.append(("wrong", "t2 has other numbers"))
        returned = s.saves and not all(m.said["ended"] for m in others)
        if returned and not (saved and latest == "t2"):
            self.problems.append(
                ("lost", f"the save of t2 returned, but there are {there}, latest is {latest}")
            )
        if latest not in there or latest not in ("t1", "t2"):
            self.problems.append(("lost", f"latest names {latest}, and there are {there}"))
        for tag in there:
            self.problems += [("torn", str(p)) for p in verify(open_checkpoint(run, tag), threads=1)]
        self.next_save(run, older)

    def next_save(self, run: Path, arrays: Arrays) -> None:
        """Save again: it must work, and take away what the other save has left."""
        try:
            save_arrays(run, "t3", {key: a + 1 for key, a in arrays.items()}, document={})
        except CheckpointError as error:
            self.wrong(f"the next save fails: {error}")
            return
        if read_latest(run) != "t3" or differ({key: a + 1 for key, a in arrays.items()}, held(run, "t3")):
            self.wrong("the next save's numbers")
        for path in run.iterdir():
            if path.name.startswith("."):
                self.wrong(f"{path.name} is left")


def ended(member: Member) -> bool:
    return "ended" in member.said or member.code is not None


def held(run: Path, tag: str) -> Arrays:
    checkpoint = open_checkpoint(run, tag)
    return {tuple(key): checkpoint.read(*key) for key in checkpoint.arrays}


def differ(a: Arrays, b: Arrays) -> bool:
    return a.keys() != b.keys() or any(a[key].tobytes() != b[key].tobytes() for key in a)

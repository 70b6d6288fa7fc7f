"""Schedules of ranks that fall sick in a step, a save, a load or `initialize`, and a rank's part in one."""

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from models import ADAM, WIDTH, Stack, global_batches, make_engine, micro_batches, seeded
from torch import Tensor, nn

import uni3d
from parallel import store_calls

PACKAGES = tuple(
    str(Path(uni3d.__file__).parents[1] / name) + os.sep for name in ("uni3d", "parallel", "ckpt")
)
TORCH = str(Path(torch.__file__).parent)
HERE = str(Path(__file__))
GROUP_TIMEOUTS = {"step": 4.0, "load": 4.0, "initialize": 6.0, "save": 60.0, "background": 60.0}
"""Timeout of the process group in seconds, by the work: that of a step's collectives, and of the wait for a
rank that doesn't come to `initialize`."""
STORE_TIMEOUT = 8.0
"""Seconds that the rendezvous store gets for an answer; a busy machine needs some."""
PATIENT = timedelta(seconds=60)
TOPOLOGIES = (
    *({"world": 2, "zero": zero} for zero in range(4)),
    *({"world": 3, "zero": zero} for zero in range(4)),
    {"world": 2, "tp": 2},
    {"world": 2, "pp": 2},
    {"world": 3, "pp": 3},
    {"world": 4, "zero": 3},
    {"world": 4, "zero": 1, "tp": 2},
    {"world": 4, "zero": 3, "tp": 2},
    {"world": 4, "zero": 2, "pp": 2},
    {"world": 4, "tp": 2, "pp": 2},
)
POINTS = {
    "step": {"forward": 10, "backward": 6, "optimizer": 45, "collective": 300, "call": 700},
    "save": {"exchange": 220, "call": 3_500},
    "background": {"exchange": 220, "call": 3_500},
    "load": {"exchange": 220, "call": 3_500},
}
OF_INITIALIZE = {"exchange": 60, "collective": 150, "call": 1_800}
"""Kinds of points of each work, and about how many there are: after fewer, a rank falls sick at the end."""
INITIALIZE = 1_000_000
"""First seed of the schedules in which a rank falls sick in `initialize`."""
HOW = ("killed", "killed", "stopped", "stopped", "raises", "raises", "slow", "paused")
ERRORS = (RuntimeError, MemoryError, OSError, KeyboardInterrupt)


@dataclass(frozen=True)
class Schedule:
    """A job of a few ranks of which one falls sick."""

    seed: int
    world: int
    zero: int
    tp: int
    pp: int
    work: str
    """Work in which it does: `step`, `save`, `background` (a background save), `load` or `initialize`."""
    point: str
    """Kind of the calls that are counted: see `matches`."""
    nth: int
    rank: int
    how: str
    lives_on: bool
    """True if ranks that raised stay until all have, and one that was stopped goes on in the end."""
    store: str
    """Owner of the process that has the rendezvous store: `torchrun` or `rank 0`."""
    timeout: float
    """`checkpoint.timeout_seconds`."""

    def __str__(self) -> str:
        ranks = f"{self.world} ranks, zero {self.zero}, tp {self.tp}, pp {self.pp}, store of {self.store}"
        lives = ", lives on" if self.lives_on else ""
        return f"{ranks}: rank {self.rank} {self.how}{lives} at {self.point} {self.nth} of the {self.work}"

    @property
    def saves(self) -> bool:
        return self.work in ("save", "background")

    @property
    def group_timeout(self) -> float:
        return GROUP_TIMEOUTS[self.work]

    @property
    def stops_the_store(self) -> bool:
        """True if the store gives no answer once the rank is sick."""
        return self.how == "stopped" and self.store == "rank 0" and self.rank == 0

    @property
    def takes_the_store(self) -> bool:
        """True if the store, in which the ranks leave their reasons, ends with the sick rank."""
        ends = self.how == "killed" or (self.how == "raises" and not self.lives_on)
        return ends and self.store == "rank 0" and self.rank == 0


def schedule_of(seed: int) -> Schedule:
    rng = Random(seed)
    topology = {"zero": 0, "tp": 1, "pp": 1} | rng.choice(TOPOLOGIES)
    work = "initialize" if seed >= INITIALIZE else rng.choice([*POINTS])
    points = OF_INITIALIZE if seed >= INITIALIZE else POINTS[work]
    point = rng.choice([*points])
    schedule = Schedule(
        seed=seed,
        **topology,
        work=work,
        point=point,
        nth=rng.randint(1, points[point]),
        rank=rng.randrange(topology["world"]),
        how=rng.choice(HOW),
        lives_on=rng.random() < 0.5,
        store=rng.choice(("torchrun", "rank 0")),
        timeout=rng.choice((1.0, 2.0)),
    )
    # torch's own calls wait without an end for a store whose process is stopped.
    waits = work == "initialize" and schedule.how == "stopped" and schedule.rank == 0
    return replace(schedule, store="torchrun") if waits else schedule


class Pair(nn.Module):
    """Two layers that tensor parallelism cuts, and a point in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            x.register_hook(passed_backward)
        return self.down(torch.tanh(self.up(x)))


class Pairs(Stack):
    """A chain of such pairs."""

    tp_plan = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Pair() for _ in range(2))


def passed_backward(gradient: Tensor) -> None:
    """Do nothing; a point that is counted."""


def matches(point: str, file: str, name: str) -> bool:
    """Return whether a call of a function is a point of this kind."""
    if point == "call":
        return file.startswith(PACKAGES)
    if point == "exchange":
        return file.endswith("parallel/host_comm.py") and name in ("_done", "_swap", "_begun", "_wait")
    if point == "forward":
        return file == HERE and name == "forward"
    if point == "backward":
        return file == HERE and name == "passed_backward"
    if point == "optimizer":
        return file.endswith("uni3d/engine/step.py") or file.startswith(f"{TORCH}/optim/")
    assert point == "collective"
    collective = "collectives" in file or file.endswith("distributed_c10d.py")
    return file.startswith(f"{TORCH}/distributed/") and collective


class Sickness:
    """Counts the points that a rank's threads come by, and calls `fall` at one of them, or after all."""

    def __init__(self, schedule: Schedule, fall: Callable[[str], None]) -> None:
        self.schedule, self.fall = schedule, fall
        self.count, self.armed, self.fell = 0, False, False
        self.lock = threading.Lock()
        threading.setprofile(self.look)
        sys.setprofile(self.look)

    def look(self, frame: FrameType, event: str, arg: Any) -> None:
        if not self.armed or event != "call":
            return
        code = frame.f_code
        if not matches(self.schedule.point, code.co_filename, code.co_name):
            return
        with self.lock:
            self.count += 1
            if self.fell or self.count < self.schedule.nth:
                return
            self.fell = True
        self.fall(code.co_qualname)

    def end(self) -> None:
        """Fall sick now, if there weren't as many points."""
        with self.lock:
            late, self.fell = not self.fell, True
        if late:
            self.fall("its end")


class Rank:
    """One rank's process in a schedule."""

    def __init__(self, schedule: Schedule, rank: int, folder: Path, told: int, hears: int) -> None:
        """`told` and `hears` are the pipes to and from the process that watches the ranks."""
        self.schedule, self.rank, self.folder = schedule, rank, folder
        self.told, self.hears = told, hears

    def tell(self, **what: Any) -> None:
        os.write(self.told, json.dumps(what).encode() + b"\n")

    def hear(self) -> None:
        os.read(self.hears, 1)

    def fall(self, place: str) -> None:
        """Fall sick as the schedule says."""
        how, timeout = self.schedule.how, self.schedule.timeout
        self.tell(sick=place)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how in ("stopped", "paused"):
            os.kill(os.getpid(), signal.SIGSTOP)
        elif how == "slow":
            time.sleep(1.5 * timeout)
        else:
            raise Random(self.schedule.seed).choice(ERRORS)("this rank is sick")

    def start(self) -> uni3d.Engine:
        """Join the other ranks, and make the engine."""
        s = self.schedule
        store_calls.LEAST_S = STORE_TIMEOUT
        os.environ.update(RANK=str(self.rank), LOCAL_RANK=str(self.rank), WORLD_SIZE=str(s.world))
        os.environ["LOCAL_WORLD_SIZE"] = str(s.world)
        store = self.start_store() if s.store == "rank 0" and self.rank == 0 else self.join_store()
        timeout = timedelta(seconds=s.group_timeout)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=s.world, timeout=timeout)
        return self.engine()

    def engine(self, resume: Path | None = None) -> uni3d.Engine:
        s = self.schedule
        return make_engine(seeded(Pairs), zero=s.zero, pp=s.pp, micro=1, config=self.config(), resume=resume)

    def start_store(self) -> dist.TCPStore:
        """Begin the rendezvous store, as rank 0 does without torchrun, and tell the others its port."""
        store = dist.TCPStore("127.0.0.1", 0, None, True, PATIENT, wait_for_workers=False)
        written = self.folder / "port of rank 0"
        written.write_text(str(store.port))
        written.rename(self.folder / "port")
        return store

    def join_store(self) -> dist.TCPStore:
        port = self.folder / "port"
        while not port.exists():
            time.sleep(0.01)
        return dist.TCPStore("127.0.0.1", int(port.read_text()), None, False, PATIENT, wait_for_workers=False)

    def config(self) -> dict[str, Any]:
        s = self.schedule
        kept = {"async_save": s.work == "background", "durable": False, "timeout_seconds": s.timeout}
        parallel = {"pp": s.pp, "tp": s.tp, "device": "cpu", "timeout_seconds": s.group_timeout}
        return {"steps_per_print": None, "checkpoint": kept, "parallel": parallel, "optimizer": ADAM}

    def live(self) -> int:
        """Do everything; return the exit code."""
        with open(self.folder / f"rank{self.rank}", "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
        sick = Sickness(self.schedule, self.fall) if self.rank == self.schedule.rank else None
        engine = self.start()
        data = micro_batches(global_batches(4), engine)
        run, work = self.folder / "run", self.schedule.work
        engine.train_batch(data)
        engine.save_checkpoint(run, "t1")
        engine.wait_for_checkpoint()
        if self.schedule.saves:
            engine.train_batch(data)
            engine.save_checkpoint(self.folder / "expected", "t2")  # what a save of t2 must hold
            engine.wait_for_checkpoint()
        self.tell(ready=True)
        self.hear()
        error: BaseException | None = None
        begun = time.monotonic()
        try:
            if sick is not None:
                sick.armed = True
            if work == "step":
                engine.train_batch(data)
            elif work == "load":
                engine.resume(run)
            elif work == "initialize":
                self.engine(resume=run if self.schedule.seed % 2 else None)
            else:
                engine.save_checkpoint(run, "t2")
                engine.wait_for_checkpoint()
            if sick is not None:
                sick.end()
        except BaseException as raised:
            error = raised
        if sick is not None:
            sick.armed = False
        self.tell(
            ended="" if error is None else " ".join(kind.__name__ for kind in type(error).__mro__),
            text=str(error),
            seconds=time.monotonic() - begun,
            points=0 if sick is None else sick.count,
        )
        if error is None or self.schedule.lives_on:
            self.hear()
        return 0 if error is None else 3

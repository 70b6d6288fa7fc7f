"""A rank that is killed or stopped in `initialize` or in a step: the others end and name it."""

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from marks import matrix, slow

SCRIPT = Path(__file__).with_name("lost_rank.py")
LONGEST = 90.0
"""Seconds after which a rank hangs, most of which start its interpreter on a busy machine."""


def told_by_others(
    place: str, number: int, lost: int = 1, *, world: int = 2, zero: int = 1, pp: int = 1
) -> list[str]:
    """Run a job in which rank `lost` gets a signal; return what the others print at their ends."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(world):
        own = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_PORT": str(store.port),
        }
        command = [sys.executable, str(SCRIPT), place, str(number), str(lost), str(zero), str(pp)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        ranks.append(subprocess.Popen(command, env=os.environ | torchrun | own, text=True, **pipes))
    deadline = time.monotonic() + LONGEST
    try:
        for rank in ranks:  # a busy machine starts one much later than another
            assert rank.stdout.readline() == "ready\n"
        for rank in ranks:
            rank.stdin.write("go\n")
            rank.stdin.flush()
        others = [ranks[rank] for rank in range(world) if rank != lost]
        told = [rank.communicate(timeout=deadline - time.monotonic())[0].strip() for rank in others]
        assert [rank.returncode for rank in others] == [0] * len(others), told
        return told
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


SILENT = "no sign of life for 5 s: ended or stopped"
GAVE_NONE = "gave no sign of life for 3 s: ended or stopped"


@pytest.mark.parametrize(
    ("place", "number", "lost", "words"),
    [
        slow("optimizer", signal.SIGKILL, 1, f"failed: rank 1 {GAVE_NONE}"),
        matrix("optimizer", signal.SIGSTOP, 0, f"failed: rank 0 {GAVE_NONE}"),
        slow("join", signal.SIGKILL, 1, f"failed on rank 1: {SILENT}"),
        matrix("join", signal.SIGSTOP, 1, f"failed on rank 1: {SILENT}"),
        slow("mesh", signal.SIGKILL, 0, f"failed on rank 0: {SILENT}"),
    ],
)
def test_in_initialize(place: str, number: int, lost: int, words: str) -> None:
    for told in told_by_others(place, number, lost):
        assert told.startswith(f"RankFailedError|initialize() {words}"), told


@pytest.mark.parametrize(
    ("place", "number", "world", "zero", "pp"),
    [
        slow("forward", signal.SIGKILL, 3, 1, 1),
        matrix("forward", signal.SIGKILL, 2, 3, 1),
        matrix("forward", signal.SIGKILL, 2, 0, 2),
        slow("forward", signal.SIGSTOP, 2, 0, 2),
        matrix("between", signal.SIGKILL, 2, 2, 1),
    ],
)
def test_in_a_step(place: str, number: int, world: int, zero: int, pp: int) -> None:
    for told in told_by_others(place, number, world=world, zero=zero, pp=pp):
        assert told.startswith(f"RankFailedError|step 1: train_batch() failed on rank 1: {SILENT}"), told

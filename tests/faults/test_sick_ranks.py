"""Ranks that are killed or stopped, or raise, in a step, a save, a load or `initialize`: no other rank hangs.

Each schedule is a job of real ranks with an engine, in `sick_jobs.py`. After it the older checkpoint must be
what it was, and the new one whole or absent.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from budget import seeds
from figures import Campaign
from sick_ranks import INITIALIZE

AT_ONCE = 6
"""Schedules at a time: for the most part they wait for timeouts."""
SERVER = Path(__file__).with_name("sick_server.py")


@pytest.mark.slow
def test_a_sick_rank(memory_path: Path) -> None:
    try_all(seeds(sample=6, everything=1_000), "sick rank in a step, save or load", memory_path)


@pytest.mark.slow
def test_a_rank_that_is_sick_in_initialize(memory_path: Path) -> None:
    try_all(seeds(sample=6, everything=300, first=INITIALIZE), "sick rank in initialize", memory_path)


def try_all(chosen: range, name: str, memory_path: Path) -> None:
    campaign = Campaign(name, len(chosen))
    command = [sys.executable, str(SERVER), str(memory_path / "sick"), str(AT_ONCE), *map(str, chosen)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        for line in server.stdout:
            found = json.loads(line)
            campaign.point(found["seed"], found["label"], [tuple(problem) for problem in found["problems"]])
    if campaign.tried < len(chosen):
        pytest.fail(f"the server ended with {server.returncode} after {campaign.tried} of {len(chosen)}")
    campaign.end()

"""Script of a rank that builds an engine and takes a step, in which one of the ranks is killed or stopped.

`lost_rank.py PLACE SIGNAL LOST ZERO PP` prints `ready`, waits for a line, and prints the error with which it
ends, as `type|text`. `initialize` starts the process group.
"""

import os
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "support")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from models import ADAM, Stack, global_batches, make_engine, micro_batches, seeded  # noqa: E402
from torch.distributed import device_mesh  # noqa: E402

SECONDS = 3.0
"""Timeout of the process group, and time without a sign of life after which a rank is lost."""


def main(place: str, signal: int, lost: int, zero: int, pp: int) -> None:
    def fall(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal)

    falls = {place: fall} if int(os.environ["RANK"]) == lost else {}
    if "join" in falls:
        dist.init_process_group = falls["join"]
    if "mesh" in falls:
        device_mesh.new_group = falls["mesh"]

    def optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        falls.get("optimizer", print)()
        return torch.optim.Adam(groups)

    print("ready", flush=True)
    sys.stdin.readline()
    config = {
        "steps_per_print": None,
        "optimizer": ADAM,
        "parallel": {"device": "cpu", "pp": pp, "timeout_seconds": SECONDS},
        "checkpoint": {"timeout_seconds": SECONDS},
    }
    try:
        engine = make_engine(seeded(Stack), zero=zero, micro=1, config=config, optimizer=optimizer)
        if "forward" in falls:
            next(m for m in engine.module.modules() if isinstance(m, torch.nn.Linear)).register_forward_hook(
                falls["forward"]
            )
        data = micro_batches(global_batches(1), engine)
        if "between" in falls:
            falls["between"]()
        engine.train_batch(data)
    except RuntimeError as error:
        print(f"{type(error).__name__}|{' '.join(str(error).split())}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

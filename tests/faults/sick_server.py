"""A process that has imported everything, and forks the ranks of each schedule.

`sick_server.py FOLDER AT_ONCE SEED...` prints a line of JSON for each seed.

Forking takes milliseconds where a new interpreter with torch takes seconds. It works here as this process
never computes with torch, which has threads afterwards.
"""

import gc
import json
import os
import sys
import warnings
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), *(str(TESTS / name) for name in ("support", "faults", "ckpt"))]

import torch  # noqa: E402
import zarr  # noqa: E402, F401
from sick_jobs import Job  # noqa: E402
from sick_ranks import schedule_of  # noqa: E402

import uni3d.engine.build  # noqa: E402, F401
from uni3d.config.torch_optimizers import names, parameters  # noqa: E402

torch.set_num_threads(1)
warnings.simplefilter("ignore")


def main(folder: Path, at_once: int, seeds: list[int]) -> int:
    """Do the schedules of all seeds, a few at once; in a rank's process, return its exit code."""
    names()  # reads a file of torch's
    parameters("AdamW")
    gc.freeze()  # so that ranks don't copy all pages by collecting garbage
    running: dict[int, int] = {}
    waiting = list(reversed(seeds))
    while running or waiting:
        while waiting and len(running) < at_once:
            seed = waiting.pop()
            pid = os.fork()
            if pid == 0:
                job = Job(schedule_of(seed), folder / str(seed))
                code = job.run()
                if job.rank is not None:
                    return code  # a rank ends as a script does: through the interpreter's end
                os._exit(code)
            running[pid] = seed
        pid, status = os.wait()
        if pid in running:
            seed = running.pop(pid)
            found = folder / f"{seed}.json"
            failed = {"seed": seed, "label": "", "problems": [("other", f"the watch ended with {status}")]}
            print(found.read_text() if found.exists() else json.dumps(failed), flush=True)
            found.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), [int(seed) for seed in sys.argv[3:]]))

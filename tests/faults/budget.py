"""Number of faults to try: a sample in every run, all of them by `make faults`, one by its seed."""

import os


def seeds(sample: int, everything: int, first: int = 0) -> range:
    """Return the seeds to try; `FAULTS=all` asks for everything, and `FAULTS_SEED=N` for one again."""
    if "FAULTS_SEED" in os.environ:
        seed = int(os.environ["FAULTS_SEED"])
        return range(seed, seed + 1)
    return range(first, first + (everything if os.environ.get("FAULTS") == "all" else sample))

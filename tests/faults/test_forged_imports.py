"""One value changed in another framework's files: an import copes, or tells the file in one error."""

import shutil
import signal
import warnings
from pathlib import Path
from random import Random
from typing import Any

from budget import seeds
from figures import Campaign
from foreign_files import FIXTURES
from forged_files import forge_file

from ckpt import CheckpointError
from uni3d.importers.detect import read
from uni3d.importers.source import Options
from uni3d.importers.write import manifest_of

CHECKPOINTS = [p for p in sorted(FIXTURES.glob("*/checkpoint")) if p.parent.name != "weights_bin_legacy"]
"""Real ones; the old format of torch is refused as a whole."""
SECONDS = 20


def late(*_: Any) -> None:
    raise TimeoutError(f"it took more than {SECONDS} s")


FAILED_ONCE = (2813,)
"""Seeds that showed a fault, tried in each run."""


def test_an_import_copes_or_tells(memory_path: Path) -> None:
    place, chosen = memory_path / "import", [*FAILED_ONCE, *seeds(sample=60, everything=5000)]
    campaign = Campaign("change in another framework's checkpoint", len(chosen))
    old = signal.signal(signal.SIGALRM, late)
    try:
        for seed in chosen:
            checkpoint = CHECKPOINTS[seed % len(CHECKPOINTS)]
            shutil.copytree(checkpoint, place)
            what = forge_file(place, Random(seed))
            why = failure(place)
            campaign.point(seed, f"{checkpoint.parent.name}, {what}", [("other", why)] if why else [])
            shutil.rmtree(place)
    finally:
        signal.signal(signal.SIGALRM, old)
    campaign.end()


def failure(place: Path) -> str | None:
    """Return what is wrong with how an import ended, or None."""
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = read(whole(place), "auto", Options())
            manifest_of(source, "AdamW").document()
            for array in source.arrays:
                array.read()
    except CheckpointError as error:
        named = [str(place), *(path.name for path in place.iterdir())]
        return None if any(name in str(error) for name in named) else f"it names no file: {error}"
    except Exception as error:
        return f"{error!r:.500}"
    finally:
        signal.alarm(0)
    return None


def whole(place: Path) -> Path:
    """Return the checkpoint's own folder: a run of Megatron's has several."""
    return next(iter(sorted(place.glob("iter_*"))), place)

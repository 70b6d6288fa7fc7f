"""File systems on which several processes can't write one file."""

from __future__ import annotations

import os
import re
from pathlib import Path

WHOLE_FILES = (
    "gcsfuse",
    "s3fs",
    "goofys",
    "geesefs",
    "mountpoint-s3",
    "blobfuse",
    "rclone",
    "ossfs",
    "cosfs",
)
"""Programs that show an object store as folders: each file is written from its beginning to its end, by one
process."""


def can_share_files(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Return whether several processes can write parts of one file below `folder`.

    Unknown file systems can: the alternative makes many more files.
    """
    try:
        lines = os.fsdecode(mounts.read_bytes()).split("\n")
    except OSError:
        return True  # no Linux
    place = folder.resolve()
    found: dict[Path, str] = {}
    for line in lines:  # id, parent, device, root, place, options, ... - type, source, ... (man 5 proc)
        before, separator, after = line.partition(" - ")
        if separator:
            where = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), before.split(" ")[4])
            found[Path(where)] = " ".join(after.split(" ")[:2])
    mount = next((found[p] for p in (place, *place.parents) if p in found), "")
    return not (mount.startswith("fuse") and any(name in mount for name in WHOLE_FILES))

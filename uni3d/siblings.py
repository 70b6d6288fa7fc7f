"""Find uni3d's own packages `ckpt` and `parallel` by their place, the folder that `uni3d` is in.

Both names are common. A script may have a data folder `ckpt/` or a module `parallel.py` beside it, and Python
searches the script's folder first. With an editable install even a folder without code hides the package.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

NAMES = ("ckpt", "parallel")
ROOT = Path(__file__).resolve().parent.parent


class SiblingFinder:
    """A finder for `sys.meta_path` that knows two names. It imports nothing before it is asked."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in NAMES:
            return None
        folder = ROOT / fullname
        return spec_from_file_location(
            fullname, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


FINDER = SiblingFinder()


def claim_names() -> None:
    """Make `import ckpt` and `import parallel` find uni3d's packages from now on.

    Raises:
        ImportError: if something else was imported under one of the names already, or a package is missing.
            A module that is in use is never replaced.
    """
    for name in NAMES:
        expected = ROOT / name / "__init__.py"
        if not expected.is_file():
            raise ImportError(
                f"uni3d's package {name!r} is missing: expected {expected}; install uni3d again"
            )
        module = sys.modules.get(name)
        if module is not None and not _is_at(module, expected):
            raise ImportError(
                f"uni3d needs the name {name!r} for its own package, {ROOT / name}, but {_place(module)} was "
                f"imported under that name before uni3d; rename yours, or move it into a package. If you "
                f"meant uni3d's {name!r}, import uni3d first"
            )
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)  # before the finder that searches the script's folder


def _is_at(module: ModuleType, expected: Path) -> bool:
    # Not by text: the package may have been found through a link.
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == expected


def _place(module: ModuleType) -> str:
    """File of a module, or folder of a namespace package, which has no file."""
    file = getattr(module, "__file__", None)
    return file or next(iter(getattr(module, "__path__", ())), "a module without a file")

"""Modules under DeepSpeed's names, made of the table of `names`, and `install`, which claims `deepspeed`.

A name is imported when it is first asked for. One that is unknown or refused raises AttributeError, or
ImportError in an import; the message names what there is instead.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from uni3d.deepspeed.names import PROVIDED, REFUSED, STAND_INS, VERSION
from uni3d.version import __version__ as release

HOME = "uni3d.deepspeed"
NAME = "deepspeed"
_SHOWN = 12
INSTALLED = f"{VERSION}+uni3d.{release}"
"""The version as packages ask for it: the release of DeepSpeed whose names these are, and uni3d's."""


def resolve(module: str, name: str) -> Any:
    """Return what DeepSpeed's module (without "deepspeed.") has under a name.

    Raises:
        AttributeError: nothing; the message says why, or what there is.
    """
    if name in STAND_INS.get(module, ()):
        full = f"{module}.{name}".lstrip(".")
        standing: Any = importlib.import_module(f"{HOME}.stand_ins")
        return standing.stand_in(full, missing(full))
    home = PROVIDED[module].get(name)
    if home is not None:
        path, _, other = home.partition(":")
        return getattr(importlib.import_module(path), other or name)
    if f"{module}.{name}".lstrip(".") in PROVIDED:
        return sys.modules[f"{HOME}.{module}.{name}".replace("..", ".")]
    raise AttributeError(missing(f"{module}.{name}".lstrip(".")))


def missing(full: str) -> str:
    """Return the message about a name that isn't provided."""
    parts = full.split(".")
    for length in range(len(parts), 0, -1):
        if reason := REFUSED.get(".".join(parts[:length])):
            return f"{NAME}.{full} isn't part of uni3d: {reason}"
    module = ".".join(parts[:-1])
    while module not in PROVIDED:
        module = module.rpartition(".")[0]
    known = [*PROVIDED[module], *children(module)]
    near = difflib.get_close_matches(parts[-1], known, n=1)
    some = sorted(name for name in known if not name.startswith("_"))
    shown = ", ".join(some[:_SHOWN]) + (f" and {len(some) - _SHOWN} more" if len(some) > _SHOWN else "")
    hint = f"did you mean {near[0]}?" if near else f"there are {shown}"
    return f"{NAME}.{full} isn't part of uni3d; in {f'{NAME}.{module}'.rstrip('.')} {hint}"


def children(module: str) -> list[str]:
    """Return the names of the modules in one."""
    prefix = f"{module}." if module else ""
    inside = [name.removeprefix(prefix) for name in PROVIDED if name.startswith(prefix) and name != module]
    return [name for name in inside if "." not in name]


class Borrowed(ModuleType):
    """A module under one of DeepSpeed's names."""

    def __init__(self, path: str) -> None:
        super().__init__(f"{HOME}.{path}", f"Names of DeepSpeed's module {NAME}.{path}.")
        self.__path__: list[str] = []  # so that names which it lacks are looked for by `Finder`
        self.__spec__ = ModuleSpec(self.__name__, None, is_package=True)
        self._module = path
        names = [*PROVIDED[path], *STAND_INS.get(path, ())]
        self.__all__ = [name for name in names if not name.startswith("_")]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in PROVIDED[self._module]:
            raise AttributeError(name)
        value = resolve(self._module, name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__all__, *children(self._module)})


class Finder(DistributionFinder):
    """Finder for `sys.meta_path` that explains missing names and, once installed, has DeepSpeed's version."""

    installed = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        for home in (HOME, NAME) if self.installed else (HOME,):
            inner = fullname.removeprefix(f"{home}.")
            if inner != fullname and not (home == HOME and inner in _FILES):
                raise ImportError(missing(inner), name=fullname)
        return None

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008 (as the base)
    ) -> Iterator[Distribution]:
        if self.installed and context.name in (None, NAME):
            yield _Release()


class _Release(Distribution):
    """The metadata of the package `deepspeed`."""

    def read_text(self, filename: str) -> str | None:
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {INSTALLED}\nSummary: by uni3d\n"
        return f"{NAME}\n" if filename == "top_level.txt" else None

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


_FILES = {path.stem for path in Path(__file__).parent.glob("*.py")}
FINDER = Finder()


def make_modules() -> None:
    """Make the modules of `uni3d.deepspeed`."""
    for path in PROVIDED:
        if path:
            sys.modules.setdefault(f"{HOME}.{path}", Borrowed(path))
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)


def _imported_too_early() -> str | None:
    """Return the library of Hugging Face's that has looked for DeepSpeed in vain, or None."""
    utils = sys.modules.get("accelerate.utils")
    if utils is not None and not hasattr(utils, "DummyOptim"):
        return "accelerate"
    glue = sys.modules.get("transformers.integrations.deepspeed")
    if glue is not None and glue.HfDeepSpeedConfig.__base__ is object and find_spec("accelerate"):
        return "transformers"
    return None


def install() -> None:
    """Make `import deepspeed` find uni3d.deepspeed in this process, its version too; again does nothing.

    Call it before `transformers` and `accelerate` are imported: they look for DeepSpeed then.

    Raises:
        ImportError: the real DeepSpeed was imported, or one of them has found that there is none.
    """
    there = sys.modules.get(NAME)
    if there is sys.modules[HOME]:
        return
    if there is not None:
        raise ImportError(
            f"DeepSpeed itself was imported, from {getattr(there, '__file__', None)}; call "
            "uni3d.deepspeed.install() before anything imports deepspeed"
        )
    if library := _imported_too_early():
        raise ImportError(
            f"{library} was imported and has found no DeepSpeed; call uni3d.deepspeed.install() before that"
        )
    FINDER.installed = True
    sys.modules[NAME] = sys.modules[HOME]
    for path in PROVIDED:
        if path:
            sys.modules[f"{NAME}.{path}"] = sys.modules[f"{HOME}.{path}"]

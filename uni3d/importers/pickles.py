"""The restricted unpickler for foreign pickles.

A pickle is a program that can call any function it names, so the names are restricted. Plain containers and
numpy's numbers are created as they are. Tensors become references to their bytes (`torch_tensors`). Classes
of the frameworks that write checkpoints become stand-ins, which hold the stored data and have no behaviour.
Any other name is refused, and the error gives the name.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from ckpt import CheckpointError
from ckpt.parts import uncollected
from uni3d.importers import trial

_FRAMEWORKS = ("apex", "deepspeed", "megatron", "torch.distributed", "torch.optim", "torchtitan")
"""Packages whose classes and functions get stand-ins."""

_STAND_INS = frozenset(
    {
        *("_io.BytesIO", "argparse.Namespace", "decimal.Decimal", "signal.Signals", "types.SimpleNamespace"),
        *("datetime.date", "datetime.datetime", "datetime.timedelta", "datetime.timezone", "uuid.UUID"),
        *("pathlib.Path", "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath"),
        *("pathlib._local.PosixPath", "torch.device", "torch.torch_version.TorchVersion"),
    }
)
"""Classes of other packages that are commonly saved next to weights."""


class StandIn:
    """Stored data of an instance whose class isn't loaded.

    Attributes:
        args: arguments of the constructor.
        state: argument of `__setstate__`, often a dict of attributes.
        elements, items: content, if the class was a kind of list or dict.
    """

    name = ""
    """Name of the class, with its module."""
    args: tuple[Any, ...]
    state: Any
    elements: list[Any]
    items: dict[Any, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        self = object.__new__(cls)
        self.__dict__.update(args=args, state=None, elements=[], items={})
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, value: Any) -> None:
        self.elements.append(value)

    def extend(self, values: Any) -> None:
        self.elements.extend(values)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def field(self, name: str, default: Any = None) -> Any:
        """Return the stored attribute `name`, or `default` if there is none."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        found = [part[name] for part in parts if isinstance(part, Mapping) and name in part]
        return found[0] if found else default

    def __repr__(self) -> str:
        return f"<stand-in for {self.name}>"


class _Fixed:
    """Base of our own objects that a pickle can name; it must not be able to change them."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("an object without state is given one")


class Ordered(dict[Any, Any]):
    """An OrderedDict. Attributes stored with it are dropped; torch's state_dicts have some."""

    def __setstate__(self, state: Any) -> None:
        pass


class TypeName(_Fixed):
    """A type that is named but not called: a torch dtype, the factory of a defaultdict."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


class Function(_Fixed):
    """A function that a pickle may call."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


def read_pickle(
    data: bytes,
    where: str,
    *,
    stand_ins: Collection[str] = (),
    names: Mapping[str, Any] | None = None,
    persistent: Callable[[Any], Any] | None = None,
    trust: bool = False,
) -> Any:
    """Unpickle `data` without importing or calling anything outside of this module and `names`.

    Unless `trust`, another process tries it first, with limits of memory and time (`trial`).

    Args:
        data: the pickle.
        where: its place, for messages.
        stand_ins: names of further classes (`package.module.Class`) that get stand-ins.
        names: further allowed names and their meaning, such as the functions that rebuild tensors.
        persistent: resolves persistent ids (storages of tensors).

    Raises:
        CheckpointError: `data` isn't a pickle, names anything else, or takes too much memory or time.
    """
    if not trust:
        trial.check(data, where, stand_ins)
    try:
        with uncollected():
            return _Unpickler(data, where, stand_ins, {**_PLAIN, **(names or {})}, persistent).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{where} can't be unpickled: {type(error).__name__}: {error}") from None


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        data: bytes,
        where: str,
        stand_ins: Collection[str],
        names: Mapping[str, Any],
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._where, self._stand_ins, self._names = where, stand_ins, names
        self._persistent = persistent
        self._made: dict[str, type[StandIn]] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        full = f"{module}.{name}"
        if full in self._names:
            return self._names[full]
        known = any(full.startswith(f"{package}.") for package in _FRAMEWORKS)
        if known or full in _STAND_INS or full in self._stand_ins:
            if full not in self._made:
                self._made[full] = type(name.rpartition(".")[2], (StandIn,), {"name": full})
            return self._made[full]
        own = module.partition(".")[0] not in sys.stdlib_module_names | {"numpy", "torch"}
        remedy = f"; if it is a class of your own that can be ignored, add --stand-in {full}" if own else ""
        raise CheckpointError(
            f"{self._where} pickles {full}, which is refused: a pickle can run any code it names{remedy}"
        )

    def persistent_load(self, pid: Any, /) -> Any:
        if self._persistent is None:
            raise CheckpointError(f"{self._where} refers to objects outside the pickle: {str(pid)[:80]}")
        return self._persistent(pid)


def serve_trials() -> None:
    """Try pickles for another process; tensors are stand-ins, all else is as in `read_pickle`."""
    trial.serve(lambda data, stand_ins: _Unpickler(data, "", stand_ins, _TRIAL_NAMES, StandIn).load())


class _TrialNames(dict[str, Any]):
    """Names that a trial allows: the plain ones, and stand-ins for all of torch's."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or str(name).startswith("torch.")

    def __missing__(self, name: str) -> Any:
        return self.setdefault(name, type(name.rpartition(".")[2], (StandIn,), {"name": name}))


# --- what is allowed -----------------------------------------------------------------------------------


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Stand in for `_codecs.encode`, by which older protocols pickle bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _bytearray(*args: Any) -> bytes:
    if args and isinstance(args[0], bytes):
        return args[0]
    return _encode(*args) if args else b""


def _default_dict(factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    """Return a plain dict, without the factory."""
    return dict(items)


def _list_alone(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return the type `kind` made of nothing or of a list: of a range it could be without end."""

    def made(items: Any = (), *rest: Any) -> Any:
        if rest or not isinstance(items, list | tuple | set | frozenset):
            raise ValueError(f"a {kind.__name__} of a {type(items).__name__}")
        return kind(items)

    return made


def _object(kind: Any, base: Any = None, state: Any = None) -> Any:
    """Stand in for `copyreg._reconstructor`, by which older protocols pickle objects."""
    if not (isinstance(kind, type) and issubclass(kind, StandIn)):
        raise ValueError(f"an object of {kind}")
    return kind() if state is None else kind(state)


class _Dtype:
    """A pickled numpy dtype; only numbers and characters are allowed."""

    def __init__(self, code: str, align: Any = False, copy: Any = True) -> None:
        dtype = np.dtype(code if isinstance(code, str) else "O")
        if dtype.kind not in "biufcSU":
            raise ValueError(f"a numpy array of the type {code}")
        self.dtype = dtype

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _NumpyArray:
    """A pickled numpy array; `plain` turns it into lists."""

    def __init__(self, *args: Any) -> None:
        self.array: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        array = np.frombuffer(data, dtype.dtype)
        self.array = array.reshape(shape, order="F" if fortran else "C")


def _numpy_scalar(dtype: _Dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype.dtype, count=1)[0].item()


def _numpy_buffer(data: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _NumpyArray:
    """Return an array pickled by protocol 5."""
    made = _NumpyArray()
    made.__setstate__((1, shape, dtype, order == "F", data))
    return made


_PLAIN: dict[str, Any] = {
    "_codecs.encode": Function(_encode),
    "collections.OrderedDict": Ordered,
    "collections.defaultdict": Function(_default_dict),
    "copyreg._reconstructor": Function(_object),
    "copy_reg._reconstructor": Function(_object),
    "numpy.dtype": Function(_Dtype),
    "numpy.ndarray": TypeName("numpy.ndarray"),
    "torch.Size": Function(_list_alone(tuple)),
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _PLAIN[f"{_module}.scalar"] = Function(_numpy_scalar)
    _PLAIN[f"{_module}._reconstruct"] = Function(_NumpyArray)
for _module in ("numpy.core.numeric", "numpy._core.numeric"):
    _PLAIN[f"{_module}._frombuffer"] = Function(_numpy_buffer)
for _module in ("builtins", "__builtin__"):
    _PLAIN |= {f"{_module}.{kind.__name__}": kind for kind in (complex, slice, range)}
    _PLAIN |= {f"{_module}.{kind.__name__}": Function(_list_alone(kind)) for kind in (set, frozenset)}
    _PLAIN |= {
        f"{_module}.{name}": TypeName(name)
        for name in ("list", "dict", "tuple", "int", "float", "bool", "str", "bytes", "object")
    }
    _PLAIN[f"{_module}.bytearray"] = Function(_bytearray)
    _PLAIN[f"{_module}.xrange"] = range

_TRIAL_NAMES = _TrialNames(_PLAIN)


def plain(value: Any) -> Any:
    """Return the value as JSON types.

    Raises:
        TypeError: it is or contains something that JSON can't represent.
    """
    try:
        return _plain(value)
    except RecursionError:
        raise TypeError("nested too deeply") from None


def plain_entries(entries: Mapping[Any, Any], what: str, left_out: list[str]) -> dict[str, Any]:
    """Return the entries that JSON can represent; a line that begins with `what` is added for each other."""
    found = {}
    for key, value in entries.items():
        try:
            found[str(key)] = plain(value)
        except TypeError as error:
            left_out.append(f"{what}{key}: {error}")
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        if not all(isinstance(key, str | int) for key in value):
            raise TypeError("a dict whose keys are neither strings nor numbers")
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, _NumpyArray) and value.array is not None:
        return value.array.tolist()
    if isinstance(value, TypeName):
        return value.name
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and np.isfinite(value):
        return value
    raise TypeError(f"a {value!r}" if isinstance(value, StandIn) else f"a {type(value).__name__}")

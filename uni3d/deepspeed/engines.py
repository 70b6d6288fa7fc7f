"""The engines of this process, found from their parameters: DeepSpeed's functions take a parameter alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.fsdp_internals import sharded_of
from parallel.tensors import named_parameters

_engines: WeakKeyDictionary[Any, dict[int, str]] = WeakKeyDictionary()
"""Names of each engine's parameters, by the id of the sharded one; the newest engine last."""
_of_pipelines: WeakSet[Any] = WeakSet()


class ZeroParamStatus(Enum):
    """State of a ZeRO-3 parameter, as its attribute `ds_status`."""

    AVAILABLE = 1
    """Whole on every rank."""
    NOT_AVAILABLE = 2
    """Sharded."""
    INFLIGHT = 3
    """Never seen here: a gather ends before a script looks."""


def register(engine: Any, *, is_pipeline: bool) -> None:
    """Remember an engine while it lives; give ZeRO-3 parameters the attributes by which scripts tell them."""
    named = named_parameters(engine.module)
    _engines[engine] = {id(parameter): name for name, parameter in named}
    if is_pipeline:
        _of_pipelines.add(engine)
    if engine.zero_optimization_stage() < 3:
        return
    for number, (_, parameter) in enumerate(named):
        if isinstance(parameter, DTensor):
            marked: Any = parameter
            marked.ds_id, marked.ds_shape, marked.ds_numel = number, parameter.shape, parameter.numel()
            marked.ds_status = ZeroParamStatus.NOT_AVAILABLE


def engine_of(parameter: Tensor) -> Any:
    """Return the engine that trains a parameter; None before `initialize`.

    Raises:
        RuntimeError: it is sharded, but not by `uni3d.deepspeed.initialize`.
    """
    mine = id(sharded_of(parameter))  # type: ignore[arg-type]  # any tensor is returned as it is
    for engine, names in _engines.items():
        if mine in names:
            return engine
    if isinstance(parameter, DTensor) or hasattr(parameter, "_sharded"):
        raise RuntimeError(
            "this parameter is sharded by an engine that uni3d.deepspeed doesn't know; make the engine by "
            "uni3d.deepspeed.initialize, or call the engine's own methods"
        )
    return None


def name_of(engine: Any, parameter: nn.Parameter) -> str:
    """Return the name of an engine's parameter in its module."""
    return _engines[engine][id(sharded_of(parameter))]


@contextmanager
def unwrap_model_for_generation(model: Any) -> Iterator[nn.Module]:
    """Give an engine's module, to call `generate` on: at ZeRO-3 layers are gathered as they run."""
    yield model.module


def newest() -> Any:
    """Return the engine that was initialized last, or None."""
    return next(reversed(list(_engines)), None)


class _OfPipelines(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return any(engine is instance for engine in _of_pipelines)


class PipelineEngine(metaclass=_OfPipelines):
    """Kind of the engines that train a `PipelineModule`, for `isinstance`: all are of one class."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError("engines are made by initialize(), which takes a PipelineModule as any other model")

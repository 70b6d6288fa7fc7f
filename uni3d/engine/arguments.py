"""Checks of the model and the data given to `initialize`, and what its results can't be used for."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from ckpt import DTYPES
from parallel.tensors import persistent_buffers
from uni3d.checkpoint.extra_state import check_in_layers
from uni3d.engine.given_loader import is_given_loader

T = TypeVar("T")

_used: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules with parameters that an engine of this process trains."""


def check_model(model: Any) -> nn.Module:
    """Return the model if it can be split and trained.

    Raises:
        ValueError: it is no module, or an earlier `initialize` has used it, or a part of it, up, or its
            pipeline stages would lose an extra state.
    """
    if model is None:
        raise ValueError("initialize needs a model")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
    for name, module in model.named_modules():
        what = f"its module {name}" if name else f"this {type(model).__name__}"
        if module in _used:
            raise ValueError(
                f"initialize was already called with {what}, and a model can be split only once; build a "
                "new one for each engine, and give it weights by load_checkpoint(..., load_module_only=True)"
            )
        parameters = module._parameters.values()
        if any(is_lazy(p) for p in parameters):
            raise ValueError(
                f"{what} is lazy: its parameters have no shape; run one batch through the model first"
            )
        if isinstance(module, FSDPModule) or any(isinstance(p, DTensor) for p in parameters):
            raise ValueError(
                f"initialize was called with a model that is sharded already ({what}); pass the plain model, "
                "which it shards itself"
            )
    for name, buffer in persistent_buffers(model):
        dtype = str(buffer.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(
                f"the buffer {name} is {dtype}, which a checkpoint can't hold; register it with "
                "persistent=False, or keep it in another type"
            )
    check_in_layers(model)
    return model


def using_up(model: nn.Module, build: Callable[[], T]) -> T:
    """Return the result of `build`, after which the model's modules are an engine's."""
    modules = [model, *(m for m in model.modules() if m._parameters)]  # `build` takes it apart
    built = build()
    _used.update(modules)
    return built


def check_data(training_data: Any) -> Any:
    """Return the data if it is something to train on.

    Raises:
        ValueError: it is neither a dataset nor a loader.
    """
    if training_data is None or is_given_loader(training_data) or _has_samples(training_data):
        return training_data
    raise ValueError(
        f"training_data is a {type(training_data).__name__}, which has no length and no sample by its index, "
        "and no state_dict: a resume couldn't find its place; pass a map-style dataset, an IterableDataset "
        "or a DataLoader, or leave training_data out and pass train_batch an iterator of this rank's micro "
        "batches"
    )


def check_dataset(data: Any) -> None:
    """Check that samples can be drawn from the data in any order.

    Raises:
        ValueError: it isn't a map-style dataset.
    """
    kind = type(data).__name__
    if is_given_loader(data):
        raise ValueError(f"the data is a {kind}, which has an order of its own; iterate over it, as it is")
    if not _has_samples(data):
        raise ValueError(
            f"the data is a {kind}, which has no length and no sample by its index; pass a map-style dataset"
        )


def _has_samples(data: Any) -> bool:
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def refuse_copies(*owners: Any) -> None:
    """Make `copy.deepcopy` of an engine or its module, and so AveragedModel, a clear error."""
    for owner in owners:
        vars(owner)["__deepcopy__"] = refuse_copy


def refuse_copy(memo: Any = None) -> NoReturn:
    """Raise the error of whoever copies or pickles an engine, or copies its module."""
    raise RuntimeError(
        "an engine and its module can't be copied: a rank holds only its part of them; load "
        "engine.module_state_dict() into a new model, and average or keep that one"
    )

"""Checks of the model and the data given to `initialize`, and what its results can't be used for."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, IterableDataset

from ckpt import DTYPES
from parallel.tensors import persistent_buffers
from uni3d.checkpoint.extra_state import check_in_layers

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


def check_data(training_data: Any) -> None:
    """Check that the engine can draw samples from the data in an order of its own.

    Raises:
        ValueError: it isn't a map-style dataset.
    """
    if training_data is None:
        return
    kind = type(training_data).__name__
    if isinstance(training_data, DataLoader):
        raise ValueError(
            f"training_data is a {kind}, but the engine makes the batches itself, in an order that every "
            "topology can go on with; pass its dataset and collate_fn, or leave training_data out and pass "
            "uni3d.RepeatingLoader(loader) to train_batch"
        )
    if isinstance(training_data, IterableDataset) or not (
        hasattr(training_data, "__getitem__") and hasattr(training_data, "__len__")
    ):
        raise ValueError(
            f"training_data is a {kind}, which has no length and no sample by its index: a resume couldn't "
            "find its place; pass a map-style dataset, or leave training_data out and pass train_batch an "
            "iterator of this rank's micro batches"
        )


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

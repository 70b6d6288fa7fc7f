"""Micro batches: checks, the move to the device, the loss of one, and dropout's random state."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from parallel import ParallelModel, Topology
from parallel.agreement import BatchError
from parallel.loss import Loss
from parallel.stages import Chain
from parallel.tensor import check_sequence
from uni3d.engine.token_means import counted_labels


class Result(NamedTuple):
    """Loss of one micro batch."""

    loss: Loss
    is_mean: bool
    """True if it is a mean of an unknown number of terms."""
    samples: int | None
    """Number of samples, if it can be seen."""


def check_batches(model: ParallelModel, batches: list[Any]) -> None:
    """Check the form of a step's micro batches, before any rank computes and waits for the others.

    Their sizes are checked by all ranks together: by `Pipeline.run`, else at the end of the step.

    Raises:
        BatchError: a batch can't be unpacked into the model's arguments; or, for a model with a `loss_fn`,
            isn't a pair, or has a sequence length that tp doesn't divide.
    """
    for batch in batches:
        if model.loss_fn is not None and not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise BatchError(
                f"the data iterator gave a {type(batch).__name__}; this model has a "
                "loss_fn(outputs, targets), so give pairs (inputs, targets)"
            )
        if not isinstance(batch, Mapping | tuple | list | Tensor):
            raise BatchError(
                f"the data iterator gave a {type(batch).__name__}; expected a tuple of the model's "
                "arguments, a dict of them by name, or one tensor"
            )
    if model.loss_fn is None or not model.sequence_parallel:
        return
    for inputs, _ in batches:  # the embedding checks this too, but only on the first stage
        try:
            check_sequence(tree_leaves(inputs)[0].shape, model.topology.degrees.tp)
        except ValueError as error:
            raise BatchError(str(error)) from None


def loss_of(model: ParallelModel, batch: Any) -> Result:
    """Run the model forward on one micro batch; return its loss.

    The mean loss of a Hugging Face model becomes a sum over its label tokens. Other terms that the model has
    added, such as its router's, count as often as the micro batch has label tokens.

    Raises:
        ValueError: the output's `loss` is None.
    """
    if model.loss_fn is not None:
        inputs, targets = batch
        given = model.loss_fn(_outputs(model.module, inputs), targets)
        return Result(Loss.of(given), not isinstance(given, tuple), samples_in(inputs))
    with counted_labels(model.module) as counted:
        if isinstance(batch, Mapping):
            output = model.module(**batch)
        else:
            output = model.module(batch) if isinstance(batch, Tensor) else model.module(*batch)
    given = loss_in(output)
    loss, is_mean, terms = Loss.of(given), not isinstance(given, tuple), counted.terms
    if is_mean and terms is not None:
        loss, is_mean = Loss(loss.total.float() * terms, terms), False
    return Result(loss, is_mean, samples_in(batch))


def _outputs(module: nn.Module, inputs: Any) -> Any:
    """Return the outputs of a model with a `loss_fn`.

    A chain of layers hands its inputs to the first layer as they are. Another model takes a dict as arguments
    by name, and a tuple as its arguments if it has so many.
    """
    if isinstance(module, Chain) or isinstance(inputs, Tensor):
        return module(inputs)
    if isinstance(inputs, Mapping):
        return module(**inputs)
    if isinstance(inputs, tuple | list):
        try:
            inspect.signature(module.forward).bind(*inputs)
        except TypeError:
            return module(inputs)
        return module(*inputs)
    return module(inputs)


def samples_in(batch: Any) -> int | None:
    """Return a batch's number of samples: the first dim of its tensors, or None if they don't share it."""
    sizes = {x.shape[0] for x in tree_leaves(batch) if isinstance(x, Tensor) and x.ndim}
    return sizes.pop() if len(sizes) == 1 else None


def loss_in(output: Any) -> Any:
    """Return the loss in a model's output: its `.loss`, a mapping's "loss", or the output itself.

    Raises:
        ValueError: there is none, or it is None.
    """
    kind = type(output).__name__
    if isinstance(output, Mapping):
        if "loss" not in output:
            raise ValueError(f"the {kind} has no loss")
        loss = output["loss"]
    elif isinstance(output, Tensor | tuple) or hasattr(output, "loss"):
        loss = getattr(output, "loss", output)
    else:
        raise ValueError(f"expected a loss, or an output with a .loss; got a {kind}")
    if loss is None:
        raise ValueError(f"the loss of the {kind} is None; does the batch have labels?")
    return loss


def on_device(values: Any, device: torch.device) -> Any:
    """Return a batch or a model's arguments with its tensors on the device; a mapping becomes a dict.

    Copies to a GPU from pinned memory, such as the loaders', don't wait for the work before them.
    """
    if isinstance(values, Mapping):
        values = dict(values)
    to_gpu = device.type == "cuda"  # from one, a copy would be used before it has arrived
    return tree_map(lambda x: x.to(device, non_blocking=to_gpu) if isinstance(x, Tensor) else x, values)


@contextmanager
def random_state(topology: Topology, seed: int, step: int, micro_step: int, nth: int = 0) -> Iterator[None]:
    """Seed dropout from (seed, step, rank), so that a resume on the same topology draws the same masks.

    `nth` numbers the forward passes of a micro batch; each draws other masks. Tensor-parallel ranks draw the
    same ones, as most of their activations are the same. Where a rank has other features or, under sequence
    parallelism, other tokens, their masks repeat.
    """
    key = (seed, step, micro_step, topology.pp_rank, topology.dp_rank, *([nth] if nth else []))
    digest = hashlib.sha256(repr(key).encode()).digest()
    seed_here = int.from_bytes(digest[:7], "little")
    devices = [topology.device] if topology.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed_here)  # torch.manual_seed seeds all devices, which is slow
        if devices:
            torch.cuda.manual_seed(seed_here)
        yield

"""Micro batches: checks, the move to the device, the loss of one, and dropout's random state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from parallel import ParallelModel, Topology
from parallel.loss import Loss
from parallel.tensor import check_sequence
from uni3d.config import BatchTriad


class BatchError(ValueError):
    """The data iterator's micro batches don't fit the config or the model."""


def check_batches(model: ParallelModel, batches: list[Any], triad: BatchTriad) -> None:
    """Check the micro batches of a step, before any rank computes and waits for the others.

    Raises:
        BatchError: a batch can't be unpacked into the model's arguments; or, for a model with a `loss_fn`,
            isn't a pair, has another size than the config's, or a sequence length that tp doesn't divide.
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
    if model.loss_fn is None:
        return
    sizes = [len(inputs) for inputs, _ in batches]
    if any(size != triad.micro_batch for size in sizes):
        raise BatchError(
            f"the data iterator gave micro batches of {sizes} samples; expected "
            f"train_micro_batch_size_per_gpu({triad.micro_batch}) in each"
        )
    if model.sequence_parallel:  # the embedding checks this too, but only on the first stage
        for inputs, _ in batches:
            try:
                check_sequence(inputs.shape, model.topology.degrees.tp)
            except ValueError as error:
                raise BatchError(str(error)) from None


def loss_of(model: ParallelModel, batch: Any) -> Loss:
    """Run the model forward on one micro batch; return its loss.

    Raises:
        ValueError: the output's `loss` is None.
    """
    if model.loss_fn is not None:
        inputs, targets = batch
        return Loss.of(model.loss_fn(model.module(inputs), targets))
    if isinstance(batch, Mapping):
        output = model.module(**batch)
    else:
        output = model.module(batch) if isinstance(batch, Tensor) else model.module(*batch)
    return Loss.of(loss_in(output))


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
    """Return a batch or a model's arguments with its tensors on the device; a mapping becomes a dict."""
    if isinstance(values, Mapping):
        values = dict(values)
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, values)


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

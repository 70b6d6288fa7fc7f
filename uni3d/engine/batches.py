"""Running a model over the micro batches of one global batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from parallel import ParallelModel
from parallel.loss import Loss, split_logits
from parallel.tensor import check_sequence
from uni3d.config import BatchTriad


class BatchError(ValueError):
    """The data iterator gave what the config doesn't announce."""


def run_batches(
    model: ParallelModel, batches: list[Any], triad: BatchTriad, *, train: bool, factor: float = 1.0
) -> Loss | None:
    """Collective: forward, and with `train` backward, over this rank's micro batches.

    Gradients are of the loss times `factor`.

    Returns the summed loss where it is known: on the last stage.

    Raises:
        BatchError: a pipeline was given micro batches of another size than the config's, or sequences that
            can't be split.
    """
    pipeline = model.pipeline
    _check_kinds(batches, needs_targets=pipeline is not None)
    if pipeline is not None:
        inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        expected = triad.micro_batch * triad.accumulation
        if len(inputs) != expected:
            raise BatchError(
                f"the data iterator gave {len(inputs)} samples in {len(batches)} micro batches; expected "
                f"train_micro_batch_size_per_gpu({triad.micro_batch}) in each"
            )
        if model.sequence_parallel:  # the first stage's embedding looks too, but the others would wait for it
            try:
                check_sequence(inputs.shape, model.topology.degrees.tp)
            except ValueError as error:
                raise BatchError(str(error)) from None
        return pipeline.run(inputs, targets, len(batches), train=train, factor=factor)
    losses = []
    for i, batch in enumerate(batches, start=1):
        with split_logits(model.topology):
            loss = Loss.of(_loss(_call(model, batch)))
            if train:
                model.zero.before_backward(last=i == len(batches))
                loss.lifted(factor).backward()  # type: ignore[no-untyped-call]
        losses.append(Loss(loss.total.detach(), loss.tokens))
    return Loss.sum(losses)


def _check_kinds(batches: list[Any], *, needs_targets: bool) -> None:
    for batch in batches:
        if needs_targets and not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise BatchError(
                f"the data iterator gave a {type(batch).__name__}; this model has a "
                "loss_fn(outputs, targets), so give pairs (inputs, targets)"
            )
        if not isinstance(batch, Mapping | tuple | list | Tensor):
            raise BatchError(
                f"the data iterator gave a {type(batch).__name__}; expected a tuple of the model's "
                "arguments, a dict of them by name, or one tensor"
            )


def _call(model: ParallelModel, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model.module(**batch)
    return model.module(batch) if isinstance(batch, Tensor) else model.module(*batch)


def on_device(values: Any, device: torch.device) -> Any:
    """A batch, or what a model is called with, with its tensors on the device; of any mapping, a dict."""
    if isinstance(values, Mapping):
        values = dict(values)
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, values)


def _loss(output: Any) -> Any:
    """The loss in a model's output: its `.loss`, or the output itself.

    Raises:
        ValueError: there is none, as the batch had no labels.
    """
    loss = getattr(output, "loss", output)
    if loss is None:
        raise ValueError(f"the {type(output).__name__} has no loss; does the batch have labels?")
    return loss

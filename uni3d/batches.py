"""Running a model over the micro batches of one global batch."""

from __future__ import annotations

from typing import Any

import torch

from parallel import ParallelModel
from parallel.pipeline import Loss, split_logits
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
        BatchError: a pipeline was given micro batches of another size than the config's.
    """
    pipeline = model.pipeline
    if pipeline is not None:
        inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        expected = triad.micro_batch * triad.accumulation
        if len(inputs) != expected:
            raise BatchError(
                f"the data iterator gave {len(inputs)} samples in {len(batches)} micro batches; expected "
                f"train_micro_batch_size_per_gpu({triad.micro_batch}) in each"
            )
        return pipeline.run(inputs, targets, len(batches), train=train, factor=factor)
    losses = []
    for i, batch in enumerate(batches, start=1):
        with split_logits(model.topology):
            loss = Loss.of(model.module(*batch))
            if train:
                model.zero.before_backward(last=i == len(batches))
                loss.lifted(factor).backward()  # type: ignore[no-untyped-call]
        losses.append(Loss(loss.total.detach(), loss.tokens))
    return Loss.sum(losses)

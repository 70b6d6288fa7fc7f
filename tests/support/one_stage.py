"""Forward and backward passes of a model without a pipeline, by `parallel` alone."""

from torch import Tensor

import parallel
from parallel.loss import Loss, split_logits


def run_batch(built: parallel.ParallelModel, inputs: Tensor, targets: Tensor, micro_batches: int) -> Loss:
    """Accumulate the gradients of a batch cut into micro batches along dim 0; return its summed loss."""
    losses = []
    parts = zip(inputs.tensor_split(micro_batches), targets.tensor_split(micro_batches), strict=True)
    for i, (part, target) in enumerate(parts, start=1):
        with split_logits(built.topology):
            loss = Loss.of(built.loss_fn(built.module(part), target))
            with built.zero.backward(last=i == micro_batches):
                loss.total.backward()
        losses.append(Loss(loss.total.detach(), loss.tokens))
    return Loss.sum(losses)

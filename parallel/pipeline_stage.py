"""torch's pipeline stage, which tells ZeRO of each backward pass, with work-arounds for torch 2.11-2.13."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from parallel.placement import Placement
from parallel.spans import Span
from parallel.topology import Topology
from parallel.zero import Zero


class _Hidden(nn.Module):
    """Wrapper that hides that a module is sharded, so that gradients and resharding are left to `Zero`.

    torch's stage would keep gradients whole until the last micro batch, which is right for ZeRO stage 1 only.
    """

    def __init__(self, zero: Zero, *, is_last: bool) -> None:
        super().__init__()
        self.module = cast(nn.Module, zero.root)
        self._zero = zero
        self._is_last = is_last

    def forward(self, *args: Any) -> Any:
        output = self.module(args if len(args) > 1 else args[0])  # torch unpacks a tuple between stages
        if isinstance(output, tuple | list) and len(output) == 1 and not self._is_last:
            raise ValueError(
                "the last layer of a pipeline stage returned a tuple of one tensor, which the next stage "
                "would receive as a tensor; return the tensor"
            )
        return output

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return the unsharded parameters: torch's split backward pass looks for those in the graph."""
        return self._zero.whole_parameters()


class TorchStage(PipelineStage):
    """A pipeline stage for torch's schedules."""

    def __init__(self, zero: Zero, index: int, placement: Placement, topology: Topology, span: Span) -> None:
        """Make stage `index` of the model; each pass is enclosed in `span`."""
        super().__init__(
            _Hidden(zero, is_last=placement.is_last(index)),
            index,
            placement.stages,
            topology.device,
            group=topology.pp_group,
        )
        self._zero = zero
        self._span = span
        self._whole: set[int] = set()  # micro batches whose backward pass wasn't split

    # --- passes ----------------------------------------------------------------------------------------

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self._span("forward", stage=self.stage_index, micro_batch=fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        with self._span("backward", stage=self.stage_index, micro_batch=bwd_chunk_id):
            if full_backward:
                with self._zero.backward(last=last_backward):
                    super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
            else:
                self._backward_of_inputs(bwd_chunk_id, loss, last_backward)

    def _backward_of_inputs(self, bwd_chunk_id: int, loss: Any, last_backward: bool) -> None:
        self._zero.before_input_backward()
        if self._cannot_be_split(bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, True, False)
            self._whole.add(bwd_chunk_id)
            self.dw_runner[bwd_chunk_id] = lambda: None  # the schedule expects an entry
        else:
            super().backward_one_chunk(bwd_chunk_id, loss, False, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        if not self.has_backward:  # an evaluation runs the same schedule
            return
        span = self._span("weights", stage=self.stage_index, micro_batch=bwd_chunk_id)
        with span, self._zero.weight_backward(last=last_backward):
            if bwd_chunk_id in self._whole:
                self._whole.remove(bwd_chunk_id)
                del self.dw_runner[bwd_chunk_id]
            else:
                super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    def _cannot_be_split(self, chunk: int) -> bool:
        """Return whether no input needs a gradient, as after frozen layers.

        torch starts from the inputs' gradients to find the weights', and would find none. (It handles the
        first stage, whose inputs never need a gradient.)
        """
        if self.is_first or not self.has_backward:
            return False
        return not any(isinstance(x, Tensor) and x.requires_grad for x in self.fwd_cache[chunk][1])

    def get_local_bwd_output(self, mb_index: int) -> Any:
        """Return nothing in an evaluation, where the V schedule asks too and torch's method raises."""
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()  # type: ignore[no-untyped-call]

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    # --- shape inference ---------------------------------------------------------------------------------

    def _compute_outputs(self, *args: Any, module: nn.Module, **kwargs: Any) -> Any:
        """Run the stage on made-up inputs, which must not change its buffers (running means, counts)."""
        owners = [(m, n, b) for m in module.modules() for n, b in m._buffers.items() if b is not None]
        for owner, name, buffer in owners:
            owner._buffers[name] = buffer.clone()
        try:
            return module(*args, **kwargs)
        finally:
            for owner, name, buffer in owners:
                owner._buffers[name] = buffer

    def _to_tensor(self, arg: Any) -> Tensor:
        """Return zeros for inputs from another stage, which torch leaves uninitialized.

        They may be indices into an embedding.
        """
        tensor: Tensor = super()._to_tensor(arg)
        if isinstance(arg, Tensor):
            return tensor
        return torch.zeros_like(tensor).requires_grad_(tensor.requires_grad)

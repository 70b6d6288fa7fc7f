"""torch's pipeline stage: ZeRO is told when each backward pass comes, what torch overlooks is set right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from parallel.placement import Placement
from parallel.topology import Topology
from parallel.zero import Zero


class _Hidden(nn.Module):
    """Hides that a module is sharded, so that torch's stage leaves gradients and resharding to `Zero`.

    Left to itself the stage keeps gradients whole until the last micro batch, which is ZeRO stage 1 only.
    """

    def __init__(self, zero: Zero, *, is_last: bool) -> None:
        super().__init__()
        self.module = cast(nn.Module, zero.root)
        self._zero = zero
        self._is_last = is_last

    def forward(self, *args: Any) -> Any:
        output = self.module(args if len(args) > 1 else args[0])  # a layer that gave a tuple gave one value
        if isinstance(output, tuple | list) and len(output) == 1 and not self._is_last:
            raise ValueError(
                "the last layer of a pipeline stage returned a tuple of one tensor, which the next stage "
                "would get as a tensor; return the tensor"
            )
        return output

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those in the graph, which torch's split backward pass looks for: a sharded one isn't there."""
        return self._zero.whole_parameters()


class TorchStage(PipelineStage):
    """One stage of a pipeline, as torch's schedules run it."""

    def __init__(self, zero: Zero, index: int, placement: Placement, topology: Topology) -> None:
        super().__init__(
            _Hidden(zero, is_last=placement.is_last(index)),
            index,
            placement.stages,
            topology.device,
            group=topology.pp_group,
        )
        self._zero = zero
        self._whole: set[int] = set()  # micro batches whose backward pass wasn't split

    # --- backward passes -------------------------------------------------------------------------------

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        if full_backward:
            self._zero.before_backward(last=last_backward)
        else:
            self._zero.before_input_backward()
            if self._cannot_be_split(bwd_chunk_id):
                super().backward_one_chunk(bwd_chunk_id, loss, True, False)
                self._whole.add(bwd_chunk_id)
                self.dw_runner[bwd_chunk_id] = lambda: None  # which a schedule looks for
                return
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        if not self.has_backward:  # an evaluation goes through the same schedule
            return
        self._zero.before_weight_backward()
        if bwd_chunk_id in self._whole:
            self._whole.remove(bwd_chunk_id)
            del self.dw_runner[bwd_chunk_id]
        else:
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self._zero.after_weight_backward(last=last_backward)

    def _cannot_be_split(self, chunk: int) -> bool:
        """Whether no input needs a gradient, as after frozen layers: torch finds the weights' from there, and
        would find none. (It knows of the first stage, whose inputs never do.)
        """
        if self.is_first or not self.has_backward:
            return False
        return not any(isinstance(x, Tensor) and x.requires_grad for x in self.fwd_cache[chunk][1])

    def get_local_bwd_output(self, mb_index: int) -> Any:
        """As torch's, which refuses to be asked in an evaluation, though the V schedule asks."""
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()  # type: ignore[no-untyped-call]

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    # --- the run by which torch learns the shapes ------------------------------------------------------

    def _compute_outputs(self, *args: Any, module: nn.Module, **kwargs: Any) -> Any:
        """Run the stage on made-up inputs, of which its buffers (running means, counts) must not learn."""
        owners = [(m, n, b) for m in module.modules() for n, b in m._buffers.items() if b is not None]
        for owner, name, buffer in owners:
            owner._buffers[name] = buffer.clone()
        try:
            return module(*args, **kwargs)
        finally:
            for owner, name, buffer in owners:
                owner._buffers[name] = buffer

    def _to_tensor(self, arg: Any) -> Tensor:
        """Zeros for what comes from another stage: torch leaves there what was in the memory, and the numbers
        may be looked up in a table."""
        tensor: Tensor = super()._to_tensor(arg)
        if isinstance(arg, Tensor):
            return tensor
        return torch.zeros_like(tensor).requires_grad_(tensor.requires_grad)

"""ZeRO stages 0-3 as settings of one mechanism, torch's `fully_shard`.

| ZeRO stage | optimizer state | gradients                             | parameters                      |
| 0          | replicated      | replicated, reduced at the boundary   | replicated                      |
| 1          | sharded         | whole until reduced at the boundary   | whole from step to step         |
| 2          | sharded         | reduce-scattered every micro batch    | whole from step to step         |
| 3          | sharded         | reduce-scattered every micro batch    | gathered for each layer's use   |

(ZeRO, Rajbhandari et al. 2020, section 5.) Stage 0 is the same code on the mesh `(replicate=dp, shard=1)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

STAGES = (0, 1, 2, 3)


class Zero:
    """A module whose parameters, gradients and optimizer state are sharded as the ZeRO stage says.

    Gradients are summed over the data-parallel ranks, not averaged: the engine divides once, by the
    number of tokens in the global batch.
    """

    def __init__(self, root: nn.Module, units: Sequence[nn.Module], mesh: DeviceMesh, stage: int) -> None:
        """Shard `root` in place. `units` are its submodules that are gathered and freed one by one.

        Raises:
            ValueError: `stage` isn't 0, 1, 2 or 3.
        """
        if stage not in STAGES:
            raise ValueError(f"ZeRO stage {stage} doesn't exist; expected 0, 1, 2 or 3")
        self.stage = stage
        self.root = cast(FSDPModule, root)
        for module in [*units, root]:
            fully_shard(module, mesh=mesh, reshard_after_forward=stage == 3)
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums

    def before_backward(self, *, last: bool) -> None:
        """Set what the next backward pass does with gradients and parameters.

        `last` says that it is the accumulation's last: the boundary before an optimizer step.
        """
        self.root.set_requires_gradient_sync(last or self.stage >= 2)
        self.root.set_reshard_after_backward(last or self.stage == 3)
        self.root.set_is_last_backward(last)

    def reshard(self) -> None:
        """Free the whole parameters, so that the sharded ones are what `parameters()` gives.

        Needed before the sharded ones are read or written from outside the step: whole copies that were
        left from a forward pass would be used again, stale.
        """
        for module in cast(nn.Module, self.root).modules():
            if isinstance(module, FSDPModule):
                module.reshard()

"""What a model says of itself, as the manifest keeps it: how it may be split.

Whoever has the checkpoint and not the code can then tell which topologies the run could go on with
(`uni3d doctor`), and which rank would hold what there (`uni3d plot --layout`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from parallel.settings import Balance
from parallel.stages import layer_costs, layer_names


def declared(model: nn.Module, balance: Balance = "flops") -> dict[str, Any]:
    """The manifest's `model.declared`: the model's class, and those of its attributes that it has.

    `pipeline_layers` (names), `tp_plan` (pattern -> style) and `tp_units` (pattern -> number) are what
    `parallel.build` reads; `pipeline_costs` what the layers cost by `balance`, or by the model's own word.

    Raises:
        ValueError: its chain of layers can't be one, as `parallel.build` says too.
    """
    said: dict[str, Any] = {"class": type(model).__name__}
    if (layers := layer_names(model)) is not None:
        costs = layer_costs(model, layers, balance)
        said["pipeline_layers"] = [str(name) for name in layers]
        said["pipeline_costs"] = [c if isinstance(c, float) else int(c) for c in costs]
    if plan := getattr(model, "tp_plan", None):
        said["tp_plan"] = {str(pattern): str(style) for pattern, style in plan.items()}
    if units := getattr(model, "tp_units", None):
        said["tp_units"] = {str(pattern): int(number) for pattern, number in units.items()}
    return said

"""What a model says of itself, as the manifest keeps it: how it may be split.

Whoever has the checkpoint and not the code can then tell which topologies the run could go on with
(`uni3d doctor`).
"""

from __future__ import annotations

from typing import Any

from torch import nn


def declared(model: nn.Module) -> dict[str, Any]:
    """The manifest's `model.declared`: the model's class, and those of its attributes that it has.

    `pipeline_layers` (names), `tp_plan` (pattern -> style) and `tp_units` (pattern -> number) are what
    `parallel.build` reads.
    """
    said: dict[str, Any] = {"class": type(model).__name__}
    if (layers := getattr(model, "pipeline_layers", None)) is not None:
        said["pipeline_layers"] = [str(name) for name in layers]
    if plan := getattr(model, "tp_plan", None):
        said["tp_plan"] = {str(pattern): str(style) for pattern, style in plan.items()}
    if units := getattr(model, "tp_units", None):
        said["tp_units"] = {str(pattern): int(number) for pattern, number in units.items()}
    return said

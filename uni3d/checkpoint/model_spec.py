"""What a model says of itself, as the manifest keeps it: how it may be split, and what it is to Hugging Face.

Whoever has the checkpoint and not the code can then tell which topologies the run could go on with
(`uni3d doctor`), what each rank would hold (`uni3d plot --layout`), and make a folder that `transformers`
loads (`uni3d export --format hf`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from parallel.stages import layer_costs
from parallel.tensor import check_plan, expand_plan, units_by_head
from uni3d.export import hugging_face


def declared(model: nn.Module) -> dict[str, Any]:
    """The manifest's `model.declared`: the model's class, and those of its attributes that it has.

    `pipeline_layers` (names), `pipeline_costs` (a number for each), `tp_plan` (pattern -> style) and
    `tp_units` (pattern -> number) are what `parallel.build` reads; so is `num_stages`. Beside them stands
    what only the modules tell: `loss_fn`, whether there is one; `layer_flops`, what each layer counts for
    where stages are cut by flops; in `tp_units`, by name, layers whose heads have a `head_dim`; and
    `tp_refused`, why the plan suits the model under no degree. `hugging_face` is for `uni3d.export.hugging_face`.
    """
    said: dict[str, Any] = {"class": type(model).__name__}
    if (layers := getattr(model, "pipeline_layers", None)) is not None:
        said["pipeline_layers"] = [str(name) for name in layers]
        known = {name for name, _ in model.named_modules()}
        if known.issuperset(said["pipeline_layers"]):  # else the model is refused, with a better word
            said["layer_flops"] = layer_costs(model, layers, "flops")
        said["loss_fn"] = getattr(model, "loss_fn", None) is not None
        if (costs := getattr(model, "pipeline_costs", None)) is not None:
            said["pipeline_costs"] = list(costs)
        if (stages := getattr(model, "num_stages", None)) is not None:
            said["num_stages"] = int(stages)
    if plan := getattr(model, "tp_plan", None):
        said["tp_plan"] = {str(pattern): str(style) for pattern, style in plan.items()}
        said |= _tensor_parallel(model, said["tp_plan"], getattr(model, "tp_units", {}))
    if (form := hugging_face.declared(model)) is not None:
        said["hugging_face"] = form
    return said


def _tensor_parallel(model: nn.Module, plan: dict[str, str], units: dict[str, int]) -> dict[str, Any]:
    """The rest of what is said of a plan: `tp_units`, `tp_refused`."""
    said: dict[str, Any] = {}
    units = {str(pattern): int(number) for pattern, number in units.items()}
    try:
        expanded = expand_plan(model, plan)
        check_plan(model, expanded, units, 1)
        units |= units_by_head(model, expanded, units)
    except ValueError as error:  # a run with tp 1 never asks
        said["tp_refused"] = str(error)
    return said | ({"tp_units": units} if units else {})

"""The model's own description in the manifest: how it can be split, its Hugging Face config, its adapters.

With it, tools that have the checkpoint but not the code know which topologies can resume (`uni3d doctor`),
the parts each rank would hold (`uni3d plot --layout`), and how to write a folder for `transformers` or `peft`
(`uni3d export --format hf`, `--format peft`).
"""

from __future__ import annotations

import copy
import json
import re
import sys
import warnings
from typing import Any

from torch import nn

import ckpt
from parallel.stages import layer_costs
from parallel.tensor import Declared, check_plan, declared_splits, expand_plan, units_by_head
from uni3d.checkpoint.adapters import adapters
from uni3d.export import hugging_face


def declared(model: nn.Module) -> dict[str, Any]:
    """Return the manifest's `model.declared`: the model's class, and its description as far as it has one.

    From attributes of the model, as `parallel.build` reads them: `pipeline_layers` (names), `pipeline_costs`
    (a number for each), `num_stages`, `tp_plan` (pattern -> style), `tp_units` (pattern -> number) and
    `tp_parts` (pattern -> number or sizes).
    Derived from its modules: `loss_fn`, true if there is one; `layer_flops`, the cost of each layer when
    stages are cut by flops; further `tp_units`, by name, of layers with a `head_dim`; and `tp_refused`, the
    reason why no tensor-parallel degree suits the plan. `uni3d.export.hugging_face` reads `hugging_face`, and
    `uni3d.export.peft_adapters` reads `peft`.
    """
    said: dict[str, Any] = {"class": type(model).__name__}
    if (layers := getattr(model, "pipeline_layers", None)) is not None:
        said["pipeline_layers"] = [str(name) for name in layers]
        known = {name for name, _ in model.named_modules()}
        if known.issuperset(said["pipeline_layers"]):  # else `parallel.build` refuses it, saying why
            said["layer_flops"] = layer_costs(model, layers, "flops")
        said["loss_fn"] = getattr(model, "loss_fn", None) is not None
        if (costs := getattr(model, "pipeline_costs", None)) is not None:
            said["pipeline_costs"] = list(costs)
        if (stages := getattr(model, "num_stages", None)) is not None:
            said["num_stages"] = int(stages)
    if (splits := declared_splits(model)).plan:
        said["tp_plan"] = {str(pattern): str(style) for pattern, style in splits.plan.items()}
        said |= _tensor_parallel(model, splits)
    if (form := _hugging_face(model)) is not None:
        said["hugging_face"] = form
    if (held := adapters(model)) is not None:
        said["peft"] = held
    return said


def _tensor_parallel(model: nn.Module, splits: Declared) -> dict[str, Any]:
    """Return `tp_units`, `tp_parts` and `tp_refused` for a tensor-parallel plan, and what it leaves out."""
    said: dict[str, Any] = {}
    units = {str(pattern): int(number) for pattern, number in splits.units.items()}
    parts = {str(p): n if isinstance(n, int) else [int(size) for size in n] for p, n in splits.parts.items()}
    try:
        expanded = expand_plan(model, splits.plan, parts)
        check_plan(model, expanded, units, 1, parts=parts)
        units |= units_by_head(model, expanded, units)
        rows = {name: style for name, style in expanded.items() if style == "per_head"}
        said |= {"tp_plan": splits.plan | rows} if rows else {}
    except ValueError as error:  # no reason to stop a run with tp=1
        said["tp_refused"] = str(error)
    return said | ({"tp_units": units} if units else {}) | ({"tp_parts": parts} if parts else {})


def _hugging_face(model: nn.Module) -> dict[str, Any] | None:
    """Return the model's Hugging Face description; None if it has none.

    The form is `{"config": content of config.json, "names": a name map}` (`uni3d/name_map.py`). Models of
    `transformers` need no attribute. A description that can't be kept is dropped with a warning: it is no
    reason to stop training.
    """
    try:
        form: dict[str, Any] | None = getattr(model, "hugging_face", None) or _of_transformers(model)
        if form is None:
            return None
        ckpt.check_json(form, "it")
        hugging_face.parse(form)
    except Exception as error:  # of any kind: the config's class may be anybody's
        what = f"a Hugging Face description of {type(model).__name__} (its attribute hugging_face)"
        warnings.warn(f"checkpoints won't have {what}: {error}", stacklevel=4)
        return None
    return copy.deepcopy(form)


def _of_transformers(model: nn.Module) -> dict[str, Any] | None:
    """Return the description of a `transformers` model; None for others.

    Names stay as they are. A weight that the library ties by itself is left out under its second name.
    """
    # A model can only be one of theirs if this module has been imported. Not here: that takes seconds.
    library = sys.modules.get("transformers.modeling_utils")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [type(model).__name__]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    tied = [k for k, first in ties.items() if k in parameters and parameters[k] is parameters.get(first)]
    return {"config": config, "names": {re.escape(name): None for name in tied}}

"""What a model says of itself, as the manifest keeps it: how it may be split, and what it is to Hugging Face.

Whoever has the checkpoint and not the code can then tell which topologies the run could go on with
(`uni3d doctor`), and make a folder that `transformers` loads (`uni3d export --format hf`).
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
from uni3d import hugging_face


def declared(model: nn.Module) -> dict[str, Any]:
    """The manifest's `model.declared`: the model's class, and those of its attributes that it has.

    `pipeline_layers` (names), `tp_plan` (pattern -> style) and `tp_units` (pattern -> number) are what
    `parallel.build` reads. `hugging_face` is `{"config": the content of config.json, "names": a name map}`
    (`uni3d/name_map.py`) for a model that one of `transformers` can stand for; such a model itself needn't
    say it. What can't be kept is warned of, and left out: it is no reason not to train.
    """
    said: dict[str, Any] = {"class": type(model).__name__}
    if (layers := getattr(model, "pipeline_layers", None)) is not None:
        said["pipeline_layers"] = [str(name) for name in layers]
    if plan := getattr(model, "tp_plan", None):
        said["tp_plan"] = {str(pattern): str(style) for pattern, style in plan.items()}
    if units := getattr(model, "tp_units", None):
        said["tp_units"] = {str(pattern): int(number) for pattern, number in units.items()}
    try:
        if (form := getattr(model, "hugging_face", None) or _of_transformers(model)) is not None:
            ckpt.check_json(form, "it")
            hugging_face.parse(form)
            said["hugging_face"] = copy.deepcopy(form)
    except Exception as error:  # of any kind: a configuration's class may be anybody's
        warnings.warn(
            f"checkpoints won't say what {said['class']} is to Hugging Face (hugging_face): {error}",
            stacklevel=3,
        )
    return said


def _of_transformers(model: nn.Module) -> dict[str, Any] | None:
    """What a model of Hugging Face's library says by its configuration; None if it isn't one.

    Its names are theirs. A weight that the library ties by itself is left out under its second name.
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

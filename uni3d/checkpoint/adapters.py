"""Adapters that `peft` has put into a model: the config of each, and its tensors by peft's own names.

They are recorded at a save, so that `uni3d export --format peft` needs neither the model nor peft. Which
tensors belong to an adapter, and under which names, is asked of peft.
"""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

import ckpt
from parallel.tensors import WRAPPED

_CHANGING = ("ADALORA",)
"""Methods whose adapters change their shapes, and their config with them, while they train."""
_OF_WRAPPED = "base_model.model."
"""Prefix of the names in peft's files, where peft hasn't wrapped the model itself."""


def adapters(model: nn.Module) -> dict[str, Any] | None:
    """Return the manifest's `model.declared.peft`; None for a model without adapters.

    The form is adapter -> `{"config": content of adapter_config.json, "tensors": {name in peft's file: name
    in the checkpoint}}`, or `{"refused": reason}` for one that can't be exported, which is no reason to stop
    training.
    """
    peft = sys.modules.get("peft")  # not imported here: that takes seconds
    if peft is None:
        return None
    held: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inner = any(not outer or name.startswith(f"{outer}.") for outer in held)
        if not inner and _has_adapters(peft, module):
            held[name] = module
    if not held:
        return None
    if len(held) > 1:
        return {"default": {"refused": f"several modules have adapters: {', '.join(held)}"}}
    ((place, module),) = held.items()
    found: dict[str, Any] = {}
    for adapter in module.peft_config:  # type: ignore[union-attr]
        try:
            found[adapter] = _described(peft, module, f"{place}." if place else "", adapter)
            ckpt.check_json(found[adapter], "its description")
        except Exception as error:  # of any kind: peft's methods are many
            found[adapter] = {"refused": f"{type(error).__name__}: {error}"}
    return found


def _has_adapters(peft: ModuleType, module: nn.Module) -> bool:
    """Return whether peft has wrapped the module, or put adapters into it at transformers' `add_adapter`."""
    return isinstance(module, peft.PeftModel) or bool(getattr(module, "_hf_peft_config_loaded", False))


def _described(peft: ModuleType, module: Any, prefix: str, adapter: str) -> dict[str, Any]:
    config = module.peft_config[adapter]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind in _CHANGING:
        return {"refused": f"an adapter of {kind} changes its shapes while it trains"}
    # Stand-ins show which tensors peft takes as they are, and under which names.
    stand_ins = {
        name: torch.empty(value.shape, dtype=value.dtype, device="meta")
        for name, value in module.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor)
    }
    stored = {id(stand_in): prefix + name for name, stand_in in stand_ins.items()}
    path, base = config.base_model_name_or_path, module
    if wrapped := isinstance(module, peft.PeftModel):
        base = module.get_base_model()
        path = path or base.__dict__.get("name_or_path") or None
    try:
        config.base_model_name_or_path = None  # peft would ask the Hub for its size of the vocabulary
        with warnings.catch_warnings(action="ignore"):
            taken = peft.get_peft_model_state_dict(
                module,
                state_dict=stand_ins,
                adapter_name=adapter,
                save_embedding_layers=True if _resized(base, path) else "auto",
            )
    finally:
        config.base_model_name_or_path = path
    start = "" if wrapped else _OF_WRAPPED
    if made := [name for name, value in taken.items() if id(value) not in stored]:
        return {"refused": f"peft computes {made[0]} of an adapter of {kind} when it saves it"}
    tensors = {_plain(start + name): _plain(stored[id(value)]) for name, value in taken.items()}
    return {"config": _content(config, path, base), "tensors": tensors}


def _plain(name: str) -> str:
    """Return a name without the traces of wrappers, as checkpoints have it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def _content(config: Any, path: str | None, base: nn.Module) -> dict[str, Any]:
    """Return what peft would write to adapter_config.json."""
    config = copy.deepcopy(config)
    config.base_model_name_or_path, config.inference_mode = path, True
    content = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    if config.task_type is None:
        kind = type(base).__mro__[2] if isinstance(base, FSDPModule) else type(base)
        content["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    plain: dict[str, Any] = json.loads(json.dumps(content, allow_nan=False))
    return plain


def _resized(base: nn.Module, path: str | None) -> bool:
    """Return whether the vocabulary isn't the pretrained model's.

    Its config is looked for on this machine alone.
    """
    size = getattr(getattr(base, "config", None), "vocab_size", None)
    if not path or not size:
        return False
    file = Path(path) / "config.json"
    if not file.is_file():
        hub = sys.modules.get("huggingface_hub")
        cached = hub.try_to_load_from_cache(path, "config.json") if hub else None
        if not isinstance(cached, str):
            return False
        file = Path(cached)
    return bool(json.loads(file.read_text(encoding="utf-8")).get("vocab_size", size) != size)

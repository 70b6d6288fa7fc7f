"""Optimizers of a config, over this rank's parts of the parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from uni3d.config import torch_optimizers as torch_optim
from uni3d.config.optimizer import AdamConfig, LionConfig, MuonConfig, OptimizerConfig
from uni3d.optim.adam import Adam, AdamW
from uni3d.optim.lion import Lion
from uni3d.optim.muon import MuonWithAdam, muon_groups

Groups = list[dict[str, Any]]


def make_optimizer(config: OptimizerConfig, groups: Groups) -> torch.optim.Optimizer:
    """Return the config's optimizer over `groups`, whose own hyperparameters take precedence.

    Muon needs groups from `split_groups`.

    Raises:
        ValueError: torch doesn't accept a hyperparameter's value, at all or for sharded parameters.
    """
    params = config.hyperparameters
    if isinstance(config, AdamConfig):
        decoupled = config.params.adam_w_mode
        if config.params.torch_adam:
            kind = torch.optim.AdamW if decoupled else torch.optim.Adam
            return kind(groups, fused=True, **params)  # one pass over memory instead of one per operation
        return AdamW(groups, **params) if decoupled else Adam(groups, adam_w_mode=False, **params)
    if isinstance(config, LionConfig):
        return Lion(groups, **params)
    if isinstance(config, MuonConfig):
        return MuonWithAdam(groups, {})
    try:
        made: torch.optim.Optimizer = getattr(torch.optim, config.type)(groups, **params)
    except ValueError as error:
        raise ValueError(f"config: optimizer.params of {config.type}: {error}") from None
    check_works_sharded(made)
    return made


def split_groups(config: OptimizerConfig, model: nn.Module, groups: Groups) -> Groups:
    """Return groups of parameter names as the config's optimizer needs them. `model` isn't split yet."""
    if not isinstance(config, MuonConfig):
        return groups
    params = config.hyperparameters
    matrices = {"lr": params["muon_lr"], **{key: params[key] for key in ("momentum", "weight_decay")}}
    rest = {"lr": params["adam_lr"], **{key: params[key] for key in ("betas", "eps", "weight_decay")}}
    return muon_groups(model, groups, matrices, rest)


def check_works_sharded(optimizer: torch.optim.Optimizer) -> None:
    """Check that a user's optimizer can train sharded parameters.

    Raises:
        ValueError: it is one of torch's that can't, or not with `fused`, or the Adafactor of `transformers`.
    """
    name, module = type(optimizer).__name__, type(optimizer).__module__
    if module.startswith("torch.optim") and name in torch_optim.REFUSED:
        raise ValueError(f"the optimizer torch.optim.{name} is refused: {torch_optim.REFUSED[name]}")
    fused = any(group.get("fused") for group in optimizer.param_groups)
    if module.startswith("torch.optim") and fused and name not in ("Adam", "AdamW"):
        raise ValueError(
            f"the optimizer torch.optim.{name} with fused=True is refused: torch has no such step for "
            "sharded parameters; leave fused out"
        )
    if (module, name) == ("transformers.optimization", "Adafactor"):
        raise ValueError(
            "the optimizer Adafactor of transformers is refused: its means by row and column don't support "
            "sharded parameters; use AdamW (optim=adamw_torch)"
        )

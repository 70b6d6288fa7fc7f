"""The config's `optimizer`: DeepSpeed's optimizers, and those of `torch.optim`, with their own parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

import uni3d.config.torch_optimizers as torch_optim
from uni3d.config.strict import ConfigError, Strict, known_keys, named_section, unknown, validate

Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]

_ONE_BIT = (
    "it needs DeepSpeed's compressed communication; use AdamW, and communication_data_type to halve traffic"
)
_TRUST = "its layer-wise norms aren't implemented for sharded layers; use AdamW"
_MUP = "it belongs to the mup package; pass an instance to initialize"
REFUSED = {
    "Lamb": _TRUST,
    "OneBitAdam": _ONE_BIT,
    "ZeroOneAdam": _ONE_BIT,
    "OneBitLamb": _ONE_BIT,
    "MuAdam": _MUP,
    "MuAdamW": _MUP,
    "MuSGD": _MUP,
    **torch_optim.REFUSED,
}
"""Refused optimizers of DeepSpeed's configs and of torch, with the reason."""


class OptimizerConfig(Strict):
    """An optimizer with all its parameters."""

    type: str
    """Name of the optimizer, in any case."""
    params: SerializeAsAny[Strict]
    """Parameters of the optimizer."""

    @property
    def implementation(self) -> str:
        """Full name of the optimizer's class."""
        return f"torch.optim.{self.type}"

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Hyperparameters that the class is constructed with."""
        return self.params.model_dump()


def _corrects(value: object) -> object:
    if value is False:
        raise ValueError(
            "torch's Adam and AdamW always correct the bias of their averages; leave it out, or pass an "
            "optimizer that doesn't to initialize"
        )
    return value


def _are_fp32(value: object) -> object:
    if value is False:
        raise ValueError("parameters and their states are always fp32; leave it out")
    return value


class AdamParams(Strict):
    """Parameters of DeepSpeed's Adam and AdamW."""

    lr: float = Field(default=1e-3, ge=0)
    betas: Betas = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    """0 by default; 0.01, torch's default, for AdamW with `torch_adam`."""
    amsgrad: bool = False
    adam_w_mode: bool = True
    """Decoupled weight decay; as in DeepSpeed, "Adam" is AdamW unless this is false."""
    torch_adam: bool = False
    """The implementation is always torch's; this only sets the default of `weight_decay`."""
    bias_correction: Annotated[Literal[True], BeforeValidator(_corrects)] = True
    set_grad_none: bool = True
    """Accepted for compatibility: gradients are always set to None after a step."""
    fp32_optimizer_states: Annotated[Literal[True], BeforeValidator(_are_fp32)] = True


class AdamConfig(OptimizerConfig):
    type: Literal["Adam", "AdamW"]
    params: AdamParams = AdamParams()

    @model_validator(mode="after")
    def _a_name_says_one_thing(self) -> AdamConfig:
        if self.type == "AdamW" and not self.params.adam_w_mode:
            raise ValueError('adam_w_mode false contradicts type "AdamW"; use "Adam"')
        return self

    @property
    def implementation(self) -> str:
        return "torch.optim.AdamW" if self.params.adam_w_mode else "torch.optim.Adam"

    @property
    def hyperparameters(self) -> dict[str, Any]:
        decay = self.params.weight_decay
        if decay is None:
            decay = 0.01 if self.params.torch_adam and self.params.adam_w_mode else 0.0
        kept = self.params.model_dump(include={"lr", "betas", "eps", "amsgrad"})
        return {**kept, "weight_decay": decay}


class LionParams(Strict):
    """Parameters of DeepSpeed's Lion."""

    lr: float = Field(default=1e-3, ge=0)
    betas: Betas = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    set_grad_none: bool = True
    """Accepted for compatibility: gradients are always set to None after a step."""
    fp32_optimizer_states: Annotated[Literal[True], BeforeValidator(_are_fp32)] = True


class LionConfig(OptimizerConfig):
    type: Literal["Lion"]
    params: LionParams = LionParams()

    @property
    def implementation(self) -> str:
        return "uni3d.optim.lion.Lion"

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return self.params.model_dump(include={"lr", "betas", "weight_decay"})


class MuonParams(Strict):
    """Parameters of Muon, which updates matrices, and of AdamW, which updates the rest."""

    lr: float | None = Field(default=None, ge=0)
    """Learning rate of both, unless `muon_lr` or `adam_lr` is given."""
    muon_lr: float | None = Field(default=None, ge=0)
    """Learning rate of Muon, 0.02 by default."""
    adam_lr: float | None = Field(default=None, ge=0)
    """Learning rate of AdamW, 3e-4 by default."""
    momentum: Beta = 0.95
    """Momentum of Muon."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of both."""
    betas: Betas = (0.9, 0.95)
    """Betas of AdamW."""
    eps: float = Field(default=1e-10, gt=0)
    """Epsilon of AdamW."""
    ns_method: Literal["gram", "standard"] = "gram"
    """Accepted for compatibility: both are the standard Newton-Schulz iteration here."""


class MuonConfig(OptimizerConfig):
    type: Literal["Muon"]
    params: MuonParams = MuonParams()

    @property
    def implementation(self) -> str:
        return "uni3d.optim.muon.MuonWithAdam"

    @property
    def hyperparameters(self) -> dict[str, Any]:
        rates = {
            "muon_lr": _first(self.params.muon_lr, self.params.lr, 0.02),
            "adam_lr": _first(self.params.adam_lr, self.params.lr, 3e-4),
        }
        return rates | self.params.model_dump(include={"momentum", "weight_decay", "betas", "eps"})


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


_OWN: dict[str, type[OptimizerConfig]] = {
    "Adam": AdamConfig,
    "AdamW": AdamConfig,
    "Lion": LionConfig,
    "Muon": MuonConfig,
}


def read_optimizer(section: object) -> OptimizerConfig | None:
    """Read the config's `optimizer`.

    Raises:
        ConfigError: the optimizer or one of its parameters doesn't exist.
    """
    values = named_section("optimizer", section, "AdamW")
    if values is None:
        return None
    given, params = values["type"], values["params"]
    known = {name.lower(): name for name in (*torch_optim.names(), *_OWN, *REFUSED)}
    name = known.get(given.lower())  # DeepSpeed ignores case in its names
    if name is None:
        raise ConfigError(
            [f"optimizer.type: {unknown('optimizer', given, set(known.values()) - set(REFUSED))}"]
        )
    if name in REFUSED:
        raise ConfigError([f"optimizer.type {given!r} is refused: {REFUSED[name]}"])
    values["type"] = name
    if isinstance(params, Mapping) and params.get("max_grad_norm"):
        raise ConfigError(["optimizer.params.max_grad_norm is refused: use gradient_clipping"])
    if name in _OWN:
        known_params = known_keys(_OWN[name], ["params"])
        return validate(_OWN[name], values, "optimizer", [f"optimizer.params.{key}" for key in known_params])
    section = torch_optim.parameters(name)
    values["params"] = validate(section, params, "optimizer.params")
    return validate(
        OptimizerConfig, values, "optimizer", [f"optimizer.params.{key}" for key in section.model_fields]
    )

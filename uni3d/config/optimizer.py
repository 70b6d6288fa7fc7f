"""The config's `optimizer`: DeepSpeed's names with DeepSpeed's parameters, and torch's with torch's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, model_validator

from uni3d.config import torch_optimizers as torch_optim
from uni3d.config.strict import ConfigError, Strict, unknown, validate

Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]

_ONE_BIT = (
    "its compressed sums belong to DeepSpeed's own communication; communication_data_type halves what is sent"
)
_TRUST = "it scales each layer's step by the layer's whole norm, which isn't implemented for sharded layers"
_MUP = "it is the mup package's; give initialize an optimizer of its class"
REFUSED = {
    "Lamb": _TRUST,
    "OneBitAdam": _ONE_BIT,
    "ZeroOneAdam": _ONE_BIT,
    "OneBitLamb": f"{_ONE_BIT}; and {_TRUST}",
    "MuAdam": _MUP,
    "MuAdamW": _MUP,
    "MuSGD": _MUP,
    **torch_optim.REFUSED,
}
"""Optimizers that DeepSpeed's configs can name and ours can't, and why."""


class OptimizerConfig(Strict):
    """An optimizer by its name, with all its parameters."""

    type: str
    """The name of the optimizer, in any case."""
    params: SerializeAsAny[Strict]
    """Its parameters; see below."""

    @property
    def implementation(self) -> str:
        """The class that it is."""
        return f"torch.optim.{self.type}"

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Those that it runs with."""
        return self.params.model_dump()


class AdamParams(Strict):
    """Of DeepSpeed's Adam and AdamW."""

    lr: float = Field(default=1e-3, ge=0)
    betas: Betas = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    """0 by default, and 0.01 for AdamW with `torch_adam`, as torch has it."""
    amsgrad: bool = False
    adam_w_mode: bool = True
    """As in DeepSpeed, "Adam" decays weights as AdamW does unless this is false."""
    torch_adam: bool = False
    """It is always torch's; this only sets the default of `weight_decay`."""
    bias_correction: Literal[True] = True
    set_grad_none: bool = True
    """Gradients are always dropped after a step, never set to zero."""
    fp32_optimizer_states: Literal[True] = True


class AdamConfig(OptimizerConfig):
    type: Literal["Adam", "AdamW"]
    params: AdamParams = AdamParams()

    @model_validator(mode="after")
    def _a_name_says_one_thing(self) -> AdamConfig:
        if self.type == "AdamW" and not self.params.adam_w_mode:
            raise ValueError('adam_w_mode false is type "Adam"; "AdamW" always decays weights apart')
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
    lr: float = Field(default=1e-3, ge=0)
    betas: Betas = (0.9, 0.99)
    weight_decay: float = Field(default=0.0, ge=0)


class LionConfig(OptimizerConfig):
    type: Literal["Lion"]
    params: LionParams = LionParams()

    @property
    def implementation(self) -> str:
        return "uni3d.optim.lion.Lion"


class MuonParams(Strict):
    """Of the matrices, which Muon updates, and of the rest, which AdamW does."""

    lr: float | None = Field(default=None, ge=0)
    """Of both; `muon_lr` and `adam_lr` come first."""
    muon_lr: float | None = Field(default=None, ge=0)
    """0.02 by default."""
    adam_lr: float | None = Field(default=None, ge=0)
    """3e-4 by default."""
    momentum: Beta = 0.95
    """Of the matrices."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of both."""
    betas: Betas = (0.9, 0.95)
    """Of the rest."""
    eps: float = Field(default=1e-10, gt=0)
    """Of the rest."""
    ns_method: Literal["gram", "standard"] = "gram"
    """Two ways to the same result in DeepSpeed; here both are the standard iteration."""


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
    """The config's `optimizer`.

    Raises:
        ConfigError: there is no such optimizer, or it has no such parameters.
    """
    if section is None:
        return None
    if not isinstance(section, Mapping) or not isinstance(section.get("type"), str):
        raise ConfigError([f'optimizer is {section!r}: write {{"type": "AdamW", "params": {{}}}}'])
    given = section["type"]
    known = {name.lower(): name for name in (*torch_optim.names(), *_OWN, *REFUSED)}
    name = known.get(given.lower())  # DeepSpeed takes its own names in any case
    if name is None:
        raise ConfigError(
            [f"optimizer.type: {unknown('optimizer', given, set(known.values()) - set(REFUSED))}"]
        )
    if name in REFUSED:
        raise ConfigError([f"optimizer.type {given!r} is refused: {REFUSED[name]}"])
    params: Any = section.get("params")
    values: dict[str, Any] = {**section, "type": name, "params": {} if params is None else params}
    if isinstance(params, Mapping) and params.get("max_grad_norm"):
        raise ConfigError(["optimizer.params.max_grad_norm is refused: it is called gradient_clipping"])
    if name in _OWN:
        return validate(_OWN[name], values, "optimizer")
    section_of_params = torch_optim.parameters(name)
    values["params"] = validate(section_of_params, values["params"], "optimizer.params")
    return validate(OptimizerConfig, values, "optimizer")

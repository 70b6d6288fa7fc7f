"""How a model is to be split and run, apart from the number of ranks: what `build` is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zero_bubble_v"]
Balance = Literal["flops", "parameters", "uniform"]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Which type each job is done in. Parameters, summed gradients and optimizer states are always fp32."""

    compute: torch.dtype = torch.float32
    """Of forward and backward passes: fp32, bf16 or fp16."""
    reduce: torch.dtype = torch.float32
    """In which gradients are accumulated and summed over the data-parallel ranks."""

    @property
    def mixed(self) -> bool:
        """Whether anything is done in another type than fp32."""
        return (self.compute, self.reduce) != (torch.float32, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """Activation checkpointing: what isn't kept in the forward pass is computed again in the backward one."""

    mode: Literal["full", "selective"] = "full"
    """"full" keeps each layer's input; "selective" also keeps what matrix products and attention gave."""
    every: int = 1
    """Of how many layers one is recomputed."""


@dataclass(frozen=True, kw_only=True)
class Compile:
    """`torch.compile` of each layer."""

    backend: str = "inductor"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `torch.compile`."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that `parallel.build` is told beside the model and the topology."""

    seed: int
    """Of the initial weights of a model on the meta device."""
    zero_stage: int = 0
    precision: Precision = Precision()
    offload: bool = False
    """Whether sharded parameters, gradients and optimizer states lie in the host's memory."""
    persistence_threshold: int = 0
    """At ZeRO stage 3, layers of fewer elements are kept whole from the forward pass to the backward one."""
    schedule: Schedule = "1f1b"
    """Of the pipeline."""
    virtual_stages: int = 1
    """Pipeline stages on each rank."""
    balance: Balance = "flops"
    """What is as even as can be between pipeline stages."""
    sequence_parallel: bool = False
    """Whether tensor-parallel ranks split the sequence where they don't split the features."""
    recompute: Recompute | None = None
    compile: Compile | None = None

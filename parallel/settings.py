"""Settings of `parallel.build`: everything apart from the model and the number of ranks. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "zero_bubble_v"]
Balance = Literal["flops", "parameters", "uniform"]
DType = Literal["fp32", "bf16", "fp16"]

ITEMSIZE: Mapping[DType, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of an element."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Types of computation and reduction. Parameters, reduced gradients and optimizer states stay fp32."""

    compute: DType = "fp32"
    """Type of forward and backward passes."""
    reduce: DType = "fp32"
    """Type in which gradients are accumulated and summed over the data-parallel ranks."""

    @property
    def mixed(self) -> bool:
        """True if anything is done in another type than fp32."""
        return (self.compute, self.reduce) != ("fp32", "fp32")


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """Activation checkpointing: layers run again in the backward pass instead of keeping activations."""

    mode: Literal["full", "selective"] = "full"
    """"full" keeps each layer's input; "selective" also keeps outputs of matrix products and attention."""
    every: int = 1
    """Recompute one of this many layers."""


@dataclass(frozen=True, kw_only=True)
class Compile:
    """`torch.compile` of each layer."""

    backend: str = "inductor"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `torch.compile`."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All arguments of `parallel.build` beside the model and the topology."""

    seed: int = 0
    """Seed of the initial weights of a model on the meta device."""
    zero_stage: int = 0
    precision: Precision = Precision()
    offload: bool = False
    """True if sharded parameters, gradients and optimizer states stay in host memory."""
    persistence_threshold: int = 0
    """At ZeRO stage 3, layers with fewer elements stay whole from the forward pass to the backward pass."""
    schedule: Schedule = "1f1b"
    """Pipeline schedule."""
    virtual_stages: int = 1
    """Pipeline stages on each rank."""
    balance: Balance = "flops"
    """Quantity that the pipeline stages share out evenly."""
    sequence_parallel: bool = False
    """True if tensor-parallel ranks split the sequence wherever they don't split the features."""
    recompute: Recompute | None = None
    compile: Compile | None = None

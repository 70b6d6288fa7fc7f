"""Floating-point operations of a model, by one formula, and what devices can do. Loads no torch.

A step of training costs three forward passes: the backward pass computes two matrix products for each of
the forward pass. What is computed a second time to save memory doesn't count. In a forward pass only matrix
products count, two operations for each multiplication: those with parameters, and attention's two, in full
also where the upper half is masked. For a decoder of L layers with attention H heads x E wide, per token:

    forward = 2 N + 4 L (H E) S        training = 3 forward = 6 N + 12 L H E S

N are the elements of the matrices that are multiplied: all but embeddings that are looked up; a tied one
counts as the output head. (PaLM, Chowdhery et al. 2022, appendix B.)

    MFU = training FLOPs of a step / (seconds x devices x peak FLOP/s)
"""

from __future__ import annotations

import re

TRAINING = 3
"""Forward passes that a step of training is worth."""

_PEAK_TFLOPS = {
    # Dense bf16/fp16, from NVIDIA's data sheets; the first that is in a device's name as whole words counts.
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "GH200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "V100": 125.0,
}


def forward_flops_per_token(matrix_elements: int, layers: int, attention_width: int, seq_len: int) -> int:
    """Of a decoder; `attention_width` is heads times head size."""
    return 2 * matrix_elements + 4 * layers * attention_width * seq_len


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a device in 16 bits, if it is known."""
    for name, tflops in _PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", device_name):  # an RTX A1000 is no A100
            return tflops * 1e12
    return None


def utilisation(forward_flops: float, seconds: float, devices: int, peak: float) -> float:
    """MFU of a step whose forward passes, over all devices, took so many operations."""
    return TRAINING * forward_flops / (seconds * devices * peak)

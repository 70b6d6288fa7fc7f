"""FLOPs of a decoder by formula, peak FLOP/s of GPUs, and MFU. Loads no torch.

A training step costs three forward passes, as the backward pass computes two matrix products for each one of
the forward pass. Recomputation to save memory doesn't count. A forward pass counts its matrix products, two
operations per multiplication: those with parameters, and attention's two, in full even if half of the scores
are masked. Per token of a decoder with L layers and attention of H heads x E, at sequence length S:

    forward = 2 N + 4 L (H E) S        training = 3 forward = 6 N + 12 L H E S

N is the number of elements of the multiplied matrices: all but embedding tables; a tied one counts, as the
output head. (PaLM, Chowdhery et al. 2022, appendix B.)

    MFU = training FLOPs of a step / (seconds x devices x peak FLOP/s)
"""

from __future__ import annotations

import re

TRAINING = 3
"""Cost of a training step in forward passes."""

_PEAK_TFLOPS = {
    # Dense bf16/fp16, from NVIDIA's data sheets. The first one found in the device's name is used.
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
    """Return the forward FLOPs per token of a decoder; `attention_width` is heads times head size."""
    return 2 * matrix_elements + 4 * layers * attention_width * seq_len


def peak_flops(device_name: str) -> float | None:
    """Return the peak FLOP/s of a GPU in 16 bits, or None if it isn't known."""
    for name, tflops in _PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", device_name):  # an RTX A1000 is no A100
            return tflops * 1e12
    return None


def utilisation(forward_flops: float, seconds: float, devices: int, peak: float) -> float:
    """Return the MFU of a step with `forward_flops` forward FLOPs over all devices."""
    return TRAINING * forward_flops / (seconds * devices * peak)

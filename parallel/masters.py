"""The fp32 masters that training updates, made of what a model came with."""

from __future__ import annotations

import torch
from torch import nn

LOW = (torch.bfloat16, torch.float16)


@torch.no_grad()
def make_masters(model: nn.Module) -> list[str]:
    """Turn parameters in bf16 or fp16 into fp32 ones, in place, and buffers with them; returns their names.

    What a model is computed in is the config's to say; its optimizer always updates fp32 parameters, which
    begin at the values that it came with. Parameters whose memory is in another order than their dims get
    it in that order, as sharding wants it. They stay the same objects: optimizers that have them still do.

    Raises:
        ValueError: a parameter of another type, naming it.
    """
    changed = []
    for name, parameter in model.named_parameters():
        if parameter.dtype in LOW:
            parameter.data = parameter.data.float()
            changed.append(name)
        elif parameter.dtype != torch.float32:
            raise ValueError(
                f"{name} is {parameter.dtype}; parameters must be torch.float32, torch.bfloat16 or "
                "torch.float16" + ("; call model.float()" if parameter.dtype == torch.float64 else "")
            )
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    if changed:
        for buffer in model.buffers():
            if buffer.dtype in LOW:
                buffer.data = buffer.data.float()
    return changed

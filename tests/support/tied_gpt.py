"""Engines of the example's GPT on any topology, with a tied head by default, and what they hold."""

from typing import Any

import oracle
import torch
from model import GPT, GPTConfig
from models import save_and_wait
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import uni3d

TIED = oracle.MODEL | {"tied_head": True}


def gpt_engine(
    pp: int,
    dp: int | str,
    tp: int,
    zero: int,
    *,
    sizes: dict[str, Any] = TIED,
    groups: bool = False,
    masked: bool = False,
    resume: Any = None,
    **config: Any,
) -> uni3d.Engine:
    """Return an engine with the oracle's data, and with its parameter groups if `groups`.

    Without a micro batch in `config`, a step has two of them.
    """
    with torch.device("meta"):
        model = GPT(GPTConfig(**sizes))
    vectors = [p for p in model.parameters() if p.ndim < 2]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    degrees = {"pp": pp, "dp": dp, "tp": tp, "device": "cpu"}
    settings = oracle.SETTINGS | config
    settings["parallel"] = degrees | config.get("parallel", {})
    settings["zero_optimization"] = {"stage": zero} | config.get("zero_optimization", {})
    if "train_micro_batch_size_per_gpu" not in config:
        settings.setdefault("gradient_accumulation_steps", 2)
    return uni3d.initialize(
        model=model,
        model_parameters=[{"params": matrices}, {"params": vectors, "weight_decay": 0.0}] if groups else None,
        training_data=torch.utils.data.TensorDataset(*oracle.samples(masked)),
        config=settings,
        resume=resume,
    )[0]


def save_case(place: tuple[int, int, int, int], folder: str, **given: Any) -> dict[str, Tensor]:
    """Train a step and save; return the weights of this rank's stage."""
    engine = gpt_engine(*place, **given)
    engine.train_batch()
    save_and_wait(engine, folder)
    return engine.module_state_dict()


def worst_error(engine: Any, expected: dict[str, dict[str, Tensor]]) -> tuple[float, str]:
    """Return the largest error of this rank's parts, relative to the largest element of the tensor."""
    worst = (0.0, "")
    engine.model.zero.reshard()  # the optimizer has the sharded parameters
    for name, parameter in engine.module.named_parameters():
        first = engine.model.first_name(name)
        tensors = {"fp32": parameter.detach()} | engine.optimizer.state[parameter]
        for key in expected[first]:
            whole, local = expected[first][key], tensors[key]
            scale = whole.abs().max().item()
            if isinstance(local, DTensor):
                args = (local.shape, local.device_mesh, local.placements)
                shape, offset = compute_local_shape_and_global_offset(*args)  # torch's, not ours
                whole = whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
                local = local.to_local()
            if whole.numel():
                worst = max(worst, ((local - whole).abs().max().item() / scale, f"{first}/{key}"))
    return worst

"""Load an export in DeepSpeed and go on: `python tests/peers/load_deepspeed.py RUN OUT RANKS ZERO [bf16]`.

Rank 0 writes what DeepSpeed holds after the load to OUT/held.safetensors, and the next steps to
OUT/after.json.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import continues_model
import deepspeed
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from make_deepspeed import train
from peers_common import on_ranks
from safetensors.torch import save_file


def load(run: str, out: str, zero: int, kind: str) -> None:
    config: dict[str, Any] = copy.deepcopy(continues_model.config())
    config["optimizer"]["params"]["torch_adam"] = True
    config["zero_optimization"] = {"stage": zero, "stage3_param_persistence_threshold": 0}
    config["checkpoint"] = {"load_universal": True}
    if kind == "bf16":
        config["bf16"] = {"enabled": True}
    model = continues_model.model()
    for parameter in model.parameters():
        parameter.data.zero_()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    _, client_state = engine.load_checkpoint(run)
    held = {}
    for name, parameter in engine.module.named_parameters():
        held[f"{name}/fp32"] = safe_get_full_fp32_param(parameter)
        for state in ("exp_avg", "exp_avg_sq"):
            held[f"{name}/{state}"] = safe_get_full_optimizer_state(parameter, state)
    before = continues_model.STEPS_BEFORE
    facts = {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "mine": client_state["mine"],
    }
    if kind != "bf16":
        steps = range(before, before + continues_model.STEPS_AFTER)
        facts["after"] = [train(engine, step) for step in steps]
    if dist.get_rank() == 0:
        save_file(
            {name: x.detach().clone().contiguous() for name, x in held.items()}, f"{out}/held.safetensors"
        )
        Path(out, "after.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    run, out, ranks, zero, *kind = sys.argv[1:]
    on_ranks(int(ranks), load, run, out, int(zero), "".join(kind))

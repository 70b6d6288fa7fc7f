"""Load a folder in Megatron-core and go on: `python tests/peers/load_megatron.py FOLDER OUT RANKS TP KIND`.

KIND is the optimizer: "fp32", "bf16" (masters on each rank) or "distributed" (bf16, masters shared out).
Rank 0 writes what Megatron holds after the load, whole, to OUT/expected.safetensors and OUT/expected.json, in
the form of the fixtures, and the next losses of all ranks to OUT/after.json.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from make_megatron import expect, on_cpu, prepared, take_step
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from peers_common import on_ranks

STEPS_AFTER = 4


def keep_steps() -> None:
    """Let the distributed optimizer load without Transformer Engine: torch's Adam has steps as states.

    They are set already when the others come; Megatron 0.16.1 looks for them among these, in its own saves
    too.
    """
    take = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_steps(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        own = self._get_main_param_and_optimizer_states(parameter)
        take(self, parameter, {"step": own["step"], **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = with_steps


def load(folder: str, out: str, tp: int, kind: str) -> None:
    parallel_state.initialize_model_parallel(tp, 1)
    keep_steps()
    with on_cpu():
        load_and_train(folder, out, kind)
    parallel_state.destroy_model_parallel()


def load_and_train(folder: str, out: str, kind: str) -> None:
    module, model, optimizer, scheduler = prepared(bf16=kind != "fp32", distributed=kind == "distributed")
    model.zero_grad_buffer()
    optimizer.step()  # without Transformer Engine, the distributed optimizer has no state to load into before
    metadata = dist_checkpointing.load_content_metadata(folder)
    weights = module.sharded_state_dict(metadata=metadata)
    states = optimizer.sharded_state_dict({"model": weights}, is_loading=True, metadata=metadata)
    # Megatron's modules ask for an `_extra_state` each, which only its own saves have; it is empty.
    loaded = dist_checkpointing.load({"model": weights, "optimizer": states}, folder, strict="log_unexpected")
    missing = module.load_state_dict(loaded["model"], strict=False)
    assert all("_extra_state" in name for name in missing.missing_keys), missing
    optimizer.load_state_dict(loaded["optimizer"])
    scheduler.load_state_dict(loaded["opt_param_scheduler"])
    begin = loaded["iteration"]
    sharding = "fully_reshardable" if kind == "distributed" else None
    expect(Path(out), module, optimizer, scheduler, sharding)
    losses = [take_step(model, optimizer, scheduler, step) for step in range(begin, begin + STEPS_AFTER)]
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, [of[0]["loss"] for of in losses])
    if dist.get_rank() == 0:
        Path(out, "after.json").write_text(json.dumps({"iteration": begin, "losses": everyones}))


if __name__ == "__main__":
    torch.serialization.add_safe_globals([argparse.Namespace])  # in Megatron's own common.pt
    folder, out, ranks, tp, kind = sys.argv[1:]
    on_ranks(int(ranks), load, folder, out, int(tp), kind)

"""Smaller names: `comm`, groups, accelerator, recomputation, messages, helpers, arguments of `initialize`."""

import logging
from typing import Any

import pytest
import torch
from models import Stack, global_batches, seeded, train
from ranks import Ranks
from test_gathering import Wide, make
from torch import nn

import uni3d
import uni3d.deepspeed as deepspeed
from uni3d.deepspeed import comm, utils


def comm_case() -> None:
    rank = comm.get_rank()
    assert comm.is_initialized()
    assert (comm.get_world_size(), comm.get_all_ranks_from_group()) == (4, [0, 1, 2, 3])
    total = torch.tensor(float(rank))
    comm.all_reduce(total, op=comm.ReduceOp.MAX)
    assert total == 3
    pair = comm.new_group([1, 3])
    if rank in (1, 3):
        assert comm.get_all_ranks_from_group(pair) == [1, 3]
        assert comm.get_global_rank(pair, 1) == 3
        whole = torch.zeros(2)
        comm.allgather_fn(whole, torch.tensor([float(rank)]), group=pair)
        assert whole.tolist() == [1.0, 3.0]
        part = torch.zeros(1)
        comm.reduce_scatter_fn(part, whole, group=pair)
        assert part.item() == whole[rank // 2] * 2
    assert comm.initialize_mesh_device((2, 2), ("a", "b")).size() == 4
    groups = utils.groups
    assert groups.get_data_parallel_world_size() == 4
    assert groups.get_data_parallel_group() is torch.distributed.group.WORLD
    with pytest.raises(RuntimeError, match="made by initialize"):
        groups.get_tensor_model_parallel_group()
    engine = make(seeded(Wide), 1, 2)
    ranks_of = torch.distributed.get_process_group_ranks
    assert ranks_of(groups.get_data_parallel_group()) == [rank % 2, 2 + rank % 2]
    assert ranks_of(groups.get_model_parallel_group()) == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert (groups._get_data_parallel_world_size(), groups._get_data_parallel_rank()) == (2, rank // 2)
    assert groups.get_tensor_model_parallel_src_rank() == rank // 2 * 2
    assert groups.get_tensor_model_parallel_rank() == rank % 2
    del engine


@pytest.mark.slow
def test_comm_and_groups(ranks: Ranks) -> None:
    ranks.run(4, comm_case)


def pipeline_case() -> None:
    """A PipelineModule's engine is of the kind PipelineEngine, and its stages are written to by each rank."""
    layers = [deepspeed.pipe.LayerSpec(nn.Linear, 6, 6) for _ in range(4)]
    model = deepspeed.PipelineModule(
        layers=layers, num_stages=2, loss_fn=lambda y, t: (y - t).square().mean(), seed_layers=True
    )
    engine = make(model, 3, parallel={"device": "cpu"})
    assert isinstance(engine, deepspeed.PipelineEngine)
    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    stage = engine.model.topology.pp_rank
    held = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(
        held, modifier_rank=1
    ):  # and on the other stage the rank at its place
        assert all(not hasattr(p, "placements") for p in held)
        for parameter in held:
            parameter.data.fill_(float(engine.global_rank))
    for parameter in held:
        value = utils.safe_get_full_fp32_param(parameter)
        assert bool((value == [1, 3][stage]).all())
    batches = [(x, x) for x, _ in global_batches(1)]
    assert train(engine, batches)
    plain = make(seeded(Stack), 1)
    assert not isinstance(plain, deepspeed.PipelineEngine)


def test_pipelines(ranks: Ranks) -> None:
    ranks.run(4, pipeline_case)


def test_accelerator() -> None:
    device = deepspeed.accelerator.get_accelerator()
    assert device.is_available()
    assert torch.device(device.current_device_name()).type == device.device_name().split(":")[0]
    assert device.device_count() >= 1
    assert device.communication_backend_name() in ("gloo", "nccl")
    assert device.total_memory() >= device.available_memory() > 0
    assert 0 <= device.memory_allocated() <= device.max_memory_allocated()
    state = device.get_rng_state()
    device.set_rng_state(state)
    with device.stream(device.current_stream()):
        device.synchronize()
    device.set_device(0)
    device.empty_cache()
    device.range_push("x")
    device.range_pop()
    assert device.on_accelerator(torch.zeros(1, device=device.current_device_name()))
    assert torch.float32 in device.supported_dtypes()


def test_recomputation() -> None:
    calls = []

    def layer(x: torch.Tensor, scale: float) -> torch.Tensor:
        calls.append(scale)
        return nn.functional.dropout(x * scale, 0.5).exp()

    checkpointing = deepspeed.checkpointing
    checkpointing.configure(None, partition_activations=False)
    assert checkpointing.is_configured()
    x = torch.ones(50, requires_grad=True)
    y = checkpointing.checkpoint(layer, x, scale=2.0)
    y.sum().backward()
    assert calls == [2.0, 2.0]
    assert x.grad is not None
    assert torch.equal(x.grad != 0, y > 1), "with the same dropout"
    checkpointing.reset()
    for option in ("partition_activations", "checkpoint_in_cpu", "contiguous_checkpointing", "profile"):
        with pytest.warns(UserWarning, match=f"{option} has no effect"):
            checkpointing.configure(None, **{option: True})


def test_messages(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.INFO, "DeepSpeed"):
        utils.log_dist("one", ranks=[0])
        utils.log_dist_once("two")
        utils.log_dist_once("two")
        utils.logger.warning_once("three")
        utils.logger.warning_once("three")
        deepspeed.runtime.utils.see_memory_usage("four", force=False)
        deepspeed.runtime.utils.see_memory_usage("five", force=True)
    heads = [record.getMessage().split(":")[0] for record in caplog.records]
    assert heads == ["[Rank -1] one", "[Rank -1] two", "three", "five"]
    deepspeed.utils.logging.print_dist("six")
    assert capsys.readouterr().out == "[Rank -1] six\n"
    with pytest.raises(ValueError, match="the level is 'loud'"):
        utils.set_log_level_from_string("loud")


def test_helpers() -> None:
    with deepspeed.OnDevice(dtype=torch.bfloat16, device="meta"):
        made = nn.Linear(2, 2)
    assert made.weight.is_meta
    assert made.weight.dtype == torch.bfloat16
    assert torch.zeros(1).dtype == torch.float32
    with deepspeed.OnDevice(dtype=torch.bfloat16, enabled=False):
        assert not nn.Linear(2, 2).weight.is_meta
    assert deepspeed.utils.instrument_w_nvtx(len)([1]) == 1
    moved = deepspeed.runtime.utils.move_to_device({"a": [torch.zeros(1)], "b": 2}, "meta")
    assert moved["a"][0].is_meta
    plain = nn.Linear(2, 2)
    plain(torch.full((1, 2), 100.0)).sum().backward()
    deepspeed.runtime.utils.clip_grad_norm_(plain.parameters(), 1.0)
    assert plain.weight.grad is not None
    assert plain.weight.grad.norm() <= 1.0
    assert deepspeed.runtime.utils.ensure_directory_exists.__doc__


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))


def test_leaf_modules() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList([Experts(), Experts()])
    assert utils.set_z3_leaf_modules(model, [Experts]) == list(model.layers)
    assert utils.set_z3_leaf_modules(model, ["Experts"]) == list(model.layers)
    with pytest.raises(ValueError, match="has no modules of the classes"):
        utils.set_z3_leaf_modules(model, ["Other"])
    with pytest.raises(ValueError, match="Experts is in no list of layers"):
        utils.set_z3_leaf_modules(Experts(), [Experts])


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"mpu": object()}, r"without get_model_parallel_world_size\(\)"),
        ({"mesh_param": (1, 2)}, "mesh"),
    ],
)
def test_initialize_refuses(alone: None, given: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        deepspeed.initialize(model=Stack(), config={"train_batch_size": 2}, **given)


def tensor_parallel_case() -> str:
    with pytest.raises(ValueError, match=r"tp_size 2, but the config has parallel.tp 1") as caught:
        make(deepspeed.tp_model_init(Wide(), tp_size=2, dtype=torch.float32), 1)
    engine = make(deepspeed.tp_model_init(seeded(Wide), tp_size=2, dtype=torch.float32), 1, 2)
    with pytest.raises(ValueError, match="set gradient_clipping in the config"):
        deepspeed.runtime.utils.clip_grad_norm_(engine.module.parameters(), 1.0)
    with pytest.raises(TypeError, match="made by initialize"):
        deepspeed.PipelineEngine()
    assert isinstance(engine, uni3d.Engine)
    return str(caught.value)


def test_tensor_parallel_size(ranks: Ranks) -> None:
    ranks.run(2, tensor_parallel_case)


def test_init_distributed_refuses() -> None:
    with pytest.raises(ValueError, match="port number missing"):
        deepspeed.init_distributed(init_method="tcp://x")
    with pytest.raises(ValueError, match="expected 'nccl', 'gloo' or None"):
        deepspeed.init_distributed("mpi")

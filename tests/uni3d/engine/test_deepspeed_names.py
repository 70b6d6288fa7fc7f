"""DeepSpeed's names on the engine and on its optimizer, each with DeepSpeed's meaning."""

import gc
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from marks import STAGES, slow
from models import (
    OwnLoss,
    Stack,
    assert_same,
    global_batches,
    make_engine,
    micro_batches,
    seeded,
    train,
    train_plainly,
    whole,
)
from ranks import Ranks
from torch import Tensor

import uni3d

HALVING = {"type": "WarmupDecayLR", "params": {"total_num_steps": 10, "warmup_num_steps": 1}}


def test_settings(alone: None) -> None:
    engine = make_engine(seeded(OwnLoss), zero=2, micro=3, clip=0.5)
    assert engine.get_batch_info() == (12, 3, 4)
    assert engine.gradient_clipping() == 0.5
    assert (engine.fp16_enabled(), engine.bfloat16_enabled()) == (False, False)
    assert engine.zero_optimization() is True
    assert engine.zero_optimization_stage() == 2
    assert engine.zero_optimization_partition_gradients()
    assert not engine.zero_optimization_partition_weights()
    assert engine.zero_gather_16bit_weights_on_model_save()
    assert make_engine(seeded(OwnLoss)).zero_optimization() is False
    for key in ("fp16", "bf16"):
        other = make_engine(seeded(OwnLoss), config={key: {"enabled": True}})
        assert (other.fp16_enabled(), other.bfloat16_enabled()) == (key == "fp16", key == "bf16")


def test_sizes_are_the_configs(alone: None) -> None:
    engine = make_engine(seeded(OwnLoss), micro=3)
    engine.set_train_batch_size(12)
    engine.set_train_micro_batch_size(3)
    with pytest.raises(ValueError, match="train_batch_size can't change from 12 to 24 during a run"):
        engine.set_train_batch_size(24)
    with pytest.raises(ValueError, match="train_micro_batch_size_per_gpu can't change from 3 to 6"):
        engine.set_train_micro_batch_size(6)


def test_rates_and_momenta(alone: None) -> None:
    engine = make_engine(seeded(OwnLoss))
    assert engine.get_mom() == [(0.9, 0.999)]
    engine.set_lr(0.0)
    assert engine.get_lr() == [0.0]
    before = whole(engine.module)["out.weight"]
    train(engine, global_batches(1))
    assert torch.equal(whole(engine.module)["out.weight"], before)
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.7}}, "scheduler": HALVING}
    engine = make_engine(seeded(OwnLoss), config=sgd)
    assert engine.get_mom() == [0.7]
    with pytest.raises(RuntimeError, match="the schedule sets the learning rate"):
        engine.set_lr(0.1)


# --- the optimizer -----------------------------------------------------------------------------------------


def optimizer_case(zero: int) -> None:
    model = seeded(OwnLoss)
    given = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(given, 1, gamma=0.5)
    engine, optimizer, _, scheduler = uni3d.initialize(
        model=model,
        optimizer=given,
        lr_scheduler=schedule,
        config={
            "train_batch_size": 12,
            "train_micro_batch_size_per_gpu": 6,
            "fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1},
            "zero_optimization": {"stage": zero},
            "parallel": {"device": "cpu"},
        },
    )
    assert optimizer is given
    assert engine.optimizer is optimizer.optimizer is given
    assert scheduler.optimizer is given
    assert isinstance(given, torch.optim.SGD)
    assert type(given).__name__ == "SGD"
    assert set(given.state_dict()) == {"state", "param_groups"}
    assert given.loss_scale == given.cur_scale == engine.get_loss_scale() == 16.0
    assert not given.overflow
    x, y = global_batches(1)[0]
    mine = slice(6 * engine.global_rank, 6 * engine.global_rank + 6)
    for scale, overflows in ((1.0, False), (float("inf"), True), (1.0, False)):
        engine.backward(engine(x[mine], y[mine]) * scale)
        engine.step()
        assert (given.overflow, engine.was_step_applied()) == (overflows, not overflows)
    assert given.cur_scale == 8.0
    assert engine.skipped_steps == 1
    assert given.param_groups[0]["lr"] == engine.get_lr()[0] == 0.025
    with pytest.raises(RuntimeError, match=r"call engine.backward\(loss\)"):
        given.backward(engine(x[mine], y[mine]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given.zero_grad()
        given.zero_grad(set_to_none=False)


@pytest.mark.parametrize("zero", STAGES)
def test_the_optimizer(ranks: Ranks, zero: int) -> None:
    ranks.run(2, optimizer_case, zero)


def test_zero_grad_of_the_optimizer_between_steps(alone: None) -> None:
    for zero in range(4):
        engine = make_engine(seeded(Stack), zero=zero, micro=12)
        x, y = global_batches(1)[0]
        (engine(x) - y).square().mean().backward()
        engine.optimizer.zero_grad()
        before = whole(engine.module)
        engine.backward((engine(x) - y).square().mean() * 0)
        engine.step()
        assert engine.get_global_grad_norm() == 0.0
        assert before.keys() == whole(engine.module).keys()


# --- places of ranks ---------------------------------------------------------------------------------------


def members(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def places_case(group: int) -> dict[str, Any]:
    engine = make_engine(seeded(Stack), zero=1, pp=2, micro=3, group=group)
    grid = engine.grid
    assert engine.mpu is grid
    sums = {}
    for name in ("data_parallel", "model_parallel", "pipe_parallel", "tensor_model_parallel"):
        total = torch.tensor(float(10**engine.global_rank))
        dist.all_reduce(total, group=getattr(grid, f"get_{name}_group")())
        sums[name] = int(total)
    assert sums["data_parallel"] == sum(10**rank for rank in members(engine.data_parallel_group))
    assert grid.get_data_parallel_group_ranks() == members(engine.data_parallel_group)
    train(engine, global_batches(2))
    assert engine.micro_steps == 2 * engine.gradient_accumulation_steps() == 4
    return {
        "sums": sums,
        "ranks": (
            grid.get_global_rank(),
            grid.get_pipe_parallel_rank(),
            grid.get_data_parallel_rank(),
            grid.get_slice_parallel_rank(),
            grid.get_model_parallel_rank(),
        ),
        "sizes": (
            grid.get_pipe_parallel_world_size(),
            grid.get_data_parallel_world_size(),
            grid.get_tensor_model_parallel_world_size(),
            grid.get_model_parallel_world_size(),
            engine.dp_world_size,
            engine.mp_world_size,
            engine.sequence_parallel_size,
        ),
        "engine": (
            engine.get_pipeline_parallel_rank(),
            engine.get_data_parallel_rank(),
            engine.get_tensor_parallel_rank(),
            engine.get_model_parallel_rank(),
        ),
        "ends": (engine.is_first_stage(), engine.is_last_stage()),
        "beside": [grid.stage_to_global(stage) for stage in range(2)],
        "across": grid.stage_to_global(1, data=0),
        "sources": (grid.get_data_parallel_src_rank(), grid.get_model_parallel_src_rank()),
    }


@pytest.mark.parametrize("group", [-1, 1])
def test_places(ranks: Ranks, group: int) -> None:
    """Rank 2 * pp + dp of a pipeline of two stages on two data-parallel ranks."""
    for rank, found in enumerate(ranks.run(4, places_case, group)):
        stage, dp = divmod(rank, 2)
        beside = [dp, dp + 2]
        expected = {
            "data_parallel": 10 ** (2 * stage) * 11,
            "model_parallel": 10**dp * 101,
            "pipe_parallel": 10**dp * 101,
            "tensor_model_parallel": 10**rank,
        }
        assert found["sums"] == expected
        assert found["ranks"] == (rank, stage, dp, 0, stage)
        assert found["sizes"] == (2, 2, 1, 2, 2, 2, 1)
        assert found["engine"] == (stage, dp, 0, stage)
        assert found["ends"] == (stage == 0, stage == 1)
        assert found["beside"] == beside
        assert found["across"] == 2
        assert found["sources"] == (2 * stage, dp)


def wide_groups_case() -> tuple[list[int], list[int]]:
    """Return the groups with data parallelism over two mesh axes, shards and copies of them."""
    engine = make_engine(seeded(OwnLoss), zero=1, micro=1, group=2)
    return members(engine.data_parallel_group), members(engine.grid.get_model_parallel_group())


def test_a_group_over_two_mesh_axes(ranks: Ranks) -> None:
    for rank, (data, model) in enumerate(ranks.run(4, wide_groups_case)):
        assert data == [0, 1, 2, 3]
        assert model == [rank]


def v_case() -> tuple[bool, bool]:
    parallel = {"pp": 2, "schedule": "zero_bubble_v", "virtual_stages": 2, "device": "cpu"}
    engine = make_engine(seeded(Stack), micro=2, config={"parallel": parallel})
    return engine.is_first_stage(), engine.is_last_stage()


def test_the_last_stage_of_a_v_schedule_is_on_the_first_rank(ranks: Ranks) -> None:
    assert ranks.run(2, v_case) == [(True, True), (False, False)]


# --- data --------------------------------------------------------------------------------------------------


def data_case() -> None:
    batches = global_batches(4)
    engine, other = make_engine(seeded(Stack), micro=3), make_engine(seeded(Stack), micro=3)
    losses = train(engine, batches)
    other.set_dataloader(list(micro_batches(batches[:2], other)))
    found = [other.train_batch().item() for _ in range(2)]
    with pytest.raises(StopIteration, match="ended after 0"):
        other.train_batch()
    other.set_dataiterator(micro_batches(batches[2:], other))
    found += [other.train_batch().item() for _ in range(2)]
    assert found == losses
    assert other.micro_steps == 4 * other.gradient_accumulation_steps()


def test_data_that_the_script_sets(ranks: Ranks) -> None:
    ranks.run(2, data_case)


def test_deepspeed_io(alone: None) -> None:
    engine = make_engine(seeded(Stack), micro=3)
    data = [(torch.full((6,), float(i)), torch.zeros(1)) for i in range(24)]
    loader = engine.deepspeed_io(data, batch_size=3, route="eval")
    assert [x[:, 0].tolist() for x, _ in loader] == [x[:, 0].tolist() for x, _ in engine.loader(data)]
    assert sorted(i for x, _ in loader for i in x[:, 0].tolist()) == list(range(24))
    with pytest.raises(ValueError, match="a batch_size of 4, but micro batches have 3"):
        engine.deepspeed_io(data, batch_size=4)
    for refused in ({"data_sampler": [1]}, {"num_local_io_workers": 2}):
        with pytest.raises(ValueError, match="has an order of its own and no workers"):
            engine.deepspeed_io(data, **refused)


# --- memory, weights, the end ------------------------------------------------------------------------------


def weights_case(zero: int, folder: str) -> None:
    engine = make_engine(seeded(OwnLoss), zero=zero, micro=3, config={"bf16": {"enabled": True}})
    train(engine, global_batches(1))
    expected = engine.module_state_dict()
    for call in (engine._zero3_consolidated_16bit_state_dict, engine._consolidated_16bit_state_dict):
        found = call()
        if engine.global_rank:
            assert found is None
            continue
        assert found is not None
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor.to(torch.bfloat16) if tensor.ndim else tensor)
    without = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    assert without is None or expected.keys() - without.keys() == {"fixed.weight", "fixed.bias"}
    assert engine.save_fp16_model(folder, "weights.bin")
    saved = torch.load(Path(folder, "weights.bin"))
    assert saved.keys() == expected.keys()


@pytest.mark.parametrize("zero", STAGES)
def test_whole_weights(ranks: Ranks, tmp_path: Path, zero: int) -> None:
    ranks.run(2, weights_case, zero, str(tmp_path))


@pytest.mark.parametrize("zero", range(4))
def test_the_partition_cache(alone: None, zero: int) -> None:
    engine = make_engine(seeded(Stack), zero=zero, micro=12)
    x, y = global_batches(1)[0]
    engine(x)
    engine.empty_partition_cache()
    losses = train(engine, [(x, y)])
    assert losses == train(make_engine(seeded(Stack), zero=zero, micro=12), [(x, y)])


def sums_case(zero: int) -> None:
    engine = make_engine(seeded(OwnLoss), zero=zero, micro=6)
    other = make_engine(seeded(OwnLoss), zero=zero, micro=6)
    x, y = global_batches(1)[0]
    mine = slice(6 * engine.global_rank, 6 * engine.global_rank + 6)
    for each in (engine, other):
        each.backward(each(x[mine], y[mine]))
        if each is other:
            each.allreduce_gradients()
        each.step()
    assert engine.get_global_grad_norm() == other.get_global_grad_norm()
    assert engine.enable_backward_allreduce
    with pytest.raises(AttributeError):
        engine.enable_backward_allreduce = False


@pytest.mark.parametrize("zero", STAGES)
def test_gradients_are_summed_already(ranks: Ranks, zero: int) -> None:
    ranks.run(2, sums_case, zero)


def test_what_is_not_supported_says_what_to_use(alone: None) -> None:
    engine = make_engine(seeded(OwnLoss))
    for call, advice in (
        (engine.offload_states, "offload_optimizer"),
        (engine.reload_states, "offload_states"),
        (engine.compile, '"compile": {"enabled": true}'),
    ):
        with pytest.raises(RuntimeError, match=advice):
            call()
    assert engine.is_compiled is False
    compiled = make_engine(seeded(Stack), config={"compile": {"enabled": True, "backend": "eager"}})
    assert compiled.is_compiled is True
    compiled.compile()


def destroyed_case(folder: str) -> None:
    engine = make_engine(seeded(Stack), micro=3)
    engine.save_checkpoint(folder)
    engine.destroy()
    assert json.loads(Path(folder, "global_step0", "manifest.json").read_text())
    for call in (lambda: train(engine, global_batches(1)), lambda: engine.save_checkpoint(folder)):
        with pytest.raises(RuntimeError, match=r"can't be used any more: destroy\(\) was called"):
            call()
    train(make_engine(seeded(Stack), micro=3), global_batches(1))


def test_destroy(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, destroyed_case, str(tmp_path))


def many_engines_case(zero: int) -> list[int]:
    """Return the number of threads after each of several engines; a process group has three."""
    threads = []
    for _ in range(3):
        engine = make_engine(seeded(Stack), zero=zero, micro=3)
        train(engine, global_batches(1))
        engine.destroy()
        del engine
        gc.collect()
        threads.append(len(list(Path("/proc/self/task").iterdir())))
    return threads


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's list of threads")
@pytest.mark.parametrize("zero", [1, slow(3)])
def test_destroyed_engines_leave_no_threads(ranks: Ranks, zero: int) -> None:
    for first, *others in ranks.run(2, many_engines_case, zero):
        assert others == [first] * 2


def accelerate_case(zero: int) -> tuple[list[float], dict[str, Tensor]]:
    """Train as Accelerate does: the boundary is set before each backward pass, `step` called at it alone."""
    engine = make_engine(seeded(OwnLoss), zero=zero, micro=3)
    losses = []
    for batch in global_batches(2):
        parts = list(micro_batches([batch], engine))
        for i, (x, y) in enumerate(parts):
            last = i == len(parts) - 1
            engine.set_gradient_accumulation_boundary(is_boundary=last)
            losses.append(engine.backward(engine(x, y)).item())
            if last:
                engine.step()
    return losses, whole(engine.module)


@pytest.mark.parametrize("zero", STAGES)
def test_a_loop_as_in_accelerate(ranks: Ranks, zero: int) -> None:
    losses, _, model = train_plainly(seeded(OwnLoss), global_batches(2))
    found = ranks.run(2, accelerate_case, zero)
    per_step = [sum(sum(f[0][2 * s : 2 * s + 2]) for f in found) / 2 for s in range(2)]
    assert per_step == pytest.approx(losses, rel=1e-5)
    for _, state in found:
        assert_same(state, model, ignore=("calls", "scratch"))

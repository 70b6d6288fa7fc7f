"""Check the time of a step: by hand, and beside the times of runs that others published."""

from dataclasses import replace
from typing import Any

import pytest

import parallel
from benchmarks.published_runs import CALIBRATION, NAMED, Run, published_runs
from uni3d.estimate.gpt import GPTShape
from uni3d.estimate.job import Job
from uni3d.estimate.step import ERROR, SELECTIVE, Machine, cost, operations
from uni3d.estimate.traffic import bubble, traffic

SHAPE = GPTShape(layers=3, hidden=8, heads=2, kv_heads=1, ffn=16, vocab=32)
LAYER = 2 * 8 * 8 + 2 * 4 * 8 + 3 * 8 * 16
"""Elements of a layer's matrices: queries and output, keys and values, feed-forward."""
HEAD = 8 * 32
ATTENTION = 2 * 4 * 8
"""Multiplications of a token with 4 keys and 4 values."""
FAST = Machine(flops=1e3, inside=1e18, between=1e18, ranks_per_node=8, step_inside=0, step_between=0)


def make_job(pp: int = 1, dp: int = 1, tp: int = 1, zero: int = 1, **settings: Any) -> Job:
    defaults: dict[str, Any] = {"seq_len": 4, "micro_batch": 2, "accumulation": 3}
    return Job(shape=SHAPE, ranks=parallel.Ranks(pp=pp, dp=dp, tp=tp, zero=zero), **(defaults | settings))


# --- compute ---------------------------------------------------------------------------------------------


def test_operations_by_hand() -> None:
    tokens = 4 * 2 * 3
    once = 6 * (3 * LAYER + HEAD) + 3 * 6 * ATTENTION
    assert operations(make_job()) == tokens * once
    assert operations(make_job(dp=2)) == tokens * once, "a rank has as many micro batches"
    assert operations(make_job(accumulation=6)) == 2 * tokens * once


def test_recomputation_leaves_out_each_layers_last_product() -> None:
    tokens, plain = 4 * 2 * 3, operations(make_job())
    again = 2 * (LAYER - 8 * 16 + ATTENTION)
    assert operations(make_job(recompute="full")) == plain + tokens * 3 * again
    assert operations(make_job(recompute="full", every=2)) == plain + tokens * 2 * again
    selective = operations(make_job(recompute="selective")) - plain
    assert selective == pytest.approx(SELECTIVE * tokens * 3 * 6 * (LAYER + ATTENTION))


def test_the_slowest_stage_sets_the_pace() -> None:
    job = make_job(pp=2)
    assert [(stage.layers, stage.ends) for stage in job.stages] == [(2, {"embed"}), (1, {"head"})]
    assert operations(job) == 4 * 2 * 3 * 2 * 6 * (LAYER + ATTENTION)
    wide = replace(job, shape=replace(SHAPE, vocab=32 * 20))  # now the head outweighs the layers
    assert operations(wide) == 4 * 2 * 3 * (6 * 20 * HEAD + 6 * wide.stages[-1].layers * (LAYER + ATTENTION))


def test_without_communication_a_step_is_compute_and_bubble() -> None:
    job = make_job(pp=2, accumulation=4)
    parts = cost(job, FAST).parts
    compute = operations(job) / 1e3
    assert parts.compute == compute
    assert parts.total == pytest.approx(compute / (1 - bubble(job)))


# --- communication ---------------------------------------------------------------------------------------


def test_tensor_parallelism_is_exposed_and_stretched_by_the_bubble() -> None:
    job = replace(make_job(pp=2, accumulation=4), shape=replace(SHAPE, kv_heads=2))
    job = replace(job, ranks=replace(job.ranks, tp=2))
    machine = replace(FAST, inside=10.0)
    parts = cost(job, machine).parts
    sent = traffic(job)
    assert parts.tp == pytest.approx(sent.tp / 10)
    assert parts.pp == pytest.approx(sent.pp / 10)
    assert parts.bubble == pytest.approx((parts.compute + parts.tp + parts.pp) / 4), "(p - 1) / m of the rest"


@pytest.mark.parametrize(("zero", "beside"), [(0, 1 / 3), (1, 1 / 3), (2, 1), (3, 1)])
def test_data_parallelism_is_what_outlasts_the_passes(zero: int, beside: float) -> None:
    job = make_job(dp=2, zero=zero)
    sent = traffic(job).dp
    hidden = operations(job) / 1e3 * beside
    quick = replace(FAST, inside=1.01 * sent / hidden)
    assert cost(job, quick).parts.dp == 0
    slow = replace(FAST, inside=sent / hidden / 2)
    assert cost(job, slow).parts.dp == pytest.approx(hidden)
    on_cpu = replace(job, device="cpu")
    assert cost(on_cpu, slow).parts.dp == pytest.approx(2 * hidden), "nothing is hidden"


def test_ranks_of_a_node_share_the_bytes_that_leave_it() -> None:
    machine = replace(FAST, between=1.0, ranks_per_node=4)
    alone, shared = make_job(dp=8, tp=1), make_job(dp=8, tp=1)
    shared = replace(shared, device="cpu")
    alone = replace(alone, device="cpu", shape=replace(SHAPE, heads=4, kv_heads=4))
    alone = replace(alone, ranks=replace(alone.ranks, tp=4))
    assert cost(shared, machine).parts.dp == pytest.approx(traffic(shared).dp / 4, rel=1e-3)
    assert cost(shared, machine).slow_bytes == traffic(shared).dp // 4
    assert cost(alone, machine).parts.dp == pytest.approx(traffic(alone).dp), "one of them on each node"
    inside = cost(replace(shared, ranks=replace(shared.ranks, dp=4)), machine)
    assert (inside.slow_bytes, inside.parts.dp) == (0, pytest.approx(0))


def test_a_shard_group_on_a_node_sends_little_between_nodes() -> None:
    machine = replace(FAST, between=1.0, ranks_per_node=4)
    job = make_job(dp=8, zero=3, device="cpu")
    grouped = replace(job, shard_group=4)
    shard = sum(grouped.shard(unit) for unit in [*job.stages[0].units, job.stages[0].root])
    assert cost(grouped, machine).slow_bytes == 4 * shard, "an all-reduce of fp32 shards over two nodes"
    assert cost(grouped, machine).slow_bytes < cost(job, machine).slow_bytes / 2


def test_a_ring_has_a_latency() -> None:
    """One all-gather and one reduce-scatter for each of five units go once around 8 ranks on 2 nodes."""
    machine = replace(FAST, ranks_per_node=4, step_inside=1.0, step_between=100.0)
    job = make_job(dp=8, device="cpu")
    units = sum(map(bool, job.stages[0].units)) + 1
    assert units == 6, "embedding, three layers, head; and the rest"
    assert cost(job, machine).parts.dp == pytest.approx(units * 2 * (6 * 1 + 1 * 100))
    tensor = replace(job, shape=replace(SHAPE, kv_heads=2), ranks=parallel.Ranks(pp=1, dp=1, tp=2, zero=1))
    sums = 3 * 4 + 2  # of each micro batch: four a layer, one for each end
    assert cost(tensor, machine).parts.tp == pytest.approx(3 * sums * 2 * 1)


# --- published runs --------------------------------------------------------------------------------------

RUNS = published_runs()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_estimate_beside_published_runs(run: Run) -> None:
    """Runs that the estimate misses are in `NAMED` with the reason, and no others are."""
    assert (abs(run.ratio - 1) > ERROR) == (run.why is not None), run.ratio
    assert 0.7 < run.ratio < 1.4


def test_published_runs_are_those_of_their_sources() -> None:
    names = [run.name for run in RUNS]
    assert len(set(names)) == len(names)
    assert {name.split()[0] for name in names} == {"titan", "mpt", "nemo", "sc21"}
    assert all(any(name.startswith(start) for name in names) for start in NAMED)
    rates = [run for run in RUNS if run.name in CALIBRATION]
    assert len(rates) == 2
    assert all(run.ratio == pytest.approx(1, abs=0.01) for run in rates)
    gpt3 = next(run for run in RUNS if run.name.startswith("sc21 175B"))
    assert gpt3.seconds == pytest.approx(32, abs=0.5), "the README gives both TFLOP/s and seconds"

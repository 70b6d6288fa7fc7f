"""Places of ranks by DeepSpeed's topologies, alone and as a pipeline's degrees."""

import multiprocessing
import pickle
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import make_engine
from ranks import Ranks
from torch import nn
from uni3d.deepspeed.runtime.pipe.topology import (
    PipeDataParallelTopology,
    PipeModelDataParallelTopology,
    ProcessTopology,
)
from uni3d.deepspeed.runtime.utils import partition_balanced, partition_uniform, prefix_sum_inc

import uni3d.deepspeed as deepspeed
from uni3d.config import load_config
from uni3d.config.strict import ConfigError


def test_ranks_are_numbered_row_by_row() -> None:
    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=3, num_dp=4)
    places = torch.arange(24).view(2, 4, 3)
    assert topology.get_axis_names() == ["pipe", "data", "model"]
    assert (topology.world_size(), topology.get_dim("data"), topology.get_dim("none")) == (24, 4, 0)
    for pipe, data, model in product(range(2), range(4), range(3)):
        rank = int(places[pipe, data, model])
        assert topology.get_rank(pipe=pipe, data=data, model=model) == rank
        assert topology.get_coord(rank) == (pipe, data, model)
        assert topology.get_rank_repr(rank) == f"model_{model:02d}"
    assert topology.get_axis_list("data", 2) == places[:, 2].flatten().tolist()
    assert topology.filter_match(pipe=1, model=0) == places[1, :, 0].tolist()
    assert topology.get_axis_comm_lists("pipe") == places.flatten(1).T.tolist()
    assert topology.get_axis_comm_lists("model") == places.flatten(0, 1).tolist()
    assert topology.get_axis_comm_lists("none") == []


def test_refusals_of_topologies() -> None:
    with pytest.raises(ValueError, match="1 axes and 2 dims"):
        ProcessTopology(["a"], [2, 2])
    topology = PipeDataParallelTopology(2, 2)
    with pytest.raises(ValueError, match=r"get_rank\(\) needs pipe, data; got pipe"):
        topology.get_rank(pipe=0)
    with pytest.raises(ValueError, match="rank 4 isn't in the topology"):
        topology.get_coord(4)
    layers = [nn.Linear(2, 2) for _ in range(4)]
    with pytest.raises(ValueError, match="axes are data, pipe; expected pipe, data"):
        deepspeed.PipelineModule(layers, topology=ProcessTopology(["data", "pipe"], [2, 2]))
    with pytest.raises(ValueError, match="num_stages is 4, but the topology has 2"):
        deepspeed.PipelineModule(layers, num_stages=4, topology=topology)


def pipeline_case(given: dict[str, Any]) -> str:
    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=1, num_dp=2)
    model = deepspeed.PipelineModule(
        [nn.Linear(2, 2) for _ in range(4)], topology=topology, loss_fn=nn.MSELoss()
    )
    try:
        engine = make_engine(model, config={"parallel": {"device": "cpu", **given}})
    except ValueError as error:
        return str(error)
    grid, rank = engine.grid, dist.get_rank()
    place = topology.get_coord(rank)
    assert (grid.get_stage_id(), grid.get_data_parallel_rank()) == (place.pipe, place.data)
    assert grid.get_data_parallel_group_ranks() == topology.filter_match(pipe=place.pipe)
    return str(engine.model.topology.degrees)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "(pp, dp, tp) = (2, 2, 1)"),
        ({"pp": 2, "dp": "auto"}, "(pp, dp, tp) = (2, 2, 1)"),
        ({"dp": 1}, "the topology's data is 2, but the config has parallel.dp 1"),
    ],
)
def test_a_pipelines_topology_is_its_degrees(ranks: Ranks, given: dict[str, Any], expected: str) -> None:
    assert all(found.startswith(expected) for found in ranks.run(4, pipeline_case, given))


def cheapest(weights: list[int], parts: int) -> int:
    """Return the weight of the heaviest part in the best partition, of all that there are."""
    if parts == 1:
        return sum(weights)
    ends = range(len(weights) + 1)
    return min(max(sum(weights[:end]), cheapest(weights[end:], parts - 1)) for end in ends)


@pytest.mark.parametrize("weights", [[1] * 8, [0, 1, 2, 3, 3, 3], [9, 1, 1, 1, 7], [2, 5]])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_partitions(weights: list[int], parts: int) -> None:
    for cuts in (partition_balanced(weights, parts), partition_uniform(len(weights), parts)):
        assert len(cuts) == parts + 1
        assert (cuts[0], cuts[-1]) == (0, len(weights))
        assert cuts == sorted(cuts)
    cuts = partition_balanced(weights, parts)
    heaviest = max(sum(weights[a:b]) for a, b in pairwise(cuts))
    assert heaviest == cheapest(weights, parts)
    assert prefix_sum_inc(weights)[-1] == sum(weights)


def join(rank: int, where: str) -> None:
    deepspeed.init_distributed("gloo", init_method=where, rank=rank, world_size=2)
    deepspeed.init_distributed("gloo", init_method=where, rank=rank, world_size=2)
    value = torch.tensor([rank + 1])
    dist.all_reduce(value)
    dist.destroy_process_group()
    assert value.item() == 3


@pytest.mark.slow
def test_init_distributed_by_a_file(tmp_path: Path) -> None:
    started = [
        multiprocessing.get_context("spawn").Process(target=join, args=(rank, f"file://{tmp_path / 'store'}"))
        for rank in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0]


def test_a_wrong_config_can_be_told_from_one_process_to_another() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"train_batch_sise": 1})
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.problems == caught.value.problems

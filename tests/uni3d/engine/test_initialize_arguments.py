"""Arguments of `initialize` that DeepSpeed's scripts give besides the model, the data and the config."""

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from models import ADAM, OwnLoss, Stack, make_engine, seeded
from ranks import RankError, Ranks

import uni3d

CONFIG = {"train_batch_size": 12, "optimizer": ADAM, "parallel": {"device": "cpu"}}


def encoded(content: str) -> str:
    return base64.urlsafe_b64encode(content.encode()).decode()


def test_a_config_in_every_form(alone: None, tmp_path: Path) -> None:
    text = json.dumps(CONFIG | {"gradient_clipping": 0.25})
    path = tmp_path / "config.json"
    path.write_text(text)
    forms: dict[str, dict[str, Any]] = {
        "dict": {"config": json.loads(text)},
        "str": {"config": str(path)},
        "Path": {"config": path},
        "base64": {"config": encoded(text)},
        "old name": {"config_params": encoded(text)},
        "args": {"args": SimpleNamespace(deepspeed_config=encoded(text))},
    }
    for name, given in forms.items():
        engine = uni3d.initialize(model=seeded(OwnLoss), **given)[0]
        assert engine.gradient_clipping() == 0.25, name


def test_a_config_in_base64_that_is_wrong(alone: None) -> None:
    def start(config: str) -> None:
        uni3d.initialize(model=seeded(OwnLoss), config=config)

    with pytest.raises(ValueError, match="the config in base64 is not valid JSON: duplicate key 'a'"):
        start(encoded('{"a": 1, "a": 2}'))
    with pytest.raises(ValueError, match="unknown key 'train_batch_sise'"):
        start(encoded('{"train_batch_sise": 2}'))
    for path in ("absent.json", "absent", encoded("no JSON")):
        with pytest.raises(ValueError, match=f"config {path} can't be read"):
            start(path)


def test_the_process_group(alone: None) -> None:
    with pytest.raises(ValueError, match="dist_init_required is False, but there is no process group"):
        make_engine(seeded(OwnLoss), dist_init_required=False)
    make_engine(seeded(OwnLoss), dist_init_required=True, distributed_port=29500)
    make_engine(seeded(OwnLoss), dist_init_required=False)


def test_unknown_arguments_are_named(alone: None) -> None:
    with pytest.raises(TypeError, match="unexpected arguments: model_engine"):
        make_engine(seeded(OwnLoss), model_engine=None)


class Mpu:
    """An `mpu` of Megatron; `old` has no pipeline, and calls tensor parallelism model parallelism."""

    def __init__(self, pp: int, dp: int, tp: int, *, swapped: bool = False, old: bool = False) -> None:
        rank = dist.get_rank()
        places = {"tensor_model": rank % tp, "data": rank // tp % dp, "pipeline_model": rank // tp // dp}
        if swapped:
            places["pipeline_model"], places["data"] = rank % pp, rank // pp
        sizes = {"tensor_model": tp, "data": dp, "pipeline_model": pp}
        for name, size in sizes.items():
            if old and name == "pipeline_model":
                continue
            name = "model" if old and name == "tensor_model" else name
            setattr(self, f"get_{name}_parallel_world_size", lambda size=size: size)
            if name != "model":
                setattr(self, f"get_{name}_parallel_rank", lambda place=places[name]: place)


def mpu_case(old: bool, swapped: bool, config: dict[str, Any], degrees: tuple[int, int, int]) -> Any:
    mpu = Mpu(*degrees, swapped=swapped, old=old)
    parallel = {"device": "cpu", **config}
    engine = uni3d.initialize(model=seeded(Stack), mpu=mpu, config=CONFIG | {"parallel": parallel})[0]
    found = engine.model.topology.degrees
    return found.pp, found.dp, found.tp


def test_degrees_of_an_mpu(ranks: Ranks) -> None:
    assert ranks.run(2, mpu_case, False, False, {}, (2, 1, 1)) == [(2, 1, 1)] * 2
    assert ranks.run(2, mpu_case, True, False, {"dp": "auto"}, (1, 2, 1)) == [(1, 2, 1)] * 2
    assert ranks.run(2, mpu_case, False, False, {"pp": 1, "dp": 2}, (1, 2, 1)) == [(1, 2, 1)] * 2


def test_degrees_of_an_mpu_that_do_not_fit(ranks: Ranks) -> None:
    message = r"mpu.get_pipeline_model_parallel_world_size\(\) is 2, but the config has parallel.pp 1"
    with pytest.raises(RankError, match=message):
        ranks.run(2, mpu_case, False, False, {"pp": 1}, (2, 1, 1))
    with pytest.raises(RankError, match=r"pp\(1\) \* dp\(1\) \* tp\(1\)"):
        ranks.run(2, mpu_case, False, False, {}, (1, 1, 1))


def test_an_mpu_with_another_order_of_ranks(ranks: Ranks) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(4, mpu_case, False, True, {}, (2, 2, 1))
    message = "get_data_parallel_rank() is 0 on rank 1, which has place 1: ranks are numbered tp first"
    assert str(caught.value).count(message) == 4


def test_no_mpu(alone: None) -> None:
    with pytest.raises(ValueError, match=r"mpu is a object without get_model_parallel_world_size\(\)"):
        make_engine(seeded(OwnLoss), mpu=object())


def mesh_case(mesh: tuple[int, int]) -> int:
    return make_engine(seeded(OwnLoss), micro=3, mesh_param=mesh).dp_world_size


def test_a_mesh(ranks: Ranks) -> None:
    assert ranks.run(2, mesh_case, (2, 1)) == [2, 2]
    with pytest.raises(RankError, match=r"mesh_param is \(1, 2\); expected \(data_parallel_size, 1\)"):
        ranks.run(2, mesh_case, (1, 2))

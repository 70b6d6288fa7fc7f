"""Further objects of a `Checkpointer`: values of JSON and tensors, one state for all ranks."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import Stack, make_engine, seeded
from ranks import RankError, Ranks
from torch import Tensor, nn

import uni3d
from uni3d.checkpoint.functions import stored_client_state
from uni3d.checkpoint.random_states import RandomStates


class Box:
    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def full() -> dict[str, Any]:
    half = torch.arange(3, dtype=torch.bfloat16) / 3
    return {
        "count": 3,
        "a/b~c": [None, True, {"mean": torch.eye(2)}],
        "half": half,
        "none": torch.zeros(0, 2),
    }


def save_case(run: str) -> None:
    averages = nn.Linear(3, 2)
    nn.init.constant_(averages.weight, 2.0)
    nn.init.zeros_(averages.bias)
    objects = {"box": Box(full()), "averages": averages}
    keeper = uni3d.Checkpointer(run, model=seeded(Stack), objects=objects)
    keeper.save(1)
    with torch.no_grad():
        averages.weight.zero_()  # while it is written
    keeper.save(2, client_state={"epoch": 1}).wait()


def load_case(run: str) -> dict[str, Any]:
    objects = {"box": Box({}), "averages": nn.Linear(3, 2)}
    found = uni3d.load(run, model=seeded(Stack), objects=objects, tag="global_step1")
    assert found.report.dropped  # not asked for without an optimizer
    keeper = uni3d.Checkpointer(run, model=seeded(Stack), objects=objects)
    report = keeper.load("global_step1").report
    assert not report.dropped
    assert set(report.extra) == {"objects['box']", "objects['averages']"}
    assert torch.equal(objects["averages"].weight, torch.full((2, 3), 2.0))
    keeper.restore()
    assert not objects["averages"].weight.any()
    assert stored_client_state(run) == ("global_step2", {"epoch": 1})
    assert stored_client_state(f"{run}-none") is None
    return objects["box"].state


def test_they_come_back_on_any_number_of_ranks(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, save_case, str(tmp_path / "run"))
    expected = full()
    for state in ranks.run(3, load_case, str(tmp_path / "run")):
        assert state.keys() == expected.keys()
        for tensor, wanted in (
            (state["a/b~c"][2].pop("mean"), torch.eye(2)),
            (state["half"], expected["half"]),
            (state["none"], expected["none"]),
        ):
            assert tensor.dtype == wanted.dtype
            assert torch.equal(tensor, wanted)
        assert (state["count"], state["a/b~c"]) == (3, [None, True, {}])


def test_others_leave_them(alone: None, tmp_path: Path) -> None:
    """The engine, a Checkpointer without objects, and the functions that read weights."""
    model = seeded(Stack)
    uni3d.save(tmp_path, model=model, step=1, objects={"box": Box(full())}, async_save=False)
    report = uni3d.Checkpointer(tmp_path, model=seeded(Stack)).load().report
    assert report.dropped["objects['box']"] == "not asked for"
    engine = make_engine(seeded(Stack), zero=1, pp=1, micro=12)
    with pytest.warns(UserWarning, match="doesn't count samples"):
        engine.load_checkpoint(tmp_path, load_optimizer_states=False)
    uni3d.load_state_dict_from_zero_checkpoint(seeded(Stack), tmp_path)
    whole = uni3d.get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert whole.keys() == {name for name, _ in model.named_parameters()}


def draws() -> list[float]:
    return [random.gauss(), np.random.normal(), torch.rand(()).item(), random.random(), np.random.rand()]


def random_case(run: str) -> tuple[list[float], list[float]]:
    rank = dist.get_rank()
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    draws()  # so that half of a pair is kept
    states = RandomStates()
    keeper = uni3d.Checkpointer(run, model=seeded(Stack), objects={"random": states}, async_save=False)
    states.take()
    keeper.save(1)
    expected = draws()
    states.take()
    keeper.load()
    states.apply()
    return expected, draws()


def resized_case(run: str) -> list[float]:
    states = RandomStates()
    uni3d.Checkpointer(run, model=seeded(Stack), objects={"random": states}).load()
    states.apply()
    return draws()


def test_random_generators_of_each_rank(ranks: Ranks, tmp_path: Path) -> None:
    run, expected = str(tmp_path / "run"), []
    for drawn, found in ranks.run(2, random_case, run):
        assert found == drawn
        expected.append(drawn)
    assert expected[0] != expected[1]
    assert ranks.run(3, resized_case, run) == [*expected, expected[0]]


def test_a_loss_scale(alone: None, tmp_path: Path) -> None:
    """The state of torch's own scaler, as Accelerators and the Trainer have it in fp16."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    uni3d.save(tmp_path, model=seeded(Stack), step=1, objects={"loss_scale": scaler}, async_save=False)
    other = torch.amp.GradScaler("cpu")
    uni3d.Checkpointer(tmp_path, model=seeded(Stack), objects={"loss_scale": other}).restore()
    assert other.get_scale() == 8.0


# --- refusals -----------------------------------------------------------------------------------------


def other_on_a_rank(run: str) -> None:
    uni3d.save(run, model=seeded(Stack), step=1, objects={"box": Box({"rank": dist.get_rank()})})


def no_json(run: str) -> None:
    uni3d.save(run, model=seeded(Stack), step=1, objects={"box": Box({"places": [(1, 2)]})})


def no_state(run: str) -> None:
    uni3d.save(run, model=seeded(Stack), step=1, objects={"box": Tensor})


def odd_name(run: str) -> None:
    uni3d.save(run, model=seeded(Stack), step=1, objects={"../box": Box({})})


def not_saved(run: str) -> None:
    uni3d.save(run, model=seeded(Stack), step=1, async_save=False)
    uni3d.Checkpointer(run, model=seeded(Stack), objects={"box": Box({})}).restore()


REFUSED: dict[Callable[[str], None], str] = {
    other_on_a_rank: r"objects\['box'\] differs between ranks 0 and 1, and a checkpoint keeps one for all",
    no_json: r"objects\['box'\] \(Box\): state/places/0 is a tuple",
    no_state: r"objects\['box'\] is a \w+, which has no state_dict and load_state_dict",
    odd_name: r"objects has the name '../box'; expected letters, digits and _",
    not_saved: r"missing in the checkpoint: objects\['box'\]",
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
def test_refusals(ranks: Ranks, tmp_path: Path, case: Callable[[str], None]) -> None:
    with pytest.raises(RankError, match=REFUSED[case]) as error:
        ranks.run(2, case, str(tmp_path / "run"))
    assert "rank 1:" in str(error.value)

"""A save by DCP that can't be whole isn't there: the error is the same on all ranks, the older one stays."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from dcp_runs import (
    FLAT,
    NESTED,
    assert_equal,
    everything,
    load,
    loaded,
    make_run,
    one_process,
    save,
    state_of,
    trained,
)
from marks import slow
from models import OwnLoss, make_engine, save_and_wait, seeded
from ranks import Ranks
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

import ckpt
import uni3d
from ckpt.stores.local import LocalStore


def refusal(work: Any, *args: Any, **kwargs: Any) -> str:
    """Return the text of the error of DCP's call."""
    with pytest.raises(CheckpointException) as raised:
        work(*args, **kwargs)
    return str(raised.value)


# --- on ranks --------------------------------------------------------------------------------------------


class Odd:
    """Value that JSON can't represent."""


def save_odd(folder: str, mine: int) -> str:
    """Save a value that rank `mine` alone has and that can't be saved."""
    odd = {"odd": {"it": Odd()}} if dist.get_rank() == mine else {}
    return refusal(save, state_of(trained(sharded=True)) | odd, folder)


@pytest.mark.parametrize("mine", [0, 1])
def test_a_value_that_is_not_of_json_is_refused_everywhere(tmp_path: Path, ranks: Ranks, mine: int) -> None:
    for text in ranks.run(2, save_odd, str(tmp_path / "run"), mine):
        assert "odd.it is a " in text
        assert "Odd; uni3d.dcp saves tensors, bytes and values of JSON, and pickles nothing" in text
    assert not (tmp_path / "run").exists()


def save_two_tags(folder: str) -> str:
    return refusal(save, weights(), folder, f"t{dist.get_rank()}")


def test_ranks_with_two_tags_are_refused(tmp_path: Path, ranks: Ranks) -> None:
    for text in ranks.run(2, save_two_tags, str(tmp_path / "run")):
        assert "'t0', None) on rank 0, but" in text
        assert "'t1', None) on rank 1; give all ranks the same" in text
    assert not (tmp_path / "run").exists()


def fail_to_replace(folder: str, method: str) -> tuple[str, dict[str, Any]]:
    """Save a tag, and fail on rank 1 to save it again; return the error, and what the first save had."""
    run = trained(sharded=True)
    save(state_of(run), folder, "it")
    held = everything(run)
    with torch.no_grad():
        for parameter in run[0].parameters():
            parameter.mul_(2)

    def full(self: LocalStore, *args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    broken = mock.patch.object(LocalStore, method, full) if dist.get_rank() == 1 else mock.MagicMock()
    with broken:
        text = refusal(save, state_of(run), folder, "it")
    return text, held


@pytest.mark.parametrize("method", ["write", slow("sync"), slow("make_folders")])
def test_a_rank_that_fails_leaves_the_older_checkpoint(tmp_path: Path, ranks: Ranks, method: str) -> None:
    found = ranks.run(2, fail_to_replace, str(tmp_path), method)
    for text, _ in found:
        assert "No space left on device (rank 1)" in text
    assert sorted(os.listdir(tmp_path)) == ["it", "latest"]
    assert ckpt.verify(ckpt.open_checkpoint(tmp_path)) == []
    assert_equal(everything(loaded(tmp_path)), found[0][1])


def load_two(folder: str) -> str:
    """Load with `latest` read before a save on one rank, and after it on the other."""
    state = state_of(make_run())
    rank = dist.get_rank()
    with mock.patch("ckpt.read.read_latest", return_value="ab"[rank]):
        return refusal(load, state, folder)


def test_ranks_that_opened_two_checkpoints_are_refused(tmp_path: Path, ranks: Ranks) -> None:
    run = trained()
    save(state_of(run), tmp_path, "a")
    save(state_of(run), tmp_path, "b")
    for text in ranks.run(2, load_two, str(tmp_path)):
        assert "which isn't the same checkpoint; name a tag, and load again" in text


# --- in one process --------------------------------------------------------------------------------------


def weights(**more: Any) -> dict[str, Any]:
    return {"model": {"w": torch.ones(3)}, **more}


REFUSED_SAVES: dict[str, tuple[dict[str, Any], str]] = {
    "a set": (weights(done={1, 2}), "done is a set"),
    "a number beyond JSON": (weights(best=float("inf")), "best is inf"),
    "a tensor beyond JSON": (weights(best=torch.tensor(float("nan"))), "best can't be saved: a float"),
    "a tensor in a tuple": (weights(pair=(1, torch.ones(2))), "pair is a torch.Tensor"),
    "no tensor in the model": ({"model": {"w": torch.ones(2), "note": "x"}}, "model.note can't be saved"),
    "two models": ({"a": {"model": {"w": torch.ones(1)}}, **weights()}, "several models: a.model, model"),
    "no weights": ({"epoch": 3}, "no weights"),
    "a double": ({"model": {"w": torch.tensor([1 / 3], dtype=torch.float64)}}, "float32 can't represent"),
    "a type": ({"model": {"w": torch.ones(2, dtype=torch.complex64)}}, "its type complex64 can't be stored"),
    "no step": (weights(), "neither a tag nor a step"),
}


@pytest.mark.parametrize("case", REFUSED_SAVES)
def test_refused_saves(tmp_path: Path, case: str) -> None:
    state, message = REFUSED_SAVES[case]
    tag = None if case == "no step" else "t"
    assert message in refusal(save, state, tmp_path / "run", tag).replace("torch.float32", "float32")
    assert not (tmp_path / "run").exists() or os.listdir(tmp_path / "run") == []


def test_refused_ways_to_save(tmp_path: Path) -> None:
    writer = uni3d.dcp.StorageWriter(tmp_path, "t")
    caching = DefaultSavePlanner(enable_plan_caching=True)
    with one_process():
        text = refusal(dcp.save, weights(), storage_writer=writer, planner=caching)
    assert "doesn't support enable_plan_caching" in text
    with one_process(), pytest.raises(ckpt.CheckpointError, match="use_collectives=False isn't"):
        dcp.save(weights(), storage_writer=writer, use_collectives=False)
    with one_process():
        text = refusal(dcp.save, weights(), storage_writer=uni3d.dcp.StorageWriter())
    assert "StorageWriter has no run" in text
    with pytest.raises(ValueError, match="step is -1; expected the number of steps taken"):
        uni3d.dcp.StorageWriter(tmp_path, step=-1)
    nested = DefaultSavePlanner(flatten_state_dict=False)
    with one_process():
        text = refusal(dcp.save, weights(), storage_writer=writer, planner=nested)
    assert "model is a torch.Tensor" in text


def saved_run(folder: Path) -> Any:
    run = trained()
    save(state_of(run) | {"epoch": 2, "name": "it"}, folder)
    return run


REFUSED_LOADS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing of this name": ({"model": {"other": torch.ones(2)}}, "Missing key in checkpoint state_dict"),
    "another shape": ({"model": {"out.bias": torch.ones(2)}}, "Size mismatch"),
    "another kind": (
        {"model": {"out.bias": torch.ones(1, dtype=torch.int64)}},
        "but torch.int64 in the state",
    ),
    "two models": (
        {"model": {"out.bias": torch.ones(1)}, "ema": {"model": {"out.bias": torch.ones(1)}}},
        "the state_dict has two models, below",
    ),
    "a tensor for text": ({"name": torch.ones(1)}, "name is in"),
    "a tensor for a number": ({"epoch": torch.ones(2)}, "of shape [2] in the state_dict"),
}


@pytest.mark.parametrize("case", REFUSED_LOADS)
def test_refused_loads(tmp_path: Path, case: str) -> None:
    saved_run(tmp_path)
    state, message = REFUSED_LOADS[case]
    assert message in refusal(load, state, tmp_path)


def test_a_name_of_two_meanings_is_refused(tmp_path: Path) -> None:
    net = nn.ModuleDict({"w": nn.Linear(1, 1), "model": nn.ModuleDict({"w": nn.Linear(1, 1)})})
    save({"net": net.state_dict()}, tmp_path, "t")
    state = {"model": {"w.bias": torch.zeros(1)}}
    assert "model.w.bias may be model.w.bias or w.bias" in refusal(load, state, tmp_path)
    assert torch.equal(load({"net": {"w.bias": torch.zeros(1)}}, tmp_path)["net"]["w.bias"], net["w"].bias)


@pytest.mark.parametrize("form", [NESTED, FLAT], ids=["groups", "flat"])
def test_other_groups(tmp_path: Path, form: Any) -> None:
    """Hyperparameters are by parameter in the flat form, so that other groups get their own values."""
    saved_run(tmp_path)
    model = OwnLoss()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.5)
    options = StateDictOptions(flatten_optimizer_state_dict=form[2])
    _, states = get_state_dict(model, optimizer, options=options)
    if form[2]:
        assert load({"optim": states}, tmp_path)["optim"]["param_groups.out.bias.lr"] == 0.02
    else:
        text = refusal(load, {"optim": states}, tmp_path)
        assert "Missing key" in text or "group the parameters as they were" in text


def test_a_damaged_chunk_is_found(tmp_path: Path) -> None:
    saved_run(tmp_path)
    (file,) = (tmp_path / "global_step3" / "atoms" / "out.bias" / "fp32").glob("c*")
    data = bytearray(file.read_bytes())
    data[1] ^= 1
    file.write_bytes(data)
    assert "out.bias/fp32 chunk [0]" in refusal(load, state_of(make_run()), tmp_path)


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_of_an_engine_is_not_replaced(tmp_path: Path) -> None:
    save_and_wait(make_engine(seeded(OwnLoss)), tmp_path, tag="t")
    text = refusal(save, weights(), tmp_path, "t")
    assert "was saved by another run" in text
    assert "this one is a script by uni3d.dcp" in text
    assert "out.bias" in ckpt.open_checkpoint(tmp_path, "t").atoms


@pytest.mark.usefixtures("alone")
def test_another_optimizer_is_known_by_its_name_alone(tmp_path: Path) -> None:
    model = seeded(OwnLoss)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    config = {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}
    engine = make_engine(seeded(OwnLoss), config=config)
    save(state_of((model, optimizer)), tmp_path, "a", step=0)
    with pytest.raises(
        ckpt.CheckpointError, match="the checkpoint's optimizer is unknown, but this run's is SGD"
    ):
        engine.load_checkpoint(tmp_path)
    save(state_of((model, optimizer)), tmp_path, "b", step=0, optimizer="SGD")
    with pytest.warns(UserWarning, match="doesn't say in which order"):
        engine.load_checkpoint(tmp_path, "b")

"""Arguments that scripts get wrong: a clear error on all ranks, or what was meant."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow
from models import OwnLoss, Stack, global_batches, make_engine, seeded, train, whole
from ranks import Ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import ckpt
import uni3d

# --- folders and tags --------------------------------------------------------------------------------------


def folders_case(run: Path) -> Any:
    engine = make_engine(seeded(Stack), zero=1)
    train(engine, global_batches(1))
    errors = []
    for folder in ("", None, 7):
        for call in (engine.save_checkpoint, engine.load_checkpoint, engine.resume, engine.save_16bit_model):
            with pytest.raises(ckpt.CheckpointError) as caught:
                call(folder)  # type: ignore[operator]
            errors.append(str(caught.value))
    for folder in ("", None):
        with pytest.raises(ckpt.CheckpointError):
            uni3d.get_fp32_state_dict_from_zero_checkpoint(folder)  # type: ignore[arg-type, call-overload]
    for tag in (1.5, True, b"t"):
        with pytest.raises(ckpt.CheckpointError, match="expected a string or an integer"):
            engine.save_checkpoint(run, tag)
    engine.save_checkpoint(run, 7)
    train(engine, global_batches(1))
    expected = whole(engine.module)
    engine.save_checkpoint(run, 12)
    assert engine.load_checkpoint(run, 7)[0] == f"{run}/7"
    assert engine.global_steps == 1
    assert engine.load_checkpoint(run)[0] == f"{run}/12"
    found = uni3d.get_fp32_state_dict_from_zero_checkpoint(run, 12)  # type: ignore[call-overload]
    assert all(torch.equal(found[name], expected[name]) for name in found)
    return errors


def test_folders_and_tags(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = ranks.run(2, folders_case, tmp_path)
    assert one == other
    for folder, errors in (("''", one[:4]), ("None", one[4:8]), ("7", one[8:])):
        for error in errors:
            expected = "expected a path or URL ('.' is the current folder) (rank 0)"
            assert error == f"the folder is {folder}; {expected}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["12", "7", "latest"]


# --- models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", range(4))
def test_a_model_is_given_to_initialize_once(alone: None, zero: int) -> None:
    model = seeded(OwnLoss)
    engine = make_engine(model, zero=zero)
    for again in (model, engine.module):
        with pytest.raises(ValueError, match=r"initialize was already called with this .*OwnLoss, and a"):
            make_engine(again, zero=zero)
    outer = nn.Sequential(nn.Linear(6, 6), model)
    with pytest.raises(ValueError, match="initialize was already called with its module 1, and a model can"):
        make_engine(outer, zero=zero)
    with pytest.raises(ValueError, match="initialize was already called with its module module, and a"):
        make_engine(engine)
    with pytest.raises(ValueError, match="initialize needs a model"):
        make_engine(None)  # type: ignore[arg-type]
    train(engine, global_batches(1))


def test_a_model_that_the_script_has_sharded(alone: None) -> None:
    make_engine(seeded(Stack))  # starts the process group
    with pytest.raises(ValueError, match=r"sharded already \(this (FSDP)?Linear\); pass the plain model"):
        make_engine(fully_shard(nn.Linear(2, 2)))


def test_a_lazy_model(alone: None) -> None:
    with pytest.raises(ValueError, match="its module 0 is lazy: its parameters have no shape"):
        make_engine(nn.Sequential(nn.LazyLinear(2)))


def test_a_chain_is_given_to_initialize_once(alone: None) -> None:
    model = seeded(Stack)
    make_engine(model)
    with pytest.raises(ValueError, match="initialize was already called with this Stack"):
        make_engine(model)


def test_a_refused_model_can_be_given_again(alone: None) -> None:
    model = seeded(OwnLoss)
    with pytest.raises(ValueError, match=r"pp\(1\) \* dp|tp"):
        make_engine(model, config={"parallel": {"tp": 2, "dp": 1, "device": "cpu"}})
    train(make_engine(model), global_batches(1))


def test_models_may_share_what_has_no_parameters(alone: None) -> None:
    loss = nn.MSELoss()
    for _ in range(2):
        make_engine(nn.Sequential(nn.Linear(2, 2), loss))


@pytest.mark.parametrize("zero", range(4))
def test_copies_point_at_the_weights(alone: None, zero: int) -> None:
    for engine in (make_engine(seeded(OwnLoss), zero=zero), make_engine(seeded(Stack), zero=zero)):
        for call in (
            lambda e=engine: copy.deepcopy(e.module),
            lambda e=engine: copy.deepcopy(e),
            lambda e=engine: AveragedModel(e.module),
        ):
            with pytest.raises(RuntimeError, match=r"can't be copied: .* load engine\.module_state_dict\(\)"):
                call()
    kept = OwnLoss()
    engine = make_engine(seeded(OwnLoss), zero=zero)
    kept.load_state_dict(engine.module_state_dict())
    average = AveragedModel(kept)
    assert torch.equal(average.module.out.weight, whole(engine.module)["out.weight"])


# --- data --------------------------------------------------------------------------------------------------


class NoLength(torch.utils.data.Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return index


def data_case() -> list[str]:
    samples = TensorDataset(*(torch.cat(parts) for parts in zip(*global_batches(2), strict=True)))
    errors = []
    for data in (NoLength(), iter([])):
        with pytest.raises(ValueError, match="training_data is a ") as caught:
            make_engine(model := seeded(Stack), training_data=data, zero=1)
        errors.append(str(caught.value))
    engine = make_engine(model, zero=1)  # which nothing was done to
    engine.train_batch(uni3d.RepeatingLoader(DataLoader(samples, batch_size=3)))  # as the messages say
    for data in (DataLoader(samples), NoLength()):
        with pytest.raises(ValueError, match="the data is a ") as caught:
            engine.loader(data)  # type: ignore[arg-type]
        errors.append(str(caught.value))
    return errors


def test_data_that_has_no_order(ranks: Ranks) -> None:
    one, other = ranks.run(2, data_case)
    assert one == other
    assert one[2].startswith("the data is a DataLoader, which has an order of its own")
    assert one[3].startswith("the data is a NoLength, which has no length and no sample by its index")
    for error, kind in zip(one[:2], ("NoLength", "list_iterator"), strict=True):
        assert error.startswith(f"training_data is a {kind}, which has no length and no sample by its index")


# --- DeepSpeed's functions on an engine's module -----------------------------------------------------------


def fill_case(run: Path, zero: int) -> Any:
    engine = make_engine(seeded(OwnLoss), zero=zero)
    batches = global_batches(3)
    train(engine, batches[:1])
    engine.save_checkpoint(run)
    saved, losses = whole(engine.module), []
    losses += train(engine, batches[1:2])
    other = make_engine(OwnLoss(), zero=zero)
    train(other, batches[:1])  # so that ranks may still have whole parameters
    assert uni3d.load_state_dict_from_zero_checkpoint(other.module, run) is other.module
    shown = dict(other.module.named_parameters())
    assert any(isinstance(p, DTensor) for p in shown.values()) == (zero == 3), "whole, as between two steps"
    found = whole(other.module)
    for name in saved.keys() - {"scratch"}:
        assert torch.equal(found[name], saved[name]), name
    with torch.no_grad():  # the script may write to what is shown, and an error changes nothing of that
        other.module.out.bias.add_(1.0)
    with pytest.raises(ckpt.CheckpointError, match="no committed checkpoint"):
        uni3d.load_state_dict_from_zero_checkpoint(other.module, run, tag="none")
    other.module.fixed.extra = nn.Linear(1, 1)
    with pytest.raises(ckpt.CheckpointError, match=r"lacks fixed\.extra\.bias"):
        uni3d.load_state_dict_from_zero_checkpoint(other.module, run)
    del other.module.fixed.extra
    assert any(isinstance(p, DTensor) for p in other.module.parameters()) == (zero == 3)
    assert torch.equal(whole(other.module)["out.bias"], saved["out.bias"] + 1.0)
    assert torch.equal(other.module_state_dict()["out.bias"], saved["out.bias"].cpu() + 1.0)
    uni3d.load_state_dict_from_zero_checkpoint(other.module, run)
    score = other.eval_batch(iter([(x[:3], y[:3]) for x, y in batches] * 4))
    other.load_checkpoint(run, load_module_only=True)
    assert other.eval_batch(iter([(x[:3], y[:3]) for x, y in batches] * 4)) == score
    return losses


@pytest.mark.parametrize("zero", [slow(0), slow(1), slow(2), 3])
def test_an_engine_s_module_is_filled(ranks: Ranks, tmp_path: Path, zero: int) -> None:
    ranks.run(2, fill_case, tmp_path, zero)


def convert_case(run: Path, safe: bool) -> None:
    engine = make_engine(seeded(OwnLoss), zero=2)
    engine.save_checkpoint(run)
    for _ in range(3):  # at once on both ranks, then over files that are there and equal
        uni3d.convert_zero_checkpoint_to_fp32_state_dict(run, run / "out", 400, safe_serialization=safe)
    with torch.no_grad():
        engine.module.out.bias.add_(1.0)
    engine.save_checkpoint(run, "other")
    with pytest.raises(FileExistsError, match="exists; delete it"):
        uni3d.convert_zero_checkpoint_to_fp32_state_dict(
            run, run / "out", 400, safe_serialization=safe, tag="other"
        )


@pytest.mark.parametrize("safe", [slow(False), True])
def test_every_rank_converts_at_once(ranks: Ranks, tmp_path: Path, safe: bool) -> None:
    ranks.run(2, convert_case, tmp_path, safe)
    expected = uni3d.get_fp32_state_dict_from_zero_checkpoint(tmp_path, "global_step0")
    folder = tmp_path / "out"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    found: dict[str, torch.Tensor] = {}
    for path in [path for path in folder.iterdir() if path.suffix != ".json"]:
        if safe:
            from safetensors.torch import load_file

            found |= load_file(path)
        else:
            found |= torch.load(path, weights_only=True)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())

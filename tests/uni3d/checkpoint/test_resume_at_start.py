"""`initialize(..., resume=run)`: no weights are drawn or sent that the load replaces, and none stay unset."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fresh_memory import fresh_memory_is_nan
from marks import slow
from model import GPT
from models import OwnLoss, global_batches, make_engine, save_and_wait, seeded, train, whole
from ranks import Ranks
from tied_gpt import gpt_engine
from torch import Tensor, nn

import ckpt
import uni3d


def refuse(*_: Any) -> None:
    raise AssertionError("weights are drawn, though a load replaces them")


def losses(engine: uni3d.Engine, steps: int) -> list[float]:
    return [engine.train_batch().item() for _ in range(steps)]


def drawn_case(place: tuple[int, int, int, int], run: str) -> None:
    with fresh_memory_is_nan():
        engine = gpt_engine(*place, resume=run)
    assert engine.client_state is None
    assert engine.global_steps == 0
    plain = gpt_engine(*place)
    first = losses(engine, 1)
    assert first == losses(plain, 1), "a new run begins as it does without resume="
    save_and_wait(engine, run, client_state={"at": 1})
    rest = losses(engine, 2)
    draw, GPT.init_parameter = GPT.init_parameter, refuse  # type: ignore[method-assign]
    try:
        with fresh_memory_is_nan():
            resumed = gpt_engine(*place, resume=run)
    finally:
        GPT.init_parameter = draw  # type: ignore[method-assign]
    assert (resumed.client_state, resumed.global_steps) == ({"at": 1}, 1)
    assert resumed.last_load is not None
    assert losses(resumed, 2) == rest


@pytest.mark.parametrize("place", [(1, 2, 1, 3), (2, 1, 1, 0), slow((1, 1, 2, 1)), slow((1, 2, 1, 0))])
def test_nothing_is_drawn_for_a_run_that_has_a_checkpoint(
    ranks: Ranks, tmp_path: Path, place: tuple[int, int, int, int]
) -> None:
    ranks.run(2, drawn_case, place, str(tmp_path / "run"))


class OwnValues(OwnLoss):
    """Model whose values and buffers differ on each rank."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            for tensor in [*self.parameters(), *self.buffers()]:
                tensor += dist.get_rank() if dist.is_initialized() else 0


def built_case(zero: int, run: Path) -> list[int]:
    engine = make_engine(seeded(OwnValues), zero=zero, resume=run)
    assert engine.module.scratch.tolist() == [0, 0], "rank 0's"
    batches = global_batches(2)
    train(engine, batches[:1])
    save_and_wait(engine, run)
    rest = train(engine, batches[1:])
    sent: list[int] = []
    plain = dist.broadcast

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.nbytes)
        return plain(tensor, *args, **kwargs)

    dist.broadcast = counted
    try:
        with fresh_memory_is_nan():
            resumed = make_engine(seeded(OwnValues), zero=zero, resume=run)
    finally:
        dist.broadcast = plain
    assert resumed.client_state == {}
    assert resumed.module.scratch.tolist() == [0, 0], "a buffer that no checkpoint has is rank 0's"
    assert train(resumed, batches[1:]) == rest
    for name, tensor in whole(engine.module).items():
        assert torch.equal(tensor, whole(resumed.module)[name]), name
    return sent


@pytest.mark.parametrize("zero", [0, 3])
def test_a_model_built_on_the_cpu_sends_buffers_alone(ranks: Ranks, tmp_path: Path, zero: int) -> None:
    for sent in ranks.run(2, built_case, zero, tmp_path / "run"):
        assert sorted(sent) == [8, 8], "a count and two numbers"


def test_a_run_without_latest_is_an_error(alone: None, tmp_path: Path) -> None:
    save_and_wait(make_engine(seeded(OwnLoss)), tmp_path)
    (tmp_path / "latest").unlink()
    with pytest.raises(ckpt.CheckpointError, match="latest"):
        make_engine(seeded(OwnLoss), resume=tmp_path)
    for path in (tmp_path / "global_step0", str(tmp_path / "global_step0")):
        with pytest.raises(ckpt.CheckpointError, match=r"global_step0 is a checkpoint, not a run's folder"):
            make_engine(seeded(OwnLoss), resume=path)


def test_a_failed_load_leaves_no_engine(alone: None, tmp_path: Path) -> None:
    engine = make_engine(seeded(OwnLoss), zero=3)
    save_and_wait(engine, tmp_path)
    for file in (tmp_path / "global_step0").glob("atoms/out.weight/fp32/c*"):
        file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(ckpt.CheckpointError, match=r"out\.weight"):
        make_engine(seeded(OwnLoss), zero=3, resume=tmp_path)
    save_and_wait(engine, tmp_path / "partly", exclude_frozen_parameters=True)
    with pytest.raises(ckpt.CheckpointError, match=r"2 missing in the checkpoint: fixed\.bias/fp32"):
        make_engine(seeded(OwnLoss), resume=tmp_path / "partly")


def test_a_parameter_that_a_load_leaves_out_is_noticed(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_and_wait(make_engine(seeded(OwnLoss)), tmp_path / "partly", exclude_frozen_parameters=True)

    def not_strict(self: uni3d.Engine, run: Path) -> Any:
        return load(self, run, load_module_strict=False)

    load = uni3d.Engine.load_checkpoint
    monkeypatch.setattr(uni3d.Engine, "load_checkpoint", not_strict)
    with pytest.raises(AssertionError, match="the load is strict"):
        make_engine(seeded(OwnLoss), resume=tmp_path / "partly")


class Undrawn(nn.Sequential):
    returns_loss = True

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 1))


def test_a_model_that_cannot_be_drawn_needs_a_checkpoint_or_weights(alone: None, tmp_path: Path) -> None:
    def unfilled() -> nn.Module:
        with torch.device("meta"):
            return Undrawn()

    message = r"Undrawn has no init_parameter.*add it, give initialize its weights \(weights=FILE, or resume="
    with pytest.raises(ValueError, match=message):
        make_engine(unfilled(), resume=tmp_path)
    engine = make_engine(seeded(Undrawn))
    save_and_wait(engine, tmp_path)
    resumed = make_engine(unfilled(), resume=tmp_path)
    for name, tensor in whole(engine.module).items():
        assert torch.equal(tensor, whole(resumed.module)[name])

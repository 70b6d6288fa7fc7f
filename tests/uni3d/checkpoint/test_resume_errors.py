"""Saves and loads that can't be right: the same error on all ranks, with names, before anything changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    OwnLoss,
    Stack,
    global_batches,
    make_engine,
    micro_batches,
    save_and_wait,
    seeded,
    train,
    whole,
)
from ranks import Ranks
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR

import ckpt
import uni3d

STEPS = 2


def save(run: Path, **given: Any) -> uni3d.Engine:
    engine = make_engine(seeded(Stack), **given)
    train(engine, global_batches(STEPS))
    save_and_wait(engine, run)
    return engine


def everything(engine: uni3d.Engine) -> list[Any]:
    """Return everything that a load can change, in a comparable form."""
    engine.model.zero.reshard()  # the optimizer has the sharded parameters
    named = {id(p): name for name, p in engine.module.named_parameters()}
    states = {
        (named[id(p)], key): torch.as_tensor(value).tolist()
        for p, state in engine.optimizer.state.items()
        for key, value in ((k, v.full_tensor() if hasattr(v, "full_tensor") else v) for k, v in state.items())
    }
    groups = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    tensors = {name: tensor.tolist() for name, tensor in whole(engine.module).items()}
    return [tensors, states, groups, engine.global_steps, engine.global_samples, engine.last_load]


def refused(engine: uni3d.Engine, run: Path, **how: Any) -> str:
    """Return the error of a load; check that it changed nothing and that training goes on."""
    before = everything(engine)
    with pytest.raises(ckpt.CheckpointError) as caught:
        engine.load_checkpoint(run, **how)
    assert everything(engine) == before
    assert not isinstance(caught.value, ckpt.PartialLoadError)
    train(engine, global_batches(1))
    return str(caught.value)


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.05)


def two_groups(model: nn.Module) -> Any:
    return [{"params": model.layers.parameters()}, {"params": model.out.parameters()}]


def swapped_groups(model: nn.Module) -> Any:
    return two_groups(model)[::-1]


MISFITS: dict[str, tuple[Callable[[], uni3d.Engine], str]] = {
    "shape": (
        lambda: make_engine(seeded(Stack, 4, 5), zero=3),
        "layers.0.0.weight/fp32 is float32[6, 6] in {run}/global_step2, but the model's is float32[5, 5]",
    ),
    "fewer_layers": (
        lambda: make_engine(seeded(Stack, 3)),
        "{run}/global_step2 doesn't fit the model and optimizer; 6 unexpected in the checkpoint: layers.3.",
    ),
    "more_layers": (
        lambda: make_engine(seeded(Stack, 5), config={"optimizer": {"type": "AdamW"}}),
        "layers.4.0.weight is in parameter group 0, but in none of the checkpoint",
    ),
    "other_optimizer": (
        lambda: make_engine(seeded(Stack), optimizer=sgd),
        "the checkpoint's optimizer is AdamW, but this run's is SGD",
    ),
    "more_groups": (
        lambda: make_engine(model := seeded(Stack), model_parameters=two_groups(model)),
        "the checkpoint's optimizer has 1 parameter groups, but this run's has 2",
    ),
    "no_scheduler": (
        lambda: make_engine(seeded(Stack), config={"scheduler": {"type": "WarmupLR"}}),
        "the checkpoint has no scheduler, but this run has WarmupLR; load it with load_lr_scheduler_states=",
    ),
}


def misfit_case(run: Path, names: list[str]) -> dict[str, list[str]]:
    """Return, for each misfit, the error of a new engine and of a trained one."""
    save(run)
    errors = {}
    for name in names:
        engine = MISFITS[name][0]()
        if name == "shape":  # its data has the wrong width, so it can't train
            before = everything(engine)
            with pytest.raises(ckpt.CheckpointError) as caught:
                engine.load_checkpoint(run)
            assert everything(engine) == before
            errors[name] = [str(caught.value)]
        else:
            errors[name] = [refused(engine, run), refused(engine, run)]
    return errors


def test_what_does_not_fit(ranks: Ranks, tmp_path: Path) -> None:
    one, other = ranks.run(2, misfit_case, tmp_path, list(MISFITS))
    assert one == other, "all ranks raise the same"
    for name, (_, expected) in MISFITS.items():
        for message in one[name]:
            assert expected.format(run=tmp_path) in message, name


def test_groups_with_other_members(alone: None, tmp_path: Path) -> None:
    model = seeded(Stack)
    save(tmp_path)
    first = make_engine(model, model_parameters=two_groups(model))
    first.save_checkpoint(tmp_path, "two")
    other = seeded(Stack)
    engine = make_engine(other, model_parameters=swapped_groups(other))
    text = refused(engine, tmp_path, tag="two")
    assert "out.weight is in parameter group 0, but in group 1 of the checkpoint" in text


def test_no_optimizer_in_the_checkpoint(alone: None, tmp_path: Path) -> None:
    make_engine(seeded(Stack), config={"optimizer": None}).save_checkpoint(tmp_path)
    text = refused(make_engine(seeded(Stack)), tmp_path)
    assert "the checkpoint has no optimizer; load it with load_optimizer_states=False" in text
    make_engine(seeded(Stack)).load_checkpoint(tmp_path, load_optimizer_states=False)


def test_tags_that_are_not_there(alone: None, tmp_path: Path) -> None:
    engine = save(tmp_path)
    engine.save_checkpoint(tmp_path, tag="best")
    text = refused(engine, tmp_path, tag="worst")
    assert text.startswith(
        f"{tmp_path} has no committed checkpoint 'worst'; the tags there are: global_step2, best"
    )
    assert str(tmp_path / "elsewhere") in refused(engine, tmp_path / "elsewhere")
    (tmp_path / "latest").write_text("gone\n")
    with pytest.raises(ckpt.CheckpointError, match="gone"):
        engine.resume(tmp_path)


def damage(run: Path) -> str:
    """Invert one byte of a chunk; return the name of its array."""
    chunk = sorted((run / "global_step2" / "atoms" / "layers.2.0.weight" / "fp32").glob("c*"))[0]
    data = bytearray(chunk.read_bytes())
    data[1] ^= 0x10
    chunk.write_bytes(data)
    return "layers.2.0.weight/fp32"


def damaged_case(run: Path) -> Any:
    engine = make_engine(seeded(Stack), zero=3)
    messages = []
    with pytest.raises(ckpt.PartialLoadError) as caught:
        engine.load_checkpoint(run)
    messages.append(str(caught.value))
    batches = global_batches(1)
    for use in (
        lambda: engine.train_batch(micro_batches(batches, engine)),
        lambda: engine.eval_batch(micro_batches(batches, engine)),
        lambda: engine(batches[0][0]),
        lambda: engine.save_checkpoint(run),
        lambda: engine.load_checkpoint(run),
    ):
        with pytest.raises(RuntimeError, match="this engine can't be used any more: a load failed half-way"):
            use()
    return messages


def test_damaged_data_stops_all_ranks_for_good(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(1, save_case, tmp_path)
    name = damage(tmp_path)
    one, other = ranks.run(2, damaged_case, tmp_path)
    assert one == other
    assert name in one[0]
    assert "is damaged" in one[0]


def save_case(run: Path) -> None:
    save(run)


UNFIT = {
    "tuple": ({"a": {"b": (1, 2)}}, "['client_state']['a']['b'] is a tuple; "),
    "int_key": ({"a": [{1: 2}]}, "['client_state']['a'][0] has the key 1; keys must be strings"),
    "nan": ({"loss": float("nan")}, "['client_state']['loss'] is nan; "),
    "tensor": ({"w": torch.ones(1)}, "['client_state']['w'] is a Tensor; "),
}


def failing_save_case(run: Path) -> Any:
    """Make several saves fail, then one succeed."""
    rank = torch.distributed.get_rank()
    engine = make_engine(seeded(OwnLoss), zero=1)
    train(engine, global_batches(STEPS))
    engine.save_checkpoint(run, tag="before")
    errors: dict[str, str] = {}
    for name, (client_state, _) in UNFIT.items():
        with pytest.raises(ckpt.CheckpointError) as caught:
            engine.save_checkpoint(run, tag="before", client_state=client_state)
        errors[name] = str(caught.value)
    for name, tag in (("tags", f"of-rank-{rank}"), ("tag", "../x")):
        with pytest.raises(ckpt.CheckpointError) as caught:
            engine.save_checkpoint(run, tag=tag)
        errors[name] = str(caught.value)
    assert sorted(path.name for path in Path(run).iterdir()) == ["before", "latest"], "nothing is left behind"
    train(engine, global_batches(1))
    engine.save_checkpoint(run, client_state={"fine": True})
    other = make_engine(seeded(OwnLoss), zero=3)
    assert other.load_checkpoint(run)[1] == {"fine": True}
    assert everything(other)[:2] == everything(engine)[:2]
    assert other.load_checkpoint(run, tag="before")[1] == {}
    return errors


def test_a_save_that_fails_leaves_everything_as_it_was(ranks: Ranks, tmp_path: Path) -> None:
    one, other = ranks.run(2, failing_save_case, tmp_path)
    assert one == other
    for name, (_, expected) in UNFIT.items():
        assert expected in one[name], name
    assert one["tags"] == "the ranks were asked to save different tags: of-rank-0, of-rank-1; use one"
    assert "'../x'" in one["tag"]


def test_a_scheduler_of_another_optimizer(alone: None) -> None:
    stray = torch.optim.SGD(nn.Linear(1, 1).parameters())
    with pytest.raises(ValueError, match="over another optimizer"):
        make_engine(seeded(Stack), lr_scheduler=StepLR(stray, 1))


def test_schedulers_that_cannot_be_kept(alone: None) -> None:
    with pytest.raises(ValueError, match="ReduceLROnPlateau takes a metric at each step, and the engine"):
        make_engine(seeded(Stack), lr_scheduler=ReduceLROnPlateau)

    def odd(optimizer: torch.optim.Optimizer) -> StepLR:
        scheduler = StepLR(optimizer, 1)
        scheduler.odd = {1, 2}
        return scheduler

    with pytest.raises(ValueError, match=r"StepLR can't be saved: its state\['odd'\] is a set"):
        make_engine(seeded(Stack), lr_scheduler=odd)


def test_another_scheduler_than_was_saved(alone: None, tmp_path: Path) -> None:
    make_engine(seeded(Stack), lr_scheduler=lambda o: CosineAnnealingLR(o, 100)).save_checkpoint(tmp_path)
    other = make_engine(seeded(Stack), lr_scheduler=lambda o: StepLR(o, 1))
    with pytest.raises(ckpt.CheckpointError, match="the checkpoint's scheduler isn't this run's StepLR"):
        other.load_checkpoint(tmp_path)
    changed = make_engine(seeded(Stack), lr_scheduler=lambda o: CosineAnnealingLR(o, 5000))
    with pytest.warns(UserWarning, match="T_max is 5000 in this run, 100 in the checkpoint"):
        changed.load_checkpoint(tmp_path)


class LocalMoments(torch.optim.SGD):
    """Optimizer with states as plain tensors of the local part, like some fused optimizers."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = torch.zeros_like(p.to_local())


def save_local_moments(folder: str) -> None:
    engine = make_engine(seeded(Stack), optimizer=lambda groups: LocalMoments(groups, lr=0.1), zero=1)
    engine.optimizer.step()
    with pytest.raises(ckpt.CheckpointError, match=r"'sum' of .* is a plain tensor"):
        engine.save_checkpoint(folder)


def test_states_that_do_not_say_their_part(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, save_local_moments, str(tmp_path))


def save_to_own_folder(folder: str) -> str:
    engine = make_engine(seeded(Stack), zero=1)
    own = f"{folder}/{engine.model.topology.rank}"  # as a node-local folder is
    engine.save_checkpoint(own)
    with pytest.raises(ckpt.CheckpointError) as caught:
        engine.wait_for_checkpoint()
    save_and_wait(engine, f"{folder}/shared")
    return str(caught.value)


def test_a_folder_that_is_not_shared(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks.run(2, save_to_own_folder, str(tmp_path))
    assert first == second
    assert "is not the same folder as rank 0's; save to a shared file system (rank 1)" in first
    assert ckpt.committed_tags(tmp_path / "0") == ckpt.committed_tags(tmp_path / "1") == []
    assert ckpt.committed_tags(tmp_path / "shared") == ["global_step0"]


def test_a_load_that_fails_half_way_waits_for_nobody(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank may be lost, so parameters aren't gathered any more; after a refusal on all ranks they are."""
    engine = save(tmp_path)
    shown = list[bool]()
    monkeypatch.setattr(engine.model.zero, "show_parameters", lambda: shown.append(True))
    with pytest.raises(ckpt.CheckpointError, match="t9"):
        engine.load_checkpoint(tmp_path, "t9")
    assert shown == [True]

    def fail(*_: Any) -> None:
        raise ckpt.PartialLoadError("rank 1 has ended")

    monkeypatch.setattr(engine._restorer, "_loaded", fail)
    with pytest.raises(ckpt.PartialLoadError, match="rank 1 has ended"):
        engine.load_checkpoint(tmp_path)
    assert shown == [True]
    with pytest.raises(RuntimeError, match="can't be used any more"):
        train(engine, global_batches(1))

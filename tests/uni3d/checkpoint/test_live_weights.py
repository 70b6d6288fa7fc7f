"""A live model's weights as plain tensors, and weights that a script loads in its own way."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow
from model import GPT, GPTConfig
from models import (
    OwnLoss,
    Stack,
    assert_same,
    global_batches,
    make_engine,
    save_and_wait,
    seeded,
    train,
    train_plainly,
)
from ranks import Ranks
from tied_gpt import TIED, gpt_engine
from torch import Tensor, nn

import ckpt

STEPS = 2
PLACES = [slow((1, 1, 1, 0)), (1, 2, 1, 3), slow((2, 1, 1, 1)), slow((1, 1, 2, 2)), slow((2, 1, 2, 3))]


def out_case(place: tuple[int, int, int, int], folder: str) -> Any:
    engine = gpt_engine(*place, bf16={"enabled": True})
    for _ in range(STEPS):
        engine.train_batch()
    assert engine.save_16bit_model(folder)
    return engine.module_state_dict()


@pytest.mark.parametrize("place", PLACES, ids=lambda p: f"pp{p[0]}dp{p[1]}tp{p[2]}z{p[3]}")
def test_the_state_dict_at_any_topology(ranks: Ranks, place: Any, tmp_path: Path) -> None:
    results = ranks.run(place[0] * place[1] * place[2], out_case, place, str(tmp_path / "out"))
    whole: dict[str, Tensor] = {}
    for result in results:
        whole |= result
    plain = GPT(GPTConfig(**TIED))
    plain.load_state_dict(whole)  # strict: every name, the tied ones too
    assert all(tensor.dtype == torch.float32 for tensor in whole.values())
    saved = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert saved.keys() == plain.state_dict().keys()
    for name, tensor in saved.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, whole[name].bfloat16())
    assert saved["head.weight"].data_ptr() == saved["embed.tokens.weight"].data_ptr(), "in the file once"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pytorch_model.bin"]


def test_frozen_parameters_can_be_left_out(alone: None, tmp_path: Path) -> None:
    engine = make_engine(seeded(OwnLoss))
    train(engine, global_batches(1))
    assert engine.module_state_dict().keys() == engine.module.state_dict().keys()
    without = engine.module_state_dict(exclude_frozen_parameters=True)
    assert engine.module_state_dict().keys() - without.keys() == {"fixed.weight", "fixed.bias"}
    engine.save_16bit_model(tmp_path, "w.pt", exclude_frozen_parameters=True)
    saved = torch.load(tmp_path / "w.pt", weights_only=True)
    assert saved.keys() == without.keys()
    assert saved["calls"].dtype == torch.int64, "buffers as they are"
    assert saved["out.weight"].dtype == torch.float32, "the type of training"


def frozen_case(folder: str) -> Any:
    engine = make_engine(seeded(OwnLoss), zero=3)
    train(engine, global_batches(STEPS))
    save_and_wait(engine, folder, exclude_frozen_parameters=True)
    resumed = make_engine(seeded(OwnLoss), zero=3)
    with pytest.raises(ckpt.CheckpointError, match=r"missing in the checkpoint: fixed\.bias/fp32"):
        resumed.load_checkpoint(folder)
    resumed.load_checkpoint(folder, load_module_strict=False)
    return sorted(resumed.last_load.defaulted), train(resumed, global_batches(1, seed=4))


def test_a_checkpoint_without_frozen_parameters(ranks: Ranks, tmp_path: Path) -> None:
    after = [*global_batches(STEPS), *global_batches(1, seed=4)]
    losses, _, _ = train_plainly(seeded(OwnLoss), after)
    for defaulted, found in ranks.run(2, frozen_case, str(tmp_path)):
        assert defaulted == ["fixed.bias/fp32", "fixed.weight/fp32"]
        assert found == pytest.approx(losses[STEPS:], rel=1e-5)


class Renamed(Stack):
    """A `Stack` whose last layer has another name."""

    def __init__(self) -> None:
        super().__init__()
        self.final = self.out
        del self.out

    @property
    def pipeline_layers(self) -> list[str]:
        return [*(f"layers.{i}" for i in range(len(self.layers))), "final"]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.final(x)


def load_renamed(src: Mapping[str, Tensor], dst: nn.Module) -> None:
    names = {name: name.replace("final.", "out.") for name, _ in dst.named_parameters()}
    dst.load_state_dict({name: src[names[name]] for name in names}, strict=False)


def custom_case(folder: str, zero: int, pp: int) -> Any:
    engine = make_engine(seeded(Stack), zero=1)
    train(engine, global_batches(STEPS))
    save_and_wait(engine, folder)
    other = make_engine(Renamed(), zero=zero, pp=pp)
    with pytest.raises(ckpt.CheckpointError):
        other.load_checkpoint(folder, load_optimizer_states=False)
    other.load_checkpoint(folder, load_optimizer_states=False, custom_load_fn=load_renamed)
    return other.global_steps, other.module_state_dict()


@pytest.mark.parametrize(("zero", "pp"), [(3, 1), slow(0, 1), (1, 2)], ids=["zero3", "zero0", "pp2"])
def test_a_script_loads_the_model_in_its_own_way(ranks: Ranks, zero: int, pp: int, tmp_path: Path) -> None:
    _, _, model = train_plainly(seeded(Stack), global_batches(STEPS))
    found: dict[str, Tensor] = {}
    for steps, part in ranks.run(2, custom_case, str(tmp_path), zero, pp):
        assert steps == STEPS
        found |= part
    assert_same({name.replace("final.", "out."): tensor for name, tensor in found.items()}, model)


def test_a_script_that_fails_to_load_leaves_an_engine_that_refuses(alone: None, tmp_path: Path) -> None:
    engine = make_engine(seeded(Stack))
    engine.save_checkpoint(tmp_path)

    def fail(src: Mapping[str, Tensor], dst: nn.Module) -> None:
        raise KeyError("no such tensor")

    with pytest.raises(ckpt.PartialLoadError, match="no such tensor"):
        engine.load_checkpoint(tmp_path, custom_load_fn=fail)
    with pytest.raises(RuntimeError, match="can't be used any more"):
        train(engine, global_batches(1))


def unwritable_case(folder: str) -> str:
    engine = make_engine(seeded(Stack))
    with pytest.raises(ckpt.CheckpointError) as caught:
        engine.save_16bit_model(folder)
    return str(caught.value) + f" {len(train(engine, global_batches(1)))}"


def test_a_file_that_cannot_be_written_is_the_same_error_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    first, second = ranks.run(2, unwritable_case, str(tmp_path / "file"))
    assert first == second
    assert "exists" in first or "directory" in first
    assert first.endswith(" 1"), "training goes on"

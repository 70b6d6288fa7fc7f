"""Extra state of modules: it comes back on any topology, or the save refuses it by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from marks import STAGES, matrix, slow
from models import Stack, global_batches, make_engine, seeded, train, train_plainly
from paced_optimizer import Paced
from ranks import Ranks
from torch import Tensor, nn

import ckpt
import uni3d
from uni3d.estimate.saved import SavedModel
from uni3d.manifest import ModelRecord, OptimizerRecord, RunManifest

STEPS = 3


class Scaled(nn.Linear):
    """Layer whose factor and history are neither parameters nor buffers, and change its outputs."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.factor, self.history, self.amax = 1.0, [{"a/b": 1}], torch.zeros(2)

    def get_extra_state(self) -> Any:
        return {"factor": self.factor, "history": self.history, "amax": {"x/~": [self.amax, None]}}

    def set_extra_state(self, state: Any) -> None:
        self.factor, self.history = state["factor"], state["history"]
        self.amax = state["amax"]["x/~"][0]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor + self.amax.sum()


class Only(nn.Tanh):
    """Layer whose extra state is one tensor."""

    value = torch.zeros(3, dtype=torch.bfloat16)

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


class Quantized(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.layers[1] = nn.Sequential(Scaled(6, 6), Only())
        self.layers[3] = nn.Sequential(Scaled(6, 6), nn.Tanh())


def changed(model: nn.Module) -> nn.Module:
    """Change the extra states, as calibration would."""
    for name, module in model.named_modules():
        if isinstance(module, Scaled):
            module.factor = 0.5 + len(name)
            module.history.append({"a/b": 2, "none": None})
            module.amax = torch.tensor([0.25, 0.5])
        if isinstance(module, Only):
            module.value = torch.tensor([1.5, -2.0, float("inf")], dtype=torch.bfloat16)
    return model


def extras(model: nn.Module) -> dict[str, Any]:
    return {
        name: module.get_extra_state()
        for name, module in model.named_modules()
        if isinstance(module, Scaled | Only)
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def module_case(run: Path, zero: int, pp: int, first: bool) -> Any:
    model = seeded(Quantized)
    engine = make_engine(changed(model) if first else model, zero=zero, pp=pp, micro=1)
    batches = global_batches(2 * STEPS)
    if first:
        losses = train(engine, batches[:STEPS])
        engine.save_checkpoint(run)
        losses += train(engine, batches[STEPS:])
    else:
        engine.resume(run)
        losses = train(engine, batches[STEPS:])
    report = engine.last_load
    return losses, extras(engine.module), None if report is None else (str(report), report.extra)


@pytest.mark.parametrize(("zero", "pp"), [slow(0, 1), matrix(1, 1), matrix(2, 1), (3, 1), slow(1, 2)])
def test_modules_extra_state_on_any_topology(ranks: Ranks, tmp_path: Path, zero: int, pp: int) -> None:
    expected, _, model = train_plainly(changed(seeded(Quantized)), global_batches(2 * STEPS))
    names = ["layers.1.0", "layers.1.1", "layers.3.0"]
    for losses, _, _ in ranks.run(2, module_case, tmp_path, zero, pp, True):
        assert losses == pytest.approx(expected, rel=1e-5)
    for world, other_zero, other_pp in ((1, 0, 1), (2, 3, 1), (2, 0, 2)):
        found: dict[str, Any] = {}
        for losses, extra, report in ranks.run(world, module_case, tmp_path, other_zero, other_pp, False):
            assert losses == pytest.approx(expected[STEPS:], rel=1e-5)
            found |= extra
            assert report[1] == [f"{name}._extra_state" for name in names]
            assert "arrays and 3 extra states restored, 0 defaulted, 0 dropped" in report[0]
        assert list(found) == names
        assert same(found, extras(model))


def test_other_readers_of_a_checkpoint_with_extra_states(alone: None, tmp_path: Path) -> None:
    engine = make_engine(changed(seeded(Quantized)))
    train(engine, global_batches(1))
    engine.save_checkpoint(tmp_path)
    expected = extras(engine.module)
    plain = Quantized()
    uni3d.load_state_dict_from_zero_checkpoint(plain, tmp_path)
    assert same(extras(plain), expected)
    plain = Quantized()
    plain.load_state_dict(engine.module_state_dict())  # strict
    assert same(extras(plain), expected)
    found = uni3d.get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    assert found.keys() == dict(plain.named_parameters()).keys(), "weights alone"
    with pytest.raises(ckpt.CheckpointError, match=r"Stack lacks layers\.1\.0\._extra_state"):
        uni3d.load_state_dict_from_zero_checkpoint(Stack(), tmp_path)
    checkpoint = ckpt.open_checkpoint(tmp_path)
    assert ckpt.verify(checkpoint) == []
    assert SavedModel(checkpoint.arrays, RunManifest.of(checkpoint)).buffers == []
    key = ckpt.ArrayKey("layers.1.0._extra_state", "extra_state/amax/x~1~0/0")
    assert checkpoint.read(*key).tolist() == [0.25, 0.5]
    assert ckpt.ArrayKey("layers.1.1._extra_state", "extra_state") in checkpoint.arrays


def applied(module: Scaled, x: Tensor) -> Tensor:
    return module(x).tanh()


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(outputs, targets)


def tied_case(run: Path, first: bool) -> Any:
    layers = [uni3d.TiedLayerSpec("t", Scaled, 6, 6, forward_fn=applied), uni3d.LayerSpec(nn.Linear, 6, 1)]
    engine = make_engine(uni3d.PipelineModule(layers, loss_fn=loss), pp=2, micro=6)
    modules = [link._called[0] for link in engine.module.modules() if hasattr(link, "_called")]
    if first:
        for module in modules:
            module.factor = 3.0
        engine.save_checkpoint(run)
    else:
        engine.resume(run)
    return [module.factor for module in modules]


def test_a_layer_behind_a_function(ranks: Ranks, tmp_path: Path) -> None:
    for first in (True, False):
        assert ranks.run(2, tied_case, tmp_path, first) == [[3.0], []]


# --- refusals --------------------------------------------------------------------------------------------


class Odd(nn.Linear):
    def get_extra_state(self) -> Any:
        return self.odd

    def set_extra_state(self, state: Any) -> None:
        self.odd = state


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "tuple": (lambda m: {"a": (1, 2)}, "out._extra_state/a is a tuple; "),
    "bytes": (lambda m: b"pickled", "out._extra_state is a bytes; "),
    "key": (lambda m: [{1: 2}], "out._extra_state/0 has the key 1; keys must be strings"),
    "nan": (lambda m: {"a": float("nan")}, "out._extra_state/a is nan; "),
    "type": (lambda m: {"z": torch.zeros(2, dtype=torch.complex64)}, "extra_state/z has dtype complex64"),
    "sharded": (lambda m: {"w": m.weight}, "out._extra_state/w is a "),
    "rank": (lambda m: torch.distributed.get_rank(), "out._extra_state differs between ranks 0 and 1"),
    "tensors": (
        lambda m: [torch.full((2,), 1.0 + torch.distributed.get_rank())],
        "out._extra_state differs between ranks 0 and 1",
    ),
}


def refused_case(run: Path, zero: int) -> dict[str, str]:
    model = seeded(Stack)
    model.out = Odd(6, 1)
    engine = make_engine(model, zero=zero)
    errors = {}
    for name, (value, _) in REFUSED.items():
        if name == "sharded" and zero < 3:
            continue  # parameters are whole there between steps, and a tensor can be kept
        model.out.odd = value(engine.module.out)
        with pytest.raises(ckpt.CheckpointError) as caught:
            engine.save_checkpoint(run)
        errors[name] = str(caught.value)
    assert not run.exists() or not [*run.iterdir()]
    model.out.odd = {}
    train(engine, global_batches(1))
    engine.save_checkpoint(run)
    return errors


@pytest.mark.parametrize("zero", [slow(0), 3])
def test_what_cannot_be_kept_is_refused_by_name(ranks: Ranks, tmp_path: Path, zero: int) -> None:
    one, other = ranks.run(2, refused_case, tmp_path / "run", zero)
    assert one == other
    assert one.keys() == REFUSED.keys() - ({"sharded"} if zero < 3 else set())
    for name, error in one.items():
        assert REFUSED[name][1] in error, name


class Adding(nn.Linear):
    """Layer that adds a key to its `state_dict` by torch's internal method, as quantized layers do."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}scale"] = torch.tensor(2.0)


def rename(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state[f"{prefix}gamma"] = state.pop(f"{prefix}weight")


def lost_case(run: Path, zero: int) -> list[str]:
    model = seeded(Stack)
    model.out = Adding(6, 1)
    engine = make_engine(model, zero=zero)
    errors = []
    for _ in range(2):
        with pytest.raises(ckpt.CheckpointError) as caught:
            engine.save_checkpoint(run)
        errors.append(str(caught.value))
    renamed = seeded(Stack)
    renamed.out.register_state_dict_post_hook(rename)
    make_engine(renamed, zero=zero).save_checkpoint(run)
    return errors


@pytest.mark.parametrize("zero", STAGES)
def test_a_key_that_only_state_dict_has_is_refused(ranks: Ranks, tmp_path: Path, zero: int) -> None:
    one, other = ranks.run(2, lost_case, tmp_path, zero)
    assert one == other
    for error in one:
        assert ".state_dict() has out.scale, which a checkpoint wouldn't keep: it keeps parameters" in error


class Getter(nn.Linear):
    def get_extra_state(self) -> Any:
        return 1


class Rooted(Stack):
    def get_extra_state(self) -> Any:
        return 1

    def set_extra_state(self, state: Any) -> None:
        pass


def test_states_that_could_not_come_back(alone: None, tmp_path: Path) -> None:
    engine = make_engine(nn.Sequential(Getter(2, 2)))
    with pytest.raises(ckpt.CheckpointError, match=r"0\._extra_state couldn't be restored: .*Getter has no"):
        engine.save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"Rooted has an extra state \(_extra_state\), but is in none of"):
        make_engine(Rooted())


def test_models_that_differ(alone: None, tmp_path: Path) -> None:
    with_state, without = tmp_path / "with", tmp_path / "without"
    make_engine(seeded(Quantized)).save_checkpoint(with_state)
    make_engine(seeded(Stack)).save_checkpoint(without)
    fewer, more = make_engine(seeded(Stack)), make_engine(changed(seeded(Quantized)))
    with pytest.raises(ckpt.CheckpointError, match=r"unexpected in the checkpoint: layers\.1\.0\._extra"):
        fewer.load_checkpoint(with_state)
    fewer.load_checkpoint(with_state, load_module_strict=False)
    assert fewer.last_load is not None
    assert fewer.last_load.dropped["layers.3.0._extra_state"] == "not in the model"
    before = extras(more.module)
    with pytest.raises(ckpt.CheckpointError, match=r"missing in the checkpoint: layers\.1\.0\._extra_state"):
        more.load_checkpoint(without)
    more.load_checkpoint(without, load_module_strict=False)
    assert same(extras(more.module), before)
    assert more.last_load is not None
    assert sorted(more.last_load.defaulted)[0] == "layers.1.0._extra_state"


def test_checkpoints_of_releases_that_saved_none(alone: None, tmp_path: Path) -> None:
    def old(document: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda self: {k: v for k, v in document(self).items() if k != "extra_state"}

    with (
        mock.patch.object(ModelRecord, "document", old(ModelRecord.document)),
        mock.patch.object(OptimizerRecord, "document", old(OptimizerRecord.document)),
    ):
        engine = make_engine(seeded(Stack), optimizer=Paced)
        engine.save_checkpoint(tmp_path)
        engine.wait_for_checkpoint()
    other = make_engine(changed(seeded(Quantized)), optimizer=Paced)
    other.load_checkpoint(tmp_path)
    assert other.last_load is not None
    assert [*other.last_load.defaulted][:1] == ["layers.1.0._extra_state"]
    assert "the optimizer's seen" in other.last_load.defaulted
    assert other.module.layers[1][0].factor == 10.5

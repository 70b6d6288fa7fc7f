"""`uni3d export --format deepspeed-universal`: the files' content, read by torch and by our importer.

`tests/peers/test_export_deepspeed.py` has DeepSpeed itself load them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import answer, refused
from models import OwnLoss, global_batches, make_engine, save_and_wait, seeded, train
from ranks import Ranks
from torch import nn
from whole_arrays import save_whole

import ckpt
from uni3d.manifest import RunManifest

STEPS = 3
TAG = f"global_step{STEPS}"
SCHEDULE = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 8}}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return two parameter groups with hyperparameters of their own."""
    last = [*model.out.parameters()]
    others = [p for p in model.parameters() if p.requires_grad and not any(p is each for each in last)]
    return [{"params": others}, {"params": last, "betas": (0.8, 0.95)}]


def save_case(run: str) -> None:
    model = seeded(OwnLoss)
    engine = make_engine(model, zero=1, model_parameters=groups(model), config={"scheduler": SCHEDULE})
    train(engine, global_batches(STEPS))
    save_and_wait(engine, run, client_state={"mine": [1, {"two": "three"}]})


@pytest.fixture(scope="module")
def run(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of an engine on two ranks."""
    folder = tmp_path_factory.mktemp("universal") / "run"
    ranks.run(2, save_case, str(folder))
    return folder


@pytest.fixture(scope="module")
def out(run: Path) -> Path:
    answer("export", run, run.parent / "out", "--format", "deepspeed-universal")
    return run.parent / "out"


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def test_every_file_has_the_stored_bits(run: Path, out: Path) -> None:
    stored = ckpt.open_checkpoint(run)
    assert (out / "latest_universal").read_text() == TAG
    trained = {"encode.weight", "encode.bias", "out.weight", "out.bias"}
    assert {path.name for path in (out / TAG / "zero").iterdir()} == {*trained, "optimizer_state.pt"}
    for name in trained:
        folder = out / TAG / "zero" / name
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            found = load(folder / f"{state}.pt")["param"].numpy()
            expected = stored.read(name, state)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert found.tobytes() == expected.tobytes()
        assert torch.equal(load(folder / "step.pt"), torch.tensor(float(STEPS)))
        assert len([*folder.iterdir()]) == 4
    common = load(out / TAG / "zero" / "optimizer_state.pt")
    first, second = common["param_groups"]
    assert (first["betas"], second["betas"]) == ((0.9, 0.999), (0.8, 0.95))
    assert not {"foreach", "fused", "capturable", "differentiable"} & first.keys()
    assert common["optimizer_state_dict"]["state"][0]["step"] == STEPS
    model = load(out / TAG / "mp_rank_00_model_states.pt")
    weights = {key.atom: stored.read(*key) for key in stored.arrays if key.state in ("fp32", "value")}
    weights["decode.weight"] = weights["encode.weight"]
    assert model["module"].keys() == weights.keys()
    assert all(model["module"][name].numpy().tobytes() == x.tobytes() for name, x in weights.items())
    assert model["module"]["decode.weight"].data_ptr() == model["module"]["encode.weight"].data_ptr()
    assert model["param_shapes"][1] == {"out.weight": torch.Size([1, 6]), "out.bias": torch.Size([1])}
    assert (model["global_steps"], model["global_samples"], model["mine"]) == (
        STEPS,
        12 * STEPS,
        [1, {"two": "three"}],
    )
    third = load(out / TAG / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    assert third["module"] == {}
    assert third["lr_scheduler"] == model["lr_scheduler"]


def test_it_comes_back_by_the_importer(run: Path, out: Path, tmp_path: Path) -> None:
    row = answer("import", out, tmp_path / "back")
    assert row["from"] == "deepspeed-universal"
    assert row["left_out"] == []
    here, there = ckpt.open_checkpoint(run), ckpt.open_checkpoint(tmp_path / "back")
    assert {*there.arrays} == {*here.arrays}
    assert all(there.read(*key).tobytes() == here.read(*key).tobytes() for key in here.arrays)
    ours, theirs = RunManifest.of(here), RunManifest.of(there)
    assert theirs.aliases == ours.aliases
    assert theirs.client_state == ours.client_state
    assert theirs.engine.global_samples == ours.engine.global_samples
    assert ours.optimizer is not None
    assert theirs.optimizer is not None
    assert theirs.optimizer.groups == ours.optimizer.groups
    assert theirs.optimizer.scalars == ours.optimizer.scalars
    assert ours.scheduler is not None
    assert theirs.scheduler is not None
    assert theirs.scheduler["last_epoch"] == ours.scheduler["last_epoch"]
    assert theirs.model.requires_grad == ours.model.requires_grad


ADAM: dict[str, Any] = {
    "type": "AdamW",
    "groups": [{"params": ["a", "b"], "lr": 0.1}],
    "scalars": {"a": {"step": 2.0}, "b": {"step": 2.0}},
}
UNHELD: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"optimizer": None}, "has no optimizer"),
    "momentum": ({"optimizer": ADAM | {"type": "SGD", "scalars": {}}}, "holds the states of Adam and AdamW"),
    "Lion": ({"optimizer": ADAM | {"type": "Lion"}}, "the optimizer Lion isn't one of torch.optim's"),
    "two counts": (
        {"optimizer": ADAM | {"scalars": {"a": {"step": 2.0}, "b": {"step": 3.0}}}},
        "a has taken 2 and b has taken 3 steps",
    ),
    "no count": ({"optimizer": ADAM | {"scalars": {"a": {"step": 2.0}}}}, "b has the states exp_avg"),
    "client state": ({"optimizer": ADAM, "client_state": {"module": 1}}, "the client state has module"),
    "frozen": (
        {"optimizer": ADAM, "model": {"left_out": ["c"]}},
        "was saved without frozen parameters",
    ),
    "extra states": (
        {"optimizer": ADAM, "model": {"extra_state": {"m._extra_state": {"value": 1, "tensors": {}}}}},
        "has extra states of modules",
    ),
}


@pytest.mark.parametrize("name", UNHELD)
def test_what_the_format_cannot_hold(tmp_path: Path, name: str) -> None:
    document, message = UNHELD[name]
    arrays = {(n, state): np.ones(3, np.float32) for n in "ab" for state in ("fp32", "exp_avg", "exp_avg_sq")}
    save_whole(tmp_path / "run", "t1", arrays, step=2, **document)
    error = refused("export", tmp_path / "run", tmp_path / "out", "--format", "deepspeed-universal")
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    "options", ["--dtype bf16", "--include out.*", "--max-shard-size 1GB", "--optimizer"]
)
def test_options_that_contradict(run: Path, tmp_path: Path, options: str) -> None:
    how = ("--format", "deepspeed-universal", *options.split())
    assert options.split()[0] in refused("export", run, tmp_path / "out", *how)
    assert list(tmp_path.iterdir()) == []

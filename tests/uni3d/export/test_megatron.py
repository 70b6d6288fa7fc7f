"""`uni3d export --format megatron`: the folder's content, read by torch and by our importer.

`tests/peers/test_export_megatron.py` has Megatron itself load such folders.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from commands import answer, refused, run
from whole_arrays import save_whole

import ckpt
from uni3d.manifest import RunManifest

LAYERS = 11  # with two digits, so that their order isn't that of their names
STEP = 3
TIED = {"aliases": {"head.weight": "embed.weight"}}


def names() -> dict[str, tuple[int, ...]]:
    """Return the trained parameters with their shapes."""
    found: dict[str, tuple[int, ...]] = {"embed.weight": (7, 4), "norm.weight": (4,)}
    for i in range(LAYERS):
        found |= {f"layers.{i}.up.weight": (6, 4), f"layers.{i}.up.bias": (6,), f"layers.{i}.norm": (4,)}
    return found


def optimizer(like: dict[str, tuple[int, ...]], **changes: Any) -> dict[str, Any]:
    """Return AdamW's record, with Megatron's two groups; `changes` are to the second."""
    both = {"lr": 0.02, "betas": [0.8, 0.95], "eps": 1e-6, "amsgrad": False, "maximize": False}
    both["decoupled_weight_decay"] = True
    spared = [name for name, shape in like.items() if len(shape) == 1]
    groups = [
        {"params": [name for name in like if name not in spared], **both, "weight_decay": 0.1},
        {"params": spared, **both, "weight_decay": 0.0, **changes},
    ]
    return {"type": "AdamW", "groups": groups, "scalars": {name: {"step": float(STEP)} for name in like}}


def saved(folder: Path, like: dict[str, tuple[int, ...]] | None = None, **document: Any) -> Path:
    """Save random weights and moments, a frozen weight and a buffer, with AdamW's record."""
    like = names() if like is None else like
    random = np.random.default_rng(0)
    states = ("fp32", "exp_avg", "exp_avg_sq")
    arrays = {(n, s): random.random(shape).astype(np.float32) for n, shape in like.items() for s in states}
    arrays["fixed.weight", "fp32"] = np.ones((2, 3), np.float32)
    arrays["calls", "value"] = np.array(5)
    model = {"parameters": {"fixed.weight": {"requires_grad": False}}, "buffers": ["calls"]}
    save_whole(
        folder,
        f"global_step{STEP}",
        arrays,
        **({"step": STEP, "model": model, "optimizer": optimizer(like)} | document),
    )
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron")
    saved(folder / "run", client_state={"mine": [1, {"two": None}]}, **TIED)
    answer("export", folder / "run", folder / "out", "--format", "megatron", "--optimizer")
    return folder / "out"


def loaded(folder: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process")
        dcp.load(like, checkpoint_id=folder, no_dist=True)
    return like


def test_the_layers_of_a_kind_are_one_tensor(out: Path) -> None:
    """torch reads each from its keys, as Megatron's planner does: a chunk for each layer."""
    stored = ckpt.open_checkpoint(out.parent / "run")
    metadata = dcp.FileSystemReader(out).read_metadata()
    assert metadata.planner_data is None
    weights = {"embed.weight", "norm.weight", "layers.up.weight", "layers.up.bias", "layers.norm"}
    states = ("exp_avg", "exp_avg_sq", "param", "fp32_param")
    keys = weights | {f"optimizer.state.{state}.{name}" for state in states for name in weights}
    assert metadata.state_dict_metadata.keys() == keys | {"fixed.weight", "calls"}
    up = metadata.state_dict_metadata["layers.up.weight"]
    assert (up.size, len(up.chunks)) == ((LAYERS, 6, 4), LAYERS)
    tree = loaded(
        out,
        {
            key: torch.zeros(each.size, dtype=each.properties.dtype)
            for key, each in metadata.state_dict_metadata.items()
        },
    )
    for state, kept in {
        "": "fp32",
        "optimizer.state.exp_avg.": "exp_avg",
        "optimizer.state.param.": "fp32",
    }.items():
        layers = tree[f"{state}layers.up.weight"].numpy()
        for i in range(LAYERS):
            assert layers[i].tobytes() == stored.read(f"layers.{i}.up.weight", kept).tobytes()
        assert tree[f"{state}embed.weight"].numpy().tobytes() == stored.read("embed.weight", kept).tobytes()
    assert tree["calls"] == 5
    files = [path for path in out.iterdir() if path.suffix == ".distcp"]
    assert len(files) == len(stored.arrays), "the masters are the weights' files"
    assert json.loads((out / "metadata.json").read_text())["sharded_backend"] == "torch_dist"


def test_what_is_common(out: Path) -> None:
    common = torch.load(out / "common.pt", weights_only=True)
    assert (common["iteration"], common["mine"]) == (STEP, [1, {"two": None}])
    assert "non_homogeneous_layers" not in common["content_metadata"]
    held = common["optimizer"]
    assert held["param_groups"] == held["optimizer"]["param_groups"]
    usual, spared = held["param_groups"]
    assert (usual["wd_mult"], usual["weight_decay"], spared["wd_mult"], spared["weight_decay"]) == (
        1,
        0.1,
        0,
        0,
    )
    for group in (usual, spared):
        assert (group["lr"], group["betas"], group["eps"], group["step"]) == (0.02, (0.8, 0.95), 1e-6, STEP)
        assert (group["lr_mult"], group["is_expert_parallel"], group["is_decoupled_lr"]) == (1, False, False)
        assert "params" not in group
    assert held["state"]["common_step"] == held["optimizer"]["state"]["common_step"] == torch.tensor(3.0)


def test_it_comes_back_by_the_importer(out: Path, tmp_path: Path) -> None:
    answer("import", out, tmp_path / "back")
    here, there = ckpt.open_checkpoint(out.parent / "run"), ckpt.open_checkpoint(tmp_path / "back")
    assert {*there.arrays} == {*here.arrays}
    assert all(there.read(*key).tobytes() == here.read(*key).tobytes() for key in here.arrays)
    ours, theirs = RunManifest.of(here), RunManifest.of(there)
    assert (theirs.step, theirs.client_state) == (ours.step, ours.client_state)
    assert ours.optimizer
    assert theirs.optimizer
    assert theirs.optimizer.type == ours.optimizer.type
    assert theirs.optimizer.scalars == ours.optimizer.scalars
    assert theirs.model.requires_grad["fixed.weight"] is False
    for group, other in zip(ours.optimizer.groups, theirs.optimizer.groups, strict=True):
        assert {**other, "params": {*other["params"]}} == {**group, "params": {*group["params"]}}


def keys_of(folder: Path) -> set[str]:
    return {*dcp.FileSystemReader(folder).read_metadata().state_dict_metadata}


def test_layers_that_differ_stay_apart(tmp_path: Path) -> None:
    """One of three chains has alike layers; a name map makes the names, and weights can be rounded."""
    like = {"a.layers.0.w": (2, 3), "a.layers.1.w": (3, 3), "b.layers.0.w": (2, 2), "b.layers.1.w": (2, 2)}
    like |= {"c.layers.1.w": (2, 2), "c.layers.2.w": (2, 2)}
    saved(tmp_path / "run", like)
    names = tmp_path / "names.json"
    names.write_text(json.dumps({r"b\.layers\.(.*)": r"decoder.layers.\1", "fixed.*": None, "calls": None}))
    done = run(
        "export",
        tmp_path / "run",
        tmp_path / "out",
        "--format",
        "megatron",
        "--dtype",
        "bf16",
        "--name-map",
        names,
    )
    assert done.stdout.splitlines()[1:] == ["left out by the name map: calls, fixed.weight"]
    found = dcp.FileSystemReader(tmp_path / "out").read_metadata().state_dict_metadata
    apart = {name for name in like if not name.startswith("b.")}
    assert found.keys() == apart | {"decoder.layers.w"}
    tree = loaded(tmp_path / "out", {"decoder.layers.w": torch.zeros(2, 2, 2, dtype=torch.bfloat16)})
    stored = ckpt.open_checkpoint(tmp_path / "run")
    for i, layer in enumerate(tree["decoder.layers.w"]):
        expected = torch.from_numpy(stored.read(f"b.layers.{i}.w", "fp32").copy())
        assert torch.equal(layer, expected.to(torch.bfloat16))
    common = torch.load(tmp_path / "out" / "common.pt", weights_only=True)
    assert common["content_metadata"]["non_homogeneous_layers"] is True
    assert "optimizer" not in common


def test_a_layer_that_is_frozen_differs(tmp_path: Path) -> None:
    record = optimizer({"layers.0.w": (2, 2)})
    arrays = {(f"layers.{i}.w", "fp32"): np.ones((2, 2), np.float32) for i in range(2)}
    arrays |= {("layers.0.w", state): np.ones((2, 2), np.float32) for state in ("exp_avg", "exp_avg_sq")}
    save_whole(tmp_path / "run", "t1", arrays, step=1, optimizer=record)
    answer("export", tmp_path / "run", tmp_path / "with", "--format", "megatron", "--optimizer")
    answer("export", tmp_path / "run", tmp_path / "without", "--format", "megatron")
    assert {"layers.0.w", "layers.1.w", "optimizer.state.exp_avg.layers.0.w"} < keys_of(tmp_path / "with")
    assert keys_of(tmp_path / "without") == {"layers.w"}


GROUPS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "one group with decay": ({"weight_decay": 0.1}, [1.0]),
    "the usual ones": ({}, [1.0, 0.0]),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_that_megatron_has(tmp_path: Path, name: str) -> None:
    changes, factors = GROUPS[name]
    like = {"w": (2, 2), "b": (2,)}
    saved(tmp_path / "run", like, optimizer=optimizer(like, **changes))
    answer("export", tmp_path / "run", tmp_path / "out", "--format", "megatron", "--optimizer")
    groups = torch.load(tmp_path / "out" / "common.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["wd_mult"] for group in groups] == factors


LIKE = {"w": (2, 2), "b": (2,)}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another rate": (
        {"optimizer": optimizer(LIKE, lr=0.5)},
        "w and b differ in lr (0.02 and 0.5), weight_decay",
    ),
    "another decay": (
        {"optimizer": optimizer(LIKE, weight_decay=0.2)},
        "differ in weight_decay (0.1 and 0.2)",
    ),
    "another kind": (
        {"optimizer": optimizer(LIKE) | {"type": "NAdam"}},
        "states of Adam and AdamW, not of NAdam",
    ),
    "no optimizer": ({"optimizer": None}, "has no optimizer"),
    "steps": (
        {"optimizer": optimizer(LIKE) | {"scalars": {"w": {"step": 1.0}, "b": {"step": 2.0}}}},
        "w has taken 1 and b has taken 2 steps; --format megatron has one count",
    ),
    "its keys": ({"client_state": {"args": 1}}, "the client state has args, which Megatron has for itself"),
    "extra states": (
        {"model": {"extra_state": {"w._extra_state": {"value": 1, "tensors": {}}}}},
        "extra states of modules (w._extra_state)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_megatron_cannot_hold(tmp_path: Path, name: str) -> None:
    document, message = REFUSED[name]
    saved(tmp_path / "run", LIKE, **document)
    error = refused("export", tmp_path / "run", tmp_path / "out", "--format", "megatron", "--optimizer")
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_names_that_meet(tmp_path: Path) -> None:
    saved(tmp_path / "run", {"layers.0.w": (2, 2), "layers.w": (2, 2)})
    error = refused("export", tmp_path / "run", tmp_path / "out", "--format", "megatron")
    assert "would be exported as layers.w, as another tensor is; change the name map" in error
    (tmp_path / "names.json").write_text('{".*": null}')
    told = refused(
        "export",
        tmp_path / "run",
        tmp_path / "out",
        "--format",
        "megatron",
        "--name-map",
        tmp_path / "names.json",
    )
    assert "leaves out every tensor" in told

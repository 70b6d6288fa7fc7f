"""Imports of Megatron-core's `torch_dist`, from folders in its layout."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import FIXTURES, RUNS, Runs, assert_bits, expected, source_of, values
from megatron_folders import (
    DECAYED,
    LAYERS,
    SPARED,
    WIDTH,
    Chunks,
    Run,
    common,
    cut,
    numbers,
    stack,
    write_dist,
)
from torch import Tensor

from ckpt import CheckpointError


@pytest.mark.parametrize("by_number", [False, True], ids=["stacked", "by number"])
def test_every_array_is_the_live_runs(tmp_path: Path, by_number: bool) -> None:
    run = Run()
    extra = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_3"
    source = source_of(write_dist(tmp_path / "it", run.tensors(by_number=by_number), common(), extra))
    assert source.kind == "megatron"
    assert_bits(values(source), run.held())
    assert (source.step, source.samples, source.batch) == (3, 48, 16)
    assert source.writer == {"tensor_model_parallel_size": 2}
    assert "_extra_state: 1 objects of Megatron that aren't tensors" in source.left_out


@pytest.mark.parametrize("name", sorted(folder.name for folder in FIXTURES.glob("megatron_*")))
def test_what_megatron_wrote(name: str) -> None:
    arrays, facts = expected(name)
    tied = facts["aliases"]  # which the last pipeline stage holds, but which isn't saved twice
    arrays = {in_checkpoint(k): a for k, a in arrays.items() if k.partition("/")[2] not in tied}
    folder = FIXTURES / name / "checkpoint" / f"iter_{facts['step']:07d}"
    source = source_of(folder)
    assert_bits(values(source), arrays)
    assert source.optimizer.type == "AdamW"
    assert {numbers["step"] for numbers in source.optimizer.scalars.values()} == set(
        facts["parameter_steps"].values()
    )
    for group, fact in zip(source.optimizer.groups, facts["groups"], strict=True):
        assert {*group["params"]} == {*map(in_checkpoint, fact["names"])}
        for key in ("lr", "betas", "eps", "weight_decay"):
            assert group[key] == fact[key]
    assert source.step == facts["step"]


def in_checkpoint(key: str) -> str:
    """Return Megatron's name of a layer norm: part of the linear layer after it."""
    for norm, linear in (("input", "self_attention.linear_qkv"), ("pre_mlp", "mlp.linear_fc1")):
        key = key.replace(f"{norm}_layernorm.", f"{linear}.layer_norm_")
    return key


def test_a_layer_is_read_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from uni3d.importers.dcp.layout import Layout

    source = source_of(write_dist(tmp_path / "it", Run().tensors(), common()))
    opened = []
    original = Layout._open
    monkeypatch.setattr(Layout, "_open", lambda *args, **kw: opened.append(args[1]) or original(*args, **kw))
    next(a for a in source.arrays if a.name == "decoder.layers.1.mlp.linear_fc1.weight").read()
    assert len(opened) == 2, "one for each tensor-parallel rank"


def test_groups_are_megatrons_default_ones(tmp_path: Path) -> None:
    source = source_of(write_dist(tmp_path / "it", Run().tensors(), common()))
    assert source.optimizer.type == "AdamW"
    decayed, spared = source.optimizer.groups
    assert decayed == {
        "params": decayed["params"],
        "lr": 1e-3,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.1,
    }
    assert spared["weight_decay"] == 0
    assert {name.rpartition(".")[2] for name in decayed["params"]} == {"weight"}
    assert sorted(spared["params"]) == [
        "decoder.final_layernorm.weight",
        *(f"decoder.layers.{i}.mlp.linear_fc1.bias" for i in range(LAYERS)),
    ]
    names = {*decayed["params"], *spared["params"]}
    assert source.optimizer.scalars == {name: {"step": 3.0} for name in names}
    assert any("their parameters aren't stored" in line for line in source.left_out)


def test_one_group_has_all_and_a_step_of_its_own(tmp_path: Path) -> None:
    content = common(optimizer={"param_groups": [{**DECAYED, "step": 3}]})
    source = source_of(write_dist(tmp_path / "it", Run().tensors(), content))
    (group,) = source.optimizer.groups
    assert set(group["params"]) == {array.name for array in source.arrays}
    assert not any("isn't stored" in line for line in source.left_out)


def test_the_order_of_the_groups_is_that_of_the_file(tmp_path: Path) -> None:
    content = common(optimizer={"param_groups": [{**SPARED, "step": 3}, {**DECAYED, "step": 3}]})
    source = source_of(write_dist(tmp_path / "it", Run().tensors(), content))
    assert "decoder.final_layernorm.weight" in source.optimizer.groups[0]["params"]


def test_halves_of_a_gated_layer_are_put_together(tmp_path: Path) -> None:
    gate, value = torch.randn(6, WIDTH), torch.randn(6, WIDTH)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    tensors = {f"{name}_w": cut(gate, 0, 2), f"{name}_v": cut(value, 0, 2)}
    source = source_of(write_dist(tmp_path / "it", tensors, {}))
    assert_bits(values(source), {f"fp32/{name}": torch.cat([gate, value]).numpy()})
    with pytest.raises(CheckpointError, match="no matching other half"):
        source_of(write_dist(tmp_path / "half", {f"{name}_w": cut(gate, 0, 2)}, {}))


def test_moments_that_are_flat_in_each_part(tmp_path: Path) -> None:
    """Return chunks as in `fully_sharded_model_space` before Megatron 0.14: flat, per data-parallel rank."""
    weights, moments = numbers(4, 6, n=2), numbers(4, 6, n=2)
    chunks: Chunks = []
    for row, moment in enumerate(moments):
        for i, part in enumerate(moment.chunk(2, 1)):  # two tensor-parallel ranks by columns
            flat = part.flatten()
            chunks += [
                ((row, 0, i, 0), flat[:5].view(1, 1, 1, 5)),
                ((row, 0, i, 5), flat[5:].view(1, 1, 1, 7)),
            ]
    name = "decoder.layers.mlp.linear_fc2.weight"
    tensors = {name: stack(weights, 1, 2), f"optimizer.state.exp_avg.{name}": chunks}
    source = source_of(
        write_dist(tmp_path / "it", tensors, common(optimizer={"param_groups": [{"step": 1}]}))
    )
    held = {f"fp32/decoder.layers.{i}.mlp.linear_fc2.weight": w.numpy() for i, w in enumerate(weights)}
    held |= {f"exp_avg/decoder.layers.{i}.mlp.linear_fc2.weight": m.numpy() for i, m in enumerate(moments)}
    assert_bits(values(source), held)


def test_the_loss_scale(tmp_path: Path) -> None:
    scaler = {"scale": torch.tensor([1024.0]), "growth_tracker": 7, "hysteresis_tracker": 0}
    optimizer = {**common()["optimizer"], "grad_scaler": scaler}
    source = source_of(write_dist(tmp_path / "it", Run().tensors(), common(optimizer=optimizer)))
    assert source.loss_scale == {"scale": 1024.0, "terms": None, "hysteresis": 1, "good_steps": 7}


def bucketed(
    folder: Path, weights: dict[str, Tensor], masters: list[Tensor], moments: tuple[int, ...] = (10,)
) -> Path:
    """Write weights, and the masters and moments of parameters in a bucket, each from a multiple of 64 on.

    For each number in `moments`, there is a rank with such a bucket.
    """
    tensors: dict[str, Any] = {name: [((0,) * w.ndim, w)] for name, w in weights.items()}
    begins = [0]
    for master in masters:
        begins.append(-(-(begins[-1] + master.numel()) // 64) * 64)
    for rank, state, more in (
        (rank, state, more * n)
        for rank, more in enumerate(moments)
        for n, state in enumerate(("param", "exp_avg", "exp_avg_sq"))
    ):
        bucket = f"optimizer.distributed.dp_group_idx_{rank}.gbuf_idx_0.dtype_x.bucket_idx_0"
        flat = torch.full((begins[-2] + masters[-1].numel(),), torch.nan)
        for begin, master in zip(begins, masters, strict=False):
            flat[begin : begin + master.numel()] = master.flatten() + more
        middle = min(40, len(flat) // 2)  # between data-parallel ranks
        tensors[f"{bucket}.{state}"] = [((0,), flat[:middle].clone()), ((middle,), flat[middle:].clone())]
    optimizer = {**common()["optimizer"], "param_state_sharding_type": "dp_reshardable"}
    return write_dist(folder, tensors, common(optimizer=optimizer))


def test_a_bucket_s_parameters_are_known_by_their_values(tmp_path: Path) -> None:
    masters = {"a.weight": torch.randn(6, 8), "b.weight": torch.randn(8), "a.bias": torch.randn(8)}
    weights = {name: master.bfloat16() for name, master in masters.items()}
    source = source_of(bucketed(tmp_path / "it", weights, [*masters.values()][::-1]))
    found = values(source)
    for name, master in masters.items():
        for n, state in enumerate(("fp32", "exp_avg", "exp_avg_sq")):
            assert torch.equal(torch.from_numpy(found[f"{state}/{name}"]), master + 10 * n), (state, name)
    assert [group["params"] for group in source.optimizer.groups] == [["a.weight"], ["a.bias", "b.weight"]]


def test_the_buckets_of_two_ranks_agree(tmp_path: Path) -> None:
    """Tensor-parallel ranks have a copy each of what isn't split."""
    master = torch.randn(8)
    weights = {"a.weight": master.bfloat16()}
    found = values(source_of(bucketed(tmp_path / "it", weights, [master], moments=(10, 10))))
    assert torch.equal(torch.from_numpy(found["exp_avg/a.weight"]), master + 10)
    arrays = source_of(bucketed(tmp_path / "other", weights, [master], moments=(10, 11))).arrays
    with pytest.raises(CheckpointError, match=r"exp_avg in .* differs from its copy on another rank"):
        next(array for array in arrays if array.state == "exp_avg").read()


def test_a_short_parameter_may_begin_as_a_longer_one(tmp_path: Path) -> None:
    """Biases that haven't moved, one behind the other, could be one that is as long as both."""
    masters = {"a.bias": torch.zeros(64), "b.bias": torch.zeros(128), "c.weight": torch.randn(4, 4)}
    weights = {name: master.bfloat16() for name, master in masters.items()}
    with pytest.raises(CheckpointError, match=r"at 0 of .* are those of b\.bias and a\.bias"):
        source_of(bucketed(tmp_path / "it", weights, [*masters.values()]))


def test_a_bucket_that_is_not_clear_is_refused(tmp_path: Path) -> None:
    masters = {"a.weight": torch.randn(6, 8), "b.weight": torch.ones(8), "c.weight": torch.ones(8)}
    weights = {name: master.bfloat16() for name, master in masters.items()}
    masters["b.weight"] = masters["b.weight"] + 1e-5  # which bfloat16 doesn't tell from the other
    folder = bucketed(tmp_path / "alike", weights, [*masters.values()])
    with pytest.raises(
        CheckpointError, match=r"at 64 of .* are those of b\.weight and c\.weight; save it with"
    ):
        source_of(folder)
    source = source_of(folder, weights_only=True)
    assert {array.state for array in source.arrays} == {"fp32"}
    assert any("b.weight and c.weight" in line for line in source.left_out)
    del masters["b.weight"], weights["b.weight"]
    folder = bucketed(tmp_path / "other", weights, [masters["a.weight"], masters["c.weight"] + 1])
    with pytest.raises(CheckpointError, match=r"at 64 of .* are those of no weight"):
        source_of(folder)
    weights |= {"d.weight": torch.randn(70).bfloat16()}
    other = weights["d.weight"].float()
    other[69] += 1
    folder = bucketed(tmp_path / "late", weights, [masters["c.weight"], masters["a.weight"], other])
    late = next(a for a in source_of(folder).arrays if a.name == "d.weight")
    with pytest.raises(CheckpointError, match="doesn't round to the weight; the files are of two saves"):
        late.read()


def test_buckets_are_refused_by_name_and_the_weights_can_be_had(tmp_path: Path) -> None:
    run = Run()
    tensors = {name: chunks for name, chunks in run.tensors().items() if not name.startswith("optimizer.")}
    bucket = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_x.bucket_idx_0.exp_avg"
    tensors[bucket] = [((0,), torch.randn(11))]
    content = common(optimizer={"param_state_sharding_type": "dp_reshardable"})
    folder = write_dist(tmp_path / "it", tensors, content)
    with pytest.raises(CheckpointError, match=r"format dp_reshardable: flat buckets.*--weights-only"):
        source_of(folder)
    source = source_of(folder, weights_only=True)
    assert any("dp_reshardable" in line for line in source.left_out)
    assert source.optimizer is None
    held = {name: a for name, a in run.held().items() if name.startswith("fp32/")}
    rounded = {n: torch.from_numpy(a).bfloat16().float().numpy() for n, a in held.items()}
    assert_bits(values(source), rounded)


def test_weights_alone_are_the_fp32_ones_where_they_can_be_read(tmp_path: Path) -> None:
    run = Run()
    source = source_of(write_dist(tmp_path / "it", run.tensors(), common()), weights_only=True)
    assert source.optimizer is None
    assert_bits(values(source), {n: a for n, a in run.held().items() if n.startswith("fp32/")})


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "no parameter groups"),
        ([DECAYED, SPARED, SPARED], "3 parameter groups that aren't Megatron's default ones"),
        ([DECAYED, {**SPARED, "lr_mult": 0.5}], "2 parameter groups that aren't"),
        ([DECAYED, DECAYED], "2 parameter groups that aren't"),
        ([{**DECAYED, "is_expert_parallel": True}], "groups of experts"),
        ([{**DECAYED, "bias_correction": False}], "without bias correction"),
        ([DECAYED], "one number of optimizer steps; found none"),
        ([{**DECAYED, "step": 3}, {**SPARED, "step": 4}], "found 3.0, 4.0"),
    ],
)
def test_groups_that_are_not_known_are_refused(tmp_path: Path, groups: list[Any], message: str) -> None:
    folder = write_dist(tmp_path / "it", Run().tensors(), common(optimizer={"param_groups": groups}))
    with pytest.raises(CheckpointError, match=message):
        source_of(folder)


def test_several_optimizers_are_refused(tmp_path: Path) -> None:
    chain = {0: common()["optimizer"], 1: common()["optimizer"]}
    with pytest.raises(CheckpointError, match="chained optimizers"):
        source_of(write_dist(tmp_path / "it", Run().tensors(), common(optimizer=chain)))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"decoder.layers.mlp.experts.linear_fc1.weight": [((0, 0), torch.ones(1, 2))]},
            "mixture of experts",
        ),
        ({"decoder.layers.mlp.weight": [((0, 0), torch.ones(2, 2))]}, "should hold one layer each"),
        ({"optimizer.state.exp_avg.w": [((0,), torch.ones(2))]}, "no weight w"),
        (
            {"w": [((0,), torch.ones(3))], "optimizer.state.exp_avg.w": [((0,), torch.ones(2))]},
            r"has shape \[2\], which doesn't fit the weight's \[3\]",
        ),
        (
            {"w": [((0,), torch.ones(2))], "optimizer.state.exp_avg.w": [((0,), torch.ones(2).int())]},
            "has type int32",
        ),
    ],
)
def test_tensors_that_are_not_understood_are_refused(tmp_path: Path, tensors: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        source_of(write_dist(tmp_path / "it", tensors, common()))


def test_other_formats_and_missing_files_are_named(tmp_path: Path) -> None:
    folder = write_dist(tmp_path / "it", Run().tensors(), common())
    (folder / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"common.pt is missing"):
        source_of(folder)
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointError, match=r"Megatron's format 'zarr', expected 'torch_dist'"):
        source_of(folder)


def test_a_runs_folder_is_told_from_its_checkpoints(tmp_path: Path) -> None:
    write_dist(tmp_path / "iter_0000003", Run().tensors(), common())
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(CheckpointError, match=r"the folder of a Megatron run; give .*/iter_0000003"):
        source_of(tmp_path)


# --- nothing runs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", RUNS)
def test_nothing_runs_that_common_names(tmp_path: Path, how: str) -> None:
    content = common(note=Runs(how, tmp_path / "ran"))
    folder = write_dist(tmp_path / "it", Run().tensors(), content)
    with pytest.raises(CheckpointError, match=rf"common\.pt pickles {RUNS[how]}, which is refused"):
        source_of(folder)
    assert not (tmp_path / "ran").exists()


def test_classes_of_megatrons_stand_in_and_are_left_out(tmp_path: Path, monkeypatch: Any) -> None:
    module = types.ModuleType("megatron.core.enums")
    backend = type("AttnBackend", (), {"__module__": module.__name__})
    module.AttnBackend = backend
    for name in ("megatron", "megatron.core"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    folder = write_dist(tmp_path / "it", Run().tensors(), common(backend=backend(), tokens=7))
    for name in ("megatron", "megatron.core", module.__name__):
        monkeypatch.delitem(sys.modules, name)
    source = source_of(folder)
    assert source.client_state == {"tokens": 7}
    assert "backend: a <stand-in for megatron.core.enums.AttnBackend>" in source.left_out

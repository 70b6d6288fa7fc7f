"""Folders with more than one set of weights, or with files that an import doesn't read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_files import saved, source_of
from imported import imported, refused, source
from safetensors.torch import save_file
from torch import Tensor

from ckpt import CheckpointError
from uni3d.importers.detect import read
from uni3d.importers.source import Options, Source

ONE, TWO = {"a.weight": torch.ones(2)}, {"b.weight": torch.full((3,), 2.0)}
PARTS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
INDEX = "model.safetensors.index.json"


def index(folder: Path, kind: str = "safetensors", **placed: str) -> None:
    stem = "model" if kind == "safetensors" else "pytorch_model"
    weight_map = {name.replace("_", "."): file for name, file in placed.items()}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def single(folder: Path) -> None:
    save_file(ONE | TWO, folder / "model.safetensors")


def sharded(folder: Path) -> None:
    save_file(ONE, folder / PARTS[0])
    save_file(TWO, folder / PARTS[1])
    index(folder, a_weight=PARTS[0], b_weight=PARTS[1])


def single_bin(folder: Path) -> None:
    torch.save(ONE | TWO, folder / "pytorch_model.bin")


def sharded_bin(folder: Path) -> None:
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    torch.save(ONE, folder / names[0])
    torch.save(TWO, folder / names[1])
    index(folder, "bin", a_weight=names[0], b_weight=names[1])


def distributed(folder: Path) -> None:
    saved(folder, {"model": ONE | TWO})


def held(found: Source) -> dict[str, list[float]]:
    return {array.name: array.read().tolist() for array in found.arrays}


def refusal(path: Path, kind: str = "auto") -> str:
    with pytest.raises(CheckpointError) as caught:
        read(path, kind, Options())
    return str(caught.value)


WHOLE = {"a.weight": [1.0, 1.0], "b.weight": [2.0, 2.0, 2.0]}
SETS: dict[str, tuple[Callable[[Path], None], str]] = {
    "single": (single, "model.safetensors"),
    "sharded": (sharded, INDEX),
    "single bin": (single_bin, "pytorch_model.bin"),
    "sharded bin": (sharded_bin, "pytorch_model.bin.index.json"),
    "distributed": (distributed, ".metadata"),
}


@pytest.mark.parametrize("other", SETS)
@pytest.mark.parametrize("one", SETS)
def test_two_sets_in_one_folder(tmp_path: Path, one: str, other: str) -> None:
    """Check that two sets are refused by name, and that each can be chosen."""
    for name in (one, other):
        SETS[name][0](tmp_path)
    if one == other:
        assert held(source_of(tmp_path)) == WHOLE
        return
    told = refusal(tmp_path)
    assert all(SETS[name][1] in told for name in (one, other))
    assert "Give the one to read as SRC" in told
    assert "delete the others" in told
    for name, others in ((one, other), (other, one)):
        if name == "distributed":
            found = read(tmp_path, "dcp", Options())
        else:
            found = source_of(tmp_path / SETS[name][1])
        assert held(found) == WHOLE
        if name in ("distributed", "sharded", "sharded bin"):  # else only a file was asked for
            assert SETS[others][1] in " ".join(found.left_out)


def test_the_kind_chooses(tmp_path: Path) -> None:
    single(tmp_path)
    single_bin(tmp_path)
    assert "--from (safetensors or torch)" in refusal(tmp_path)
    found = read(tmp_path, "torch", Options())
    assert held(found) == WHOLE
    assert found.left_out == ["model.safetensors: not read (other weights)"]
    sharded(tmp_path)
    assert "model.safetensors and model.safetensors.index.json" in refusal(tmp_path, "safetensors")


TRAINER = {
    "optimizer.pt": "optimizer state",
    "scheduler.pt": "LR schedule",
    "rng_state_0.pth": "random-number",
    "rng_state_1.pth": "random-number",
    "random_states_0.pkl": "random-number",
    "optimizer.bin": "optimizer state",
    "scheduler.bin": "LR schedule",
    "training_args.bin": "not read",
    "trainer_state.json": "not read",
    "consolidated.00.pth": "not read",
    "global_step7": "a folder",
}


@pytest.mark.parametrize("kind", [*SETS, "megatron", "deepspeed"])
def test_a_trainer_s_checkpoint(tmp_path: Path, kind: str) -> None:
    """Check that everything beside the weights is listed, by each reader."""
    folder = tmp_path / "checkpoint-7"
    if kind == "megatron":
        shutil.copytree(source("megatron_fp32") / "iter_0000003", folder)
    elif kind == "deepspeed":
        shutil.copytree(source("deepspeed_zero1_fp32"), folder)
        (folder / "global_step5" / "mine.pt").touch()
        single(folder)
    else:
        folder.mkdir()
        SETS[kind][0](folder)
    for name in TRAINER:
        (folder / name).mkdir() if name == "global_step7" else (folder / name).touch()
    left_out = source_of(folder).left_out
    for name, words in TRAINER.items():
        (line,) = (line for line in left_out if name in line.partition(":")[0].split(", "))
        assert words in line
    told = " ".join(left_out)
    assert ("global_step5/mine.pt" in told) == ("model.safetensors" in told) == (kind == "deepspeed")
    assert not any(word in told for word in ("latest", "distcp", "common.pt", "of-00002"))


def test_the_report_has_what_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    single_bin(tmp_path / "theirs")
    torch.save({"state": {}}, tmp_path / "theirs" / "optimizer.pt")
    line = "optimizer.pt: optimizer state, not read: not the state_dict of an optimizer"
    assert imported(tmp_path / "theirs", "--dry-run")["left_out"] == [line]
    assert imported(tmp_path / "theirs", tmp_path / "run")["left_out"] == [line]
    single(tmp_path / "theirs")
    assert "has several sets of weights" in refused(tmp_path / "theirs", "--dry-run")


def test_the_folder_above(tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-7").mkdir(parents=True)
    single(tmp_path / "out" / "checkpoint-7")
    (tmp_path / "out" / "training_args.bin").touch()
    newest = tmp_path / "out" / "checkpoint-10"
    newest.mkdir()
    assert refusal(tmp_path / "out").endswith(f"(checkpoint-7, checkpoint-10); did you mean {newest}?")


def an_index_of_one(folder: Path) -> None:
    sharded(folder)
    index(folder, a_weight=PARTS[0])


def an_index_without_the_first_file(folder: Path) -> None:
    an_index_of_one(folder)
    (folder / PARTS[1]).unlink()


def a_tensor_in_two_files(folder: Path) -> None:
    sharded(folder)
    save_file(ONE | TWO, folder / PARTS[1])


def a_file_of_another_save(folder: Path) -> None:
    sharded(folder)
    save_file(TWO, folder / "model-00003-of-00003.safetensors")


def nothing_in_it(folder: Path) -> None:
    save_file({}, folder / "model.safetensors")


def an_empty_index(folder: Path) -> None:
    sharded(folder)
    index(folder)


def an_absent_file(folder: Path) -> None:
    sharded(folder)
    (folder / PARTS[1]).unlink()


def a_link_to_nothing(folder: Path) -> None:
    (folder / "model.safetensors").symlink_to("nothing")
    single_bin(folder)


def no_index(folder: Path) -> None:
    sharded(folder)
    (folder / INDEX).unlink()


def no_bytes(folder: Path) -> None:
    (folder / "model.safetensors").touch()
    single_bin(folder)


INCOMPLETE = {
    an_index_of_one: f"{PARTS[1]} and {INDEX}",
    an_index_without_the_first_file: "names 1 files, but by their names there are 2",
    a_tensor_in_two_files: "has a.weight, which the index doesn't list",
    a_file_of_another_save: f"model-00003-of-00003.safetensors and {INDEX}",
    nothing_in_it: "has no tensors",
    an_empty_index: "names no tensors",
    an_absent_file: "is missing",
    a_link_to_nothing: "several sets of weights",
    no_index: "is one of 2 files; give the folder, which must have their index",
    no_bytes: "several sets of weights",
}


@pytest.mark.parametrize("make", INCOMPLETE, ids=lambda make: make.__name__)
def test_what_is_not_whole_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    assert INCOMPLETE[make] in refusal(tmp_path)


def test_an_index_of_one_file_of_two_is_no_way_out(tmp_path: Path) -> None:
    an_index_of_one(tmp_path)
    assert "names 1 files, but by their names there are 2" in refusal(tmp_path / INDEX)


def test_names_in_capitals_and_links(tmp_path: Path) -> None:
    save_file(ONE | TWO, tmp_path / "MODEL.SAFETENSORS")
    assert held(source_of(tmp_path)) == held(source_of(tmp_path / "MODEL.SAFETENSORS")) == WHOLE
    torch.save(ONE | TWO, tmp_path / "MODEL.BIN")
    assert "MODEL.BIN and MODEL.SAFETENSORS" in refusal(tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "model.safetensors").symlink_to(tmp_path / "MODEL.SAFETENSORS")
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    found = source_of(tmp_path / "link")
    assert (held(found), found.left_out) == (WHOLE, [])


RANKS = [
    *("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt", "model_optim_rng.pt"),
    *("layer_00-model_00-model_states.pt", "consolidated.01.pth", "pytorch_model_rank0.bin"),
]


@pytest.mark.parametrize("name", RANKS)
def test_a_file_of_one_rank_is_not_the_model(tmp_path: Path, name: str) -> None:
    torch.save({"model": ONE}, tmp_path / name)
    assert "may lack weights; give the folder of the whole checkpoint" in refusal(tmp_path / name)
    assert held(read(tmp_path / name, "torch", Options())) == {"a.weight": [1.0, 1.0]}


def test_llama_s_only_file(tmp_path: Path) -> None:
    torch.save(ONE, tmp_path / "consolidated.00.pth")
    assert held(source_of(tmp_path / "consolidated.00.pth")) == {"a.weight": [1.0, 1.0]}
    torch.save(TWO, tmp_path / "consolidated.01.pth")
    assert "may lack weights" in refusal(tmp_path / "consolidated.00.pth")


# --- one file ------------------------------------------------------------------------------------------

BESIDE = {
    "a counter": ({"model": ONE, "step": torch.tensor(7)}, ["step"]),
    "a number": ({"state_dict": ONE, "ema_decay": torch.tensor(0.99), "epoch": 3}, ["ema_decay", "epoch"]),
    "many": ({"module": ONE, "ema": torch.ones(2), "optimizer": TWO}, ["ema", "optimizer"]),
    "a config": (ONE | {"model": {"layers": 2}}, ["model"]),
    "an optimizer": (ONE | {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, ["optimizer"]),
}


@pytest.mark.parametrize("case", BESIDE)
def test_tensors_beside_a_state_dict(tmp_path: Path, case: str) -> None:
    content, names = BESIDE[case]
    torch.save(content, tmp_path / "x.pt")
    found = source_of(tmp_path / "x.pt")
    assert held(found) == {"a.weight": [1.0, 1.0]}
    assert [line.partition(":")[0] for line in found.left_out] == names
    for name in names:
        line = next(line for line in found.left_out if line.startswith(f"{name}: "))
        assert ("a tensor of shape" in line) == isinstance(content[name], Tensor)


UNCLEAR: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": ({"net": ONE, "step": torch.tensor(7)}, "tensors like step and further dicts of tens"),
    "two known keys": ({"model": ONE, "state_dict": TWO}, "under model and state_dict"),
    "two levels": ({"model": {**ONE, "head": TWO}}, "(model.head)"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_is_the_state_dict_is_never_guessed(tmp_path: Path, case: str) -> None:
    content, words = UNCLEAR[case]
    torch.save(content, tmp_path / "x.pt")
    assert words in refusal(tmp_path / "x.pt")


# --- adapters ------------------------------------------------------------------------------------------

LORA = {f"base_model.model.q.lora_{each}.weight": torch.ones(2, 2) for each in "AB"}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_adapter_says_that_it_is_one(tmp_path: Path, kind: str) -> None:
    def save(tensors: dict[str, Tensor], name: str) -> None:
        path = tmp_path / f"{name}.{kind}"
        save_file(tensors, path) if kind == "safetensors" else torch.save(tensors, path)

    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    (tmp_path / "training_args.bin").touch()
    save({"base_model.model.q.ia3_l": torch.ones(2)}, "adapter_model")
    for path in (tmp_path, tmp_path / f"adapter_model.{kind}"):
        told = refusal(path)
        assert "is an adapter" in told
        assert "Merge it into its base model first, with peft's merge_and_unload()" in told
    save(LORA, "lora")
    assert "is an adapter" in refusal(tmp_path / f"lora.{kind}")
    (tmp_path / f"lora.{kind}").unlink()
    save(ONE, "model")
    assert f"adapter_model.{kind} and model.{kind}" in refusal(tmp_path)
    assert held(source_of(tmp_path / f"model.{kind}")) == {"a.weight": [1.0, 1.0]}


def test_an_adapter_in_another_format_is_listed(tmp_path: Path) -> None:
    saved(tmp_path, {"model": LORA})
    assert any("the weights of an adapter (LoRA) alone" in line for line in source_of(tmp_path).left_out)


# --- DeepSpeed -----------------------------------------------------------------------------------------


def copied(name: str, to: Path) -> Path:
    """Copy a fixture, and return the folder of its tag."""
    shutil.copytree(source(name), to)
    return next(each for each in to.iterdir() if each.is_dir())


TWICE = {
    "zero_pp_rank_0_mp_rank_00_model_states.pt": "mp_rank_00_model_states.pt",
    "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": "zero_pp_rank_0_mp_rank_00_optim_states.pt",
}


@pytest.mark.parametrize("name", TWICE)
def test_files_of_two_saves(tmp_path: Path, name: str) -> None:
    """Check that a folder into which two runs saved under one tag isn't read as one of them."""
    tag = copied("deepspeed_zero1_fp32", tmp_path / "theirs")
    shutil.copy(tag / TWICE[name], tag / name)
    told = refusal(tmp_path / "theirs")
    assert name in told
    assert TWICE[name] in told
    assert "two saves" in told


def test_layers_of_another_save(tmp_path: Path) -> None:
    tag = copied("deepspeed_zero1_fp32", tmp_path / "theirs")
    layer = next((source("deepspeed_pipeline") / "global_step4").glob("layer_00-*"))
    shutil.copy(layer, tag / layer.name)
    told = refusal(tmp_path / "theirs")
    assert "two sets of weights" in told
    assert layer.name in told
    assert "mp_rank_00_model_states.pt" in told


def test_weights_in_the_folder_of_the_tag(tmp_path: Path) -> None:
    tag = copied("deepspeed_zero1_fp32", tmp_path / "theirs")
    single(tag)
    assert "*_model_states.pt and model.safetensors" in refusal(tmp_path / "theirs")
    found = read(tmp_path / "theirs", "deepspeed", Options())
    assert found.left_out[-1] == "global_step5/model.safetensors: not read (other weights)"


def test_a_universal_checkpoint_s_other_files(tmp_path: Path) -> None:
    tag = copied("deepspeed_zero2_fp16_universal", tmp_path / "theirs")
    first = next(each for each in sorted((tag / "zero").iterdir()) if (each / "exp_avg.pt").exists())
    shutil.copytree(first, tag / "zero" / "stale.weight")
    assert "zero/stale.weight: the model files don't name it" in source_of(tmp_path / "theirs").left_out
    (first / "exp_avg.pt").unlink()
    assert "has exp_avg; a file is missing" in refusal(tmp_path / "theirs")

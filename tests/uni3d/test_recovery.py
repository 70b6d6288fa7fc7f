"""The weights of a checkpoint by DeepSpeed's functions, and by the script in its folder."""

import json
import subprocess
import sys
from collections import OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import matrix, slow
from model import GPT, GPTConfig
from models import OwnLoss, global_batches, make_engine, save_and_wait, seeded, train
from ranks import Ranks
from safetensors.torch import load_file
from tied_gpt import TIED, save_case
from torch import Tensor

import ckpt
import uni3d
from uni3d.zero_to_fp32 import UnreadableError, crc32c_by_numpy, cut, find, size_in_bytes

PLACES = [
    matrix((1, 1, 1, 0)),
    slow((2, 1, 2, 3)),
    (1, 2, 1, 3),
    matrix((2, 1, 1, 1)),
    matrix((1, 1, 2, 2)),
]


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a Hugging Face folder, read with safetensors or torch alone."""
    (index,) = folder.glob("*.index.json")
    content = json.loads(index.read_text())
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(content["weight_map"].values())):
        path = folder / name
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        assert found.keys() == {k for k, v in content["weight_map"].items() if v == name}
        tensors |= found
    assert sorted(p.name for p in folder.iterdir()) == sorted({*content["weight_map"].values(), index.name})
    unique = {t.data_ptr(): t.nbytes for t in tensors.values()}
    assert content["metadata"]["total_size"] == sum(unique.values())
    return tensors


def run_script(*args: str | Path, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The script of the checkpoint that `args` begin with, in a Python that hasn't some packages."""
    (script,) = Path(args[0]).glob("**/zero_to_fp32.py")
    start = "import runpy, sys; sys.argv = sys.argv[1:]; sys.modules.update(dict.fromkeys({!r})); " + (
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-I", "-c", start.format(without), script, *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("place", PLACES, ids=lambda p: f"pp{p[0]}dp{p[1]}tp{p[2]}z{p[3]}")
def test_all_ways_give_the_live_tensors(ranks: Ranks, place: Any, tmp_path: Path) -> None:
    live: dict[str, Tensor] = {}
    for part in ranks.run(place[0] * place[1] * place[2], save_case, place, str(tmp_path / "run")):
        live |= part
    run = tmp_path / "run"
    found = uni3d.get_fp32_state_dict_from_zero_checkpoint(run)
    lazy = uni3d.get_fp32_state_dict_from_zero_checkpoint(run, lazy_mode=True)
    assert found.keys() == lazy.keys() == live.keys()
    for name, tensor in live.items():
        assert torch.equal(found[name], tensor)
        assert (lazy[name].shape, lazy[name].dtype) == (tensor.shape, torch.float32)
        assert torch.equal(lazy[name].contiguous(), tensor)
    assert found["head.weight"] is found["embed.tokens.weight"]
    model = GPT(GPTConfig(**TIED))
    assert uni3d.load_state_dict_from_zero_checkpoint(model, run) is model
    assert all(torch.equal(live[name], tensor) for name, tensor in model.state_dict().items())
    # Files: by the function and by the script, in both formats.
    for safe in (True, False):
        out = tmp_path / f"function{safe}"
        uni3d.convert_zero_checkpoint_to_fp32_state_dict(run, out, "20KB", safe_serialization=safe)
        flags = ["--safe_serialization"] if safe else []
        none = ("uni3d", "ckpt", "crc32c", "google_crc32c", "zarr", *(["torch"] if safe else []))
        made = tmp_path / f"script{safe}"
        result = run_script(run, made, "--max_shard_size", "20KB", *flags, without=none)
        assert result.returncode == 0, result.stderr
        for tensors in (read_folder(out), read_folder(made)):
            assert tensors.keys() == (live.keys() - {"head.weight"} if safe else live.keys())
            assert all(torch.equal(tensor, live[name]) for name, tensor in tensors.items())


def trained(folder: Path) -> uni3d.Engine:
    """A model with frozen parameters, a buffer and a tied weight, saved."""
    engine = make_engine(seeded(OwnLoss))
    train(engine, global_batches(1))
    save_and_wait(engine, folder)
    return engine


def test_frozen_parameters_and_buffers(alone: None, tmp_path: Path) -> None:
    live = trained(tmp_path / "run").module_state_dict()
    found = uni3d.get_fp32_state_dict_from_zero_checkpoint(tmp_path / "run")
    assert found.keys() == live.keys()
    assert found["calls"].dtype == torch.int64
    assert all(torch.equal(found[name], tensor) for name, tensor in live.items())
    without = live.keys() - {"fixed.weight", "fixed.bias"}
    some = uni3d.get_fp32_state_dict_from_zero_checkpoint(tmp_path / "run", exclude_frozen_parameters=True)
    assert some.keys() == without
    uni3d.convert_zero_checkpoint_to_fp32_state_dict(
        tmp_path / "run", tmp_path / "out", exclude_frozen_parameters=True
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pytorch_model.bin"]
    assert torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True).keys() == without
    result = run_script(tmp_path / "run", tmp_path / "made", "--exclude_frozen_parameters", "-d")
    assert result.returncode == 0, result.stderr
    assert "out.weight: [1, 6] float32" in result.stdout
    assert torch.load(tmp_path / "made" / "pytorch_model.bin", weights_only=True).keys() == without


def test_a_model_that_does_not_fit_stays_as_it_was(alone: None, tmp_path: Path) -> None:
    trained(tmp_path)
    model = OwnLoss()
    model.out = torch.nn.Linear(7, 1)
    model.extra = torch.nn.Linear(2, 2)
    del model.fixed
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ckpt.CheckpointError) as error:
        uni3d.load_state_dict_from_zero_checkpoint(model, tmp_path)
    assert str(error.value) == (
        "OwnLoss lacks fixed.bias, fixed.weight; the checkpoint lacks extra.bias, extra.weight; "
        "out.weight has shape [1, 6] in the checkpoint and [1, 7] in OwnLoss"
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.device("meta"), pytest.raises(ckpt.CheckpointError, match=r"call model\.to_empty"):
        uni3d.load_state_dict_from_zero_checkpoint(OwnLoss(), tmp_path)


def test_damage_is_named_and_nothing_is_left(alone: None, tmp_path: Path) -> None:
    trained(tmp_path / "run")
    (chunk,) = (tmp_path / "run").glob("*/atoms/out.weight/fp32/c*")
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)
    lazy = uni3d.get_fp32_state_dict_from_zero_checkpoint(tmp_path / "run", lazy_mode=True)
    assert lazy["out.bias"].contiguous().shape == (1,), "the rest is whole"
    with pytest.raises(ckpt.CheckpointError, match=r"out\.weight/fp32 chunk .* is damaged"):
        lazy["out.weight"].contiguous()
    with pytest.raises(ckpt.PartialLoadError, match="is damaged"):
        uni3d.load_state_dict_from_zero_checkpoint(OwnLoss(), tmp_path / "run")
    for safe in (True, False):
        with pytest.raises(ckpt.CheckpointError, match="is damaged"):
            uni3d.convert_zero_checkpoint_to_fp32_state_dict(
                tmp_path / "run", tmp_path / "out", safe_serialization=safe
            )
    result = run_script(tmp_path / "run", tmp_path / "out", "--safe_serialization")
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {chunk} is damaged")
    assert not list((tmp_path / "out").iterdir())


def test_the_script_is_verified_too(alone: None, tmp_path: Path) -> None:
    trained(tmp_path)
    (script,) = tmp_path.glob("*/zero_to_fp32.py")
    checkpoint = ckpt.open_checkpoint(tmp_path)
    assert ckpt.verify(checkpoint) == []
    script.write_bytes(script.read_bytes() + b"\n")
    (problem,) = ckpt.verify(checkpoint)
    assert problem.path == str(script)
    script.unlink()
    assert len(ckpt.verify(checkpoint)) == 1


def test_mistakes_are_one_line(alone: None, tmp_path: Path) -> None:
    trained(tmp_path / "run")
    out = tmp_path / "out"
    for args, message in (
        ([out, "-t", "t9"], "has no checkpoint 't9'; there are: global_step1"),
        ([out, "--max_shard_size", "5 apples"], "the size '5 apples' isn't a number above 0"),
    ):
        result = run_script(tmp_path / "run", *args)
        assert result.returncode == 1
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
    out.mkdir()
    (out / "model.safetensors").touch()
    assert "exists; delete it" in run_script(tmp_path / "run", out, "--safe_serialization").stderr
    with pytest.raises(FileExistsError, match="exists; delete it"):
        uni3d.convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "run", out, safe_serialization=True)
    with pytest.raises(ckpt.CheckpointError, match="no committed checkpoint 't9'"):
        uni3d.get_fp32_state_dict_from_zero_checkpoint(tmp_path / "run", "t9")


def test_sizes() -> None:
    assert [size_in_bytes(s) for s in ("5GB", "500MiB", "1.5KB", 17)] == [5 * 10**9, 500 << 20, 1500, 17]
    sizes = {"a": 3, "b": 3, "c": 9, "d": 1, "e": 0}
    assert cut(sizes, 6) == [["a", "b"], ["c"], ["d", "e"]]
    assert cut({}, 6) == [[]]


@pytest.mark.parametrize("size", [0, 1, 9, 4095, 4096, 4097, 100_000])
def test_the_checksum_without_packages(size: int) -> None:
    crc32c = pytest.importorskip("crc32c").crc32c
    data = bytes(torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(size)).tolist())
    assert crc32c_by_numpy(data) == crc32c(data)


Pair = namedtuple("Pair", ["left", "right"])


def test_clones_are_as_small_as_their_data(tmp_path: Path) -> None:
    large = torch.arange(100_000.0)
    view, twice = large[10:20], large[:3]
    item = {
        "list": [view, Pair(view, 1), (twice, "text")],
        "nested": OrderedDict(a=defaultdict(list, {"b": twice})),
        "none": None,
    }
    clones = uni3d.clone_tensors_for_torch_save(item)
    assert torch.equal(clones["list"][0], view)
    assert isinstance(clones["list"][1], Pair)
    assert isinstance(clones["nested"], OrderedDict)
    assert clones["nested"]["a"].default_factory is list
    assert clones["list"][2] == (clones["nested"]["a"]["b"], "text"), "one tensor stays one"
    assert clones["none"] is None
    assert item["list"][0] is view, "the original is as it was"
    torch.save(clones, tmp_path / "small.pt")
    torch.save(item, tmp_path / "large.pt")
    assert (tmp_path / "small.pt").stat().st_size < 5_000 < (tmp_path / "large.pt").stat().st_size
    assert uni3d.clone_tensors_for_torch_save(view, device="meta").is_meta


def test_the_script_holds_a_tag_against_its_folder(tmp_path: Path) -> None:
    """Swapped folders aren't taken for each other; a copy is named by its own folder."""
    folder = tmp_path / "best"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"tag": "global_step7"}))
    with pytest.raises(UnreadableError, match="has the tag 'global_step7', not 'best'"):
        find(str(tmp_path), "best")
    assert find(str(folder), None) == folder
    folder.rename(tmp_path / "global_step7")
    assert find(str(tmp_path), "global_step7") == tmp_path / "global_step7"

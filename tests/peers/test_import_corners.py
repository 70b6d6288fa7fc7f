"""Corner cases of `uni3d import`, each of which once gave a wrong result or a traceback."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from foreign_files import rewritten
from imported import atoms, imported, refused, source
from safetensors.torch import save_file

from ckpt import CheckpointError
from uni3d.importers.deepspeed import zero as deepspeed_zero
from uni3d.importers.deepspeed.optimizer_state import scheduler_state
from uni3d.importers.detect import read
from uni3d.importers.pickles import plain, read_pickle
from uni3d.importers.source import Options
from uni3d.importers.torch_files import TorchFile

SPLIT = ["*shift=replicated", "embed.weight=0", "*down=1", "*down_bias=replicated", "*norm.*=replicated"]


@pytest.mark.parametrize("state", [{"strides": (-1,), "shape": (4096,)}, {"offset": -5}, {"storage": 5}])
def test_a_pickle_cannot_change_a_tensor_that_it_made(tmp_path: Path, state: dict[str, Any]) -> None:
    """Check that a pickle can't give a checked tensor another state."""
    torch.save(torch.arange(8.0), tmp_path / "x.pt")
    build = pickle.dumps(state, protocol=2)[2:-1] + b"b."  # without the protocol; BUILD before the end
    rewritten(tmp_path / "x.pt", lambda data: data[:-1] + build)
    with pytest.raises(CheckpointError, match="a tensor is given a state"):
        TorchFile(tmp_path / "x.pt", Options()).load()


def test_a_view_that_negates_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch._neg_view(torch.ones(3))}, tmp_path / "x.pt")
    assert "a negated or conjugated view" in refused(tmp_path / "x.pt", tmp_path / "run")


def test_values_without_end_are_no_json() -> None:
    loop: list[Any] = []
    loop.append(loop)
    for value in (loop, read_pickle(pickle.dumps(loop, protocol=2), "x", trust=True)):
        with pytest.raises(TypeError, match="nested too deeply"):
            plain(value)


def test_a_zip_of_a_later_version(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    data[data.rindex(b"PK\x01\x02") + 6] = 138  # what is needed to read the last entry
    (tmp_path / "x.pt").write_bytes(data)
    assert "damaged" in refused(tmp_path / "x.pt", tmp_path / "run")


def test_splits_must_not_contradict_each_other_nor_be_idle(tmp_path: Path) -> None:
    theirs = source("deepspeed_tp_no_patterns")
    for more, words in (
        (["*gate*=0", "*gate_up=0x2", "*gate_up_bias=0x2"], "has several rules for blocks.0.gate_up"),
        (
            ["*gate_up=0x2", "*gate_up_bias=0x2", "nothing=0"],
            "nothing=0 matches no tensor-parallel parameter",
        ),
    ):
        splits = [f"--split={rule}" for rule in (*more, *SPLIT)]
        assert words in refused(theirs, tmp_path / "run", *splits)
    assert "matches no tensor-parallel parameter" in refused(
        source("deepspeed_zero1_bf16"), tmp_path / "run", "--split=*=0"
    )


OPTIONS = {
    "--split=*=0": "only works with DeepSpeed checkpoints",
    "--in-model-order": "only works with DeepSpeed checkpoints",
    "--optimizer=AdamW": "has no optimizer states",
    "--frozen=*": "needs --in-model-order",
    "--tag=x": "only works with DeepSpeed checkpoints",
}


@pytest.mark.parametrize("name", ["deepspeed_zero1_bf16", "deepspeed_zero2_fp16_universal"])
def test_states_that_have_names_need_no_order(tmp_path: Path, name: str) -> None:
    assert "leave --in-model-order out" in refused(source(name), tmp_path / "run", "--in-model-order")


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_decide_nothing_are_refused(tmp_path: Path, option: str) -> None:
    assert OPTIONS[option] in refused(source("weights_bin"), tmp_path / "run", option)


@pytest.mark.parametrize(
    ("name", "words"), [("SGD", "has states of AdamW"), ("Adams", "has states of AdamW")]
)
def test_the_optimizer_is_what_the_source_says(tmp_path: Path, name: str, words: str) -> None:
    assert words in refused(source("deepspeed_zero1_bf16"), tmp_path / "run", "--optimizer", name)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"p": "b"}, "renames both p and b to b"),
        ({"h": "other"}, "renames both other and h to other"),
        ({"h|i": "same"}, "renames both h and i to same"),
    ],
)
def test_names_must_stay_apart(tmp_path: Path, names: dict[str, str], words: str) -> None:
    """Check clashes of parameter and buffer, alias and parameter, and two aliases."""
    e = torch.randn(3)
    save = {"p": torch.ones(2), "b": torch.arange(3), "e": e, "h": e, "i": e, "other": torch.ones(4)}
    torch.save(save, tmp_path / "x.pt")
    (tmp_path / "map.json").write_text(json.dumps(names))
    assert words in refused(tmp_path / "x.pt", tmp_path / "run", "--name-map", tmp_path / "map.json")


def test_another_name_takes_the_place_of_one_that_is_dropped(tmp_path: Path) -> None:
    e = torch.randn(3)
    torch.save({"e": e, "h": e, "i": e}, tmp_path / "x.pt")
    (tmp_path / "map.json").write_text('{"e": null, "h": "head"}')
    said = imported(tmp_path / "x.pt", tmp_path / "run", "--name-map", tmp_path / "map.json")
    assert list(atoms(said["url"])) == ["fp32/head"]
    assert said["aliases"] == {"i": "head"}
    assert said["left_out"] == ["e: left out by the name map"]


def test_tied_or_not(tmp_path: Path) -> None:
    e = torch.randn(3)
    torch.save({"e": e, "h": e, "count": torch.arange(2), "same": torch.arange(2)}, tmp_path / "x.pt")
    assert imported(tmp_path / "x.pt", tmp_path / "a")["aliases"] == {"h": "e"}
    said = imported(tmp_path / "x.pt", tmp_path / "b", "--untie")
    assert said["aliases"] == {}
    assert {"fp32/e", "fp32/h"} <= atoms(said["url"]).keys()
    shared = torch.arange(2)
    torch.save({"one": shared, "two": shared}, tmp_path / "y.pt")
    assert atoms(imported(tmp_path / "y.pt", tmp_path / "c")["url"]).keys() == {"value/one", "value/two"}


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.complex64])
def test_types_that_cannot_be_stored(tmp_path: Path, kind: torch.dtype) -> None:
    torch.save({"w": torch.ones(2).to(kind)}, tmp_path / "x.pt")
    told = refused(tmp_path / "x.pt", tmp_path / "run")
    assert "--stand-in" not in told


def test_places_that_are_no_place(tmp_path: Path) -> None:
    theirs = Path(shutil.copytree(source("deepspeed_zero1_bf16"), tmp_path / "theirs"))
    assert "lies inside SRC" in refused(theirs, theirs / "global_step5" / "out")
    assert "would be lost when this process ends" in refused(theirs, "memory://run")
    (tmp_path / "run" / ".saving.global_step5").mkdir(parents=True)  # an import that was interrupted
    imported(theirs, tmp_path / "run")
    done = run("import", theirs, tmp_path / "run", "--as", "older")
    assert f"{tmp_path / 'run'} already had global_step5; its latest is now older" in done.stdout.splitlines()
    assert "tag" in refused(theirs, tmp_path / "run", "--as", "")


CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], int]] = {
    "a cosine before its first rise": (
        {"type": "WarmupCosineLR", "params": {"total_num_steps": 9}},
        [0.0],
        0,
    ),
    "a warmup to the groups' own rates": ({"type": "WarmupLR", "params": {}}, [0.0], 0),
    "the end of a cosine": (
        {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": 4, "warmup_num_steps": 2, "cos_min_ratio": 0},
        },
        [0.0],
        9,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_schedules_whose_rate_is_nothing(case: str) -> None:
    section, rates, iteration = CASES[case]
    left_out: list[str] = []
    config = {"scheduler": section, "optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}
    groups = [{"params": [], "lr": lr, "betas": [0.9, 0.99]} for lr in rates]
    state = scheduler_state(config, {"last_batch_iteration": iteration}, groups, left_out)
    assert state is not None, left_out
    assert state["last_epoch"] == iteration + 1
    assert state["base_lrs"] == [0.5]


def test_what_a_terminal_cannot_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    save_file({"größe": torch.ones(2)}, tmp_path / "x.safetensors")
    command = [
        str(Path(sys.executable).with_name("uni3d")),
        "import",
        str(tmp_path / "x.safetensors"),
        "--dry-run",
    ]
    env = {"PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert b"gr\\xf6\\xdfe" in done.stdout


def test_a_run_before_its_first_step_has_no_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_zero, "_state", lambda optimizer, index: {})
    found = read(source("deepspeed_zero1_fp32"), "auto", Options())
    assert found.optimizer.scalars == {}, "or a load looks for their states"
    assert {array.state for array in found.arrays} == {"fp32", "value"}

"""Imports of DeepSpeed's checkpoints equal the live run, and a run resumes from them."""

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import continues_model
import numpy as np
import pytest
from commands import run
from foreign_files import expected
from imported import atoms, differing, imported, manifest, names, refused, source
from marks import slow
from ranks import Ranks

import uni3d as package
from uni3d.importers.detect import kind_of

NUMBERED = ["deepspeed_zero0_fp32", "deepspeed_zero0_fp16"]
"""Fixtures whose optimizer states have no names."""
FLAT = "deepspeed_zero0_fp16_fused_adam"
ZERO = [name for name in names("deepspeed_zero") if name not in (*NUMBERED, FLAT) and "universal" not in name]
UNIVERSAL = [name for name in names("deepspeed") if name.endswith("_universal")]
FROZEN = ["--split", "*shift=replicated"]
"""Rules for frozen parameters: no checkpoint records how to merge their tensor-parallel shards."""
UNPATTERNED = {"deepspeed_tp_no_patterns", "deepspeed_pipeline"}
"""Fixtures that don't record the padding of the vocabulary."""
PARALLEL = {
    "deepspeed_pipeline": [],
    "deepspeed_autotp": [],
    "deepspeed_tp": FROZEN,
    "deepspeed_3d": FROZEN,
    "deepspeed_tp_no_patterns": [
        *FROZEN,
        *(f"--split={x}" for x in ("embed.weight=0", "*gate_up=0x2", "*gate_up_bias=0x2", "*down=1")),
        *(f"--split={x}=replicated" for x in ("*down_bias", "*norm.weight", "*norm.bias")),
    ],
}
HOW = {"foreach", "capturable", "differentiable", "fused", "bias_correction"}


def check(name: str, checkpoint: str, fixtures: Path, lost: tuple[str, ...] = ()) -> None:
    """Check that the import equals the live run, except the tensors that DeepSpeed `lost`."""
    arrays, facts = expected(name, fixtures)
    rows = facts.get("vocabulary", {}).get("size")
    for key in facts.get("vocabulary", {}).get("padded", {}):
        if name not in UNPATTERNED:
            arrays |= {full: x[:rows] for full, x in arrays.items() if full.partition("/")[2] == key}
    arrays = {full: x for full, x in arrays.items() if full.partition("/")[2] not in lost}
    assert not differing(atoms(checkpoint), arrays)
    said = manifest(checkpoint)
    wanted = [{k: v for k, v in group.items() if k not in HOW} for group in facts["groups"]]
    for group in wanted:
        group["params"] = sorted(group.pop("names"))
    assert [{**g, "params": sorted(g["params"])} for g in said["optimizer"]["groups"]] == wanted
    assert said["optimizer"]["type"] == "AdamW"
    assert {n: s["step"] for n, s in said["optimizer"]["scalars"].items()} == facts["parameter_steps"]
    frozen = [n for n, p in said["model"]["parameters"].items() if not p["requires_grad"]]
    assert sorted(frozen) == sorted(set(facts["frozen"]) - set(lost))
    assert said["aliases"] == facts["aliases"]
    assert said["client_state"] == facts["client_state"]
    engine = said["engine"]
    keys = ("global_steps", "global_samples", "skipped_steps")
    assert [engine[key] for key in keys] == [facts["step"], facts["samples"], facts["skipped_steps"]]
    if "fp16" in name:
        assert engine["loss_scale"]["scale"] == facts["loss_scale"]
    else:
        assert engine["loss_scale"] is None


@pytest.mark.parametrize("name", ZERO)
def test_it_is_what_the_live_run_held(tmp_path: Path, name: str) -> None:
    said = imported(source(name), tmp_path)
    check(name, said["url"], source(name).parents[1])
    assert said["from"] == "deepspeed"
    assert said["scheduler"]
    assert run("verify", tmp_path).returncode == 0


@pytest.mark.parametrize("name", PARALLEL)
def test_stages_and_tensor_parallel_ranks_are_joined(tmp_path: Path, name: str) -> None:
    check(name, imported(source(name), tmp_path, *PARALLEL[name])["url"], source(name).parents[1])


@pytest.mark.parametrize("name", UNIVERSAL)
def test_universal_checkpoints(tmp_path: Path, name: str) -> None:
    said = imported(source(name), tmp_path)
    assert said["from"] == "deepspeed-universal"
    lost = ("1.shift", "2.shift", "1.scale", "2.scale") if name == "deepspeed_3d_universal" else ()
    check(name, said["url"], source(name).parents[1], lost)
    assert bool(lost) == any("buffers 1.scale, 2.scale" in line for line in said["left_out"])


def test_how_parts_are_joined_is_never_guessed(tmp_path: Path) -> None:
    told = refused(source("deepspeed_tp_no_patterns"), tmp_path / "run")
    assert "doesn't record how to merge the 2 tensor-parallel shards of embed.weight" in told
    assert "blocks.0.shift" in refused(source("deepspeed_tp"), tmp_path / "run")
    wrong = [
        each.replace("*down_bias=rep", "*down_bias=0,rep") for each in PARALLEL["deepspeed_tp_no_patterns"]
    ]
    assert "expected PATTERN=RULE" in refused(source("deepspeed_tp_no_patterns"), tmp_path / "run", *wrong)
    wrong = [
        each.replace("embed.weight=0", "embed.weight=replicated")
        for each in PARALLEL["deepspeed_tp_no_patterns"]
    ]
    told = refused(source("deepspeed_tp_no_patterns"), tmp_path / "run", *wrong)
    # Threads read the weight and its moments, so any of them may be the first.
    assert re.search(r"embed\.weight/\w+ differs between tensor-parallel ranks", told), told
    assert not list((tmp_path / "run").glob("global*"))


@pytest.mark.parametrize("name", NUMBERED)
def test_numbered_states_are_taken_in_order_if_asked(tmp_path: Path, name: str) -> None:
    asked = ["--in-model-order", "--frozen", "frozen.*"]
    check(name, imported(source(name), tmp_path / "asked", *asked)["url"], source(name).parents[1])
    told = refused(source(name), tmp_path / "guessed", "--in-model-order")
    assert "only 2 of 3 parameters of shape [7] have optimizer states" in told
    said = imported(source(name), tmp_path / "not")
    assert not any("exp_avg" in key for key in atoms(said["url"]))
    assert manifest(said["url"])["optimizer"] is None
    assert "--in-model-order" in "".join(said["left_out"])


def test_flat_states_without_zero_are_refused(tmp_path: Path) -> None:
    assert "flat groups" in refused(source(FLAT), tmp_path / "run", "--in-model-order")
    assert imported(source(FLAT), tmp_path / "weights", "--weights-only")["optimizer"] is None


@pytest.mark.peers
@pytest.mark.parametrize("name", ZERO)
def test_what_the_installed_deepspeed_writes(tmp_path: Path, name: str) -> None:
    """Run the same checks on a newly written checkpoint."""
    pytest.importorskip("deepspeed")
    script = Path(__file__).with_name("make_deepspeed.py")
    made = subprocess.run([sys.executable, script, tmp_path, name], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (folder,) = tmp_path.iterdir()
    check(folder.name, imported(folder / "checkpoint", tmp_path / "run")["url"], tmp_path)


# --- a run that goes on ---------------------------------------------------------------------------------


def continue_case(zero: int, run: str) -> list[tuple[float, float, float]]:
    """Return loss, gradient norm and learning rate of each step after the import."""
    settings = continues_model.config() | {
        "zero_optimization": {"stage": zero},
        "parallel": {"device": "cpu"},
    }
    engine = package.initialize(model=continues_model.model(), config=settings)[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*doesn't say in which order its samples came")
        engine.load_checkpoint(run)
    assert engine.global_steps == continues_model.STEPS_BEFORE
    rank, world = engine.model.topology.dp_rank, engine.world_size
    share = continues_model.BATCH // world
    rows = []
    for step in range(
        continues_model.STEPS_BEFORE, continues_model.STEPS_BEFORE + continues_model.STEPS_AFTER
    ):
        rate = engine.get_lr()[0]
        inputs, labels = continues_model.batch(step)
        mine = slice(rank * share, (rank + 1) * share)
        loss = engine.train_batch(iter([(inputs[mine], labels[mine])]))
        rows.append((loss.item(), engine.get_global_grad_norm(), rate))
    return rows


@pytest.mark.parametrize(
    ("world", "zero", "in_place"), [(1, 0, False), slow(2, 1, False), slow(4, 3, False), slow(4, 3, True)]
)
def test_the_run_goes_on_as_deepspeed_s_did(
    ranks: Ranks, tmp_path: Path, world: int, zero: int, in_place: bool
) -> None:
    place = source("deepspeed_continues") if in_place else tmp_path
    if not in_place:
        imported(source("deepspeed_continues"), tmp_path)
    after = expected("deepspeed_continues")[1]["after"]
    wanted = [(row["loss"], row["grad_norm"], row["lr"]) for row in after]
    for rows in ranks.run(world, continue_case, zero, str(place)):
        np.testing.assert_allclose(rows, wanted, rtol=2e-6)


# --- what is wrong is refused ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy to damage."""
    return Path(shutil.copytree(source("deepspeed_zero1_bf16"), tmp_path / "theirs"))


def one(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(f"*/{pattern}")
    return path


MISSING: dict[str, Any] = {
    "*rank_1_*optim_states.pt": "2 data-parallel ranks, but has 1 files",
    "*rank_0_*optim_states.pt": r"those of [0] are missing",
    "mp_rank_00*": "no DeepSpeed checkpoint|isn't a known kind",
}


@pytest.mark.parametrize("pattern", MISSING)
def test_a_missing_file(folder: Path, tmp_path: Path, pattern: str) -> None:
    one(folder, pattern).unlink()
    told = refused(folder, tmp_path / "run")
    assert any(words in told for words in MISSING[pattern].split("|")) or "no checkpoint" in told
    assert not (tmp_path / "run").exists()


def test_damage_is_named(folder: Path, tmp_path: Path) -> None:
    path = one(folder, "*rank_1_*optim_states.pt")
    whole = path.read_bytes()
    values = expected("deepspeed_zero1_bf16")[0]["exp_avg/hidden.weight"].tobytes()[-64:]
    at = whole.index(values)
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    told = refused(folder, tmp_path / "run")
    assert path.name in told
    assert "CRC-32" in told
    assert not list((tmp_path / "run").glob("global*"))
    path.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refused(folder, tmp_path / "run")


def test_files_of_two_saves_are_told_apart(folder: Path, tmp_path: Path) -> None:
    other = source("deepspeed_zero1_fp32")  # the same model and shapes, other numbers
    path = one(folder, "*rank_1_*optim_states.pt")
    shutil.copy(next(other.glob("*/*rank_1_*optim_states.pt")), path)
    told = refused(folder, tmp_path / "run")
    assert "the fp32 master differs from the weights in the model file" in told


def test_which_tag(folder: Path, tmp_path: Path) -> None:
    told = refused(folder, tmp_path / "run", "--tag", "global_step7")
    assert "no checkpoint 'global_step7'" in told
    assert "it has global_step5" in told
    (folder / "latest").write_text("global_step6")
    assert "it has global_step5" in refused(folder, tmp_path / "run")
    assert imported(folder, tmp_path / "run", "--tag", "global_step5")["tag"] == "global_step5"
    assert imported(folder / "global_step5", tmp_path / "own", "--as", "first")["tag"] == "first"


def test_where_it_goes(folder: Path, tmp_path: Path) -> None:
    before = sorted(p.name for p in folder.rglob("*"))
    assert "isn't a run, but isn't empty" in refused(folder, folder)
    assert sorted(p.name for p in folder.rglob("*")) == before
    imported(folder, tmp_path / "run")
    assert "exists" in refused(folder, tmp_path / "run")
    imported(folder, tmp_path / "run", "--as", "again")
    assert run("verify", tmp_path / "run", "--all").returncode == 0
    assert run("diff", tmp_path / "run", tmp_path / "run", "--first-tag", "global_step5").returncode == 0


def test_a_dry_run_says_what_becomes_of_what(folder: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.json"
    names.write_text('{"hidden\\\\.(.*)": "mlp.\\\\1", "scale": null, "nothing": "x"}')
    done = run("import", folder, tmp_path / "run", "--name-map", names, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run").exists()
    lines = done.stdout.splitlines()
    assert any("hidden.weight" in line and "mlp.weight" in line and "exp_avg_sq" in line for line in lines)
    assert "left out: scale: left out by the name map" in lines
    assert "left out: pattern 'nothing' of the name map: it matches no tensor" in lines
    said = imported(folder, tmp_path / "run", "--name-map", names)
    groups = manifest(said["url"])["optimizer"]["groups"]
    assert "mlp.weight" in groups[0]["params"]
    assert not any("hidden" in key or "scale" in key for key in atoms(said["url"]))


def test_kinds_are_told_apart(folder: Path) -> None:
    assert kind_of(folder) == kind_of(folder / "global_step5") == "deepspeed"


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    command = (
        f"ulimit -f 1; exec {Path(sys.executable).with_name('uni3d')} import {folder} {tmp_path / 'run'}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert not any((tmp_path / "run").iterdir())
    check("deepspeed_zero1_bf16", imported(folder, tmp_path / "run")["url"], source("x").parents[1])

"""Run `uni3d plan` as a user would: its figures, its proposals and its error messages."""

import json
from pathlib import Path

import pytest
from commands import answer, refused, run

import parallel
from uni3d.estimate.gpt import derive
from uni3d.estimate.memory import Memory
from uni3d.estimate.save import on_paper

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "megatron_gpt" / "configs"


@pytest.mark.slow
def test_it_prints_the_figures_of_a_save() -> None:
    arguments = ["--params", "70e9", "--pp", "8", "--dp", "64", "--tp", "8"]
    row = answer("plan", *arguments, "--bandwidth", "500MB/s")
    figures = on_paper(derive(70_000_000_000), parallel.Ranks(pp=8, dp=64, tp=8, zero=1))
    assert row["parameters"] == figures.parameters
    assert row["files"] == figures.files + figures.documents
    assert row["bytes"] == sum(figures.written)
    assert row["bytes_by_rank"]["max"] == max(figures.written)
    assert row["balance"] == figures.balance
    assert row["manifest_bytes"] == figures.manifest
    assert row["save_seconds"] == figures.save_seconds(5e8, 8, 5000)
    assert row["stall_seconds"] == figures.stall_seconds(1e10)
    lines = run("plan", *arguments).stdout
    for part in ("80 layers", "68,976,648,192 (70,000,000,000 requested)", f"{row['chunks']:,} chunks"):
        assert part in lines
    assert run("plan", "--params", "70B", *arguments[2:]).stdout == lines


def test_it_takes_an_examples_config() -> None:
    config = str(EXAMPLES / "1.3b.json")
    row = answer("plan", config, "--world-size", 16, "--pp", 2, "--zero", 1)
    assert row["ranks"] | {"pp": 2, "dp": 8, "tp": 1, "zero": 1, "total": 16} == row["ranks"]
    training = row["training"]
    assert training["tokens_per_step"] == 512 * 2048
    assert (training["micro_batch"], training["accumulation"]) == (2, 32)
    assert training["bubble"] == pytest.approx(1 / 33)
    assert sum(training["seconds"].values()) == training["step_seconds"]
    assert training["seconds"]["bubble"] > 0
    faster = answer("plan", config, "--world-size", 16, "--pp", 2, "--zero", 1, "--flops", "920TFLOP/s")
    assert faster["training"]["seconds"]["compute"] == pytest.approx(training["seconds"]["compute"] / 2)
    stages = training["memory_by_stage"]
    assert training["worst_stage"] == max(stages, key=lambda stage: stage["bytes"])["stage"]
    assert all(sum(stage[part] for part in Memory._fields) == stage["bytes"] for stage in stages)
    tied = 50304 * 2048  # on both stages
    assert sum(stage["optimizer"] for stage in stages) == row["parameters"] + tied  # 8 bytes on 8 ranks


def test_it_proposes_topologies_or_the_missing_memory() -> None:
    config = str(EXAMPLES / "1.3b.json")
    shown = run("plan", config, "--world-size", 8, "--memory", "40GiB").stdout
    assert "fit in 40.0 GiB per rank, fastest first:" in shown
    row = answer("plan", config, "--world-size", 8, "--memory", "40GiB")
    assert row["fits"]
    first = row["proposals"][0]
    assert f"{first['pp']:>4} {first['dp']:>5} {first['tp']:>3}" in shown
    missed = run("plan", config, "--world-size", 2, "--memory", "1GB")
    assert missed.returncode == 0
    assert "nothing fits in 953.7 MiB per rank." in missed.stdout
    assert "nothing fits in 80 B" in run("plan", config, "--memory", "80").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("CONFIG --params 1e9", "--params and"),
        ("CONFIG --world-size 6 --pp 4", "pp(4) * tp(1) = 4 doesn't divide the world size 6"),
        ("CONFIG --world-size 8 --tp 3 --dp 1 --pp 1", "pp(1) * dp(1) * tp(3) = 3, but the world size is 8"),
        ("CONFIG --world-size 24 --tp 3", "tp(3) doesn't divide the 16 heads"),
        ("CONFIG --seq-len 4096", "seq_len 4096 is more than the 2048 learned positions"),
        ("CONFIG --precision fp8", "--precision fp8 is unknown; give one of fp32, bf16, fp16"),
        ("CONFIG --recompute some", "--recompute some is unknown; give one of none, full, selective"),
        ("CONFIG --device tpu", "--device tpu is unknown; give one of cuda, cpu"),
        ("CONFIG --memory lots", "--memory lots: expected a positive number with a known unit"),
        ("CONFIG --micro-batch 0", "micro-batch 0 must be at least 1"),
        ("nowhere.json", "nowhere.json can't be read"),
        (__file__, "is not JSON"),
        ("--params 70e9 --tp 3", "tp(3) doesn't divide the 64 heads"),
        ("--params 70e9 --tp 16", "tp(16) doesn't divide the 8 kv heads; give another --tp or --kv-heads"),
        ("--params 70e9 --pp 84", "a pipeline of 84 stages needs at least 84 layers, but the model has 83"),
        ("--params 70e9 --dp 0", "dp(0) must be at least 1"),
        ("--params 70e9 --zero 4", "ZeRO stage 4 doesn't exist"),
        ("--params 70e9 --layers 0", "--layers 0 must be at least 1"),
        ("--params 70e9 --layers 4 --hidden 64 --ffn 64", "more than 2% off --params 70,000,000,000"),
        ("--params 1e5", "change --params, --vocab or the sizes that you gave"),
        ("--params seventy", "--params seventy: expected a positive number"),
        ("--params 70e9 --hidden 8192 --heads 60", "60 heads don't divide --hidden 8192"),
        ("--layers 4", "give --params, or the shape"),
        ("--params 70e9 --bandwidth 2Gb/s", "e.g. 2GB/s or 500MiB/s"),
        ("--params 70e9 --memory-bandwidth 0", "--memory-bandwidth 0: expected a positive number"),
        ("--params 70e9 --file-rate 0", "--file-rate 0: expected a positive number"),
        ("--params 70e9 --ranks-per-node 0", "--ranks-per-node 0 must be at least 1"),
        ("--params 70e9 --states fp32,fp32", "must be distinct names"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(arguments: str, message: str) -> None:
    assert message in refused("plan", *arguments.replace("CONFIG", str(EXAMPLES / "1.3b.json")).split())


def test_an_invalid_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    settings = {"train_batch_size": 1}
    for document, message in [
        ({"model": {}, "uni3d": {}}, "seq_len is missing"),
        ({"model": {"hiden_size": 3}, "seq_len": 8, "uni3d": settings}, "model.hiden_size isn't"),
        ({"model": {"norm": "batchnorm"}, "seq_len": 8, "uni3d": settings}, "model.norm is 'batchnorm'"),
        ({"model": {"hidden_size": "a"}, "seq_len": 8, "uni3d": settings}, "expected a whole number"),
        ({"model": {}, "seq_len": 8, "uni3d": {"train_batch_sise": 1}}, "did you mean"),
    ]:
        path.write_text(json.dumps(document))
        assert message in refused("plan", path)

"""Compare the doctor's verdicts with real engines, which resume or refuse."""

import warnings
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from marks import matrix, slow
from model import GPT, GPTConfig
from models import ADAM, OwnLoss, Stack, global_batches, make_engine, save_and_wait, seeded, train
from ranks import Ranks
from tied_gpt import TIED, gpt_engine
from torch import nn

import ckpt
from ckpt.array_files import file_grid
from ckpt.parts import ArrayInfo
from parallel.tensor import check_plan, expand_plan
from uni3d.checkpoint.model_spec import declared
from uni3d.config import load_config
from uni3d.doctor import examine
from uni3d.doctor.checks import judged
from uni3d.doctor.topologies import Asked
from uni3d.estimate.saved import SavedModel
from uni3d.manifest import ModelRecord, RunManifest

# --- topologies ----------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"train_batch_size": 6, "train_micro_batch_size_per_gpu": 1}


def build(model: str, config: dict[str, Any]) -> Any:
    """Make an engine on this rank, with a global batch of 12 for the GPT and of 6 for others."""
    if model == "gpt":
        return gpt_engine(1, 1, 1, 0, **config)
    kinds: dict[str, Any] = {"own": seeded(OwnLoss), "short": seeded(Stack, 2)}
    return make_engine(kinds[model], config=SMALL | config)


def save_case(model: str, run: str) -> None:
    engine = build(model, {})
    if model == "gpt":
        engine.train_batch()
    else:
        train(engine, global_batches(1, 6))
    save_and_wait(engine, run)


def resume_case(model: str, run: str, configs: list[dict[str, Any]]) -> list[str | None]:
    """Return for each config why no engine can be made that resumes the run, or None if one can."""
    found: list[str | None] = []
    for config in configs:
        parts = config | {"parallel": {**config["parallel"], "device": "cpu"}}
        try:
            engine = build(model, parts)
            engine.resume(run)
        except (ValueError, ckpt.CheckpointError) as error:
            found.append(str(error))
            continue
        assert engine.global_steps == 1
        found.append(None)
    return found


@pytest.mark.parametrize(
    "model",
    [slow("own"), matrix("short"), matrix("gpt")],
)
def test_topologies_are_those_of_real_engines(ranks: Ranks, tmp_path: Path, model: str) -> None:
    """Try all topologies of up to four ranks, with the doctor's config if it gives one."""
    ranks.run(1, save_case, model, str(tmp_path))
    reasons = []
    for world in (1, 2, 3, 4):
        splits = [s for s in product(range(1, 5), repeat=3) if s[0] * s[1] * s[2] == world]
        configs, told = [], []
        for i, (pp, dp, tp) in enumerate(splits):
            asked = Asked(world=world, pp=pp, dp=dp, tp=tp, zero=i % 4)
            report = examine(str(tmp_path), None, asked, None, None)
            told.append(report["would_resume"])
            reasons += [reason["why"] for reason in report["refused"]]
            usual: dict[str, Any] = {"parallel": {"pp": pp, "dp": dp, "tp": tp}}
            config = report["recommended"]["config"] if report["recommended"] else usual
            share = max(1, report["train_batch_size"] // dp)
            batch = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": share}
            configs.append(config | batch)
        for found in ranks.run(world, resume_case, model, str(tmp_path), configs):
            assert [error is None for error in found] == told, list(zip(splits, found, strict=True))
        everything = examine(str(tmp_path), None, Asked(world=world), None, None)
        assert [(t["pp"], t["dp"], t["tp"]) for t in everything["topologies"]] == [
            split for split in sorted(splits, key=lambda s: (s[2], s[0])) if told[splits.index(split)]
        ]
    expected = {
        "gpt": "doesn't divide the 26 features of layers.0.ffn.gate (colwise)",
        "own": "doesn't divide the global batch of 6",
        "short": "needs more layers than the 3 pipeline_layers of Stack",
    }[model]
    assert expected in reasons


# --- tensor parallelism, from names and shapes alone ------------------------------------------------------


WIDE = {"hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "tied_head": False}


@pytest.mark.parametrize(
    "options", [{}, {"positions": "learned", "num_kv_heads": 1}, {"ffn_size": 30}], ids=str
)
def test_which_tp_a_model_takes(options: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = GPT(GPTConfig(**(TIED | WIDE | options)))
    compare_degrees(model)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.ones(2, 24, 8))
        self.down_proj = nn.Parameter(torch.ones(2, 8, 12))


class Attention(nn.Module):
    head_dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(8, 12), nn.Linear(12, 8)


class Mixture(nn.Module):
    """Model in the style of Hugging Face: heads by `head_dim`, stacked experts."""

    tp_plan = {  # noqa: RUF012 - as models declare it
        "experts": "moe_tp_experts",
        "experts.gate_up_proj": "packed_colwise",
        "experts.down_proj": "rowwise",
        "attn.q": "colwise",
        "attn.o": "rowwise",
    }

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.attn = Experts(), Attention()


class Odd(Mixture):
    tp_plan = Mixture.tp_plan | {"attn": "colwise"}


class Fused(nn.Module):
    """Model with fused projections, declared and not, and a norm with a row for each head."""

    tp_plan = {"qkv": "colwise", "o": "rowwise", "up": "packed_colwise", "q": "colwise"}  # noqa: RUF012
    tp_parts = {"qkv": [16, 8, 8]}  # noqa: RUF012
    head_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 32), nn.Linear(16, 8)
        self.up, self.q, self.norm = nn.Linear(8, 24), nn.Linear(8, 16), Rows()


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


class Undeclared(Fused):
    tp_parts = {}  # noqa: RUF012


@pytest.mark.parametrize("kind", [Mixture, Odd, Fused, Undeclared])
def test_which_tp_others_take(kind: type[nn.Module]) -> None:
    compare_degrees(kind())


def compare_degrees(model: Any) -> None:
    """Check that the doctor accepts the degrees that `parallel` accepts."""
    parameters = dict(model.named_parameters())
    keys = {name: ckpt.ArrayKey(name, "fp32") for name in parameters}
    arrays: Any = {keys[name]: array_info(keys[name], tuple(p.shape)) for name, p in parameters.items()}
    said = {"declared": declared(model), "parameters": {n: {"requires_grad": True} for n in parameters}}
    source = SavedModel(arrays, RunManifest.read({"model": said}))
    refused = {}
    for degree in range(2, 14):
        try:
            parts = getattr(model, "tp_parts", {})
            plan = expand_plan(model, model.tp_plan, parts)
            check_plan(model, plan, getattr(model, "tp_units", {}), degree, parts=parts)
        except ValueError as error:
            refused[degree] = str(error)
    told = {degree: why for degree in range(2, 14) if (why := source.refuses_tp(degree))}
    assert told.keys() == refused.keys()
    for degree, why in told.items():
        assert why in refused[degree] or "tp_refused" in said["declared"]


def array_info(key: ckpt.ArrayKey, shape: tuple[int, ...]) -> ArrayInfo:
    return ArrayInfo(key, "float32", file_grid(shape, shape, shape, 4), np.zeros(1, np.uint32))


def test_a_style_of_a_later_release() -> None:
    key = ckpt.ArrayKey("a.weight", "fp32")
    arrays: Any = {key: array_info(key, (4,))}
    declares = ModelRecord(declared={"tp_plan": {"a": "diagonal"}})
    source = SavedModel(arrays, RunManifest(model=declares))
    assert source.refuses_tp(1) is None
    why = "needs the style 'diagonal' of the tp_plan for a, which is unknown here"
    assert source.refuses_tp(2) == source.untold_tp() == why


# --- configs ---------------------------------------------------------------------------------------------

SCHEDULE = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_num_steps": 4}}
FASTER = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.5, "warmup_num_steps": 4}}
SGD = {"type": "SGD", "params": {"lr": 0.02}}
MOMENTUM = {"type": "SGD", "params": {"lr": 0.02, "momentum": 0.9}}


def adam(**params: Any) -> dict[str, Any]:
    return {"optimizer": {**ADAM, "params": {**ADAM["params"], **params}}}


CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    # config of the checkpoint's run, config of the resuming run, number of refusals, number of warnings
    "same": ({}, {}, 0, 0),
    "another optimizer": ({}, {"optimizer": SGD}, 1, 0),
    "adam that decays apart": ({}, {"optimizer": {**ADAM, "type": "Adam"}}, 0, 0),
    "adam that doesn't": (
        {},
        {"optimizer": {"type": "Adam", "params": {**ADAM["params"], "adam_w_mode": False}}},
        1,
        0,
    ),
    "another moment": ({}, adam(amsgrad=True), 1, 0),
    "a moment less": (adam(amsgrad=True), {}, 1, 0),
    "momentum": ({"optimizer": SGD}, {"optimizer": MOMENTUM}, 0, 1),
    "no momentum": ({"optimizer": MOMENTUM}, {"optimizer": SGD}, 1, 0),
    "lion": ({"optimizer": {"type": "Lion"}}, {"optimizer": {"type": "Lion"}}, 0, 0),
    "muon": ({"optimizer": {"type": "Muon"}}, {"optimizer": {"type": "Muon"}}, 0, 0),
    "another decay": ({}, adam(weight_decay=0.2), 0, 1),
    "betas": ({}, adam(betas=[0.8, 0.9]), 0, 1),
    "another rate": ({}, adam(lr=0.5), 0, 1),
    "a schedule": ({}, {"scheduler": SCHEDULE}, 1, 0),
    "no schedule": ({"scheduler": SCHEDULE}, {}, 0, 1),
    "the same schedule": ({"scheduler": SCHEDULE}, {"scheduler": SCHEDULE}, 0, 0),
    "a schedule of another rate": ({"scheduler": SCHEDULE}, {"scheduler": FASTER}, 1, 0),
    "the same, accepted": (
        {"scheduler": SCHEDULE},
        {"scheduler": FASTER, "checkpoint": {"accept_changes": ["scheduler"]}},
        0,
        1,
    ),
    "another seed": ({}, {"seed": 1}, 0, 1),
    "another batch": ({}, {"train_batch_size": 6, "train_micro_batch_size_per_gpu": 3}, 0, 1),
    "fp16": ({}, {"fp16": {"enabled": True}}, 0, 1),
    "no fp16 any more": ({"fp16": {"enabled": True}}, {}, 0, 1),
}


def outcome(run: Path, config: dict[str, Any]) -> tuple[str | None, list[str]]:
    """Return a real engine's refusal of the checkpoint, or its warnings."""
    engine = make_engine(seeded(Stack), config=config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            engine.load_checkpoint(run)
        except ckpt.CheckpointError as error:
            return str(error), []
    texts = [str(warning.message) for warning in caught if str(run) in str(warning.message)]
    return None, [part for text in texts for part in text.split("; ")]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("case", CONFIGS)
def test_configs_are_judged_as_an_engine_judges_them(tmp_path: Path, case: str) -> None:
    before, after, refusals, warned = CONFIGS[case]
    engine = make_engine(seeded(Stack), config=before)
    train(engine, global_batches(1))
    save_and_wait(engine, tmp_path)
    checkpoint = ckpt.open_checkpoint(tmp_path)
    manifest = RunManifest.of(checkpoint)
    values = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 3, "optimizer": ADAM} | after
    config = load_config(values)
    refused, told = outcome(tmp_path, after)
    assert (refused is not None, bool(told)) == (refusals, warned), (refused, told)
    judgement = judged(manifest, config, checkpoint)
    assert len(judgement.refusals) == refusals
    if not refusals:
        assert len(judgement.changes) == warned
    assert judged(manifest, None, checkpoint) == ([], [])


@pytest.mark.usefixtures("alone")
def test_frozen_parameters_that_were_left_out(tmp_path: Path) -> None:
    engine = make_engine(seeded(OwnLoss))
    save_and_wait(engine, tmp_path, exclude_frozen_parameters=True)
    with pytest.raises(ckpt.CheckpointError, match="2 missing in the checkpoint"):
        engine.load_checkpoint(tmp_path)
    checkpoint = ckpt.open_checkpoint(tmp_path)
    (why,), _ = judged(RunManifest.of(checkpoint), None, checkpoint)
    assert why.startswith("2 frozen parameters were left out of it (fixed.weight, ...); load it with")

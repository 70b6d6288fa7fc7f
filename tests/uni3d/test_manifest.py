"""The run's part of a manifest: written and read back, with keys missing, and with values of wrong types."""

import json
from typing import Any

import pytest

import ckpt
from uni3d.manifest import SCRIPT, EngineRecord, ModelRecord, OptimizerRecord, RunManifest, WriterRecord

STAGE = RunManifest(
    step=3,
    run_id="4f1c",
    writer=WriterRecord(
        torch="2.11.0",
        topology={"pp": 2, "dp": 1, "tp": 1},
        zero_stage=1,
        shard_group=1,
        layers=[["a"], ["b"]],
    ),
    model=ModelRecord(
        requires_grad={"a.w": True},
        buffers=["a.x"],
        left_out=["a.f"],
        declared={"class": "M"},
        extra_state={"a._extra_state": {"value": [None], "tensors": {"/0": "cpu"}}},
    ),
    optimizer=OptimizerRecord(
        type="AdamW",
        groups=[{"params": ["a.w"], "lr": 0.1}],
        scalars={"a.w": {"step": 3.0}},
        extra_state={"value": {}, "tensors": {}},
    ),
    aliases={"b.tied": "a.w"},
    scheduler={"last_epoch": 3},
    schedule={"type": "WarmupLR", "params": {}},
    engine=EngineRecord(
        global_steps=3,
        global_samples=36,
        loss_scale={"scale": 2.0},
        seed=1,
        train_batch_size=12,
        dataset_length=100,
        sample_order=1,
    ),
    client_state={"epoch": 1},
)
IMPORT = RunManifest(
    step=3,
    writer=WriterRecord(
        topology={"pp": 1, "dp": 1, "tp": 1}, zero_stage=0, imported={"from": "deepspeed", "zero_stage": 2}
    ),
    engine=EngineRecord(global_steps=3, global_samples=0),
)


SEVERAL = RunManifest(
    optimizer=OptimizerRecord(
        type="Muon + AdamW",
        groups=[{"params": ["a.w"], "lr": 0.1}, {"params": ["a.b"], "lr": 0.2}],
        scalars={"a.b": {"step": 3.0}},
        members=[
            {"name": "muon", "type": "Muon", "groups": 1},
            {"name": "0", "type": "AdamW", "groups": 1},
        ],
    )
)


@pytest.mark.parametrize("manifest", [STAGE, IMPORT, SEVERAL])
def test_round_trip(manifest: RunManifest) -> None:
    assert RunManifest.read(json.loads(json.dumps(manifest.document()))) == manifest


def test_the_keys_of_the_file() -> None:
    """Check the keys: ordered as in docs/format.md, and without those that an import doesn't know."""
    saved, imported = STAGE.document(), IMPORT.document()
    top = "step created writer model optimizer aliases scheduler engine client_state"
    assert list(imported) == top.split()
    top = top.replace("created", "created run_id").replace("scheduler", "scheduler schedule")
    assert list(saved) == top.split()
    assert list(saved["writer"]) == ["uni3d", "torch", "topology", "zero_stage", "shard_group", "layers"]
    assert list(imported["writer"]) == ["uni3d", "topology", "zero_stage", "imported"]
    assert list(saved["model"]) == ["parameters", "buffers", "left_out", "extra_state", "declared"]
    assert list(saved["optimizer"]) == ["type", "groups", "scalars", "extra_state"]
    assert list(imported["model"]) == ["parameters", "buffers"]
    counters = ["global_steps", "global_samples", "skipped_steps", "loss_scale"]
    order = ["seed", "train_batch_size", "dataset_length", "sample_order"]
    assert list(saved["engine"]) == [*counters, *order]
    assert list(imported["engine"]) == counters
    assert SCRIPT.is_file()


def test_stages_are_merged() -> None:
    other = RunManifest(
        model=ModelRecord(
            requires_grad={"b.w": False},
            buffers=["b.x"],
            left_out=["a.f", "b.f"],
            extra_state={"b._extra_state": {"value": 1, "tensors": {}}},
        ),
        optimizer=OptimizerRecord(
            type="AdamW", groups=[{"params": ["a.w", "b.w"], "lr": 0.1}], scalars={"b.w": {"step": 3.0}}
        ),
    )
    whole = STAGE.merged([other])
    assert whole.model.requires_grad == {"a.w": True, "b.w": False}
    assert (whole.model.buffers, whole.model.left_out) == (["a.x", "b.x"], ["a.f", "b.f"])
    assert [*whole.model.extra_state] == ["a._extra_state", "b._extra_state"]
    assert whole.optimizer.groups == [{"params": ["a.w", "b.w"], "lr": 0.1}]
    assert whole.optimizer.scalars.keys() == {"a.w", "b.w"}
    differs = OptimizerRecord(type="AdamW", groups=[{"params": [], "lr": 0.2}], scalars={})
    with pytest.raises(ckpt.CheckpointError, match="group 0 has different hyperparameters on two"):
        STAGE.merged([RunManifest(optimizer=differs)])


def test_members_have_all_groups() -> None:
    document = SEVERAL.document()
    document["optimizer"]["members"] = document["optimizer"]["members"][:1]
    with pytest.raises(ckpt.CheckpointError, match="members have 1 of 2 groups; use another tag"):
        RunManifest.read(document)


def test_stages_have_the_same_optimizers() -> None:
    one = OptimizerRecord(type="AdamW", groups=[{"params": [], "lr": 0.2}], scalars={})
    with pytest.raises(
        ckpt.CheckpointError, match="two pipeline stages have different optimizers: muon: Muon"
    ):
        SEVERAL.merged([RunManifest(optimizer=one)])


@pytest.mark.parametrize("document", [{}, dict.fromkeys(STAGE.document())])
def test_missing_keys(document: dict[str, Any]) -> None:
    manifest = RunManifest.read(document)
    assert (manifest.step, manifest.created, manifest.optimizer, manifest.scheduler) == (None,) * 4
    assert (manifest.written_on, manifest.imported_from, manifest.zero_so_far) == (None, None, 0)
    assert manifest.engine == EngineRecord()
    assert manifest.model == ModelRecord()
    assert manifest.model.trains("a.w")
    assert (manifest.aliases, manifest.client_state) == ({}, {})


def test_the_topology_that_wrote_it() -> None:
    assert str(STAGE.written_on) == "pp2 dp1 tp1 zero1"
    assert (IMPORT.written_on, IMPORT.imported_from, IMPORT.zero_so_far) == (None, "deepspeed", 2)
    partial = RunManifest.read({"writer": {"topology": {"pp": 2}, "zero_stage": 1}})
    assert (partial.written_on, partial.zero_so_far) == (None, 1)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"step": "3"}, "run/m: step is '3'; expected an integer; use another tag"),
        ({"step": True}, "run/m: step is True; expected an integer"),
        ({"engine": []}, r"run/m: engine is \[\]; expected an object"),
        ({"engine": {"global_steps": 1.5}}, "run/m: engine: global_steps is 1.5; expected an integer"),
        ({"aliases": {"a": 1}}, r"run/m: aliases\['a'\] is 1; expected a string"),
        ({"model": {"buffers": [1]}}, r"run/m: model: buffers\[0\] is 1; expected a string"),
        ({"model": {"parameters": {"a": {"requires_grad": 1}}}}, r"parameters\['a'\]: requires_grad is 1"),
        ({"optimizer": {"type": "SGD"}}, "run/m: optimizer has no 'groups'"),
        ({"optimizer": {"type": "SGD", "groups": [{}]}}, r"optimizer: groups\[0\] has no 'params'"),
    ],
)
def test_wrong_types(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ckpt.CheckpointError, match=message):
        RunManifest.read(document, "run/m")
